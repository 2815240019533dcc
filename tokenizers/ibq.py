"""Index backpropagation quantization (Shi et al. 2024, arXiv:2412.02692).

The choice of a code is passed straight through, not the latent: the gradient of what the decoder
reads reaches every code by its probability, so that none is left behind. Here latents and codes are
unit vectors of few channels, and the codebook starts from the data; as published, in a few hundred
steps most codes are never chosen (docs/decisions/quantizers.md).

Shapes: N latents of C channels, K codes.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from multimodal.tokenizers.quantizer import Quantized, drawn_from, entropy_of


class IBQ(nn.Module):
    """Args:
    codebook_size: K; channels: C.
    temperature: of the softmax over the cosines, backwards and in the entropy loss.
    codebook_weight: of the loss that pulls the chosen codes alone to their latents, beside the two
        of weight 1: of all codes and latents to one another, and of latents to their codes.
    entropy_weight: of the loss that wants each latent sure of its code, and all codes in use.
    """

    initialised: Tensor

    def __init__(
        self,
        codebook_size: int = 4096,
        channels: int = 8,
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
        with torch.autocast(latents.device.type, enabled=False):
            latents = F.normalize(latents.float(), dim=-1)
            flat = rearrange(latents, "b h w c -> (b h w) c")
            if self.training and not self.initialised:
                with torch.no_grad():
                    self.codebook.weight.copy_(drawn_from(flat, self.codebook_size))
                    self.initialised.fill_(True)
            codebook = F.normalize(self.codebook.weight, dim=-1)
            logits = flat @ codebook.T / self.temperature
            codes = logits.detach().argmax(-1)
            nearest = codebook[codes]
            losses: dict[str, Tensor] = {}
            vectors = nearest
            if self.training:
                # One-hot forwards, softmax backwards: what IBQ is.
                probabilities = logits.softmax(-1)
                chosen = F.one_hot(codes, self.codebook_size).to(probabilities)
                vectors = (chosen + probabilities - probabilities.detach()) @ codebook
                # Of unit vectors summed over channels, as each has 1 / C of it.
                both, pull, commitment = (
                    self.channels * F.mse_loss(one, other)
                    for one, other in (
                        (vectors, flat), (nearest, flat.detach()), (flat, nearest.detach())
                    )
                )  # fmt: skip
                losses["codebook"] = both + self.codebook_weight * pull
                losses["commitment"] = commitment
                if self.entropy_weight:
                    spread = entropy_of(probabilities).mean() - entropy_of(probabilities.mean(0))
                    losses["entropy"] = self.entropy_weight * spread
            return Quantized(
                codes.view(latents.shape[:-1]), vectors.view_as(latents), losses, self.codebook_size
            )

    def lookup(self, codes: Tensor) -> Tensor:
        """codes: int64[...] -> vectors: float[..., C] of unit norm"""
        return F.normalize(self.codebook(codes), dim=-1)
