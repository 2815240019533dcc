"""Captions by llama.cpp, of GGUF files of the model, against our own greedy captions.

    python -m benchmarks.gguf_captions --data data/flickr8k [--model starter] [--photos 100]
        [--dtypes float32 q8_0 q4_k] [--out docs/gguf.json]

Both get the same codes of the first photos of the split ``val``. The last line is JSON: for each
dtype the size of the file, how many captions are equal to ours letter by letter, and CIDEr against
the references. llama.cpp comes by ``pip install llama-cpp-python``.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from multimodal import load
from multimodal.api import Model
from multimodal.data.shards import Shards
from multimodal.eval.metrics.captioning import score_captions
from multimodal.export.gguf import export_gguf
from multimodal.files import write_json
from multimodal.inference.codec import encode_to_read, read_images
from multimodal.model.sequences import describe_prompt

TOKENS = 64


def by_llama_cpp(model: Model, file: Path, prompts: list[list[int]]) -> list[str]:
    from llama_cpp import Llama

    llama: Any = Llama(str(file), n_ctx=1024, logits_all=False, verbose=False)
    texts = model.vocabulary.text_size
    forbidden = dict.fromkeys(range(texts, model.vocabulary.size), float("-inf"))
    del forbidden[model.vocabulary.eos]  # a caption has texts and an end, no codes
    replies = [
        llama.create_completion(each, max_tokens=TOKENS, temperature=0.0, logit_bias=forbidden)
        for each in prompts
    ]
    return [reply["choices"][0]["text"].strip() for reply in replies]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--photos", type=int, default=100)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "q8_0", "q4_k"])
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    model, val = load(arguments.model), Shards(arguments.data, "val")
    samples = [val[number] for number in range(min(arguments.photos, len(val)))]
    references = {sample.key: sample.record["captions"] for sample in samples}
    codes = [
        encode_to_read(model, read_images(model, [sample.image]))[0].tolist() for sample in samples
    ]
    prompts = [describe_prompt(model.vocabulary, each) for each in codes]
    ours = list(model.caption([sample.image for sample in samples], max_tokens=TOKENS))

    def cider(captions: list[str]) -> float:
        scores = score_captions(dict(zip(references, captions, strict=True)), references)
        return round(scores["CIDEr"], 4)

    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in arguments.dtypes:
            file = Path(folder) / f"{dtype}.gguf"
            export_gguf(arguments.model, file, dtype)
            theirs = by_llama_cpp(model, file, prompts)
            rows[dtype] = {
                "megabytes": round(file.stat().st_size / 1e6, 2),
                "equal": sum(one == other for one, other in zip(ours, theirs, strict=True)),
                "CIDEr": cider(theirs),
            }
            print(f"{dtype}: {rows[dtype]}", flush=True)
    result = {
        "benchmark": "gguf",
        "model": arguments.model,
        "fingerprint": model.fingerprint,
        "photos": len(samples),
        "CIDEr": cider(ours),
        "llama_cpp": rows,
    }
    print(json.dumps(result))
    if arguments.out is not None:
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
