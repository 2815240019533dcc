"""How well image tokenizers keep pictures: all of them by one protocol, on one set of images.

PSNR; SSIM (Wang et al. 2004) and MS-SSIM (Wang et al. 2003) of torchmetrics; perceptual distance
and FID (Heusel et al. 2017, arXiv:1706.08500) with the features named. Every tokenizer is given the
same pictures of one size: they are resized to its own, encoded, decoded, and resized back.

Shapes: N images, R pixels of a side, h w the grid of codes.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from torchmetrics.image.fid import FrechetInceptionDistance

from multimodal.eval.metrics.features import Features
from multimodal.tokenizers.image import VQTokenizer
from multimodal.tokenizers.quantizer import CodebookUsage

SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # weights of MS-SSIM, from fine to coarse
KERNEL = 11  # pixels of SSIM's window


def resized(images: Tensor, side: int) -> Tensor:
    """float[N, 3, R, R] -> float[N, 3, side, side] in [-1, 1]"""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, side, mode="bicubic", antialias=True).clamp(-1, 1)


def ms_ssim_scales(side: int) -> int:
    """How many scales of MS-SSIM fit: at the coarsest the window still has to."""
    return min(len(SCALES), int(math.log2(max(1, (side - 1) / (KERNEL - 1)))) + 1)


@torch.inference_mode()
def score_reconstructions(
    tokenizer: VQTokenizer,
    images: Tensor,
    features: Features,
    batch_size: int = 64,
    keep: int = 0,
    on_batch: Callable[[int], object] = lambda count: None,
) -> tuple[dict[str, float], Tensor]:
    """images: float[N, 3, R, R] in [-1, 1] -> the scores, and the first ``keep`` reconstructions.

    psnr: dB, mean over images; ssim, ms_ssim: up to 1; perceptual, fid: with ``features``, 0 is
    best (fid of fewer than 2 images is left out); used: share of the codebook; perplexity.
    """
    side = images.shape[-1]
    use = CodebookUsage(tokenizer.codebook_size)
    sums: dict[str, float] = {}
    frechet = FrechetInceptionDistance(feature=features, normalize=True)
    scales = ms_ssim_scales(side)
    betas = tuple(weight / sum(SCALES[:scales]) for weight in SCALES[:scales])
    found = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        codes = tokenizer.encode(resized(batch, tokenizer.config.image_size))
        use.update(codes)
        again = resized(tokenizer.decode(codes), side)
        found.append(again[: max(0, keep - start)])
        scores = {
            "psnr": peak_signal_noise_ratio(
                again, batch, data_range=2.0, reduction="none", dim=(1, 2, 3)
            ),
            "ssim": structural_similarity_index_measure(
                again, batch, data_range=2.0, reduction="none"
            ),
            "ms_ssim": multiscale_structural_similarity_index_measure(
                again, batch, data_range=2.0, reduction="none", betas=betas, normalize="relu"
            ),
            "perceptual": features.distance(again, batch),
        }
        for name, values in scores.items():
            sums[name] = sums.get(name, 0.0) + float(torch.as_tensor(values).sum())
        frechet.update(batch, real=True)
        frechet.update(again, real=False)
        on_batch(len(batch))
    means = {name: total / len(images) for name, total in sums.items()}
    if len(images) > 1:
        means["fid"] = float(frechet.compute())
    return {**means, "used": use.used, "perplexity": use.perplexity}, torch.cat(found)


@torch.inference_mode()
def time_tokenizers(
    tokenizers: Mapping[str, VQTokenizer], images: Tensor, rounds: int = 3
) -> dict[str, dict[str, float]]:
    """Images a second, encoded and decoded: the median of rounds in which all take turns, so that
    what else the machine does falls on all alike."""
    taken: dict[str, dict[str, list[float]]] = {
        name: {"encode": [], "decode": []} for name in tokenizers
    }
    for _ in range(rounds + 1):  # the first is to warm up
        for name, tokenizer in tokenizers.items():
            batch = resized(images, tokenizer.config.image_size)
            start = time.perf_counter()
            codes = tokenizer.encode(batch)
            middle = time.perf_counter()
            tokenizer.decode(codes)
            taken[name]["encode"].append(middle - start)
            taken[name]["decode"].append(time.perf_counter() - middle)
    return {
        name: {
            f"{verb}_per_second": len(images) / sorted(seconds[1:])[len(seconds[1:]) // 2]
            for verb, seconds in both.items()
        }
        for name, both in taken.items()
    }


def describe(tokenizer: VQTokenizer, side: int) -> dict[str, Any]:
    """What a tokenizer is, and the bits it spends on a pixel of a picture of ``side``."""
    config = tokenizer.config
    bits = config.grid**2 * math.log2(tokenizer.codebook_size)
    return {
        "image_size": config.image_size,
        "codes": config.grid**2,
        "codebook_size": tokenizer.codebook_size,
        "bits_per_pixel": bits / side**2,
        "parameters": sum(weight.numel() for weight in tokenizer.parameters()),
        "fingerprint": tokenizer.fingerprint,
    }
