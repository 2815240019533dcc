"""Retrieval: the image that a text describes among all images, and the reverse."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from multimodal.data.samples import Sample
from multimodal.eval.evaluator import Example, PerQuestion, Subject, Value
from multimodal.eval.metrics.retrieval import KS, count_ahead
from multimodal.inference.embedding import embed_codes, embed_texts
from multimodal.model.lessons import descriptions_of


@dataclass
class Retrieval:
    """Recall of images by text, and of texts by image."""

    name: ClassVar[str] = "retrieval"
    protocol: ClassVar[str] = "every caption with every image; ties count against the model"
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return bool(descriptions_of(sample.record))

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        model = subject.model
        images = subject.map_rows(lambda codes: embed_codes(model, codes), subject.codes)
        texts, image_of_text = list[str](), list[int]()
        for row, sample in enumerate(subject.samples):
            captions = descriptions_of(sample.record)
            texts += captions
            image_of_text += [row] * len(captions)
        text_rows = torch.stack(
            subject.map_batches(texts, lambda batch: list(embed_texts(model, batch)))
        )
        ahead_of_image, ahead_of_text = count_ahead(images, text_rows, image_of_text)
        for k in KS:
            found = (ahead_of_image < k).float().tolist()
            yield f"text_to_image@{k}", PerQuestion(found, image_of_text)
            yield f"image_to_text@{k}", (ahead_of_text < k).float().tolist()
        ranks = ahead_of_image + 1
        yield "text_to_image_median_rank", float(ranks.float().median())
        yield "images", float(len(images))
