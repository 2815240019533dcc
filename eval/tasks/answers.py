"""Answers: open answers to questions and statements."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch

from multimodal.data.samples import Sample
from multimodal.eval.evaluator import Example, PerQuestion, Subject, Value
from multimodal.eval.metrics.answering import (
    CLOSED,
    normalise,
    same_answer,
    score_answers,
)
from multimodal.inference.codec import encode_images
from multimodal.inference.text import complete_prompts
from multimodal.model.lessons import questions_of
from multimodal.model.templates import Templates
from multimodal.options import AnswerOptions

SHORT_ANSWER = AnswerOptions(max_tokens=16)


class Question(NamedTuple):
    """A question or statement about a sample.

    row: number of the sample. prompt: what the model reads. question: without template.
    """

    row: int
    prompt: str
    question: str
    answer: str


def has_questions(sample: Sample) -> bool:
    """Whether a sample has a question or a statement."""
    return bool(questions_of(sample.record, Templates()))


def all_questions(subject: Subject) -> list[Question]:
    """All questions and statements of all samples."""
    templates = subject.model.config.templates
    return [
        Question(row, *question)
        for row, sample in enumerate(subject.samples)
        for question in questions_of(sample.record, templates)
    ]


@dataclass
class Answers:
    """Answers by kind of question, and the answers to the same questions without the image."""

    name: ClassVar[str] = "answers"
    protocol: ClassVar[str] = (
        f"greedy, at most {SHORT_ANSWER.max_tokens} tokens; right if equal but for case, "
        "punctuation, articles and numbers in words or digits (VQA); closed: yes, no, true or "
        "false is right; in_form: one of the two words that fit is given; blind: the same "
        "questions about a uniform grey picture"
    )
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return has_questions(sample)

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        model, codes = subject.model, subject.codes
        questions = all_questions(subject)
        grey = encode_images(model, torch.zeros_like(subject.pixels[:1]))

        def answer(batch: Sequence[Question]) -> list[str]:
            prompts = [question.prompt for question in batch]
            rows = [question.row for question in batch]
            return complete_prompts(model, codes[rows], prompts, SHORT_ANSWER)

        def answer_blind(batch: Sequence[Question]) -> list[str]:
            prompts = [question.prompt for question in batch]
            return complete_prompts(model, grey.expand(len(batch), -1), prompts, SHORT_ANSWER)

        predicted = subject.map_batches(questions, answer)
        blind = subject.map_batches(questions, answer_blind)
        expected = [question.answer for question in questions]
        right = [same_answer(a, b) for a, b in zip(expected, predicted, strict=True)]
        yield (
            "accuracy",
            PerQuestion(
                [float(value) for value in right], [question.row for question in questions]
            ),
        )
        for name, value in score_answers(zip(expected, predicted, strict=True)).items():
            if name in ("open", "closed", "closed_in_form"):
                yield name, value
        for name, value in score_answers(zip(expected, blind, strict=True)).items():
            if name in ("accuracy", "open", "closed"):
                yield f"blind_{name}", value
        answer_counts = Counter(normalise(text) for text in predicted)
        expected_counts = Counter(map(normalise, expected))
        for first, second in CLOSED:
            if count := expected_counts[first] + expected_counts[second]:
                given = answer_counts[first] + answer_counts[second]
                yield f"says_{first}", answer_counts[first] / max(1, given)
                yield f"{first}_is_right", expected_counts[first] / count
        yield from _by_first_word(questions, right)
        yield "questions", float(len(questions))
        for question, text, correct in zip(questions, predicted, right, strict=True):
            sample, image = subject.samples[question.row], subject.images[question.row]
            more = "" if correct else f" (right: {question.answer})"
            shown = f"{question.question} {text}{more}"
            self.examples.append(Example(sample.key, shown, float(correct), image))


def _by_first_word(
    questions: Sequence[Question], right: Sequence[bool]
) -> Iterator[tuple[str, Value]]:
    """Accuracy of the questions with the same first word, for the eight most frequent ones."""
    by_word: dict[str, list[bool]] = {}
    for question, correct in zip(questions, right, strict=True):
        word = question.question.lower().split()[0].strip("?:,.")
        by_word.setdefault(word, []).append(correct)
    for word, each in sorted(by_word.items(), key=lambda item: -len(item[1]))[:8]:
        yield f"{word}...", sum(each) / len(each)
