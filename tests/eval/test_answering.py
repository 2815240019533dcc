"""Answers are compared as VQA's official evaluation compares them.

``vqa_answers.tsv`` has 2,001 answers, each as ``processPunctuation`` and ``processDigitArticle`` of
VQAEval (github.com/GT-Vision-Lab/VQA, version 2.0) left it. The answers are made: words and signs
in all kinds of company, and one of forty stops, of which it drops 32.
"""

from pathlib import Path

import pytest

from multimodal.eval.metrics.answering import same_answer, vqa_normalise

TABLE = Path(__file__).with_name("vqa_answers.tsv")


def test_answers_are_normalised_as_by_vqa() -> None:
    pairs = [tuple(line.split("\t")) for line in TABLE.read_text("utf-8").split("\n") if line]
    assert len(pairs) == 2001
    assert [text for text, expected in pairs if vqa_normalise(text) != expected] == []


@pytest.mark.parametrize(
    ("expected", "predicted", "same"),
    [
        ("yes", " Yes.", True),
        ("a red circle", "the red circle", True),
        ("three", "3", True),
        ("top left", "top-left", True),
        ("red, blue", "red blue", True),
        ("none", "0", True),
        ("1,000", "1000", True),
        ("u.s.", "us", True),
        ("dont", "don't", True),
        ("dog's", "dogs", False),
        ("50%", "50", False),
        ("$5", "5", False),
        ("2.5", "2 5", False),
        ("red & white", "red white", False),
        ("", "a", False),
        ("a", "A", True),
        ("red", "dark red", False),
        ("left", "", False),
        ("Größe", "größe", True),
    ],
)
def test_same_answers(expected: str, predicted: str, same: bool) -> None:
    assert same_answer(expected, predicted) == same == same_answer(predicted, expected)
