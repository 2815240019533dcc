"""Writes synthetic scenes as a shard folder: pictures, captions, questions and the ground truth.

Every sample comes from generators of its own, seeded by (seed, split, number): the first samples of
a folder are the same however many follow, and no order of work can change them. The tar has no
times or owners, and the PNG is compressed with run lengths only (zlib's Z_RLE), which leaves the
variants of zlib nothing to decide. The Pillow version is noted in the manifest, because another
one might draw an edge differently.
"""

import io
import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL
from tqdm import tqdm

from multimodal.data.shards import index_shard, write_manifest, write_tar
from multimodal.scenes.captions import captions, questions
from multimodal.scenes.scene import HELD_OUT, render, sample_scene

LICENSE = "CC0-1.0"


def make_sample(
    split: str, seed: int, number: int, size: int, captions_each: int, questions_each: int
) -> tuple[str, dict[str, bytes]]:
    """(key, members) of one sample: "png" is the picture, size x size pixels, "json" its record."""
    rng = random.Random(f"scenes/{seed}/{split}/{number}")
    scene = sample_scene(rng, held_out=split == "heldout")
    # Words and questions have generators of their own: asking for more changes no other part.
    words = random.Random(f"captions/{seed}/{split}/{number}")
    asked = random.Random(f"questions/{seed}/{split}/{number}")
    record: dict[str, Any] = {
        "captions": captions(scene, words, captions_each),
        "qa": [list(pair) for pair in questions(scene, asked, questions_each)],
        "scene": scene.to_json(),
        "source": "scenes",
        "license": LICENSE,
    }
    picture = io.BytesIO()
    render(scene, size).save(picture, "png", compress_level=9, compress_type=zlib.Z_RLE)
    text = json.dumps(record, separators=(",", ":"))
    return f"scene-{split}-{seed}-{number:07d}", {"png": picture.getvalue(), "json": text.encode()}


def write_scenes(
    out: Path,
    count: int,
    seed: int,
    size: int = 64,
    *,
    captions_each: int = 5,
    questions_each: int = 6,
    shard_size: int = 10_000,
) -> None:
    """Write a shard folder with splits train, val and heldout; same arguments, same bytes.

    Args:
        out: a folder that is not there yet, or is empty.
        count: training scenes; val and heldout have max(200, count // 20) each.
        seed: at least 0.  size: pixels of a side.  shard_size: the most samples in one tar.
    Errors: ``ValueError`` for arguments that cannot be and for a folder that holds something.
    """
    if count < 1 or seed < 0 or shard_size < 1:
        raise ValueError(
            f"count {count}, seed {seed}, shard_size {shard_size}: expected at least 1, 0 and 1"
        )
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: not empty; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    splits = {"train": count, "val": max(200, count // 20), "heldout": max(200, count // 20)}
    entries = []
    with tqdm(total=sum(splits.values()), desc="scenes", unit="scene", disable=None) as progress:

        def samples(split: str, numbers: range) -> Iterator[tuple[str, dict[str, bytes]]]:
            for number in numbers:
                yield make_sample(split, seed, number, size, captions_each, questions_each)
                progress.update()

        for split, total in splits.items():
            for shard, start in enumerate(range(0, total, shard_size)):
                path = out / f"{split}-{shard:04d}.tar"
                write_tar(path, samples(split, range(start, min(start + shard_size, total))))
                entries.append(index_shard(path))
    write_manifest(
        out,
        entries,
        made_by="multimodal.scenes.dataset.write_scenes",
        source="scenes",
        license=LICENSE,
        count=count,
        seed=seed,
        size=size,
        captions_each=captions_each,
        questions_each=questions_each,
        shard_size=shard_size,
        held_out=[f"{colour} {shape}" for colour, shape in HELD_OUT],
        pillow=PIL.__version__,
    )
