"""Do captions get better with the captions of the nearest photos as examples?

    python benchmarks/retrieval.py --data data/flickr8k [--photos 200] [--indexed 1000]
        [--retrieve 1 4] [--model starter] [--out docs/retrieval.json]

Indexes the first photos of the split ``train`` with their captions, and captions the first photos
of the split ``val``, greedy: without an index, with the K nearest photos as examples, and with K
photos of the index drawn at random (what is owed to examples of any kind). CIDEr against all
references, with 95 % intervals over photos (bootstrap, 1,000 times, the photos of each pair of
rows the same). ``first_caption`` is the first caption of the nearest photo as it is: what looking
up alone is worth. The last line is JSON.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from multimodal.api import load
from multimodal.data.shards import Shards
from multimodal.eval.metrics.captioning import score_captions
from multimodal.index.index import Index


def interval(values: list[float], seed: int = 0) -> list[float]:
    """The 95 % interval of the mean over photos."""
    rng, array = np.random.default_rng(seed), np.array(values)
    means = array[rng.integers(len(array), size=(1000, len(array)))].mean(1)
    return [round(float(q), 4) for q in np.quantile(means, [0.025, 0.975])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--indexed", type=int, default=1000)
    parser.add_argument("--retrieve", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    model, options = load(arguments.model), {"max_tokens": 32}
    val, train = Shards(arguments.data, "val"), Shards(arguments.data, "train")
    samples = [val[n] for n in range(min(arguments.photos, len(val)))]
    images = [sample.image for sample in samples]
    references = {sample.key: sample.record["captions"] for sample in samples}
    rows: dict[str, Any] = {}

    def score(name: str, captions: list[str]) -> None:
        scores = score_captions(dict(zip(references, captions, strict=True)), references)
        per_image = [scores["per_image"][key]["CIDEr"] for key in references]
        rows[name] = {
            "CIDEr": round(scores["CIDEr"], 4),
            "interval": interval(per_image),
            "minus_without": [0.0, 0.0],
            "per_image": per_image,
        }
        difference = np.subtract(per_image, rows["without"]["per_image"])
        rows[name]["minus_without"] = interval(difference.tolist())
        print(f"{name}: {rows[name]['CIDEr']} {rows[name]['interval']}, {captions[:2]}", flush=True)

    start = time.process_time()
    score("without", list(model.caption(images, **options)))
    seconds = {"without": time.process_time() - start}
    rng = np.random.default_rng(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        photos = Path(name) / "photos"
        photos.mkdir()
        for number in range(min(arguments.indexed, len(train))):
            sample = train[number]
            (photos / f"{number}.jpg").write_bytes(sample.image)
            (photos / f"{number}.txt").write_text("\n".join(sample.record["captions"]), "utf-8")
        index = Index.open(Path(name) / "index", model, create=True)
        start = time.process_time()
        indexed = index.add(photos).added
        seconds["index"] = time.process_time() - start
        nearest = [hits[0] for hits in index.search_rows(model.embed(images=images), 1)]
        score("first_caption", [hit.captions[0] for hit in nearest])
        for count in arguments.retrieve:
            start = time.process_time()
            found = index.caption_each(images, retrieve=count, **options)
            score(f"nearest {count}", [str(caption) for caption in found])
            seconds[f"nearest {count}"] = time.process_time() - start
            chosen = rng.choice(indexed, count, replace=False)
            examples = [
                (photos / f"{n}.jpg", train[int(n)].record["captions"][0]) for n in chosen.tolist()
            ]
            random = model.caption(images, examples=examples, **options)
            score(f"random {count}", list(random))
    for row in rows.values():
        del row["per_image"]
    result = {
        "model": model.fingerprint,
        "photos": len(samples),
        "indexed": indexed,
        "seed": arguments.seed,
        "cpu_seconds": {name: round(value, 1) for name, value in seconds.items()},
        "rows": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
