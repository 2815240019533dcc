"""Scores answers to questions."""

import re
from collections.abc import Iterable
from functools import cache

ARTICLES = ("a", "an", "the")
CLOSED = (("yes", "no"), ("true", "false"))  # the pairs of answers to closed questions
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBERS)}}
SIGNS = ';/[]"{}()=+\\_-><@`,?!'  # stops, $, %, & and apostrophes are not among them
# The words that VQA's evaluation knows without one of their apostrophes.
CONTRACTIONS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were "
    "wo would",
    "'ve": "could might must not should they we what where who would you",
    "'s": "he how somebody someone that there what when where who why",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "n't've": "could had might should would",
    "'d've": "he it she somebody someone something there they we who you y'all",
    "": "ma'am o'clock 'twas y'all y'all'll 'ow's'at",
}


def normalise(answer: str) -> str:
    """Lower case, single spaces, no punctuation at the ends."""
    return " ".join(answer.lower().split()).strip(" .,!?\"'")


def vqa_normalise(answer: str) -> str:
    """An answer as VQA's evaluation compares it (Antol et al. 2015, arXiv:1505.00468).

    In lower case, without articles, numbers up to ten as digits, "dont" as "don't". A sign becomes
    a space ("top-left"), but goes where a space is beside one of its kind. All signs go, without a
    space, where a comma stands between digits ("1,000"). Stops go, except before a digit: the first
    32 of them, since that evaluation gives the flag ``re.UNICODE`` where a number is expected.
    """
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    grouped = re.search(r"\d,\d", answer)
    cleaned = answer
    for sign in SIGNS:
        goes = grouped or f"{sign} " in answer or f" {sign}" in answer
        cleaned = cleaned.replace(sign, "" if goes else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned, count=32)
    words = [DIGITS.get(word, word) for word in cleaned.lower().split()]
    full = _full_forms()
    return " ".join(full.get(word, word) for word in words if word not in ARTICLES)


@cache
def _full_forms() -> dict[str, str]:
    forms = [start + end for end, starts in CONTRACTIONS.items() for start in starts.split()]
    full = {
        form[:place] + form[place + 1 :]: form
        for form in forms
        for place, letter in enumerate(form)
        if letter == "'"
    }
    return {**full, "somebody'd": "somebodyd"}  # the wrong way round, as VQA's evaluation has it


def same_answer(expected: str, predicted: str) -> bool:
    """Whether two answers are the same to VQA's evaluation.

    Answers of which nothing is left ("a", "?") are compared as they are.
    """
    words = vqa_normalise(expected)
    if words != vqa_normalise(predicted):
        return False
    return bool(words) or normalise(expected) == normalise(predicted)


def score_answers(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Shares of right answers.

    Args:
        pairs: (expected answer, predicted answer).

    Returns:
        - ``accuracy``: share in [0, 1] over all answers.
        - ``closed``: over those where yes, no, true or false is expected.
        - ``closed_in_form``: those answered by one of the two words that fit, right or wrong.
        - ``open``: over the others.
        - ``n``: number of answers.

        Yes does not fit where true or false is expected. A share over no answers is left out.
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
