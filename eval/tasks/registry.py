"""All evaluators by name, and evaluators in other files: ``FILE.py:CLASS``.

To add one, write a file like answers.py in this folder or in eval/trust, and a line here. Importing
this file does not import them: the names alone must not cost the seconds that torch takes.
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from multimodal.plugins import from_file

if TYPE_CHECKING:
    from multimodal.eval.evaluator import Evaluator

# name: room and file, and class
EVALUATORS = {
    "captioning": ("tasks.captioning", "Captioning"),
    "answers": ("tasks.answers", "Answers"),
    "choices": ("tasks.choices", "Choices"),
    "presence": ("trust.presence", "Presence"),
    "retrieval": ("tasks.retrieval", "Retrieval"),
    "classification": ("tasks.classification", "Classification"),
    "likelihood": ("tasks.likelihood", "Likelihood"),
    "drawing": ("tasks.drawing", "Drawing"),
    "reconstruction": ("tasks.reconstruction", "Reconstruction"),
    "few_shot": ("tasks.few_shot", "FewShot"),
    "robustness": ("trust.robustness", "Robustness"),
    "person_words": ("trust.person_words", "PersonWords"),
    "scene_captions": ("tasks.scene_captions", "SceneCaptions"),
    "scene_answers": ("tasks.scene_answers", "SceneAnswers"),
    "scene_presence": ("trust.scene_presence", "ScenePresence"),
    "scene_drawings": ("tasks.scene_drawings", "SceneDrawings"),
    "scene_counterfactuals": ("trust.scene_counterfactuals", "SceneCounterfactuals"),
    "energy": ("tasks.energy", "EnergyUse"),
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
        return getattr(import_module(f"multimodal.eval.{file}"), name)
    evaluator: Callable[[], Evaluator] = from_file(task, "task", EVALUATORS, "CLASS")
    path, _, name = task.rpartition(":")
    required = ("name", "protocol", "fits", "measure")
    missing = [attribute for attribute in required if not hasattr(evaluator, attribute)]
    if missing:
        raise ValueError(
            f"{path}: {name} has no {', '.join(missing)}; "
            "see docs/guides/evaluation.md, or Evaluator in multimodal/eval/evaluator.py"
        )
    return evaluator
