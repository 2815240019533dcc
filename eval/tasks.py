"""All evaluators by their names. To add one, write a class as in evaluators.py, and put it here."""

from collections.abc import Callable

from multimodal.eval.evaluators import (
    Answers,
    Captioning,
    Drawing,
    Likelihood,
    Reconstruction,
    Retrieval,
)
from multimodal.eval.measuring import Evaluator
from multimodal.eval.probes import Choices, Classification, FewShot, Robustness

EVALUATORS: dict[str, Callable[[], Evaluator]] = {
    one.name: one
    for one in (
        Captioning, Answers, Choices, Retrieval, Classification, Likelihood, Drawing,
        Reconstruction, FewShot, Robustness,
    )
}  # fmt: skip
