"""Probes beside the main tasks: classes by name, choices, examples in the prompt, rough handling.

Shapes: N samples, C classes, n codes of an image, D dimensions of an embedding.
"""

import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from multimodal.data.images import fit_image, to_tensor
from multimodal.data.samples import Sample
from multimodal.eval.evaluator import Example, PerQuestion, Subject, Value
from multimodal.eval.metrics.answering import normalise, same_answer
from multimodal.eval.metrics.captioning import score_captions
from multimodal.eval.tasks.evaluators import all_asked, is_described
from multimodal.inference.embedding import embed_codes, embed_texts
from multimodal.inference.likelihoods import choice_likelihoods
from multimodal.inference.text import (
    continue_text,
    examples_prompt,
    text_after,
)
from multimodal.model.lessons import LABELS, asked_of, descriptions_of
from multimodal.model.network import Multimodal
from multimodal.model.templates import Templates

CLASS_FIELDS = ("label", "class", "group")  # of a record; true and false label statements
SHOTS = (0, 1, 2, 4)
WORDINGS = ("Question: {text} Answer:", "Q: {text} A:", "{text}", "Please answer. {text} Answer:")
QUESTIONS = 2  # of each image, where images are handled roughly
ANSWERS_AT_MOST = 16  # choices: the commonest answers of that kind of question


def class_of(record: dict[str, Any]) -> str | None:
    names = (str(record[name]) for name in CLASS_FIELDS if name in record)
    return next((name for name in names if name not in LABELS), None)


def zero_shot_classifier(
    model: Multimodal, names: Sequence[str], templates: Sequence[Callable[[str], str]]
) -> Tensor:
    """float32[D, C] of unit columns: the mean embedding of a class in all templates, as open_clip's
    ``build_zero_shot_classifier`` makes it."""
    texts = [template(name) for name in names for template in templates]
    rows = torch.cat([embed_texts(model, texts[i : i + 256]) for i in range(0, len(texts), 256)])
    return F.normalize(rows.view(len(names), len(templates), -1).mean(1), dim=-1).T


@dataclass
class Classification:
    """Which of the classes of the data an image is of, by their names alone."""

    name: ClassVar[str] = "classification"
    protocol: ClassVar[str] = "zero-shot: open_clip's 80 templates for ImageNet, cosine"
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return class_of(sample.record) is not None

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        own = [class_of(sample.record) or "" for sample in subject.samples]
        names = sorted(set(own))
        classifier = zero_shot_classifier(subject.model, names, OPENAI_IMAGENET_TEMPLATES)
        images = subject.rows_over(lambda codes: embed_codes(subject.model, codes), subject.codes)
        ranked = (images @ classifier).argsort(dim=-1, descending=True)
        place = (ranked == torch.tensor([names.index(one) for one in own])[:, None]).int().argmax(1)
        yield "top1", (place < 1).float().tolist()
        yield "top5", (place < 5).float().tolist()
        yield "classes", float(len(names))
        yield "chance", 1 / len(names)
        for sample, row, at, image in zip(
            subject.samples, ranked, place.tolist(), subject.images, strict=True
        ):
            said = f"{names[int(row[0])]} (right: {class_of(sample.record)})"
            self.examples.append(Example(sample.key, said, -float(at), image))


@dataclass
class Choices:
    """Questions and statements by likelihood: which of the usual answers is likeliest."""

    name: ClassVar[str] = "choices"
    protocol: ClassVar[str] = (
        "the likeliest, to its end, of yes and no, true and false, or the answers that questions "
        f"of the same first two words have in these samples (the {ANSWERS_AT_MOST} commonest, the "
        "right one among them); questions that leave no choice are left out, and counted"
    )
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return bool(asked_of(sample.record, Templates()))

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        model = subject.model
        asked = all_asked(subject)
        usual: dict[str, Counter[str]] = {}
        for _, _, question, answer in asked:
            usual.setdefault(_kind(question), Counter())[normalise(answer)] += 1
        every = [(*one, _choices(usual[_kind(one[2])], normalise(one[3]))) for one in asked]
        put = [one for one in every if len(one[-1]) > 1]
        codes = subject.codes

        def found_right(part: Sequence[tuple[int, str, str, str, list[str]]]) -> list[float]:
            rows, prompts, *_, choices = zip(*part, strict=True)
            likely = choice_likelihoods(model, codes[list(rows)], prompts, choices)
            # The right one is first: what is as likely counts against it.
            return [float(found[0] > found[1:].max()) for found in likely]

        if not put:
            return
        right = subject.over(put, found_right)
        chance = [1 / len(choices) for *_, choices in put]
        yield "accuracy", PerQuestion(right, [row for row, *_ in put])
        yield "chance", sum(chance) / len(chance)
        yield "questions", float(len(put))
        yield "without_a_choice", float(len(asked) - len(put))
        for (row, _, question, answer, _), good in zip(put, right, strict=True):
            sample = subject.samples[row]
            said = f"{question} {answer}: {'found' if good else 'not found'}"
            self.examples.append(Example(sample.key, said, good, subject.images[row]))


def _choices(usual: Counter[str], right: str) -> list[str]:
    """The right answer first, then what else it could be; of yes or no, and true or false, both."""
    for both in (("yes", "no"), LABELS):
        if right in both:
            return [right, *(one for one in both if one != right)]
    ordered = sorted(usual, key=lambda one: (-usual[one], one))
    others = [one for one in ordered if one and one != right and one not in ("yes", "no", *LABELS)]
    return [right, *others][:ANSWERS_AT_MOST] if right else []


