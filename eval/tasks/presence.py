"""Is there a X? What a model takes to be in an image, probed by yes and no.

POPE (Li et al. 2023, arXiv:2305.10355): as many questions about things that are there as about
others, in three sets: others drawn at random, the commonest of the data, and those that most often
stand beside what is there. A model that hears only how likely things are fails the last two.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import ClassVar

from multimodal.data.samples import Sample
from multimodal.eval.evaluator import Example, PerQuestion, Subject, Value
from multimodal.eval.metrics.objects import objects_said
from multimodal.eval.tasks.evaluators import is_described, scene_of
from multimodal.inference.likelihoods import choice_likelihoods
from multimodal.model.lessons import descriptions_of
from multimodal.scenes.words import with_article

AT_MOST = 3  # things of an image that are asked for, and as many that are not there
Asked = tuple[int, str, bool]  # number of the sample, the thing, whether it is there


def things_of(sample: Sample) -> set[str]:
    """Scenes: the shapes that are there; photos: what their references name."""
    if (scene := scene_of(sample)) is not None:
        return {item.shape for item in scene.objects}
    return objects_said(" ".join(descriptions_of(sample.record)))


def negatives(there: Sequence[set[str]], rng: random.Random) -> dict[str, list[list[str]]]:
    """Of each set, for each image, what is not there, in the order in which it is asked for."""
    common = Counter(thing for some in there for thing in sorted(some))
    beside = Counter(pair for some in there for pair in permutations(sorted(some), 2))
    found: dict[str, list[list[str]]] = {"random": [], "popular": [], "adversarial": []}
    for some in there:
        absent = sorted(set(common) - some)
        found["random"].append(rng.sample(absent, len(absent)))
        found["popular"].append(sorted(absent, key=lambda thing: -common[thing]))
        found["adversarial"].append(
            sorted(absent, key=lambda thing: -sum(beside[one, thing] for one in some))
        )
    return found


@dataclass
class Presence:
    """Whether the model knows what is there from what might be."""

    name: ClassVar[str] = "presence"
    protocol: ClassVar[str] = (
        f"POPE: is there a X, the likelier of yes and no; of each image at most {AT_MOST} things "
        "that are there (scenes: shapes; photos: what a reference names) and as many others: at "
        "random, the commonest, and those that most often stand beside what is there"
    )
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return is_described(sample) and bool(things_of(sample))

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        model, codes = subject.model, subject.codes
        there = [things_of(sample) for sample in subject.samples]
        rng = random.Random(f"presence/{subject.seed}")
        absent = negatives(there, rng)
        present = [rng.sample(sorted(some), min(AT_MOST, len(some))) for some in there]
        sets: dict[str, list[Asked]] = {"there": []}
        for row, things in enumerate(present):
            sets["there"] += [(row, thing, True) for thing in things]
        for name, others in absent.items():
            sets[name] = [
                (row, thing, False)
                for row, (things, some) in enumerate(zip(present, others, strict=True))
                for thing in some[: len(things)]
            ]

        def says_yes(part: Sequence[Asked]) -> list[bool]:
            words = model.config.templates
            prompts = [words.ask(f"is there {with_article(thing)}?") for _, thing, _ in part]
            rows = [row for row, _, _ in part]
            likely = choice_likelihoods(model, codes[rows], prompts, [("yes", "no")] * len(part))
            return [bool(yes > no) for yes, no in likely]

        said = {name: subject.over(asked, says_yes) for name, asked in sets.items()}
        for name in absent:
            both = [*zip(sets["there"], said["there"], strict=True),
                    *zip(sets[name], said[name], strict=True)]  # fmt: skip
            right = [float(yes == true) for (_, _, true), yes in both]
            yield f"{name}_accuracy", PerQuestion(right, [row for (row, _, _), _ in both])
            yield f"{name}_says_yes", sum(yes for _, yes in both) / len(both)
            yield f"{name}_questions", float(len(both))
            hits = sum(yes for (_, _, true), yes in both if true)
            yield f"{name}_f1", 2 * hits / max(1, len(sets["there"]) + sum(yes for _, yes in both))
        for (row, thing, _), yes in zip(sets["adversarial"], said["adversarial"], strict=True):
            text = f"is there {with_article(thing)}? {'yes (right: no)' if yes else 'no'}"
            key, image = subject.samples[row].key, subject.images[row]
            self.examples.append(Example(key, text, float(not yes), image))
