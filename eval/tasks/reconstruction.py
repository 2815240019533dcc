"""Reconstruction: what an image tokenizer preserves of images."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from multimodal.data.images import to_image
from multimodal.data.samples import Sample
from multimodal.eval.evaluator import Example, Subject, Value, is_one_image
from multimodal.eval.metrics.features import Features
from multimodal.eval.metrics.reconstruction import ReconstructionScores
from multimodal.tokenizers.image import ImageTokenizer
from multimodal.tokenizers.weights import resize


@torch.inference_mode()
def score_tokenizer(
    tokenizer: ImageTokenizer,
    images: Tensor,
    features: Features,
    batch_size: int = 64,
    keep: int = 0,
    on_batch: Callable[[int], object] = lambda count: None,
    side: int = 0,
) -> tuple[ReconstructionScores, Tensor]:
    """Encode and decode images, and score the result.

    Images are resized to the size of the tokenizer, and its reconstructions to that of the
    comparison. So tokenizers of different sizes can be compared on the same images.

    Args:
        tokenizer: image tokenizer in eval mode.
        images: float[N, 3, R, R] in [-1, 1].
        features: network for perceptual distance and FID.
        batch_size: images per forward pass.
        keep: number of reconstructions to return.
        on_batch: called after each batch with its number of images.
        side: pixels of a side at which images are compared. 0: R.

    Returns:
        (scores, reconstructions). The scores are those of all images and of each. The
        reconstructions are of the first images: float[min(N, keep), 3, side, side] in [-1, 1].
    """
    side = side or images.shape[-1]
    scores = ReconstructionScores(features, side, tokenizer.codebook_size)
    first = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        codes = tokenizer.encode(resize(batch, tokenizer.image_size))
        reconstructions = resize(tokenizer.decode(codes), side)
        scores.update(resize(batch, side), reconstructions, codes)
        first.append(reconstructions[: max(0, keep - start)])
        on_batch(len(batch))
    return scores, torch.cat(first)


@dataclass
class Reconstruction:
    """What the image tokenizer preserves."""

    name: ClassVar[str] = "reconstruction"
    draws: ClassVar[bool] = True
    protocol: ClassVar[str] = (
        "images at the size that the model draws, encoded and decoded; perceptual and fid use "
        "random features of seed 0, so they compare with each other but not with published values"
    )
    examples: list[Example] = field(default_factory=list)

    def fits(self, sample: Sample) -> bool:
        return is_one_image(sample)

    def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        tokenizer = copy.deepcopy(subject.model.image_tokenizer).cpu()  # the pixels are on the CPU
        scores, reconstructions = score_tokenizer(
            tokenizer,
            subject.pixels,
            Features(),
            keep=len(subject.samples),
            on_batch=subject.on_batch,
            side=tokenizer.drawn_size,
        )
        for name, value in scores.compute().items():
            yield name, scores.per_image.get(name, value)
        for sample, image, psnr in zip(
            subject.samples, reconstructions, scores.per_image["psnr"], strict=True
        ):
            self.examples.append(Example(sample.key, f"{psnr:.1f} dB", psnr, to_image(image)))
