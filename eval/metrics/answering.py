"""Scores answers to questions."""

import re
from collections.abc import Iterable

ARTICLES = ("a", "an", "the")
CLOSED = (("yes", "no"), ("true", "false"))  # the pairs of answers to closed questions
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBERS)}}


def normalise(answer: str) -> str:
    """Lower case, single spaces, no punctuation at the ends."""
    return " ".join(answer.lower().split()).strip(" .,!?\"'")


def same_answer(expected: str, predicted: str) -> bool:
    """Whether two answers are equal by the rules of VQA (Antol et al. 2015, arXiv:1505.00468).

    Case, punctuation and articles do not count. Numbers are compared as digits.
    """
    return _words(expected) == _words(predicted)


def _words(answer: str) -> list[str]:
    words = re.sub(r"[^\w\s'-]", " ", answer.lower()).split()
    content = [word for word in words if word not in ARTICLES] or words
    return [DIGITS.get(word, word) for word in content]


def score_answers(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Shares of right answers.

    Args:
        pairs: (expected answer, predicted answer).

    Returns:
        - ``accuracy``: share in [0, 1] over all answers.
        - ``closed``: over those where yes, no, true or false is expected.
        - ``closed_in_form``: the share of those that are answered by one of the two words that fit,
          be it the right one. Yes does not fit where true or false is expected.
        - ``open``: over the others.
        - ``n``: number of answers.

        A share over no answers is left out.
    """
    names = ("accuracy", "closed", "closed_in_form", "open")
    right: dict[str, list[bool]] = {name: [] for name in names}
    for expected, predicted in pairs:
        correct = same_answer(expected, predicted)
        right["accuracy"].append(correct)
        words = next((pair for pair in CLOSED if normalise(expected) in pair), None)
        if words is None:
            right["open"].append(correct)
        else:
            right["closed"].append(correct)
            right["closed_in_form"].append(normalise(predicted) in words)
    scores = {name: sum(each) / len(each) for name, each in right.items() if each}
    return {**scores, "n": float(len(right["accuracy"]))}
