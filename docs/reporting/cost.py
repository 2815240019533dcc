"""What a training of the starter cost, from the logs of its runs, into docs/starter_cost.json.

    python -m docs.reporting.cost runs/starter "level of detail=runs/starter-detail" \\
        "all objectives=runs/starter-joint" "reward=runs/starter-reward"

The first folder is the model, the others are its runs: each has ``logs/energy*.json``, a file for
each start. What is no run (codebooks, codes of all pictures) is not counted.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from docs.reporting.results import DOCS


def step_of(name: str, run: Path) -> dict[str, Any]:
    """Minutes and watt hours of all starts of a run.

    Raises:
        ValueError: if it has no record of its energy.
    """
    files = sorted((run / "logs").glob("energy*.json"))
    if not files:
        raise ValueError(f"{run / 'logs'}: no energy.json")
    starts = [json.loads(path.read_text("utf-8")) for path in files]
    return {
        "name": name,
        "minutes": round(sum(start["seconds"] for start in starts) / 60, 1),
        "watt_hours": round(sum(start["watt_hours"] for start in starts), 2),
        "how": "; ".join(sorted({start["how"] for start in starts})),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("model", type=Path, help="a model folder")
    options.add_argument("runs", nargs="+", metavar="NAME=RUN")
    arguments = options.parse_args()
    config = json.loads((arguments.model / "config.json").read_text("utf-8"))
    named = [run.split("=", 1) for run in arguments.runs]
    steps = [step_of(name, Path(run)) for name, run in named]
    spent = {"fingerprint": config["fingerprints"]["model"], "steps": steps}
    (DOCS / "starter_cost.json").write_text(json.dumps(spent, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
