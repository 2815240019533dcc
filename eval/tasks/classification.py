"""Classification: the class of an image, by the names of the classes alone.

The prompts are open_clip's 80 templates for ImageNet ("a photo of a {}."), averaged as in CLIP
(Radford et al. 2021, arXiv:2103.00020).

Shapes: C classes, D dimensions of an embedding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.api import Model
from multimodal.data.samples import Sample
from multimodal.eval.evaluator import Example, Subject, Value
from multimodal.inference.embedding import embed_codes, embed_texts
from multimodal.model.lessons import LABELS

CLASS_FIELDS = ("label", "class", "group")  # of a record
TEXTS_PER_BATCH = 256


def class_of(record: dict[str, Any]) -> str | None:
    """The name of a record's class in words. The labels true and false are not classes.

    A field that is null or empty is none.
    """
    values = (record.get(name) for name in CLASS_FIELDS)
    names = (str(value) for value in values if value not in (None, ""))
    return next((name.replace("_", " ") for name in names if name not in LABELS), None)


def zero_shot_classifier(
    model: Model, names: Sequence[str], templates: Sequence[Callable[[str], str]]
) -> Tensor:
    """The mean embedding of each class name in all templates.

    It is equal to ``build_zero_shot_classifier`` of open_clip.

    Args:
        model: embeds texts.
        names: C class names.
        templates: class name -> text.

    Returns:
        float32[D, C], columns of unit norm.
    """
    texts = [template(name) for name in names for template in templates]
    starts = range(0, len(texts), TEXTS_PER_BATCH)
    rows = torch.cat([embed_texts(model, texts[i : i + TEXTS_PER_BATCH]) for i in starts])
    return F.normalize(rows.view(len(names), len(templates), -1).mean(1), dim=-1).T


@dataclass
class Classification:
    """Which class of the data an image has, by the names of the classes alone."""

    name: ClassVar[str] = "classification"
    protocol: ClassVar[str] = (
        "zero-shot: open_clip's 80 templates for ImageNet, cosine; the classes are those of the "
        "samples and of the training split"
    )
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return class_of(sample.record) is not None

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        classes = [class_of(sample.record) or "" for sample in subject.samples]
        # Few samples may show few of the classes, and fewer classes are easier to tell apart.
        others = (class_of(record) for _, record in subject.training_records())
        names = sorted({*classes, *(name for name in others if name is not None)})
        classifier = zero_shot_classifier(subject.model, names, OPENAI_IMAGENET_TEMPLATES)
        images = subject.map_rows(lambda codes: embed_codes(subject.model, codes), subject.codes)
        ranking = (images @ classifier).argsort(dim=-1, descending=True)
        targets = torch.tensor([names.index(name) for name in classes])
        ranks = (ranking == targets[:, None]).int().argmax(1)
        yield "top1", (ranks < 1).float().tolist()
        yield "top5", (ranks < 5).float().tolist()
        yield "classes", float(len(names))
        yield "chance", 1 / len(names)
        for sample, row, rank, image in zip(
            subject.samples, ranking, ranks.tolist(), subject.images, strict=True
        ):
            text = f"{names[int(row[0])]} (right: {class_of(sample.record)})"
            self.examples.append(Example(sample.key, text, -float(rank), image))
