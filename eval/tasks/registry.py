"""All evaluators by their names, and those of a file of one's own: ``FILE.py:CLASS``."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from multimodal.eval.evaluator import Evaluator
from multimodal.eval.tasks.evaluators import (
    Answers,
    Captioning,
    Drawing,
    Likelihood,
    Reconstruction,
    Retrieval,
)
from multimodal.eval.tasks.presence import Presence
from multimodal.eval.tasks.probes import Choices, Classification, FewShot, Robustness

EVALUATORS: dict[str, Callable[[], Evaluator]] = {
    one.name: one
    for one in (
        Captioning, Answers, Choices, Presence, Retrieval, Classification, Likelihood, Drawing,
        Reconstruction, FewShot, Robustness,
    )
}  # fmt: skip


def find_evaluator(task: str) -> Callable[[], Evaluator]:
    """Errors: ``ValueError`` for a name that is none, or a class that is no evaluator."""
    if task in EVALUATORS:
        return EVALUATORS[task]
    path, colon, name = task.rpartition(":")
    if not colon:
        raise ValueError(f"no task {task!r}; there are {', '.join(EVALUATORS)}, and FILE.py:CLASS")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise ValueError(f"{path}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[], Evaluator] | None = getattr(module, name, None)
    if found is None:
        raise ValueError(f"{path}: has no {name}")
    missing = [part for part in ("name", "protocol", "fits", "measure") if not hasattr(found, part)]
    if missing:
        raise ValueError(f"{path}: {name} has no {', '.join(missing)}: see multimodal/eval")
    return found
