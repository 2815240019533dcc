"""The image tokenizer in onnxruntime against ours: codes of photos, and images of those codes.

    python -m benchmarks.onnx_codes --data data/flickr8k [--model starter] [--photos 500]
        [--out docs/onnx.json]

Both get the same pixels of the first photos of the split ``val``, in batches of 10, in float32. The
last line is JSON: the share of codes that are equal, the largest difference between decoded pixels
in [-1, 1], and milliseconds an image of both for encoding and decoding.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from multimodal import load
from multimodal.data.shards import Shards
from multimodal.export.onnx import export_onnx
from multimodal.files import write_json
from multimodal.inference.codec import read_images
from multimodal.memory import keep_freed_memory

BATCH = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--photos", type=int, default=500)
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    keep_freed_memory()
    model, val = load(arguments.model), Shards(arguments.data, "val")
    ours = model.image_tokenizer
    seconds = dict.fromkeys(("encode", "encode_onnx", "decode", "decode_onnx"), 0.0)
    equal, total, difference = 0, 0, 0.0

    def timed(name: str, function: Any, *given: Any) -> Any:
        start = time.perf_counter()
        result = function(*given)
        seconds[name] += time.perf_counter() - start
        return result

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        export_onnx(arguments.model, Path(folder) / "onnx")
        sessions = {
            name: onnxruntime.InferenceSession(f"{folder}/onnx/{name}.onnx")
            for name in ("encode", "decode")
        }
        photos = range(min(arguments.photos, len(val)))
        for first in photos[::BATCH]:
            pixels = read_images(model, [val[n].image for n in photos[first : first + BATCH]])
            codes = timed("encode", ours.encode, pixels)
            (theirs,) = timed(
                "encode_onnx", sessions["encode"].run, None, {"images": pixels.numpy()}
            )
            equal, total = equal + int((codes.numpy() == theirs).sum()), total + codes.numel()
            drawn = timed("decode", ours.decode, codes)
            (again,) = timed("decode_onnx", sessions["decode"].run, None, {"codes": codes.numpy()})
            difference = max(difference, float((drawn - torch.from_numpy(again)).abs().max()))
    result = {
        "benchmark": "onnx_codes",
        "model": arguments.model,
        "fingerprint": model.fingerprint,
        "photos": len(photos),
        "equal_codes": equal / total,
        "pixels_differ_by": difference,
        **{f"{name}_ms": round(1000 * s / len(photos), 2) for name, s in seconds.items()},
    }
    print(json.dumps(result))
    if arguments.out is not None:
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
