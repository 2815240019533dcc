"""What each objective gives and costs: language modelling alone, and with the other objectives.

    python benchmarks/objectives.py --data data/scenes [--tokenizers starter] [--steps 400]
        [--seeds 0 1 2] [--score data/scenes] [--out runs/objectives]

Every row trains a `mini` from random weights on about the same number of tokens: of each sample the
caption after the image, the caption alone, and in half of the draws the image after the caption,
code by code. Reconstruction adds masked images in three tenths of the draws. Measured on val are
greedy captions (claims of scenes are checked by program, photos have CIDEr), the recall at 10 among
up to 1,000 images, and 200 drawings of scenes. If --data holds codes (``multimodal tokenizer
encode``), --score names the folder of images. A row that is done is not done again. Writes
``table.md`` and ``table.json``. The last line is JSON.
"""

import argparse
import json
import math
import statistics
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from fits import fit, last_figures, markdown, score_captions, score_drawings

from multimodal import load
from multimodal.api import Model
from multimodal.data.shards import Shards
from multimodal.eval.metrics.retrieval import score_retrieval
from multimodal.hub.names import part_of
from multimodal.inference.codec import encode_images, read_images
from multimodal.inference.embedding import embed_codes, embed_texts
from multimodal.tokenizers.image import load_image_tokenizer

TEXT_TOKENS = 20  # of a caption, about
CANDIDATES = 1000  # images to search in
LEARNED = {
    "val/CIDEr": "CIDEr",
    "val/caption": "caption_nats",
    "val/image": "image_nats",
    "val/reconstruct": "reconstruct_nats",
}
READ_OF_MASKED = 1 - 1 / math.pi  # mean share of the codes of a masked image (``random_mask``)
ROWS: dict[str, dict[str, Any]] = {
    "LM": {"alignment_weight": 0.0, "reconstruct_share": 0.0},
    "LM + alignment": {"reconstruct_share": 0.0},
    "LM + reconstruction": {"alignment_weight": 0.0, "reconstruct_share": 0.3},
    "all three": {"reconstruct_share": 0.3},
}


def steps_of_equal_tokens(steps: int, codes: int, reconstruct_share: float) -> int:
    """``steps`` is what rows without reconstruction get."""
    plain = codes + TEXT_TOKENS + TEXT_TOKENS + 0.5 * codes
    return round(steps * plain / (plain + reconstruct_share * READ_OF_MASKED * codes))


def recall(model: Model, data: str) -> dict[str, float]:
    samples = list(islice(Shards(data, "val"), CANDIDATES))
    pixels = read_images(model, [sample.image for sample in samples])
    images = torch.cat([embed_codes(model, encode_images(model, p)) for p in pixels.split(50)])
    owners = [n for n, sample in enumerate(samples) for _ in sample.record["captions"]]
    texts = [text for sample in samples for text in sample.record["captions"]]
    rows = torch.cat([embed_texts(model, texts[i : i + 64]) for i in range(0, len(texts), 64)])
    return score_retrieval(images, rows, owners)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a shard folder, of images or of codes")
    parser.add_argument("--score", help="the same as images (default: --data)")
    parser.add_argument("--tokenizers", default="starter", help="of this model")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    score = arguments.score or arguments.data
    tokenizer = load_image_tokenizer(part_of(arguments.tokenizers, "image_tokenizer"))
    codes = tokenizer.codes_per_image
    of_scenes = "scene" in next(iter(Shards(score, "val"))).record
    table = []
    for name, goals in ROWS.items():
        results: list[dict[str, float]] = []
        for seed in arguments.seeds:
            folder = arguments.out / f"{name.replace(' ', '-').replace('+', 'and')}-{seed}"
            module = {
                "text_tokenizer": arguments.tokenizers,
                "size": "mini",
                "image_tokenizer": arguments.tokenizers,
                "row_length": 3 * codes,
                "objectives": {"next_token_share": 0.5, **goals},
                "question_share": 0.0,
                "learning_rate": 4e-3,
                "answers_in_validation": 0,
                "drawings_in_validation": 0,
            }
            data = {
                "folders": [arguments.data],
                "global_batch_size": 32,
                "val_limit": 256,
                "seed": seed,
            }
            steps = steps_of_equal_tokens(arguments.steps, codes, goals["reconstruct_share"])
            fit(folder, "joint.JointModule", module, data, steps, seed)
            learned, model = last_figures(folder), load(folder / "model")
            scores = {key: learned[name] for name, key in LEARNED.items() if name in learned}
            if of_scenes:
                captions = score_captions(model, score)
                scores["claims_true"] = captions["attribute_precision"]
                scores["objects_said"] = captions["object_recall"]
                scores["objects_drawn"] = score_drawings(model, score)["objects"]
            if of_scenes and goals["reconstruct_share"]:
                scores["objects_drawn_masked"] = score_drawings(model, score, "masked")["objects"]
            if goals.get("alignment_weight", 1.0):
                recalls = recall(model, score)
                scores |= {way: recalls[f"{way}@10"] for way in ("text_to_image", "image_to_text")}
            results.append(scores)
            print(name, seed, json.dumps(scores), flush=True)
        row: dict[str, Any] = {"trained": name}
        for figure in sorted({key for scores in results for key in scores}):
            values = [scores[figure] for scores in results]
            row[figure] = statistics.mean(values)
            row[f"{figure}_spread"] = max(values) - min(values)
        table.append(row)
    columns = dict.fromkeys(key for row in table for key in row if not key.endswith("_spread"))
    (arguments.out / "table.md").write_text(
        markdown([{key: row.get(key, "") for key in columns} for row in table]), "utf-8"
    )
    result = {"steps": arguments.steps, "seeds": arguments.seeds, "rows": table}
    (arguments.out / "table.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
