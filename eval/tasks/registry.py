"""All evaluators by name, and evaluators in other files: ``FILE.py:CLASS``."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from multimodal.eval.evaluator import Evaluator
from multimodal.eval.tasks.answers import Answers
from multimodal.eval.tasks.captioning import Captioning
from multimodal.eval.tasks.choices import Choices
from multimodal.eval.tasks.classification import Classification
from multimodal.eval.tasks.drawing import Drawing
from multimodal.eval.tasks.few_shot import FewShot
from multimodal.eval.tasks.likelihood import Likelihood
from multimodal.eval.tasks.presence import Presence
from multimodal.eval.tasks.reconstruction import Reconstruction
from multimodal.eval.tasks.retrieval import Retrieval
from multimodal.eval.tasks.robustness import Robustness
from multimodal.eval.tasks.scene_captions import SceneCaptions
from multimodal.eval.tasks.scene_drawings import SceneDrawings
from multimodal.eval.tasks.scene_presence import ScenePresence

EVALUATORS: dict[str, Callable[[], Evaluator]] = {
    "captioning": Captioning,
    "answers": Answers,
    "choices": Choices,
    "presence": Presence,
    "retrieval": Retrieval,
    "classification": Classification,
    "likelihood": Likelihood,
    "drawing": Drawing,
    "reconstruction": Reconstruction,
    "few_shot": FewShot,
    "robustness": Robustness,
    "scene_captions": SceneCaptions,
    "scene_presence": ScenePresence,
    "scene_drawings": SceneDrawings,
}


def find_evaluator(task: str) -> Callable[[], Evaluator]:
    """The class of an evaluator.

    Args:
        task: a name in ``EVALUATORS``, or ``FILE.py:CLASS``.

    Raises:
        ValueError: if there is no such task, file or class, or the class is no evaluator.
    """
    if task in EVALUATORS:
        return EVALUATORS[task]
    path, colon, name = task.rpartition(":")
    if not colon:
        raise ValueError(f"no task {task!r}: expected {', '.join(EVALUATORS)}, or FILE.py:CLASS")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise ValueError(f"{path}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    evaluator: Callable[[], Evaluator] | None = getattr(module, name, None)
    if evaluator is None:
        raise ValueError(f"{path}: has no class {name}")
    required = ("name", "protocol", "fits", "measure")
    missing = [attribute for attribute in required if not hasattr(evaluator, attribute)]
    if missing:
        raise ValueError(
            f"{path}: {name} has no {', '.join(missing)}; see docs/evaluation.md, or Evaluator in "
            "multimodal/eval/evaluator.py"
        )
    return evaluator
