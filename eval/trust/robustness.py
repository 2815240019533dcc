"""Robustness: the same questions in other words, and about degraded images."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from PIL import Image, ImageFilter
from torch import Tensor

from multimodal.data.images import fit_image, to_tensor
from multimodal.data.samples import Sample
from multimodal.eval.evaluator import Example, PerQuestion, Subject, Value
from multimodal.eval.metrics.answering import same_answer
from multimodal.eval.tasks.answers import SHORT_ANSWER
from multimodal.inference.text import complete_prompts

WORDINGS = ("Question: {text} Answer:", "Q: {text} A:", "{text}", "Please answer. {text} Answer:")
MAX_QUESTIONS = 2  # per image


def noisy(image: Image.Image, seed: int) -> Image.Image:
    """Gaussian noise with a standard deviation of a tenth of the range."""
    noise = 25.5 * torch.randn(
        image.height, image.width, 3, generator=torch.Generator().manual_seed(seed)
    )
    pixels = (to_tensor(image).permute(1, 2, 0) + 1) * 127.5
    return Image.fromarray((pixels + noise).clamp(0, 255).byte().numpy())


def blurred(image: Image.Image, seed: int) -> Image.Image:
    """Gaussian blur with a radius of a fortieth of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(min(image.size) / 40))


def compressed(image: Image.Image, seed: int) -> Image.Image:
    """JPEG of quality 10."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=10)
    with Image.open(file) as reopened:
        return reopened.convert("RGB")


def occluded(image: Image.Image, seed: int) -> Image.Image:
    """A grey square at a random position, with a quarter of the shorter side per side."""
    side = max(1, min(image.size) // 4)
    generator = torch.Generator().manual_seed(seed)
    x, y = (int(torch.randint(size - side + 1, (), generator=generator)) for size in image.size)
    copy = image.copy()
    copy.paste((128, 128, 128), (x, y, x + side, y + side))
    return copy


DEGRADATIONS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "noise": noisy,
    "blur": blurred,
    "jpeg": compressed,
    "occlusion": occluded,
}


class _Question(NamedTuple):
    row: int  # number of the sample
    text: str
    answer: str


@dataclass
class Robustness:
    """Accuracy with other wordings, and with degraded images."""

    name: ClassVar[str] = "robustness"
    protocol: ClassVar[str] = (
        f"answers as in answers, to the first {MAX_QUESTIONS} questions of each image; wordings: "
        + ", ".join(WORDINGS)
        + "; images at the model's size with noise of a tenth of the range, a blur of a fortieth "
        "of the side, JPEG of quality 10, or a grey square of a sixteenth of the area"
    )
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return bool(sample.record.get("qa"))

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        model = subject.model
        questions = [
            _Question(row, str(question), str(answer))
            for row, sample in enumerate(subject.samples)
            for question, answer in sample.record["qa"][:MAX_QUESTIONS]
        ]

        def accuracy(codes: Tensor, wording: str) -> list[float]:
            templates = replace(model.config.templates, question=wording)

            def is_right(batch: Sequence[_Question]) -> list[float]:
                prompts = [templates.ask(question.text) for question in batch]
                rows = [question.row for question in batch]
                texts = complete_prompts(model, codes[rows], prompts, SHORT_ANSWER)
                return [
                    float(same_answer(question.answer, text))
                    for text, question in zip(texts, batch, strict=True)
                ]

            return subject.map_batches(questions, is_right)

        rows = [question.row for question in questions]
        model_wording = model.config.templates.question
        plain = accuracy(subject.codes, model_wording)
        yield "plain", PerQuestion(plain, rows)
        means = [sum(plain) / len(plain)]
        for wording in WORDINGS:
            if wording != model_wording:
                values = accuracy(subject.codes, wording)
                means.append(sum(values) / len(values))
                yield f"asked: {wording}", PerQuestion(values, rows)
        yield "spread of wordings", max(means) - min(means)
        size, fit = model.image_tokenizer.image_size, model.image_tokenizer.fit
        fitted = [fit_image(image, size, fit) for image in subject.originals]
        for name, degrade in DEGRADATIONS.items():
            images = [degrade(image, subject.seed + row) for row, image in enumerate(fitted)]
            codes = subject.encode(torch.stack([to_tensor(image) for image in images]))
            yield name, PerQuestion(accuracy(codes, model_wording), rows)
