"""Are the photos that the starter is shown with copies of its training photos?

    python -m docs.reporting.copies data/flickr8k data/imagenet_1k_sample data/tiny_imagenet \\
        data/caltech101 data/fashion_products data/grocery_store

Writes docs/starter_copies.json. Two sets of photos are compared with all pictures of the split
train of the folders: the photos of scikit-image that the demo and docs/strip.png show, and the
split val of the first folder. Each photo is compared in two ways.

- By its perceptual hash: all training pictures whose hash is near are correlated with the photo
  (``multimodal.data.near_duplicates``).
- By the features of the starter's frozen encoder: the nearest training picture is correlated with
  the photo, however far its hash is. A strong crop changes the hash, and hardly the features. The
  largest cosine is written too, for a mirrored copy does not correlate.

A pair that correlates enough counts as a copy. It may be two photos of one moment: look at them.
Only keys of photos are written, and numbers.

Shapes: M training pictures, V views of a picture, D features.
"""

import argparse
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from docs.reporting.results import DOCS
from multimodal import Model, load
from multimodal.commands.vectors.search import default_cache
from multimodal.data.near_duplicates import (
    MAX_HASH_DISTANCE,
    MIN_SIMILARITY,
    ImageHash,
    hash_image,
    picture_similarity,
)
from multimodal.data.samples import Sample
from multimodal.data.shards import Shards
from multimodal.eval.demo import PHOTOS, photo
from multimodal.eval.evaluate import git_commit
from multimodal.eval.evaluator import Subject
from multimodal.eval.tasks.captioning import encoder_features, meaning_encoder

SHOWN = 5  # pairs of val that are written, the most similar ones


@dataclass
class Pictures:
    """Pictures to compare. names: FOLDER:KEY. features: float32[M, D] of unit norm, or NaN."""

    names: list[str]
    hashes: list[ImageHash]
    features: Tensor

    @property
    def views(self) -> NDArray[np.uint64]:
        """uint64[M, V]."""
        return np.stack([each.views for each in self.hashes])

    def __add__(self, other: "Pictures") -> "Pictures":
        features = torch.cat([self.features, other.features])
        return Pictures(self.names + other.names, self.hashes + other.hashes, features)


def read_pictures(
    name: str, samples: Sequence[Sample] | Shards, features_of: Callable[[Any, list[int]], Tensor]
) -> Pictures:
    """Hash pictures, and read their features. What cannot be read is left out.

    Args:
        name: of their folder.
        samples: of one picture each.
        features_of: samples and M numbers of them -> float32[M, D].
    """
    rows, hashes, names = list[int](), list[ImageHash](), list[str]()
    for row in tqdm(range(len(samples)), name, file=sys.stderr, disable=None):
        sample = samples[row]
        try:
            hashes.append(hash_image(sample.image, sample.key))
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        rows.append(row)
        names.append(f"{name}:{sample.key}")
    return Pictures(names, hashes, nn.functional.normalize(features_of(samples, rows)))


def hash_distances(image: ImageHash, views: NDArray[np.uint64]) -> NDArray[np.int64]:
    """int64[M]: bits that differ, of the picture and the views of the others, or the reverse."""
    whole = np.bitwise_count(views ^ image.views[0]).min(1)
    return np.minimum(whole, np.bitwise_count(views[:, :1] ^ image.views).min(1)).astype(np.int64)


def compare(photos: Pictures, training: Pictures) -> list[dict[str, Any]]:
    """Of each photo the nearest training pictures, by hash and by features."""
    views, rows = training.views, list[dict[str, Any]]()
    cosines = torch.nan_to_num(photos.features @ training.features.T, nan=-1.0)
    exact = {each.exact for each in training.hashes}
    for number, image in enumerate(tqdm(photos.hashes, "compared", file=sys.stderr, disable=None)):
        bits = hash_distances(image, views)
        near = np.flatnonzero(bits <= MAX_HASH_DISTANCE).tolist()
        by_features = int(cosines[number].argmax())
        alike = {
            row: picture_similarity(image, training.hashes[row]) for row in {*near, by_features}
        }
        best = max(alike, key=lambda row: alike[row])
        rows.append(
            {
                "photo": photos.names[number],
                "is_copy": image.exact in exact or alike[best] >= MIN_SIMILARITY,
                "hash_bits": int(bits.min()),
                "candidates": len(near),
                "correlation": round(alike[best], 3),
                "with": training.names[best],
                "nearest_by_features": training.names[by_features],
                "cosine": round(float(cosines[number, by_features]), 3),
            }
        )
    return rows


def summary(rows: list[dict[str, Any]], shown: int = SHOWN) -> dict[str, Any]:
    """How many of the photos are copies, and the pairs that are most alike."""
    ranked = sorted(rows, key=lambda row: (-row["correlation"], row["photo"]))
    copies = [row for row in ranked if row["is_copy"]]
    return {
        "n": len(rows),
        "copies": len(copies),
        "largest_correlation": ranked[0]["correlation"],
        "largest_cosine": max(row["cosine"] for row in rows),
        "most_alike": copies + [row for row in ranked if not row["is_copy"]][:shown],
    }


def demo_photos() -> list[Sample]:
    """The photos that the demo shows."""
    samples = []
    for name in PHOTOS:
        file = io.BytesIO()
        photo(name).save(file, "png")
        samples.append(Sample(name, {"png": file.getvalue(), "json": b"{}"}))
    return samples


def measure(model: Model, folders: Sequence[Path], split: str = "val") -> dict[str, Any]:
    """What docs/starter_copies.json has.

    Raises:
        ValueError: if the model has no frozen encoder.
    """
    if (encoder := meaning_encoder(model)) is None:
        raise ValueError("the image tokenizer has no pretrained encoder to compare photos with")
    subject = Subject(model, [], cache=Path(default_cache()))

    def features_of(samples: Any, rows: list[int]) -> Tensor:
        return encoder_features(subject, encoder, samples, rows)

    held_out = read_pictures(str(folders[0]), Shards(folders[0], split), features_of)
    shown = read_pictures("scikit-image", demo_photos(), features_of)
    parts = [read_pictures(str(each), Shards(each, "train"), features_of) for each in folders]
    training = sum(parts[1:], parts[0])
    protocol = {
        "fingerprint": model.fingerprint,
        "training": {str(f): len(part.names) for f, part in zip(folders, parts, strict=True)},
        "hash": f"63 bits of six views, candidates differ in at most {MAX_HASH_DISTANCE}",
        "copy": f"the same pixels, or a correlation of at least {MIN_SIMILARITY}",
        "features": "mean over the grid of the frozen encoder of the image tokenizer, cosine",
        "image_size": model.image_tokenizer.image_size,
        "fit": model.image_tokenizer.fit,
        "seed": "none: nothing is random",
        "commit": git_commit(),
    }
    return {
        "protocol": protocol,
        "demo": {
            "data": "photos of scikit-image that the demo shows",
            **summary(compare(shown, training), len(PHOTOS)),
        },
        "held_out": {
            "data": f"{folders[0]}, split {split}",
            **summary(compare(held_out, training)),
        },
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folders", nargs="+", type=Path, help="what the starter was trained on")
    options.add_argument("--model", default="starter")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--out", type=Path, default=DOCS / "starter_copies.json")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    found = measure(load(arguments.model), arguments.folders)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
