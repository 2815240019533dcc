"""Lookup-free quantization (MAGVIT-v2, Yu et al. 2023, arXiv:2310.05737): a code is a row of signs.

There is no codebook to learn and none to search. What keeps the codes in use is an entropy loss:
each latent should be sure of its code, all latents together should use all codes.

Shapes: N latents of C channels, K = 2^C codes, G bits of a group.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from multimodal.tokenizers.quantizer import Quantized, entropy_of

GROUP = 9  # bits whose 2^G patterns are counted exactly; groups are taken as independent


class LFQ(nn.Module):
    """Args:
    channels: C bits; the codebook has 2^C codes.
    entropy_weight, commitment: of the two losses.
    temperature: of p(code | latent), a softmax over minus the squared distances divided by it.
    """

    def __init__(
        self,
        channels: int = 12,
        entropy_weight: float = 0.1,
        commitment: float = 0.25,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if not 1 <= channels <= 18:
            raise ValueError(f"channels={channels}: expected 1 to 18, for 2 to 262,144 codes")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: expected more than 0")
        self.codebook_size, self.channels = 2**channels, channels
        self.entropy_weight, self.commitment = entropy_weight, commitment
        self.temperature = temperature

    def forward(self, latents: Tensor) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            bits = latents > 0
            codes = (bits << torch.arange(self.channels, device=bits.device)).sum(-1)
            signs = 2.0 * bits - 1
            losses = {"commitment": self.commitment * F.mse_loss(latents, signs)}
            if self.training and self.entropy_weight:
                flat = rearrange(latents, "... c -> (...) c")
                losses["entropy"] = self.entropy_weight * self.entropy(flat)
            vectors = latents + (signs - latents).detach()
            return Quantized(codes, vectors, losses, self.codebook_size)

    def lookup(self, codes: Tensor) -> Tensor:
        """codes: int64[...] -> vectors: float[..., C] of -1 and 1."""
        return 2.0 * (codes[..., None] >> torch.arange(self.channels, device=codes.device) & 1) - 1

    def entropy(self, flat: Tensor) -> Tensor:
        """Mean entropy of a latent's code, minus that of all codes together: float[N, C] -> float[]

        The bits of one latent are independent, so its entropy is a sum over bits, exact for any C.
        That of all together is counted for groups of at most GROUP bits.
        """
        # (z + 1)^2 - (z - 1)^2 = 4 z
        yes = torch.sigmoid(4 * flat / self.temperature)
        each = entropy_of(torch.stack([yes, 1 - yes], -1)).sum(-1).mean()
        together = torch.stack([
            entropy_of(_patterns(group).mean(0)) for group in torch.split(yes, GROUP, dim=-1)
        ]).sum()  # fmt: skip
        return each - together


def _patterns(yes: Tensor) -> Tensor:
    """Probabilities of G independent bits, float[N, G] -> of their patterns, float[N, 2^G]"""
    probabilities = yes.new_ones(len(yes), 1)
    for bit in yes.unbind(-1):
        pair = torch.stack([1 - bit, bit], -1)
        probabilities = rearrange(probabilities[:, None] * pair[:, :, None], "n two p -> n (two p)")
    return probabilities
