"""A mixture of experts against a dense model, at equal active parameters and equal tokens.

    python benchmarks/experts.py --data data/scenes [--tokenizers starter] [--size mini]
        [--experts 8] [--active 2] [--steps 400] [--seeds 0 1 2] [--out runs/experts]

Each of the experts has the width of the dense MLP over the number of active ones. So a token goes
through as many parameters in both, besides the router. The samples of a seed are the same in both.
Measured on val after the last step are the losses and CIDEr, and over the training the median
tokens in a second: of equal tokens, the inverse of the step time. Give at least 40 steps. A run
that is done is not done again. The last line is JSON.
"""

import argparse
import csv
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from fits import fit, last_figures

from multimodal import load
from multimodal.model.layers.transformer import named_config

MEASURED = {
    "val/total": "total",
    "val/caption": "caption_nats",
    "val/image": "image_nats",
    "val/reconstruct": "reconstruct_nats",
    "val/CIDEr": "CIDEr",
    "val/router_balance": "router_balance",
    "val/experts/text": "experts_of_text",
    "val/experts/image": "experts_of_images",
    "val/experts/shared": "experts_shared",
}


def speed(folder: Path) -> float:
    """The median of the logged tokens in a second."""
    with open(folder / "logs/metrics.csv", newline="", encoding="utf-8") as file:
        return statistics.median(
            float(row["tokens/s"]) for row in csv.DictReader(file) if row.get("tokens/s")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a shard folder, of images or of codes")
    parser.add_argument("--tokenizers", default="starter", help="of this model")
    parser.add_argument("--size", default="mini", help="of the dense model")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--active", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--captions", type=int, default=200, help="for CIDEr")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/experts"))
    arguments = parser.parse_args()
    width = named_config(arguments.size, 1).intermediate_size
    if width % arguments.active:
        parser.error(f"--active {arguments.active}: does not divide the MLP's width, {width}")
    experts = {
        "num_experts": arguments.experts,
        "num_experts_per_tok": arguments.active,
        "moe_intermediate_size": width // arguments.active,
        "norm_topk_prob": arguments.active > 1,  # the weight of one expert would always be 1
    }
    rows: dict[str, dict[str, Any]] = {}
    for name, more in (("dense", {}), ("experts", {"experts": experts})):
        results: list[dict[str, float]] = []
        for seed in arguments.seeds:
            folder = arguments.out / f"{name}-{seed}"
            module = {
                "text_tokenizer": arguments.tokenizers,
                "image_tokenizer": arguments.tokenizers,
                "size": arguments.size,
                "learning_rate": 4e-3,
                "warmup_steps": min(100, arguments.steps // 10),
                "captions_in_validation": arguments.captions,
                "answers_in_validation": 0,
                "drawings_in_validation": 0,
                **more,
            }
            data = {
                "folders": [arguments.data],
                "global_batch_size": arguments.batch,
                "val_limit": 256,
                "seed": seed,
            }
            fit(folder, "joint.JointModule", module, data, arguments.steps, seed)
            figures, transformer = last_figures(folder), load(folder / "model").network.transformer
            results.append(
                {key: figures[logged] for logged, key in MEASURED.items() if logged in figures}
                | {
                    "tokens_per_second": speed(folder),
                    "parameters": sum(p.numel() for p in transformer.parameters()),
                    "active_parameters": transformer.active_parameters,
                }
            )
            print(name, seed, json.dumps(results[-1]), flush=True)
        rows[name] = {
            key: [result[key] for result in results] for key in results[0]
        }  # one value a seed
    print(
        json.dumps(
            {
                "size": arguments.size,
                "steps": arguments.steps,
                "seeds": arguments.seeds,
                "threads": torch.get_num_threads(),
                **experts,
                **rows,
            }
        )
    )


if __name__ == "__main__":
    main()
