"""Vector quantization: a code is the nearest row of a learned codebook.

van den Oord et al. 2017 (arXiv:1711.00937) for VQ, by gradient or by moving averages; Yu et al.
2021 (arXiv:2110.04627) for few channels and unit vectors; data initialisation and the restart of
dead codes after Dhariwal et al. 2020 (arXiv:2005.00341).

Shapes: B batch, h w the grid, N = B h w, C channels, K codebook size.
"""

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from multimodal.tokenizers.quantizers.quantizer import (
    Channels,
    CodebookSize,
    LearnedCodebook,
    Quantized,
    distributed,
    sample_codebook,
)


class VQ(LearnedCodebook):
    """Vector quantization.

    Args:
        codebook_size: K, at least 2.
        channels: C, at least 2. Few (8) channels keep all codes in use.
        normalise: make latents and codes unit vectors. Released VQGANs older than LlamaGen do not.
        learning: how codes move. ``ema`` moves them to the moving average of their latents,
            ``gradient`` by a loss of weight 1.
        decay: of the moving averages, per training step.
        commitment: weight of the loss that moves latents to their codes.
        dead_after: restart a code from the data if its average count per step falls below this. 0
            restarts none.

    Raises:
        ValueError: for sizes below 2, or an unknown ``learning``.
    """

    counts: Tensor

    def __init__(
        self,
        codebook_size: CodebookSize = 4096,
        channels: Channels = 8,
        normalise: bool = True,
        learning: Literal["ema", "gradient"] = "ema",
        decay: float = 0.99,
        commitment: float = 0.25,
        dead_after: float = 0.01,
    ) -> None:
        super().__init__()
        if codebook_size < 2 or channels < 2:
            raise ValueError(
                f"codebook_size={codebook_size}, channels={channels}: both must be >= 2"
            )
        if learning not in ("ema", "gradient"):
            raise ValueError(f"learning={learning!r}: expected ema or gradient")
        self.codebook_size, self.channels = codebook_size, channels
        self.normalise, self.learning = normalise, learning
        self.decay, self.commitment, self.dead_after = decay, commitment, dead_after
        self.codebook = nn.Embedding(codebook_size, channels)
        self.codebook.weight.requires_grad_(learning == "gradient")
        with torch.no_grad():
            self.codebook.weight.copy_(F.normalize(self.codebook.weight, dim=-1))
        self.register_buffer("counts", torch.ones(codebook_size))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))

    def _scaled(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.normalise else vectors

    def forward(self, latents: Tensor) -> Quantized:
        """Quantize latents, float[B, h, w, C]."""
        # In fp32: bf16 products pick another neighbour at several percent of the positions.
        with torch.autocast(latents.device.type, enabled=False):
            latents = self._scaled(latents.float())
            flat = rearrange(latents, "b h w c -> (b h w) c")
            if self.training:
                self._initialise(flat.detach())
                self._restart_dead(flat.detach())
            codes = self._nearest(flat.detach())
            nearest = self.lookup(codes).view_as(latents)
            losses = {"commitment": self.commitment * self._distance(latents, nearest.detach())}
            if self.learning == "gradient":
                losses["codebook"] = self._distance(nearest, latents.detach())
            if self.training:
                self._update(flat.detach(), codes)
            vectors = latents + (nearest - latents).detach()
            return Quantized(codes.view(latents.shape[:-1]), vectors, losses, self.codebook_size)

    def lookup(self, codes: Tensor) -> Tensor:
        """codes: int64[...] -> vectors: float[..., C], of unit norm with ``normalise``."""
        return self._scaled(self.codebook(codes))

    @torch.no_grad()
    def _nearest(self, flat: Tensor) -> Tensor:
        codebook = self._scaled(self.codebook.weight)
        products = flat @ codebook.T
        if not self.normalise:  # |z - e|^2 = |z|^2 - 2 z e + |e|^2
            products -= codebook.square().sum(-1) / 2
        return products.argmax(-1)

    def _distance(self, moved: Tensor, target: Tensor) -> Tensor:
        """Mean squared distance. Summed over channels for unit vectors, averaged otherwise."""
        return F.mse_loss(moved, target) * (self.channels if self.normalise else 1)

    @torch.no_grad()
    def _update(self, flat: Tensor, codes: Tensor) -> None:
        # Sum over ranks, so that all codebooks move alike.
        # Not torch.bincount: there the host waits for a GPU.
        fresh = torch.zeros_like(self.counts).index_add_(0, codes, flat.new_ones(len(codes)))
        if distributed():
            dist.all_reduce(fresh)
        past = self.decay * self.counts
        total = past + (1 - self.decay) * fresh
        if self.learning == "ema":
            weight = self.codebook.weight
            sums = torch.zeros_like(weight).index_add_(0, codes, flat)
            if distributed():
                dist.all_reduce(sums)
            # The mean of past and fresh latents, weighted by their counts.
            moved = (past[:, None] * weight + (1 - self.decay) * sums) / total[:, None]
            weight.copy_(torch.where(fresh[:, None] > 0, self._scaled(moved), weight))
        self.counts.copy_(total)

    @torch.no_grad()
    def _restart_dead(self, flat: Tensor) -> None:
        # Called before the lookup: autograd forbids changing a tensor it has saved.
        drawn, found = sample_codebook(flat, self.codebook_size)
        dead = (self.counts < self.dead_after) & found
        weight = self.codebook.weight
        weight.copy_(torch.where(dead[:, None], self._scaled(drawn), weight))
        self.counts.copy_(torch.where(dead, torch.ones_like(self.counts), self.counts))
