"""Answers to questions, right or wrong."""

import re
from collections.abc import Iterable

ARTICLES = ("a", "an", "the")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBERS)}}


def normalise(answer: str) -> str:
    return " ".join(answer.lower().split()).strip(" .,!?\"'")


def same_answer(expected: str, found: str) -> bool:
    """Whether two answers are one, as the evaluation of VQA has it (Antol et al. 2015,
    arXiv:1505.00468): without case, punctuation and articles, numbers in digits."""
    return _plain(expected) == _plain(found)


def _plain(answer: str) -> list[str]:
    words = re.sub(r"[^\w\s'-]", " ", answer.lower()).split()
    spoken = [word for word in words if word not in ARTICLES] or words
    return [DIGITS.get(word, word) for word in spoken]


def score_answers(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """pairs: (expected, found) -> shares of right answers, and how many there were.

    ``accuracy``: of all; ``closed``: where yes, no, true or false was expected; ``open``: of the
    others. A share of nothing is left out.
    """
    right: dict[str, list[bool]] = {"accuracy": [], "closed": [], "open": []}
    for expected, found in pairs:
        correct = same_answer(expected, found)
        closed = normalise(expected) in ("yes", "no", "true", "false")
        right["accuracy"].append(correct)
        right["closed" if closed else "open"].append(correct)
    scores = {name: sum(each) / len(each) for name, each in right.items() if each}
    return {**scores, "n": float(len(right["accuracy"]))}
