"""Scores answers to questions."""

import re
from collections.abc import Iterable

ARTICLES = ("a", "an", "the")
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
        - ``open``: over the others.
        - ``n``: number of answers.

        A share over no answers is left out.
    """
    right: dict[str, list[bool]] = {"accuracy": [], "closed": [], "open": []}
    for expected, predicted in pairs:
        correct = same_answer(expected, predicted)
        closed = normalise(expected) in ("yes", "no", "true", "false")
        right["accuracy"].append(correct)
        right["closed" if closed else "open"].append(correct)
    scores = {name: sum(each) / len(each) for name, each in right.items() if each}
    return {**scores, "n": float(len(right["accuracy"]))}
