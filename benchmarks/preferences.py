"""Does a model draw scenes better by preferences that it makes itself?

    python benchmarks/preferences.py --data data/scenes128 [--model starter] [--limit 3000]
        [--candidates 6] [--drawn-with 1] [--variants dpo ipo kto] [--steps 250]
        [--guidance 1 1.5 3] [--seeds 0] [--out runs/preferences]

`multimodal prefer` draws candidates of scenes of the split train, code by code. Without guidance
(--drawn-with 1) they are as likely as the network says. Exact claims judge them (``scenes``). Each
variant then trains all weights on the pairs; the joint losses beside learn to draw what was chosen,
and nothing else. Measured on 200 scenes of val, before and after: the drawn objects, with each
guidance and the default temperature, with 95 % intervals of the differences over scenes, and the
claims of greedy captions. What is done is not done again. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fits import fit, judge_drawings, last_figures, measured_once, score_captions

from multimodal import load
from multimodal.api import Model
from multimodal.eval.evaluator import interval
from multimodal.options import DrawOptions

BETA = {"dpo": 0.1, "ipo": 10.0, "kto": 0.1}  # ipo aims at 1 / (2 beta) nats a code


def measured(model: str, data: str, guidances: list[float]) -> dict[str, Any]:
    """Captions, and for each guidance the values of objects and their scenes."""
    loaded = load(model)
    figures: dict[str, Any] = {"captions": score_captions(loaded, data)}
    for guidance in guidances:
        cases = judge_drawings(loaded, data, DrawOptions(guidance_scale=guidance))
        figures[f"{guidance:g}"] = {name: [each.values, each.rows] for name, each in cases.items()}
    return figures


def summary(figures: dict[str, Any], before: dict[str, Any], guidances: list[float]) -> Any:
    """Means, and the differences of objects to the model before, of the same scenes."""
    row: dict[str, Any] = {"captions": figures["captions"]}
    for guidance in map("{:g}".format, guidances):
        means = {
            name: sum(values) / max(1, len(values))
            for name, (values, _) in figures[guidance].items()
        }
        (values, rows), (old, _) = figures[guidance]["objects"], before[guidance]["objects"]
        gains = [new - one for new, one in zip(values, old, strict=True)]
        low, high = interval(gains, groups=rows)
        gain = {"value": sum(gains) / len(gains), "low": low, "high": high}
        row[f"guidance {guidance}"] = {**means, "objects_gained": gain}
    return row


def made_pairs(options: argparse.Namespace, *more: Any) -> Path:
    """The shards that ``multimodal prefer`` writes of the split train, made once."""
    pairs = Path(options.out) / "pairs"
    if not (pairs / "manifest.json").is_file():
        command = ["prefer", options.model, "--data", options.data, "--out", pairs, "--split"]
        command += ["train", "--candidates", options.candidates, "--batch-size", 32, *more]
        subprocess.run([sys.executable, "-m", "multimodal", *map(str, command)], check=True)
    return pairs


def fit_preferences(
    folder: Path,
    pairs: Path,
    base: Model,
    options: argparse.Namespace,
    variant: str,
    learns: str,
    seed: int,
) -> str:
    """Train all weights on pairs, and return the folder of the model.

    Args:
        base: the model of ``options``, loaded.
        learns: the only part of a sequence that the joint losses beside learn: of the chosen ones.
    """
    weights = {part: float(part == learns) for part in ("image", "caption", "answer", "text")}
    module = {
        "text_tokenizer": options.model,
        "image_tokenizer": options.model,
        "size": "mini",
        "reads": [*base.config.reads],
        "draws": [*base.config.draws],
        "row_length": 640,
        "variant": variant,
        "beta": BETA[variant],
        "lm_weight": options.lm_weight,
        "objectives": {
            "weights": weights,
            "alignment_weight": 0.0,
            "reconstruct_share": 0.0,
            "next_token_share": 1.0,
        },
        "learning_rate": options.rate,
        "warmup_steps": min(20, options.steps // 5),
    }
    data = {"folders": [str(pairs)], "global_batch_size": 32, "workers": 0, "hold_out": 0.03}
    kind = "preferences.module.PreferenceModule"
    fit(folder, kind, module, data, options.steps, seed, options.model)
    return str(folder / "model")


def run_all(
    options: argparse.Namespace,
    pairs: Path,
    learns: str,
    measure: Callable[[Path, str], dict[str, Any]],
    row_of: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]],
) -> None:
    """Train with each seed and variant, and print a row of each. The last line is JSON of all.

    Args:
        learns: see ``fit_preferences``.
        measure: figures of a model, kept in a folder.
        row_of: of figures after and before.
    """
    base, before = load(options.model), measure(options.out, options.model)
    rows = {"before": row_of(before, before)}
    print("before", json.dumps(rows["before"]), flush=True)
    for seed in options.seeds:
        for variant in options.variants:
            folder = options.out / f"{variant}-{seed}"
            trained = fit_preferences(folder, pairs, base, options, variant, learns, seed)
            rows[folder.name] = {
                **row_of(measure(folder, trained), before),
                "log": last_figures(folder),
                "seconds": float((folder / "seconds").read_text("utf-8")),
            }
            print(variant, seed, json.dumps(rows[folder.name]), flush=True)
    print(json.dumps({name: str(value) for name, value in vars(options).items()} | rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="a shard folder of scenes")
    parser.add_argument("--model", default="starter")
    parser.add_argument("--limit", type=int, default=3000, help="scenes to draw")
    parser.add_argument("--candidates", type=int, default=6)
    parser.add_argument("--drawn-with", type=float, default=1.0, help="guidance of candidates")
    parser.add_argument("--variants", nargs="+", choices=BETA, default=list(BETA))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate")
    parser.add_argument("--lm-weight", type=float, default=0.2)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5, 3.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/preferences"))
    options = parser.parse_args()
    more = ["--of", "drawings", "--judge", "scenes", "--guidance-scale", options.drawn_with]
    pairs = made_pairs(options, *more, "--margin", 0.2, "--limit", options.limit)

    def measure(folder: Path, model: str) -> dict[str, Any]:
        settings = {"model": model, "data": options.data, "guidance": options.guidance}
        return measured_once(
            folder, "drawn", settings, lambda: measured(model, options.data, options.guidance)
        )

    run_all(options, pairs, "image", measure, lambda *both: summary(*both, options.guidance))


if __name__ == "__main__":
    main()
