"""Drawings of synthetic scenes, read off their pixels by program."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from PIL import Image
from torch import Tensor

from multimodal.data.images import to_image
from multimodal.data.samples import Sample
from multimodal.eval.evaluator import Example, Subject, Value, value_of
from multimodal.eval.metrics.scene_drawings import (
    complete_caption,
    judge_drawn_claims,
    judge_scene_drawings,
    score_scene_drawings,
)
from multimodal.eval.tasks.drawing import DRAWING, draw
from multimodal.inference.codec import decode_images
from multimodal.options import DrawOptions


@dataclass
class SceneDrawings:
    """Which objects and claims of captions the drawings show."""

    name: ClassVar[str] = "scene_drawings"
    draws: ClassVar[bool] = True
    protocol: ClassVar[str] = (
        f"{DRAWING}, after the first caption that names all objects; objects and claims are read "
        f"off the pixels by program; masked: drawn in {DrawOptions().steps} steps; "
        "of_reconstructions: the true pictures, encoded and decoded"
    )
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return complete_caption(sample.record) is not None

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        texts = [complete_caption(sample.record) or "" for sample in subject.samples]
        options = DrawOptions(seed=subject.seed)
        masked_options = DrawOptions(seed=subject.seed, method="masked")

        def pictures(codes: Tensor) -> list[Image.Image]:
            pixels = subject.map_rows(lambda batch: decode_images(subject.model, batch), codes)
            return [to_image(image) for image in pixels]

        drawings = pictures(draw(subject, texts, options))
        scores = judge_scene_drawings(texts, drawings)
        best = judge_scene_drawings(texts, pictures(subject.codes))
        for name in ("objects", "colours", "extra"):
            yield name, value_of(scores[name])
            yield f"{name}_of_reconstructions", value_of(best[name])
        masked = judge_scene_drawings(texts, pictures(draw(subject, texts, masked_options)))
        for name in ("objects", "colours"):
            yield f"{name}_masked", value_of(masked[name])
        yield "objects_asked", float(len(scores["objects"].values))
        for kind, claims in judge_drawn_claims(texts, drawings).items():
            yield f"{kind}_true", value_of(claims)
            yield f"{kind}_claims", float(len(claims.values))
        for sample, text, drawing in zip(subject.samples, texts, drawings, strict=True):
            quality = score_scene_drawings([text], [drawing])["objects"]
            self.examples.append(Example(sample.key, text, quality, drawing))
