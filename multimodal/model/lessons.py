"""What a sample teaches: its descriptions of the image, its questions, its statements."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from multimodal.model.templates import Templates

LABELS = ("true", "false")  # of statements. Any other label is a class.
# How the name of a class is put in words, and how it is asked for.
NAME_WORDINGS = ("a photo of {}.", "a picture of {}.", "{}.", "there is {} in the picture.")
NAME_QUESTIONS = ("What is this?", "What does the picture show?", "What is in the photo?")
MAX_TURNS = 4  # questions about one image in one sequence: its codes are read once for all of them


@dataclass(frozen=True)
class Lesson:
    """What one sample teaches in one epoch.

    Attributes:
        captions: describe the image. Empty: the image has no description.
        exchanges: prompts and their answers.
    """

    captions: tuple[str, ...]
    exchanges: tuple[tuple[str, str], ...] = ()


def descriptions_of(record: Mapping[str, Any]) -> list[str]:
    """The captions that describe the image. Empty texts are none.

    With a ``label`` of true or false the captions are statements, and may be wrong. A caption that
    only repeats a question with its answer describes nothing. Names of a class are put in words.
    """
    if record.get("label") in LABELS:
        return []
    questions = [str(question) for question, _ in record.get("qa", []) if question.strip()]
    captions = [str(text) for text in record.get("captions", []) if text.strip()]
    names = names_of(record)
    lower = {name.lower() for name in names}
    described = [
        caption
        for caption in captions
        if _as_name(caption).lower() not in lower
        and not any(caption.startswith(question) for question in questions)
    ]
    if described:
        return described
    return [wording.format(with_article(name)) for name in names for wording in NAME_WORDINGS]


def names_of(record: Mapping[str, Any]) -> list[str]:
    """The names of what the image shows: ``label`` and ``synonyms``, without repetitions.

    None if the captions say something else: the label may then be a category.
    """
    label, synonyms = record.get("label"), record.get("synonyms", [])
    if label in LABELS or not isinstance(label, str):
        return []
    found = [label, *(synonyms if isinstance(synonyms, list) else [])]
    names = list(dict.fromkeys(filter(None, (_as_name(str(name)) for name in found))))
    captions = {_as_name(str(caption)).lower() for caption in record.get("captions", [])}
    return names if not captions or captions & {name.lower() for name in names} else []


def _as_name(text: str) -> str:
    """Words of a name as they are written in a sentence: ``Tabby_cat`` is "Tabby cat"."""
    return " ".join(text.replace("_", " ").split()).rstrip(".")


def with_article(name: str) -> str:
    """ "tabby cat" -> "a tabby cat" """
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def questions_of(record: Mapping[str, Any], templates: Templates) -> list[tuple[str, str, str]]:
    """(prompt, question or statement, answer) of all questions and labelled statements."""
    questions = [
        (templates.ask(str(question)), str(question), str(answer))
        for question, answer in record.get("qa", [])
        if question.strip() and answer.strip()
    ]
    if (label := record.get("label")) in LABELS:
        captions = [str(text) for text in record.get("captions", []) if text.strip()]
        questions += [(templates.judge(caption), caption, str(label)) for caption in captions]
    if not questions and (names := names_of(record)):
        answer = with_article(names[0])
        questions = [(templates.ask(ask), ask, answer) for ask in NAME_QUESTIONS]
    return questions


def exchanges_of(record: Mapping[str, Any], templates: Templates) -> list[tuple[str, str]]:
    """The prompts of all questions and labelled statements, each with its answer."""
    return [(prompt, answer) for prompt, _, answer in questions_of(record, templates)]


def answer_text(answer: str) -> str:
    """An answer as it follows its prompt: after a space."""
    return f" {answer}"


def lesson_of(
    key: str,
    record: Mapping[str, Any],
    seed: int,
    templates: Templates,
    question_share: float = 1.0,
    captions_per_image: int = 1,
) -> Lesson:
    """Some of the captions and up to MAX_TURNS of the questions of a sample.

    Args:
        key: names the sample in errors.
        record: what ``KEY.json`` holds.
        seed: decides which captions and which questions.
        templates: the words around questions and statements.
        question_share: the share of the samples with a caption that bring questions, too.
        captions_per_image: at most so many captions: one of them, and those after it. 0: all.

    Raises:
        ValueError: for a sample without any text. An empty text would teach to say nothing.
    """
    rng = np.random.default_rng([seed, 2])
    captions, exchanges = descriptions_of(record), exchanges_of(record, templates)
    if not (captions or exchanges):
        raise no_text_error(key)
    chosen: tuple[str, ...] = ()
    if captions:
        first = int(rng.integers(len(captions)))
        chosen = (*captions[first:], *captions[:first])[: captions_per_image or None]
        if rng.random() >= question_share:
            return Lesson(chosen)
    turns = [exchanges[i] for i in rng.permutation(len(exchanges))[:MAX_TURNS]]
    return Lesson(chosen, tuple((prompt, answer_text(answer)) for prompt, answer in turns))


def check_texts(templates: Templates, key: str, record: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for a sample of an image that has no text to learn."""
    if not (descriptions_of(record) or exchanges_of(record, templates)):
        raise no_text_error(key)


def no_text_error(key: str) -> ValueError:
    return ValueError(f"sample {key} has no captions and no questions: training needs a text")
