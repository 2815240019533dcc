"""Answers to questions about synthetic scenes, in wordings that training never has."""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from multimodal.data.samples import Sample
from multimodal.eval.evaluator import Example, PerQuestion, Subject, Value
from multimodal.eval.metrics.answering import same_answer
from multimodal.eval.tasks.answers import SHORT_ANSWER
from multimodal.inference.text import complete_prompts
from multimodal.scenes.questions import draw_questions
from multimodal.scenes.scene import Scene, scene_of
from multimodal.scenes.wordings import UNSEEN_WORDINGS

QUESTIONS_EACH = 3


class WordedQuestion(NamedTuple):
    """A question about a scene in one wording.

    row: number of the sample. number: of the question, the same in all its wordings.
    """

    row: int
    number: int
    kind: str
    text: str
    answer: str


@dataclass
class SceneAnswers:
    """Accuracy on the same questions in unseen wordings and in the usual one."""

    name: ClassVar[str] = "scene_answers"
    protocol: ClassVar[str] = (
        f"{QUESTIONS_EACH} new questions a scene, each in all unseen wordings of its kind; answers "
        "as in answers; all_wordings: questions that are right in each of them; usual: the same "
        "questions in the usual wording; KIND: in unseen wordings"
    )
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return scene_of(sample.record) is not None

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        model, codes, templates = subject.model, subject.codes, subject.model.config.templates
        usual: list[WordedQuestion] = []
        reworded: list[WordedQuestion] = []
        for row, sample in enumerate(subject.samples):
            rng = random.Random(f"scene answers/{subject.seed}/{sample.key}")
            scene = Scene.from_json(sample.record["scene"])
            for question in draw_questions(scene, rng, QUESTIONS_EACH):
                about = (row, len(usual), question.kind)
                usual.append(WordedQuestion(*about, question.usual, question.answer))
                reworded += [
                    WordedQuestion(*about, question.worded(wording, rng), question.answer)
                    for wording in UNSEEN_WORDINGS[question.kind]
                ]

        def answer(batch: Sequence[WordedQuestion]) -> list[str]:
            prompts = [templates.ask(question.text) for question in batch]
            rows = [question.row for question in batch]
            return complete_prompts(model, codes[rows], prompts, SHORT_ANSWER)

        def is_right(questions: Sequence[WordedQuestion], answers: Sequence[str]) -> list[float]:
            pairs = zip(questions, answers, strict=True)
            return [float(same_answer(question.answer, text)) for question, text in pairs]

        answers = subject.map_batches(reworded, answer)
        right = is_right(reworded, answers)
        yield "accuracy", PerQuestion(right, [asked.row for asked in reworded])
        of_question, of_kind = defaultdict[int, list[float]](list), defaultdict(list)
        for asked, value in zip(reworded, right, strict=True):
            of_question[asked.number].append(value)
            of_kind[asked.kind].append(value)
        rows = [asked.row for asked in usual]
        yield "all_wordings", PerQuestion([min(each) for each in of_question.values()], rows)
        yield "usual", PerQuestion(is_right(usual, subject.map_batches(usual, answer)), rows)
        for kind in UNSEEN_WORDINGS:
            if kind in of_kind:
                yield kind, sum(of_kind[kind]) / len(of_kind[kind])
        for asked, text, value in zip(reworded, answers, right, strict=True):
            more = "" if value else f" (right: {asked.answer})"
            sample, image = subject.samples[asked.row], subject.images[asked.row]
            self.examples.append(Example(sample.key, f"{asked.text} {text}{more}", value, image))
