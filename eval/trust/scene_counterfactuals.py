"""Counterfactual pairs of scenes: one attribute changes, and the rest of what is said must stay."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from multimodal.data.images import fit_image, to_tensor
from multimodal.data.samples import Sample
from multimodal.eval.evaluator import Example, PerQuestion, Subject, Value
from multimodal.eval.metrics.answering import same_answer
from multimodal.eval.tasks.answers import SHORT_ANSWER
from multimodal.inference.text import caption_codes, complete_prompts
from multimodal.model.checkpoint import ModelParts
from multimodal.scenes.checking import check_caption
from multimodal.scenes.claims import ATTRIBUTES
from multimodal.scenes.counterfactuals import CHANGES, change, common_questions, concerns
from multimodal.scenes.facts import Fact
from multimodal.scenes.rendering import render
from multimodal.scenes.scene import Scene, scene_of

SAME_EACH, OTHER_EACH = 3, 1  # questions a pair whose answer stays, and whose answer changes


class ScenePair(NamedTuple):
    """row: number of the sample. kind: of the change. number: of the changed object, if one is."""

    row: int
    kind: str
    scenes: tuple[Scene, Scene]
    number: int | None


class PairQuestion(NamedTuple):
    """A question about both scenes. pair: number of the pair. right: both answers."""

    pair: int
    text: str
    right: tuple[str, str]

    @property
    def stays(self) -> bool:
        return self.right[0] == self.right[1]


@dataclass
class SceneCounterfactuals:
    """What changes in answers and captions if one attribute of a scene changes."""

    name: ClassVar[str] = "scene_counterfactuals"
    from_codes: ClassVar[bool] = True  # it draws its own pictures
    protocol: ClassVar[str] = (
        f"each scene beside itself with one thing changed: {', '.join(CHANGES)}, in turn; at most "
        f"{SAME_EACH} questions whose answer stays and {OTHER_EACH} whose answer changes, in the "
        "usual wording, answers as in answers; stays: the same answer to both pictures, right or "
        "wrong; stays_right: and right; follows: the answer changes, and both are right; "
        "caption_stays: attributes of everything else that both captions name, named alike; all "
        "computed from the scenes"
    )
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return scene_of(sample.record) is not None

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        model, templates = subject.model, subject.model.config.templates
        pairs, questions = make_pairs(subject.samples, subject.seed)
        size, fit = model.image_tokenizer.image_size, model.image_tokenizer.fit
        pictures = [[render(scene, size) for scene in pair.scenes] for pair in pairs]
        codes = [
            subject.encode(torch.stack([to_tensor(fit_image(p[n], size, fit)) for p in pictures]))
            for n in (0, 1)
        ]

        def answers(which: int) -> list[str]:
            def answer(batch: Sequence[PairQuestion]) -> list[str]:
                prompts = [templates.ask(question.text) for question in batch]
                rows = [question.pair for question in batch]
                return complete_prompts(model, codes[which][rows], prompts, SHORT_ANSWER)

            return subject.map_batches(questions, answer)

        answered = list(zip(answers(0), answers(1), strict=True))

        def shares(
            name: str, kind: str | None, of_stays: bool, holds: Sequence[bool]
        ) -> Iterator[tuple[str, Value]]:
            chosen = [
                (float(held), pairs[question.pair].row)
                for question, held in zip(questions, holds, strict=True)
                if question.stays == of_stays and kind in (None, pairs[question.pair].kind)
            ]
            if chosen:
                values, rows = zip(*chosen, strict=True)
                yield name, PerQuestion(values, rows)

        same = [same_answer(*given) for given in answered]
        right = [
            all(same_answer(*each) for each in zip(question.right, given, strict=True))
            for question, given in zip(questions, answered, strict=True)
        ]
        yield from shares("stays", None, True, same)
        yield from shares("stays_right", None, True, right)
        yield from shares("follows", None, False, right)
        for kind in CHANGES:
            yield from shares(f"{kind}_stays", kind, True, same)
            yield from shares(f"{kind}_follows", kind, False, right)
        captions = [
            subject.map_batches(range(len(pairs)), partial(_caption, model, codes[n]))
            for n in (0, 1)
        ]
        kept = [
            (float(value), pair.row)
            for pair, *texts in zip(pairs, *captions, strict=True)
            for value in same_in_both(pair, texts)
        ]
        if kept:
            values, rows = zip(*kept, strict=True)
            yield "caption_stays", PerQuestion(values, rows)
        for question, given, is_same, is_right in zip(
            questions, answered, same, right, strict=True
        ):
            pair = pairs[question.pair]
            good = is_same if question.stays else is_right
            text = (
                f"{pair.kind}: {question.text} {' / '.join(given)} | {' / '.join(question.right)}"
            )
            key = subject.samples[pair.row].key
            self.examples.append(Example(key, text, float(good), beside(*pictures[question.pair])))


def _caption(model: ModelParts, codes: Tensor, batch: Sequence[int]) -> list[str]:
    return caption_codes(model, codes[list(batch)])


def make_pairs(samples: Sequence[Sample], seed: int) -> tuple[list[ScenePair], list[PairQuestion]]:
    """A pair for each sample, the kinds of changes in turn, and the questions about them."""
    pairs: list[ScenePair] = []
    questions: list[PairQuestion] = []
    for row, sample in enumerate(samples):
        rng = random.Random(f"counterfactuals/{seed}/{sample.key}")
        scene = Scene.from_json(sample.record["scene"])
        turn = row % len(CHANGES)
        for kind in (*CHANGES[turn:], *CHANGES[:turn]):  # not every scene has a size to change
            if changed := change(scene, kind, rng):
                other, number = changed
                break
        about_both = [
            PairQuestion(len(pairs), first.usual, (first.answer, second.answer))
            for first, second in common_questions(scene, other, rng)
        ]
        questions += [question for question in about_both if question.stays][:SAME_EACH]
        questions += [question for question in about_both if not question.stays][:OTHER_EACH]
        pairs.append(ScenePair(row, kind, (scene, other), number))
    return pairs, questions


def same_in_both(pair: ScenePair, captions: Sequence[str]) -> list[bool]:
    """For each attribute of everything else that both captions name: whether they name it alike."""
    first, second = (
        _attributes(text, scene) for text, scene in zip(captions, pair.scenes, strict=True)
    )
    return [
        first[fact] == second[fact]
        for fact in first.keys() & second.keys()
        if not concerns(fact, pair.kind, pair.number)
    ]


def _attributes(caption: str, scene: Scene) -> dict[Fact, str]:
    """The attributes of objects and the background that a caption names, true or not."""
    score = check_caption(caption, scene)
    said: dict[Fact, str] = {}
    for claim, _ in score.results:
        if claim.kind == "background":
            said["background", frozenset()] = claim.value
        elif claim.kind in ATTRIBUTES and claim.subject[0] in score.items:
            said[claim.kind, frozenset({score.items[claim.subject[0]]})] = claim.value
    return said


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Both pictures in one."""
    both = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both
