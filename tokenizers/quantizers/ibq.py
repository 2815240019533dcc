"""Index backpropagation quantization (Shi et al. 2024, arXiv:2412.02692).

The straight-through estimator passes the one-hot choice of a code, not the latent. So the gradient
of the decoder's input reaches every code in proportion to its probability, and no code is left
unused. Unlike the paper, latents and codes are unit vectors of few channels, and the codebook
starts from the data. As published, most codes are never chosen in the first few hundred steps
(docs/decisions/quantizers.md).

Shapes: N latents of C channels, K codes.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from multimodal.tokenizers.quantizers.quantizer import (
    Channels,
    CodebookSize,
    LearnedCodebook,
    Quantized,
    entropy_of,
)


class IBQ(LearnedCodebook):
    """Index backpropagation quantization.

    Args:
        codebook_size: K, at least 2.
        channels: C, at least 2.
        temperature: of the softmax over the cosines, in the backward pass and the entropy loss.
        codebook_weight: of the loss that moves the chosen codes to their latents. Two more losses
            have weight 1: one moves all codes and latents towards each other, the commitment loss
            moves latents to their codes.
        entropy_weight: of the entropy loss. It is low if each latent is sure of its code, and all
            codes are in use.

    Raises:
        ValueError: for sizes below 2, or a temperature of 0 or less.
    """

    def __init__(
        self,
        codebook_size: CodebookSize = 4096,
        channels: Channels = 8,
        temperature: float = 0.03,
        codebook_weight: float = 0.25,
        entropy_weight: float = 0.3,
    ) -> None:
        super().__init__()
        if codebook_size < 2 or channels < 2:
            raise ValueError(
                f"codebook_size={codebook_size}, channels={channels}: both must be >= 2"
            )
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: expected more than 0")
        self.codebook_size, self.channels = codebook_size, channels
        self.temperature = temperature
        self.codebook_weight, self.entropy_weight = codebook_weight, entropy_weight
        self.codebook = nn.Embedding(codebook_size, channels)
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))

    def forward(self, latents: Tensor) -> Quantized:
        """Quantize latents, float[B, h, w, C]."""
        with torch.autocast(latents.device.type, enabled=False):
            latents = F.normalize(latents.float(), dim=-1)
            flat = rearrange(latents, "b h w c -> (b h w) c")
            if self.training:
                self._initialise(flat)
            codebook = F.normalize(self.codebook.weight, dim=-1)
            logits = flat @ codebook.T / self.temperature
            codes = logits.detach().argmax(-1)
            nearest = codebook[codes]
            losses: dict[str, Tensor] = {}
            vectors = nearest
            if self.training:
                # The IBQ estimator: one-hot in the forward pass, softmax in the backward pass.
                probabilities = logits.softmax(-1)
                # Not F.one_hot: there the host waits for a GPU.
                one_hot = torch.zeros_like(probabilities).scatter_(-1, codes[:, None], 1.0)
                vectors = (one_hot + probabilities - probabilities.detach()) @ codebook
                mutual = self._distance(vectors, flat)
                chosen = self._distance(nearest, flat.detach())
                commitment = self._distance(flat, nearest.detach())
                losses["codebook"] = mutual + self.codebook_weight * chosen
                losses["commitment"] = commitment
                if self.entropy_weight:
                    entropy = entropy_of(probabilities).mean() - entropy_of(probabilities.mean(0))
                    losses["entropy"] = self.entropy_weight * entropy
            return Quantized(
                codes.view(latents.shape[:-1]), vectors.view_as(latents), losses, self.codebook_size
            )

    def _distance(self, moved: Tensor, target: Tensor) -> Tensor:
        """Mean squared distance of unit vectors, summed over channels."""
        return self.channels * F.mse_loss(moved, target)

    def lookup(self, codes: Tensor) -> Tensor:
        """codes: int64[...] -> vectors: float[..., C] of unit norm."""
        return F.normalize(self.codebook(codes), dim=-1)
