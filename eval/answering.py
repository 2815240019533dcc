"""Answers to questions, right or wrong: exact, after the case and the marks around are dropped."""

from collections.abc import Iterable


def normalise(answer: str) -> str:
    return " ".join(answer.lower().split()).strip(" .,!?\"'")


def score_answers(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """pairs: (expected, found) -> shares of right answers, and how many there were.

    ``accuracy``: of all; ``closed``: where yes, no, true or false was expected; ``open``: of the
    others. A share of nothing is left out.
    """
    right: dict[str, list[bool]] = {"accuracy": [], "closed": [], "open": []}
    for expected, found in pairs:
        correct = normalise(expected) == normalise(found)
        closed = normalise(expected) in ("yes", "no", "true", "false")
        right["accuracy"].append(correct)
        right["closed" if closed else "open"].append(correct)
    scores = {name: sum(each) / len(each) for name, each in right.items() if each}
    return {**scores, "n": float(len(right["accuracy"]))}
