"""All evaluators by name, and evaluators in other files: ``FILE.py:CLASS``.

To add one, write a file like answers.py in this folder, and a line here. Importing this file does
not import them: the names alone must not cost the seconds that torch takes.
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from multimodal.plugins import from_file

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
