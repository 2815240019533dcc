"""A student of a third of the parameters, with its teacher and from the data alone.

    python benchmarks/distillation.py --data data/flickr8k [--teacher starter] [--weights 0.5 0]
        [--seeds 0] [--out runs/distillation] [-- --KEY VALUE ...]

The recipe is student.yaml; what follows ``--`` goes to all runs. They start from the same weights
and read the same rows in the same order, and the teacher's weight is all that they differ in: 0 is
the data alone. Measured is CIDEr on the split val of --data, beside that of the teacher, with 95 %
intervals. A run that is done is not done again, and one of other arguments needs another --out. The
last line is JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from adapters import cider, fit_once

from multimodal import load


def parameters(model: str) -> int:
    return sum(weight.numel() for weight in load(model).network.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="images with captions, to measure on")
    parser.add_argument("--teacher", default="starter")
    parser.add_argument("--weights", nargs="+", default=["0.5", "0"], help="of the teacher, 0 to 1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"))
    parser.add_argument("more", nargs="*", metavar="--KEY VALUE", help="after --, of fit")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    def measured(folder: Path, model: str) -> dict[str, Any]:
        figures = cider(folder, options.data, "--model", model)
        return {"parameters": parameters(model), **figures}

    rows: dict[str, Any] = {"teacher": measured(options.out, options.teacher)}
    for seed in options.seeds:
        for weight in options.weights:
            name = f"weight {weight}, seed {seed}"
            folder = options.out / f"{weight}-{seed}"
            fit = ["--config", "student.yaml", "--seed_everything", str(seed)]
            fit += ["--model.teacher_weight", weight, *options.more]
            for part in ("teacher", "text_tokenizer", "image_tokenizer"):
                fit += [f"--model.{part}", options.teacher]
            seconds = fit_once(folder, *fit)
            rows[name] = {**measured(folder, str(folder / "model")), "seconds": seconds}
            print(name, json.dumps(rows[name]), flush=True)
    print(json.dumps({"data": options.data, "more": options.more, "rows": rows}))


if __name__ == "__main__":
    main()
