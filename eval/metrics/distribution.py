"""FID and KID: the distance between generated and true pictures, in features of a frozen network.

FID (Heusel et al. 2017, arXiv:1706.08500) and KID (Binkowski et al. 2018, arXiv:1801.01401) are
those of torchmetrics. The expected value of FID depends on the number of pictures, that of KID does
not.
"""

import warnings

import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from multimodal.eval.metrics.features import Features

SUBSETS = 50  # of KID
SUBSET_SIZE = 100  # pictures, at most


@torch.inference_mode()
def score_distribution(
    generated: Tensor, true: Tensor, features: Features, seed: int = 0, batch_size: int = 64
) -> dict[str, float]:
    """FID and KID of two sets of pictures.

    Args:
        generated: float[N, 3, H, W] in [-1, 1].
        true: float[M, 3, H, W] in [-1, 1].
        features: the frozen network.
        seed: of KID's random subsets.
        batch_size: pictures per forward pass.

    Returns:
        ``fid`` and ``kid``, 0 is best. Empty if one set has fewer than two pictures.
    """
    fewest = min(len(generated), len(true))
    if fewest < 2:
        return {}
    frechet = FrechetInceptionDistance(feature=features, normalize=True)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # it warns that it stores all features, here a few thousand short rows
        kernel = KernelInceptionDistance(
            feature=features, subsets=SUBSETS, subset_size=min(SUBSET_SIZE, fewest), normalize=True
        )
    for pictures, are_true in ((generated, False), (true, True)):
        for batch in torch.split(pictures.float().cpu(), batch_size):
            frechet.update(batch, real=are_true)
            kernel.update(batch, real=are_true)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, _ = kernel.compute()
    return {"fid": float(frechet.compute()), "kid": float(mean)}
