"""Codes that say what a frozen network sees there: semantic alignment with a teacher.

VQ-KD (BEiT v2, Peng et al. 2022, arXiv:2208.06366) trains codes from which a teacher's features can
be told, by their cosine; here beside the pixels, so that the codes still make pictures.

Shapes: B batch, h w the grid of codes, C channels of a code vector, D features of the teacher.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from multimodal.eval.metrics.features import Features


class Distillation(nn.Module):
    """Args:
    teacher: as for ``Features``: timm:MODEL, timm:MODEL=FILE; ``random`` teaches textures only.
    channels: C; width: of the layer that reads the codes. It is thrown away after training.
    """

    def __init__(self, teacher: str, channels: int, width: int = 256) -> None:
        super().__init__()
        self.teacher = Features(teacher)
        self.head = nn.Sequential(
            nn.Linear(channels, width), nn.GELU(), nn.Linear(width, self.teacher.num_features)
        )

    def forward(self, vectors: Tensor, images: Tensor) -> Tensor:
        """vectors: float[B, h, w, C]; images: float[B, 3, H, W] in [-1, 1] -> 1 - cosine, a mean"""
        with torch.no_grad():
            features = self.teacher.maps(images)[-1].float()
            wanted = F.interpolate(features, vectors.shape[1:3], mode="bilinear", antialias=True)
        found = rearrange(self.head(vectors).float(), "b h w d -> b d h w")
        return 1 - F.cosine_similarity(found, wanted, dim=1).mean()
