"""How far a set of made pictures is from a set of true ones, in the features of a frozen network.

FID (Heusel et al. 2017, arXiv:1706.08500) and KID (Binkowski et al. 2018, arXiv:1801.01401), by
torchmetrics. FID depends on how many pictures there are; KID does not, on average.

Shapes: N, M pictures of H x W pixels.
"""

import warnings

import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from multimodal.eval.metrics.features import Features

SUBSETS, SUBSET = 50, 100  # of KID: how many, and the pictures of each


@torch.inference_mode()
def score_distribution(
    made: Tensor, real: Tensor, features: Features, seed: int = 0, batch_size: int = 64
) -> dict[str, float]:
    """made: float[N, 3, H, W], real: float[M, 3, H, W], in [-1, 1] -> fid, kid; 0 is best

    Of fewer than two pictures there is nothing to say: {}.
    """
    fewest = min(len(made), len(real))
    if fewest < 2:
        return {}
    frechet = FrechetInceptionDistance(feature=features, normalize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps the features: a few thousand short rows
        kernel = KernelInceptionDistance(
            feature=features, subsets=SUBSETS, subset_size=min(SUBSET, fewest), normalize=True
        )
    for pictures, true in ((made, False), (real, True)):
        for some in torch.split(pictures.float().cpu(), batch_size):
            frechet.update(some, real=true)
            kernel.update(some, real=true)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, _ = kernel.compute()
    return {"fid": float(frechet.compute()), "kid": float(mean)}
