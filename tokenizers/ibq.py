"""Index backpropagation quantization (Shi et al. 2024, arXiv:2412.02692).

The choice of a code is passed straight through, not the latent: the gradient of what the decoder
reads reaches every code by its probability, so that none is left behind.

Shapes: N latents of C channels, K codes.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from multimodal.tokenizers.quantizer import Quantized, entropy_of


class IBQ(nn.Module):
    """Args:
    codebook_size: K; channels: C.
    codebook_weight: of the loss that pulls the chosen codes alone to their latents, beside the two
        of weight 1: of all codes and latents to one another, and of latents to their codes.
    entropy_weight, temperature: of the entropy loss, and of the softmax in it.
    """

    def __init__(
        self,
        codebook_size: int = 4096,
        channels: int = 16,
        codebook_weight: float = 0.25,
        entropy_weight: float = 0.05,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if codebook_size < 2 or channels < 2:
            raise ValueError(
                f"codebook_size={codebook_size}, channels={channels}: both must be >= 2"
            )
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: expected more than 0")
        self.codebook_size, self.channels = codebook_size, channels
        self.codebook_weight, self.entropy_weight = codebook_weight, entropy_weight
        self.temperature = temperature
        self.codebook = nn.Embedding(codebook_size, channels)

    def forward(self, latents: Tensor) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            flat = rearrange(latents.float(), "b h w c -> (b h w) c")
            logits = flat @ self.codebook.weight.T
            codes = logits.detach().argmax(-1)
            losses: dict[str, Tensor] = {}
            if self.training:
                # One-hot forwards, softmax backwards: what IBQ is.
                probabilities = logits.softmax(-1)
                chosen = F.one_hot(codes, self.codebook_size).to(probabilities)
                vectors = (chosen + probabilities - probabilities.detach()) @ self.codebook.weight
                nearest = self.codebook(codes)
                both, pull = F.mse_loss(vectors, flat), F.mse_loss(nearest, flat.detach())
                losses["codebook"] = both + self.codebook_weight * pull
                losses["commitment"] = F.mse_loss(flat, nearest.detach())
                if self.entropy_weight:
                    p = (logits / self.temperature).softmax(-1)
                    spread = entropy_of(p).mean() - entropy_of(p.mean(0))
                    losses["entropy"] = self.entropy_weight * spread
            else:
                vectors = self.codebook(codes)
            return Quantized(
                codes.view(latents.shape[:-1]), vectors.view_as(latents), losses, self.codebook_size
            )

    def lookup(self, codes: Tensor) -> Tensor:
        """codes: int64[...] -> vectors: float[..., C]"""
        vectors: Tensor = self.codebook(codes)
        return vectors
