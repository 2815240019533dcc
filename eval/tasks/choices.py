"""Choices: questions and statements, answered by the most likely of the usual answers."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import ClassVar, NamedTuple

from multimodal.data.samples import Sample
from multimodal.eval.evaluator import Example, PerQuestion, Subject, Value
from multimodal.eval.metrics.answering import CLOSED, normalise, same_answer
from multimodal.eval.tasks.answers import (
    SHORT_ANSWER,
    Question,
    all_questions,
    has_questions,
)
from multimodal.inference.likelihoods import choice_likelihoods
from multimodal.inference.text import complete_prompts

MAX_CHOICES = 16  # the most frequent answers of a kind of question


class ChoiceQuestion(NamedTuple):
    """A question and its possible answers, the right one first."""

    question: Question
    choices: list[str]


@dataclass
class Choices:
    """Which of the usual answers is the most likely."""

    name: ClassVar[str] = "choices"
    protocol: ClassVar[str] = (
        "the most likely answer, with its end token: yes or no, true or false, or the answers to "
        f"questions with the same first two words in these samples (the {MAX_CHOICES} most "
        "frequent and the right one); questions with a single answer are left out and counted; "
        "free: the same questions, answered greedily in the model's own words as in answers"
    )
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return has_questions(sample)

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        model, codes = subject.model, subject.codes
        questions = all_questions(subject)
        answers: dict[str, Counter[str]] = {}  # kind of question -> its answers
        for question in questions:
            kind = _kind(question.question)
            answers.setdefault(kind, Counter())[normalise(question.answer)] += 1
        with_choices = [
            ChoiceQuestion(
                question, _choices(answers[_kind(question.question)], normalise(question.answer))
            )
            for question in questions
        ]
        usable = [item for item in with_choices if len(item.choices) > 1]
        if not usable:
            return

        def is_right(batch: Sequence[ChoiceQuestion]) -> list[float]:
            rows = [item.question.row for item in batch]
            prompts = [item.question.prompt for item in batch]
            choices = [item.choices for item in batch]
            likelihoods = choice_likelihoods(model, codes[rows], prompts, choices)
            # The right choice is first. A tie counts against the model.
            return [float(each[0] > each[1:].max()) for each in likelihoods]

        def is_right_freely(batch: Sequence[ChoiceQuestion]) -> list[float]:
            rows = [item.question.row for item in batch]
            prompts = [item.question.prompt for item in batch]
            texts = complete_prompts(model, codes[rows], prompts, SHORT_ANSWER)
            return [
                float(same_answer(item.question.answer, text))
                for item, text in zip(batch, texts, strict=True)
            ]

        right = subject.map_batches(usable, is_right)
        free = subject.map_batches(usable, is_right_freely)
        chances = [1 / len(item.choices) for item in usable]
        rows = [item.question.row for item in usable]
        yield "accuracy", PerQuestion(right, rows)
        yield "free_accuracy", PerQuestion(free, rows)
        yield "chance", sum(chances) / len(chances)
        yield "questions", float(len(usable))
        yield "without_a_choice", float(len(questions) - len(usable))
        for (question, _), correct in zip(usable, right, strict=True):
            sample, image = subject.samples[question.row], subject.images[question.row]
            verdict = "right" if correct else "wrong"
            text = f"{question.question} {question.answer}: {verdict}"
            self.examples.append(Example(sample.key, text, correct, image))


def _choices(answers: Counter[str], right: str) -> list[str]:
    """The right answer, then the other possible ones. Empty if the right answer is empty."""
    for closed in CLOSED:
        if right in closed:
            return [right, *(answer for answer in closed if answer != right)]
    by_frequency = sorted(answers, key=lambda answer: (-answers[answer], answer))
    excluded = ("", right, *chain.from_iterable(CLOSED))
    others = [answer for answer in by_frequency if answer not in excluded]
    return [right, *others][:MAX_CHOICES] if right else []


def _kind(question: str) -> str:
    """The first two words of a question."""
    return " ".join(question.lower().split()[:2])
