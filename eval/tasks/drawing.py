"""Drawing: pictures drawn after captions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from multimodal.data.images import to_image
from multimodal.data.samples import Sample
from multimodal.eval.evaluator import Example, Subject, Value
from multimodal.eval.metrics.distribution import score_distribution
from multimodal.eval.metrics.features import Features
from multimodal.inference.codec import decode_images
from multimodal.inference.drawing import draw_codes
from multimodal.inference.embedding import embed_codes, embed_texts
from multimodal.model.lessons import descriptions_of
from multimodal.options import DrawOptions

DEFAULT = DrawOptions()
DRAWING = (
    f"drawn code by code, guidance {DEFAULT.guidance_scale:g}, temperature {DEFAULT.temperature}"
)


def draw(subject: Subject, texts: Sequence[str], options: DrawOptions) -> Tensor:
    """The codes of a drawing for each text: int64[len(texts), n].

    A drawing depends on its text, its number and the seed, but not on the batch size.
    """
    codes = subject.map_batches(
        range(len(texts)),
        lambda rows: list(
            draw_codes(subject.model, [texts[row] for row in rows], options, numbers=rows)
        ),
    )
    return torch.stack(codes)


@dataclass
class Drawing:
    """Drawings after captions, by the model's alignment score, FID, KID and CLIPScore."""

    name: ClassVar[str] = "drawing"
    draws: ClassVar[bool] = True
    protocol: ClassVar[str] = (
        f"{DRAWING}, after the first caption; own_alignment: the product of the model's embeddings "
        "of caption and drawing; fid and kid compare the drawings, and the true pictures encoded "
        "and decoded, with the true pictures; their features are random, of seed 0, so they "
        "compare with each other but not with published values"
    )
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return bool(descriptions_of(sample.record))

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        model = subject.model
        texts = [descriptions_of(sample.record)[0] for sample in subject.samples]
        codes = draw(subject, texts, DrawOptions(seed=subject.seed))
        embeddings = torch.stack(
            subject.map_batches(texts, lambda batch: list(embed_texts(model, batch)))
        )
        alignment, true_alignment = (
            (subject.map_rows(lambda batch: embed_codes(model, batch), rows) * embeddings)
            .sum(-1)
            .tolist()
            for rows in (codes, subject.codes)
        )
        drawn, reconstructed = (
            subject.map_rows(lambda batch: decode_images(model, batch), rows)
            for rows in (codes, subject.codes)
        )
        for suffix, pixels in (("", drawn), ("_of_reconstructions", reconstructed)):
            scores = score_distribution(pixels, subject.pixels, Features(), subject.seed)
            for name, value in scores.items():
                yield f"{name}_random_features{suffix}", value
        yield "own_alignment", alignment
        yield "own_alignment_of_true_images", true_alignment
        drawings = [to_image(image) for image in drawn]
        if (clip := subject.clip) is not None:
            for name, images in (
                ("clip_score", drawings),
                ("clip_score_of_true_images", subject.originals),
            ):

                def scores_of(
                    rows: Sequence[int], images: Sequence[Image.Image] = images
                ) -> list[float]:
                    return clip([images[row] for row in rows], [texts[row] for row in rows])

                yield name, subject.map_batches(range(len(texts)), scores_of)
        for sample, text, image, score in zip(
            subject.samples, texts, drawings, alignment, strict=True
        ):
            self.examples.append(Example(sample.key, text, score, image))
