"""Alignment: a contrastive loss between images and their texts.

The image is embedded at <eoi> of describe, the text at <boi> of draw.

Shapes: B pairs, D width, E embedding.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.distributed import gather_with_gradients


class Alignment(nn.Module):
    """Projections of image and text states into one space, and the contrastive loss there.

    Args:
        width: D, of the hidden states.
        dim: E, of the embeddings.
        form: ``siglip`` (sigmoid, Zhai et al. 2023, arXiv:2303.15343) or ``clip`` (softmax,
            Radford et al. 2021, arXiv:2103.00020).

    Pairs with the same image or the same text are never negatives of each other.
    """

    def __init__(self, width: int, dim: int, form: str) -> None:
        super().__init__()
        self.form = form
        self.image_projection = nn.Linear(width, dim, bias=False)
        self.text_projection = nn.Linear(width, dim, bias=False)
        scale, bias = (10.0, -10.0) if form == "siglip" else (1 / 0.07, 0.0)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(bias), requires_grad=form == "siglip")

    def embed_image(self, state: Tensor) -> Tensor:
        """The state at <eoi>, float[B, D] -> float32[B, E] of unit norm."""
        return F.normalize(self.image_projection(state).float(), dim=-1)

    def embed_text(self, state: Tensor) -> Tensor:
        """The state at <boi>, float[B, D] -> float32[B, E] of unit norm."""
        return F.normalize(self.text_projection(state).float(), dim=-1)

    def forward(
        self, images: Tensor, texts: Tensor, image_hashes: Tensor, text_hashes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss over the pairs of all ranks.

        Args:
            images, texts: float32[B, E] of unit norm. Row i of both is a pair.
            image_hashes: int64[B], equal for equal images.
            text_hashes: int64[B], equal for equal texts. -1 leaves the pair out.

        Returns:
            The loss, float32[], and the share of images whose paired text is nearer than all
            negatives.
        """
        images, texts, image_hashes, text_hashes = (
            gather_with_gradients(part) for part in (images, texts, image_hashes, text_hashes)
        )
        logits = self.log_scale.clamp(max=math.log(100)).exp() * images @ texts.T + self.bias
        paired = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        same = image_hashes[:, None] == image_hashes[None, :]
        same = same | (text_hashes[:, None] == text_hashes[None, :])
        valid = (text_hashes >= 0)[None, :] & (text_hashes >= 0)[:, None] & (paired | ~same)
        pairs = (text_hashes >= 0).sum().clamp(min=1)
        nearest = logits.masked_fill(~valid, -torch.inf).argmax(-1) == paired.int().argmax(-1)
        accuracy = (nearest & (text_hashes >= 0)).sum() / pairs
        if self.form == "siglip":
            signed = torch.where(paired, logits, -logits)
            return -(F.logsigmoid(signed) * valid).sum() / pairs, accuracy
        logits = logits.masked_fill(~valid & ~paired, -torch.inf)
        rows = -(logits.log_softmax(1).diagonal() * (text_hashes >= 0)).sum()
        columns = -(logits.log_softmax(0).diagonal() * (text_hashes >= 0)).sum()
        return (rows + columns) / 2 / pairs, accuracy
