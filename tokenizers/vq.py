"""l2-normalised low-dimensional vector quantization, the codebook learned by moving averages.

van den Oord et al. 2017 (arXiv:1711.00937) for VQ and its EMA update; Yu et al. 2021
(arXiv:2110.04627) for low-dimensional unit vectors; data initialisation and the restart of dead
codes after Dhariwal et al. 2020 (arXiv:2005.00341).
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from multimodal.tokenizers.quantizer import Quantized


class VQ(nn.Module):
    """Args:
    codebook_size: K; channels: C, small (8) so that all codes are reached.
    decay: of the moving averages, per training step.
    commitment: weight of the loss that pulls latents to their codes.
    dead_after: a code whose average count per step falls below this is restarted from the data.
    """

    codebook: Tensor
    counts: Tensor
    initialised: Tensor

    def __init__(
        self,
        codebook_size: int = 4096,
        channels: int = 8,
        decay: float = 0.99,
        commitment: float = 0.25,
        dead_after: float = 0.01,
    ) -> None:
        super().__init__()
        if codebook_size < 2 or channels < 2:
            raise ValueError(
                f"codebook_size={codebook_size}, channels={channels}: both must be >= 2"
            )
        self.codebook_size, self.channels = codebook_size, channels
        self.decay, self.commitment, self.dead_after = decay, commitment, dead_after
        self.register_buffer("codebook", F.normalize(torch.randn(codebook_size, channels), dim=-1))
        self.register_buffer("counts", torch.ones(codebook_size))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))

    def forward(self, latents: Tensor) -> Quantized:
        # In fp32: bf16 products pick another neighbour for several percent of the positions.
        with torch.autocast(latents.device.type, enabled=False):
            latents = F.normalize(latents.float(), dim=-1)
            flat = rearrange(latents, "b h w c -> (b h w) c")
            if self.training:
                self._initialise(flat.detach())
            # Between unit vectors the nearest is the one of the largest product.
            codes = (flat.detach() @ self.codebook.T).argmax(-1)
            nearest = self.codebook[codes].view_as(latents)
            if self.training:
                self._update(flat.detach(), codes)
            loss = self.commitment * F.mse_loss(latents, nearest) * self.channels
            vectors = latents + (nearest - latents).detach()
            return Quantized(codes.view(latents.shape[:-1]), vectors, loss)

    def lookup(self, codes: Tensor) -> Tensor:
        """codes: int64[...] -> vectors: float[..., C] of unit norm."""
        return self.codebook[codes]

    @torch.no_grad()
    def _initialise(self, flat: Tensor) -> None:
        if not self.initialised:
            self.codebook.copy_(self._draw(flat, self.codebook_size))
            self.initialised.fill_(True)

    @staticmethod
    def _draw(flat: Tensor, count: int) -> Tensor:
        """Latents of this batch, at random; a little noise keeps repeated ones apart."""
        chosen = flat[torch.randint(len(flat), (count,), device=flat.device)]
        return F.normalize(chosen + 0.01 * torch.randn_like(chosen), dim=-1)

    @torch.no_grad()
    def _update(self, flat: Tensor, codes: Tensor) -> None:
        seen = torch.bincount(codes, minlength=self.codebook_size).to(flat)
        sums = torch.zeros_like(self.codebook).index_add_(0, codes, flat)
        # A code moves by its own data: the fresh mean weighs what it brings against the memory.
        mass = self.decay * self.counts
        moved = mass[:, None] * self.codebook + (1 - self.decay) * sums
        self.counts.copy_(mass + (1 - self.decay) * seen)
        self.codebook.copy_(F.normalize(moved, dim=-1))
        dead = self.counts < self.dead_after
        self.codebook.copy_(
            torch.where(dead[:, None], self._draw(flat, self.codebook_size), self.codebook)
        )
        self.counts.copy_(torch.where(dead, torch.ones_like(self.counts), self.counts))
