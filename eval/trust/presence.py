"""Presence: does the model know which objects an image contains?

POPE (Li et al. 2023, arXiv:2305.10355) asks as many questions about present objects as about absent
ones. The absent ones come in three sets: random, the most frequent in the data, and those that most
often occur together with the present ones. A model that only knows how frequent objects are fails
the last two sets.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import ClassVar, NamedTuple

from multimodal.data.objects import named_objects, presence_question
from multimodal.data.samples import Sample
from multimodal.eval.evaluator import Example, PerQuestion, Subject, Value
from multimodal.inference.likelihoods import choice_likelihoods
from multimodal.model.lessons import descriptions_of

MAX_PRESENT = 3  # present objects per image in questions, and as many absent ones


class PresenceQuestion(NamedTuple):
    """row: number of the sample. present: the right answer is yes."""

    row: int
    object_name: str
    present: bool


def absent_objects(present: Sequence[set[str]], rng: random.Random) -> dict[str, list[list[str]]]:
    """Objects that images do not contain.

    Args:
        present: the objects of each image.
        rng: of the random set.

    Returns:
        "random", "popular" and "adversarial" -> for each image, all objects of other images that it
        does not contain, in the order in which they are asked about.
    """
    frequency = Counter(name for names in present for name in sorted(names))
    together = Counter(pair for names in present for pair in permutations(sorted(names), 2))
    result: dict[str, list[list[str]]] = {"random": [], "popular": [], "adversarial": []}
    for names in present:
        absent = sorted(set(frequency) - names)
        result["random"].append(rng.sample(absent, len(absent)))
        result["popular"].append(sorted(absent, key=lambda name: -frequency[name]))
        result["adversarial"].append(
            sorted(absent, key=lambda name: -sum(together[other, name] for other in names))
        )
    return result


@dataclass
class Presence:
    """Yes or no to "is there a X?", about objects that references name and about others."""

    name: ClassVar[str] = "presence"
    protocol: ClassVar[str] = (
        "POPE: is there a X, the more likely of yes and no; for each image at most "
        f"{MAX_PRESENT} objects that a reference names, and as many absent ones: random, the most "
        "frequent, and those that most often occur together with the present ones; chance: always "
        "the answer that is right more often"
    )
    examples: list[Example] = field(default_factory=list)

    def objects_of(self, sample: Sample) -> set[str]:
        """The objects that an image contains."""
        return named_objects(" ".join(descriptions_of(sample.record)))

    def fits(self, sample: Sample) -> bool:
        return bool(self.objects_of(sample))

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        model, codes = subject.model, subject.codes
        present = [self.objects_of(sample) for sample in subject.samples]
        rng = random.Random(f"presence/{subject.seed}")
        absent = absent_objects(present, rng)
        picked = [rng.sample(sorted(names), min(MAX_PRESENT, len(names))) for names in present]
        about_present = [
            PresenceQuestion(row, name, True) for row, names in enumerate(picked) for name in names
        ]

        def says_yes(batch: Sequence[PresenceQuestion]) -> list[bool]:
            templates = model.config.templates
            prompts = [templates.ask(presence_question(question.object_name)) for question in batch]
            rows = [question.row for question in batch]
            choices = [("yes", "no")] * len(batch)
            likelihoods = choice_likelihoods(model, codes[rows], prompts, choices)
            return [bool(yes > no) for yes, no in likelihoods]

        present_yes = subject.map_batches(about_present, says_yes)
        for name, absent_of in absent.items():
            about_absent = [
                PresenceQuestion(row, other, False)
                for row, others in enumerate(absent_of)
                for other in others[: len(picked[row])]
            ]
            absent_yes = subject.map_batches(about_absent, says_yes)
            questions, answers = about_present + about_absent, present_yes + absent_yes
            right = [
                float(yes == question.present)
                for question, yes in zip(questions, answers, strict=True)
            ]
            yield f"{name}_accuracy", PerQuestion(right, [question.row for question in questions])
            present_share = len(about_present) / len(questions)
            yield f"{name}_chance", max(present_share, 1 - present_share)
            yield f"{name}_says_yes", sum(answers) / len(answers)
            yield f"{name}_questions", float(len(answers))
            f1 = 2 * sum(present_yes) / max(1, len(about_present) + sum(answers))
            yield f"{name}_f1", f1
        # Examples are of the last set, the hardest one.
        for question, yes in zip(about_absent, absent_yes, strict=True):
            text = f"{presence_question(question.object_name)} {'yes (right: no)' if yes else 'no'}"
            sample, image = subject.samples[question.row], subject.images[question.row]
            self.examples.append(Example(sample.key, text, float(not yes), image))
