"""What one sample teaches in one epoch: a caption, exchanges, or both. Chosen by its seed."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from multimodal.data.samples import parts_of
from multimodal.model.lessons import descriptions_of, exchanges_of
from multimodal.model.templates import Templates

TURNS = 4  # exchanges about one image, one after the other: its codes are read once for them all


@dataclass(frozen=True)
class Lesson:
    """caption: describes the image; exchanges: prompts and the answers to them."""

    caption: str | None
    exchanges: tuple[tuple[str, str], ...] = ()


def lesson_of(
    key: str, record: dict[str, Any], seed: int, templates: Templates, question_share: float = 1.0
) -> Lesson:
    """One of the captions and up to TURNS of the questions of a sample, by its seed.

    ``question_share``: of the samples that have a caption, how many bring questions besides.

    Errors: ``ValueError`` for a sample without any text.
    """
    rng = np.random.default_rng([seed, 2])
    captions, exchanges = descriptions_of(record), exchanges_of(record, templates)
    caption = captions[int(rng.integers(len(captions)))] if captions else None
    if not exchanges and caption is None:
        raise _speechless(key)
    if caption is not None and rng.random() >= question_share:
        return Lesson(caption)
    chosen = [exchanges[i] for i in rng.permutation(len(exchanges))[:TURNS]]
    return Lesson(caption, tuple((prompt, f" {answer}") for prompt, answer in chosen))


def texts_about(key: str, record: dict[str, Any]) -> list[str]:
    """The captions of a sample, or the texts of a document, or else its questions, each with its
    answer.

    Errors: ``ValueError`` for a sample without any text.
    """
    texts = [str(caption) for caption in record.get("captions", [])]
    texts = texts or [part["text"] for part in parts_of(record) if "text" in part]
    texts = texts or [f"{question} {answer}" for question, answer in record.get("qa", [])]
    if not texts:
        raise _speechless(key)
    return texts


def _speechless(key: str) -> ValueError:
    # An empty text in its place would teach the model to say nothing.
    return ValueError(f"sample {key} has no captions and no questions: training needs a text")
