"""All evaluators by name, and evaluators in other files: ``FILE.py:CLASS``.

To add one, write a file like answers.py in this folder, and a line here. Importing this file does
not import them: the names alone must not cost the seconds that torch takes.
"""

import importlib.util
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multimodal.eval.evaluator import Evaluator

# name: file in this folder, and class
EVALUATORS = {
    "captioning": ("captioning", "Captioning"),
    "answers": ("answers", "Answers"),
    "choices": ("choices", "Choices"),
    "presence": ("presence", "Presence"),
    "retrieval": ("retrieval", "Retrieval"),
    "classification": ("classification", "Classification"),
    "likelihood": ("likelihood", "Likelihood"),
    "drawing": ("drawing", "Drawing"),
    "reconstruction": ("reconstruction", "Reconstruction"),
    "few_shot": ("few_shot", "FewShot"),
    "robustness": ("robustness", "Robustness"),
    "scene_captions": ("scene_captions", "SceneCaptions"),
    "scene_answers": ("scene_answers", "SceneAnswers"),
    "scene_presence": ("scene_presence", "ScenePresence"),
    "scene_drawings": ("scene_drawings", "SceneDrawings"),
}


def find_evaluator(task: str) -> "Callable[[], Evaluator]":
    """The class of an evaluator.

    Args:
        task: a name in ``EVALUATORS``, or ``FILE.py:CLASS``.

    Raises:
        ValueError: if there is no such task, file or class, or the class is no evaluator.
    """
    if task in EVALUATORS:
        file, name = EVALUATORS[task]
        return getattr(import_module(f"multimodal.eval.tasks.{file}"), name)
    evaluator: Callable[[], Evaluator] = from_file(task, "task", EVALUATORS, "CLASS")
    path, _, name = task.rpartition(":")
    required = ("name", "protocol", "fits", "measure")
    missing = [attribute for attribute in required if not hasattr(evaluator, attribute)]
    if missing:
        raise ValueError(
            f"{path}: {name} has no {', '.join(missing)}; see docs/evaluation.md, or Evaluator in "
            "multimodal/eval/evaluator.py"
        )
    return evaluator


def from_file(address: str, kind: str, names: Iterable[str], what: str) -> Any:
    """What is called NAME in a Python file; address: ``FILE.py:NAME``.

    Args:
        kind, names, what: for errors: what it is for, what else there is, and what NAME is.

    Raises:
        ValueError: if there is no such file, or nothing of that name in it.
    """
    path, colon, name = address.rpartition(":")
    if not colon:
        raise ValueError(f"no {kind} {address!r}: expected {', '.join(names)}, or FILE.py:{what}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise ValueError(f"{path}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise ValueError(f"{path}: has no {what.lower()} {name}")
    return getattr(module, name)
