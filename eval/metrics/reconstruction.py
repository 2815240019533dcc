"""Scores reconstructions of images.

PSNR; SSIM (Wang et al. 2004) and MS-SSIM (Wang et al. 2003) of torchmetrics; perceptual distance
and FID (Heusel et al. 2017, arXiv:1706.08500) with given features.

Shapes: B images of a batch, R pixels per side, h w grid of codes.
"""

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from torchmetrics.image.fid import FrechetInceptionDistance

from multimodal.eval.metrics.features import Features
from multimodal.tokenizers.quantizers.quantizer import CodebookUsage

SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # weights of MS-SSIM, from fine to coarse
KERNEL = 11  # pixels of SSIM's window


def ms_ssim_scales(side: int) -> int:
    """Number of scales of MS-SSIM at which its window still fits. ``side``: pixels.

    Each scale halves the image. torchmetrics shrinks it by ``(scales - 1) ** 2`` in its own check.
    """
    fitting = [
        scales
        for scales in range(1, len(SCALES) + 1)
        if side > (KERNEL - 1) * 2 ** (scales - 1) and side // max(1, scales - 1) ** 2 > KERNEL - 1
    ]
    return max(fitting, default=1)


class ReconstructionScores:
    """Collects scores batch by batch. ``per_image``: those that are a mean, of each image.

    Args:
        features: network for perceptual distance and FID.
        side: R, pixels per side of the images.
        codebook_size: of the image tokenizer.
    """

    def __init__(self, features: Features, side: int, codebook_size: int) -> None:
        self.features = features
        self.use = CodebookUsage(codebook_size)
        self.frechet = FrechetInceptionDistance(feature=features, normalize=True)
        weights = SCALES[: ms_ssim_scales(side)]
        self.scale_weights = tuple(weight / sum(weights) for weight in weights)
        self.per_image: dict[str, list[float]] = {}
        self.count = 0

    @torch.inference_mode()
    def update(self, images: Tensor, reconstructions: Tensor, codes: Tensor) -> None:
        """Add a batch.

        Args:
            images: float[B, 3, R, R] in [-1, 1].
            reconstructions: float[B, 3, R, R] in [-1, 1].
            codes: int64[B, h, w].
        """
        self.use.update(codes)
        scores = {
            "psnr": peak_signal_noise_ratio(
                reconstructions, images, data_range=2.0, reduction="none", dim=(1, 2, 3)
            ),
            "ssim": structural_similarity_index_measure(
                reconstructions, images, data_range=2.0, reduction="none"
            ),
            "ms_ssim": multiscale_structural_similarity_index_measure(
                reconstructions,
                images,
                data_range=2.0,
                reduction="none",
                betas=self.scale_weights,
                normalize="relu",
            ),
            "perceptual": self.features.distance(reconstructions, images),
        }
        for name, values in scores.items():
            self.per_image.setdefault(name, []).extend(torch.as_tensor(values).flatten().tolist())
        self.frechet.update(images, real=True)
        self.frechet.update(reconstructions, real=False)
        self.count += len(images)

    @torch.inference_mode()
    def compute(self) -> dict[str, float]:
        """The scores of all images.

        Returns:
            - ``psnr``: dB, mean over images.
            - ``ssim``, ``ms_ssim``: mean over images, at most 1.
            - ``perceptual``: mean distance, 0 is best.
            - ``fid``: 0 is best. Left out for fewer than 2 images.
            - ``used``: share of the codebook. ``perplexity``: of the codes.
        """
        scores = {name: sum(values) / self.count for name, values in self.per_image.items()}
        if self.count > 1:
            scores["fid"] = float(self.frechet.compute())
        return {**scores, "used": self.use.used, "perplexity": self.use.perplexity}