def _kind(question: str) -> str:
    return " ".join(question.lower().split()[:2])


@dataclass
class FewShot:
    """Captions after examples: other images with their captions before the one that is asked of."""

    name: ClassVar[str] = "few_shot"
    protocol: ClassVar[str] = (
        f"captions after {', '.join(map(str, SHOTS))} examples: the samples that follow in the "
        "data, each with its first caption; greedy, at most 64 tokens"
    )
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return is_described(sample)

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        model, count = subject.model, len(subject.samples)
        v = model.vocabulary
        images = (subject.codes + v.image_start).tolist()
        captions = [descriptions_of(sample.record)[0] for sample in subject.samples]
        truth = {sample.key: descriptions_of(sample.record) for sample in subject.samples}
        limit = model.config.transformer.max_position_embeddings
        each: dict[str, dict[str, float]] = {}
        found = dict[str, str]()
        for shots in (shots for shots in SHOTS if shots < count):
            prompts = [
                [
                    *examples_prompt(model, [
                        (subject.codes[other % count], captions[other % count])
                        for other in range(row + 1, row + 1 + shots)
                    ]),
                    v.boi, *images[row], v.eoi,
                ]
                for row in range(count)
            ]  # fmt: skip
            if max(map(len, prompts)) + 64 > limit:
                break  # more examples than the model reads
            said = subject.over(prompts, lambda some: continue_text(model, list(some), 64))
            found = {
                sample.key: model.text_tokenizer.decode(text).strip()
                for sample, text in zip(subject.samples, said, strict=True)
            }
            each = score_captions(found, truth)["per_image"]
            yield f"CIDEr_{shots}", [each[key]["CIDEr"] for key in truth]
        for sample, image in zip(subject.samples, subject.images, strict=True):
            if sample.key in each:
                score = each[sample.key]["CIDEr"]
                self.examples.append(Example(sample.key, found[sample.key], score, image))


def noisy(image: Image.Image, seed: int) -> Image.Image:
    """Gaussian noise of a tenth of the range."""
    noise = 25.5 * torch.randn(
        image.height, image.width, 3, generator=torch.Generator().manual_seed(seed)
    )
    pixels = (to_tensor(image).permute(1, 2, 0) + 1) * 127.5
    return Image.fromarray((pixels + noise).clamp(0, 255).byte().numpy())


def blurred(image: Image.Image, seed: int) -> Image.Image:
    """A Gaussian blur of a fortieth of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(min(image.size) / 40))


def compressed(image: Image.Image, seed: int) -> Image.Image:
    """JPEG of quality 10."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=10)
    with Image.open(file) as again:
        return again.convert("RGB")


def occluded(image: Image.Image, seed: int) -> Image.Image:
    """A grey square of a sixteenth of the picture, anywhere."""
    side = max(1, min(image.size) // 4)
    generator = torch.Generator().manual_seed(seed)
    x, y = (int(torch.randint(size - side + 1, (), generator=generator)) for size in image.size)
    whole = image.copy()
    whole.paste((128, 128, 128), (x, y, x + side, y + side))
    return whole


HANDLED: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "noise": noisy, "blur": blurred, "jpeg": compressed, "occlusion": occluded
}  # fmt: skip


@dataclass
class Robustness:
    """The same questions in other words, and about images that were handled roughly."""

    name: ClassVar[str] = "robustness"
    protocol: ClassVar[str] = (
        f"answers as in answers, to the first {QUESTIONS} questions of each; in other words: "
        + ", ".join(WORDINGS)
        + "; images at the model's size with noise of a tenth of the range, blurred by a fortieth "
        "of the side, as JPEG of quality 10, with a grey square of a sixteenth"
    )
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return bool(sample.record.get("qa"))

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        model = subject.model
        pairs = [
            (row, str(question), str(answer))
            for row, sample in enumerate(subject.samples)
            for question, answer in sample.record["qa"][:QUESTIONS]
        ]
        config = model.image_tokenizer.config
        fitted = [fit_image(image, config.image_size, config.fit) for image in subject.images]

        def accuracy(codes: Tensor, wording: str) -> list[float]:
            templates = replace(model.config.templates, question=wording)

            def right(part: Sequence[tuple[int, str, str]]) -> list[float]:
                prompts = [templates.ask(question) for _, question, _ in part]
                found = text_after(model, codes[[row for row, _, _ in part]], prompts, 16)
                return [float(same_answer(text, answer))
                        for text, (_, _, answer) in zip(found, part, strict=True)]  # fmt: skip

            return subject.over(pairs, right)

        owners = [row for row, _, _ in pairs]
        own = model.config.templates.question
        plain = accuracy(subject.codes, own)
        yield "plain", PerQuestion(plain, owners)
        means = [sum(plain) / len(plain)]
        for wording in WORDINGS:
            if wording != own:
                values = accuracy(subject.codes, wording)
                means.append(sum(values) / len(values))
                yield f"asked: {wording}", PerQuestion(values, owners)
        yield "spread of wordings", max(means) - min(means)
        for name, handle in HANDLED.items():
            pixels = torch.stack([
                to_tensor(handle(image, subject.seed + row)) for row, image in enumerate(fitted)
            ])  # fmt: skip
            yield name, PerQuestion(accuracy(subject.encoded(pixels), own), owners)
