"""What the texts of a sample are for: to describe its image, to be asked, to be judged."""

from collections.abc import Mapping
from typing import Any

from multimodal.model.templates import Templates

LABELS = ("true", "false")  # of statements; any other label is a class


def descriptions_of(record: Mapping[str, Any]) -> list[str]:
    """The captions that describe the image.

    With a ``label`` of true or false they are statements, and may be wrong; and one that only
    repeats a question with its answer describes nothing.
    """
    if record.get("label") in LABELS:
        return []
    questions = [str(question) for question, _ in record.get("qa", [])]
    captions = [str(caption) for caption in record.get("captions", [])]
    return [c for c in captions if not any(c.startswith(question) for question in questions)]


def asked_of(record: Mapping[str, Any], templates: Templates) -> list[tuple[str, str, str]]:
    """(prompt, question or statement, answer) of everything that a sample asks."""
    asked = [(templates.ask(str(q)), str(q), str(answer)) for q, answer in record.get("qa", [])]
    if (label := record.get("label")) in LABELS:
        captions = map(str, record.get("captions", []))
        asked += [(templates.judge(caption), caption, str(label)) for caption in captions]
    return asked


def exchanges_of(record: Mapping[str, Any], templates: Templates) -> list[tuple[str, str]]:
    """The prompts of a sample, each with its answer: its questions, and statements with a label."""
    return [(prompt, answer) for prompt, _, answer in asked_of(record, templates)]
