"""Writes synthetic scenes as a shard folder: pictures, captions, questions and the ground truth.

Same arguments, same bytes:
- Each sample has its own random generators, seeded by (seed, split, number). So the number of
  samples and the order of the work do not change a sample.
- The tar has no times or owners.
- PNG files use run lengths only (zlib's Z_RLE), so all variants of zlib compress them alike.
- The manifest has the version of Pillow, because another version may render edges differently.
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
from multimodal.files import local_path
from multimodal.scenes.captions import captions
from multimodal.scenes.questions import questions
from multimodal.scenes.rendering import render
from multimodal.scenes.scene import HELD_OUT, sample_scene

LICENSE = "CC0-1.0"


def make_sample(
    split: str, seed: int, number: int, size: int, captions_each: int, questions_each: int
) -> tuple[str, dict[str, bytes]]:
    """One sample.

    Args:
        split: train, val or heldout. Only scenes of heldout have held-out pairs.
        seed: of the folder.
        number: of the sample in its split.
        size: pixels per side of the picture.
        captions_each: number of captions.
        questions_each: number of questions.

    Returns:
        (key, members). Member "png" is the picture, "json" its record.
    """
    rng = random.Random(f"scenes/{seed}/{split}/{number}")
    scene = sample_scene(rng, held_out=split == "heldout")
    # Separate generators: the number of captions does not change the questions or the scene.
    caption_rng = random.Random(f"captions/{seed}/{split}/{number}")
    question_rng = random.Random(f"questions/{seed}/{split}/{number}")
    record: dict[str, Any] = {
        "captions": captions(scene, caption_rng, captions_each),
        "qa": [list(pair) for pair in questions(scene, question_rng, questions_each)],
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
    """Write a shard folder with the splits train, val and heldout. Same arguments, same bytes.

    Args:
        out: a new or empty folder.
        count: number of training scenes. val and heldout have max(200, count // 20) each.
        seed: at least 0.
        size: pixels per side of a picture.
        captions_each: captions per scene.
        questions_each: questions per scene.
        shard_size: most samples per tar.

    Raises:
        ValueError: if a number is out of range or the folder is not empty.
    """
    if count < 1 or seed < 0 or shard_size < 1:
        raise ValueError(
            f"count {count}, seed {seed}, shard_size {shard_size}: expected count >= 1, seed >= 0, "
            "shard_size >= 1"
        )
    out = local_path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: the folder is not empty. Give a new or empty folder.")
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
