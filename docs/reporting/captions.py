"""Captions of photos that the starter never saw, for people to read: docs/starter_captions.json.

    python -m docs.reporting.captions data/flickr8k

The first thirty photos of val, in the order of the shards: nobody chose them. Greedy. The photos
may not be published, so each is named by its key, which is its file name in Flickr8k.
``python -m docs.reporting`` puts the captions on a page.

A person who looked at the photos may write "judged" beside a caption: right (what is in the middle,
what it does and where), partly, or wrong. A judgement stays as long as the caption does.
"""

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from docs.reporting.results import DOCS
from multimodal import Model, load
from multimodal.data.shards import Shards
from multimodal.eval.evaluate import git_commit
from multimodal.eval.evaluator import Subject, usable_samples
from multimodal.inference.text import caption_codes
from multimodal.model.lessons import descriptions_of
from multimodal.options import TextOptions

COUNT = 30


def read(model: Model, folder: Path, split: str, count: int) -> dict[str, Any]:
    """The first captions, their references, and how they were made."""
    samples = list(islice(usable_samples(Shards(folder, split), print, model), count))
    captions = caption_codes(model, Subject(model, samples).codes)
    options, tokenizer = TextOptions(), model.image_tokenizer
    protocol = {
        "fingerprint": model.fingerprint,
        "data": f"{folder}, split {split}, the first {len(samples)} samples",
        "n": len(samples),
        "image_size": tokenizer.image_size,
        "fit": tokenizer.fit,
        "decoding": f"greedy, at most {options.max_tokens} tokens, no seed",
        "dtype": "float32",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "commit": git_commit(),
    }
    rows = [
        {
            "photo": sample.key,
            "caption": caption.strip(),
            "references": descriptions_of(sample.record),
        }
        for sample, caption in zip(samples, captions, strict=True)
    ]
    return {"protocol": protocol, "captions": rows}


def keep_judgements(rows: list[dict[str, Any]], before: Path) -> None:
    """Put what a person wrote of the same captions of the same photos into the rows."""
    if not before.exists():
        return
    old = json.loads(before.read_text("utf-8"))["captions"]
    judged = {(row["photo"], row["caption"]): row["judged"] for row in old if "judged" in row}
    for row in rows:
        if (word := judged.get((row["photo"], row["caption"]))) is not None:
            row["judged"] = word


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("data", type=Path, help="a shard folder of photos with captions")
    options.add_argument("--model", default="starter")
    options.add_argument("--split", default="val")
    options.add_argument("--count", type=int, default=COUNT)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--out", type=Path, default=DOCS / "starter_captions.json")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    made = read(load(arguments.model), arguments.data, arguments.split, arguments.count)
    keep_judgements(made["captions"], arguments.out)
    arguments.out.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
