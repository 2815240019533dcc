"""Do preferences make captions of photos invent fewer objects, at equal CIDEr?

    python benchmarks/invented_objects.py --data data/flickr8k [--model starter] [--photos 1000]
        [--candidates 6] [--margin 0.2] [--judge objects] [--variants dpo] [--steps 200]
        [--seeds 0] [--out runs/invented-objects]

`multimodal prefer` writes captions of the photos of the split train and judges which objects they
name (``objects``: the F1 by those that the references name). Training is that of preferences.py;
the joint losses beside learn the references. Measured on photos of val, greedy and with five
beams, each against the model before on the same photos, with 95 % intervals of the differences:
invented: the share of named objects that no reference names (CHAIRi, Rohrbach et al. 2018,
    arXiv:1809.02156);
captions_with: the share of captions that name such an object (CHAIRs);
named: objects in a caption, right or not; right: those that a reference names;
CIDEr, words, and the number of distinct captions.

What is done is not done again. The last line is JSON.
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from fits import measured_once
from preferences import BETA, made_pairs, run_all

from multimodal import load
from multimodal.data.objects import named_objects
from multimodal.data.shards import Shards
from multimodal.eval.evaluator import Subject
from multimodal.eval.metrics.captioning import score_captions
from multimodal.inference.text import caption_codes
from multimodal.model.lessons import descriptions_of
from multimodal.options import TextOptions

DECODING = {"greedy": TextOptions(), "beams": TextOptions(beams=5)}
RESAMPLED = 2000
Values = Mapping[str, Sequence[float]]  # one for each photo


def values_of(texts: Sequence[str], references: Sequence[list[str]]) -> dict[str, list[float]]:
    """What is counted in each caption."""
    named = [named_objects(text) for text in texts]
    true = [named_objects(" ".join(each)) for each in references]
    keys = [str(number) for number in range(len(texts))]
    scores = score_captions(
        dict(zip(keys, texts, strict=True)), dict(zip(keys, references, strict=True))
    )
    right = [float(len(each & known)) for each, known in zip(named, true, strict=True)]
    counts = [float(len(each)) for each in named]
    return {
        "named": counts,
        "right": right,
        "captions_with": [float(n > r) for n, r in zip(counts, right, strict=True)],
        "CIDEr": [scores["per_image"][key]["CIDEr"] for key in keys],
        "words": [float(len(text.split())) for text in texts],
    }


def captioned(model: str, data: str, photos: int) -> dict[str, Any]:
    """The captions of photos of val and their values, for each way of decoding."""
    loaded = load(model)
    samples = [s for s in islice(Shards(data, "val"), photos) if descriptions_of(s.record)]
    subject, references = Subject(loaded, samples), [descriptions_of(s.record) for s in samples]
    figures: dict[str, Any] = {}
    for name, options in DECODING.items():

        def write(batch: Sequence[int], options: TextOptions = options) -> list[str]:
            return caption_codes(loaded, subject.codes[list(batch)], options)

        texts = subject.map_batches(range(len(samples)), write)
        figures[name] = {"texts": texts, **values_of(texts, references)}
    return figures


def means(values: Values, photos: Any = slice(None)) -> dict[str, float]:
    """Of some photos. ``invented`` is a share of objects, and not a mean of photos."""
    arrays = {name: np.asarray(each, float)[photos] for name, each in values.items()}
    named, right = arrays["named"].sum(), arrays["right"].sum()
    found = {name: float(each.mean()) for name, each in arrays.items()}
    return {"invented": float((named - right) / max(1, named)), **found}


def summary(after: Values, before: Values) -> dict[str, dict[str, float]]:
    """Means, and the differences to before with intervals (bootstrap over photos)."""
    rng, count = np.random.default_rng(0), len(after["named"])
    draws = [rng.integers(count, size=count) for _ in range(RESAMPLED)]
    resampled = [(means(after, photos), means(before, photos)) for photos in draws]
    old, rows = means(before), {}
    for name, value in means(after).items():
        low, high = np.quantile([new[name] - one[name] for new, one in resampled], (0.025, 0.975))
        change = {"change": value - old[name], "low": float(low), "high": float(high)}
        rows[name] = {"value": value, **change}
    return rows


def row_of(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The summaries of each way of decoding."""
    row: dict[str, Any] = {}
    for name in DECODING:
        values, old = dict(after[name]), dict(before[name])
        texts, _ = values.pop("texts"), old.pop("texts")
        row[name] = {**summary(values, old), "distinct_captions": len(set(texts))}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="a shard folder of photos with captions")
    parser.add_argument("--model", default="starter")
    parser.add_argument("--photos", type=int, default=1000, help="of val")
    parser.add_argument("--candidates", type=int, default=6)
    parser.add_argument("--margin", type=float, default=0.2)
    parser.add_argument("--judge", default="objects")
    parser.add_argument("--variants", nargs="+", choices=BETA, default=["dpo"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate")
    parser.add_argument("--lm-weight", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/invented-objects"))
    options = parser.parse_args()
    pairs = made_pairs(options, "--judge", options.judge, "--margin", options.margin)

    def measure(folder: Path, model: str) -> dict[str, Any]:
        settings = {"model": model, "data": options.data, "photos": options.photos}
        return measured_once(
            folder, "captioned", settings, lambda: captioned(model, options.data, options.photos)
        )

    run_all(options, pairs, "caption", measure, row_of)


if __name__ == "__main__":
    main()
