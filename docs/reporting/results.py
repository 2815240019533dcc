"""The numbers of the report: JSON files of this repository, and nothing else."""

import json
import struct
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS, STARTER = ROOT / "docs", ROOT / "multimodal/starter"
# What is compared as steps on the way, in this order. The bundled starter comes first.
STAGES = {
    "bundled starter": "starter_val",
    "the starter before": "starter_before_val",
    "codes of meaning, then a reward": "starter_reward_val",
}


@dataclass(frozen=True)
class Score:
    """A score with its 95 % interval, where the evaluation gives one."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    def text(self, form: str = ".3f") -> str:
        """As ``0.163 (0.147 to 0.182)``. form: of Python; ``%`` is percent with one digit."""
        if self.low is None or self.high is None:
            return written(self.value, form)
        return f"{written(self.value, form)} ({bare(self.low, form)} to {bare(self.high, form)})"


def bare(value: float, form: str) -> str:
    return f"{100 * value:.1f}" if form == "%" else format(value, form)


def written(value: float, form: str) -> str:
    return f"{bare(value, form)} %" if form == "%" else bare(value, form)


@cache
def read(name: str) -> dict[str, Any]:
    """docs/NAME.json."""
    return json.loads((DOCS / f"{name}.json").read_text("utf-8"))


def result(report: str, folder: str, task: str) -> dict[str, Any] | None:
    """What ``multimodal eval`` wrote about a task on a folder, or None if it was not measured."""
    for each in read(report)["results"]:
        if each["task"] == task and Path(each["data"]).name == folder:
            return each
    return None


def find(report: str, folder: str, task: str, score: str) -> Score | None:
    """A score, or None if it was not measured."""
    found = result(report, folder, task)
    if found is None or score not in found["scores"]:
        return None
    number = found["scores"][score]
    return Score(number["value"], number.get("low"), number.get("high"), found["n"])


def anywhere(folder: str, task: str, score: str) -> Score | None:
    """A score that does not depend on the model: of the first stage that has it."""
    found = (find(report, folder, task, score) for report in STAGES.values())
    return next((each for each in found if each is not None), None)


def shown(score: Score | None, form: str = ".3f") -> str:
    return "-" if score is None else score.text(form)


def config() -> dict[str, Any]:
    """``config.json`` of the bundled starter."""
    return json.loads((STARTER / "config.json").read_text("utf-8"))


def sources() -> list[dict[str, Any]]:
    """Of what the starter was made."""
    return json.loads((STARTER / "sources.json").read_text("utf-8"))["sources"]


def parameters(folder: Path) -> int:
    """Of all weights in the safetensors files of a folder, by their headers."""
    total = 0
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        tensors = (value for name, value in header.items() if name != "__metadata__")
        total += sum(prod(tensor["shape"]) for tensor in tensors)
    return total
