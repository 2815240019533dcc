"""Images a second of the training loader, of a minimal loop, and of webdataset.

    python benchmarks/loader.py --data data/flickr8k [--image-size 128] [--count 1024]

These take turns in one process with one thread:

- a bare loop that reads the tar, decodes with Pillow, and resizes,
- plain webdataset with the same decoding, into batches with their texts,
- the loader of training, shuffled, over the same images,
- the same over their codes (``multimodal tokenizer encode``).

Then it measures the time and memory before the first sample of 100,000 shards (simulated: their
files are empty), and the memory after each of ten epochs. The last line is JSON.
"""

import argparse
import io
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from multimodal.data.encode import Encoding, encode_shards
from multimodal.data.shards import Shards, index_shard, write_manifest, write_tar
from multimodal.tokenizers.detail import VQTokenizer, VQTokenizerConfig
from multimodal.tokenizers.image import ImageTokenizer
from multimodal.train.data import GlobalBatchLoader
from multimodal.train.examples import ShardDataset
from multimodal.train.sample_order import GlobalBatches, Order

BATCH, ROUNDS = 64, 9  # the best of the rounds counts: other load disturbs it least
MANY = 100_000  # shards of the simulated folder
START_UP = """
import json, re, sys, time
from multimodal.data.shards import Shards
from multimodal.train.sample_order import GlobalBatches, Order

def largest():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

before, start = largest(), time.perf_counter()  # without the imports
shards = Shards(sys.argv[1], "train")
first = next(iter(GlobalBatches(Order([shards.sizes]), 64)))
print(json.dumps({"samples": len(shards), "seconds": time.perf_counter() - start,
                  "megabytes": largest() - before, "megabytes_of_the_process": largest()}))
"""


def pixels(data: bytes, side: int) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB").resize((side, side))


def bare(tars: list[Path], side: int) -> Iterator[object]:
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None and member.name.endswith(("jpg", "png", "webp")):
                    yield pixels(file.read(), side)


def webdataset_loop(tars: list[Path], side: int) -> Iterator[tuple[torch.Tensor, list[object]]]:
    """Batches of images and texts, as training needs them."""
    import webdataset

    dataset = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False)
    samples = ((pixels(s["jpg"], side), json.loads(s["json"])) for s in dataset)
    while batch := list(islice(samples, BATCH)):
        images, texts = zip(*batch, strict=True)
        stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        yield stacked.permute(0, 3, 1, 2).contiguous(), list(texts)


def loader(folder: Path, side: int) -> GlobalBatchLoader:
    shards = [Shards(folder, "train")]
    dataset = ShardDataset(shards, side, "squash", 0)
    return GlobalBatchLoader(dataset, GlobalBatches(Order([shards[0].sizes]), BATCH), 0)


def images_a_second(folders: dict[str, Path], side: int, count: int) -> dict[str, float]:
    tars = sorted(folders["raw"].glob("*.tar"))
    loaders = {name: loader(folder, side) for name, folder in folders.items()}
    in_batches = len(loaders["raw"]) * BATCH
    ways = {
        "bare": lambda: sum(1 for _ in bare(tars, side)),
        "webdataset": lambda: sum(len(images) for images, _ in webdataset_loop(tars, side)),
        **{name: (lambda each=each: sum(map(len, each))) for name, each in loaders.items()},
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            done = way()
            times[name].append((time.perf_counter() - start) / done)
            assert done == (in_batches if name in loaders else count), (name, done)
    return {name: 1 / min(each) for name, each in times.items()}


def start_up(folder: Path) -> dict[str, float]:
    """Of a full manifest whose shards are empty files."""
    digest = "0" * 64
    entries = [
        {
            "name": f"train-{n:06d}.tar",
            "split": "train",
            "samples": 1000,
            "bytes": 0,
            "sha256": digest,
            "index_sha256": digest,
        }
        for n in range(MANY)
    ]
    for entry in entries:
        (folder / str(entry["name"])).touch()
    manifest = {"format": "multimodal-shards", "version": 1, "shards": entries}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), "utf-8")
    command = [sys.executable, "-c", START_UP, str(folder)]
    return json.loads(subprocess.check_output(command, text=True, encoding="utf-8"))


def ten_epochs(folder: Path, side: int) -> list[float]:
    """The peak memory of this process after each epoch, in MiB."""
    batches, largest = loader(folder, side), []
    for epoch in range(10):
        batches.batch_sampler.set_epoch(epoch)
        for _ in batches:
            pass
        largest.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a shard folder with JPEGs")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--count", type=int, default=1024, help="images, in shards of 256")
    arguments = parser.parse_args()
    side, count = arguments.image_size, arguments.count
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        raw, coded, many = (Path(name) / part for part in ("raw", "coded", "many"))
        raw.mkdir()
        many.mkdir()
        samples = list(islice(Shards(arguments.data, "train"), count))
        for start in range(0, count, 256):
            chosen = [(sample.key, sample.members) for sample in samples[start : start + 256]]
            write_tar(raw / f"train-{start // 256:04d}.tar", chosen)
        write_manifest(raw, [index_shard(tar) for tar in sorted(raw.glob("*.tar"))])
        small = {"name": "vit", "dim": 32, "encoder_depth": 0, "decoder_depth": 0, "heads": 2}
        detail = VQTokenizer(VQTokenizerConfig(side, "squash", 16, small)).eval()
        tokenizer = ImageTokenizer(detail=detail)
        encode_shards(raw, coded, tokenizer, Encoding.for_tokenizer(tokenizer))
        speeds = images_a_second({"raw": raw, "codes": coded}, side, count)
        memory = ten_epochs(raw, side)
        figures = {
            "of_the_bare_loop": speeds["raw"] / speeds["bare"],
            "of_webdataset": speeds["raw"] / speeds["webdataset"],
            "codes_of_raw": speeds["codes"] / speeds["raw"],
            "images_per_second": speeds,
            "start_up": start_up(many),
            "megabytes_after_each_epoch": [round(size) for size in memory],
        }
    print(json.dumps({**figures, "image_size": side, "count": count, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
