"""Lookup-free quantization (MAGVIT-v2, Yu et al. 2023, arXiv:2310.05737): a code is a row of signs.

There is no codebook to learn or to search. An entropy loss keeps the codes in use: each latent
should be sure of its code, and the latents of a batch should use all codes.

Shapes: N latents of C channels, K = 2^C codes, G bits of a group.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from multimodal.tokenizers.quantizers.quantizer import Quantized, Quantizer, entropy_of

GROUP = 9  # bits whose 2^G patterns are computed exactly; groups count as independent


class LFQ(Quantizer):
    """Lookup-free quantization.

    Args:
        channels: C bits, 1 to 18. The codebook has 2^C codes.
        entropy_weight: of the entropy loss.
        commitment: weight of the commitment loss.
        temperature: of p(code | latent), a softmax over minus the squared distances divided by it.

    Raises:
        ValueError: for channels outside 1 to 18, or a temperature of 0 or less.
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
        """Quantize latents, float[B, h, w, C]."""
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
        """Mean entropy of each latent's code, minus the entropy of the mean code distribution.

        The bits of one latent are independent, so its entropy is a sum over bits, exact for any C.
        The entropy of the mean is computed for groups of at most GROUP bits.

        Args:
            flat: float[N, C].

        Returns:
            float[], in nats.
        """
        # (z + 1)^2 - (z - 1)^2 = 4 z
        ones = torch.sigmoid(4 * flat / self.temperature)
        per_latent = entropy_of(torch.stack([ones, 1 - ones], -1)).sum(-1).mean()
        groups = torch.split(ones, GROUP, dim=-1)
        of_mean = torch.stack([entropy_of(_patterns(group).mean(0)) for group in groups]).sum()
        return per_latent - of_mean


def _patterns(ones: Tensor) -> Tensor:
    """Probabilities of G independent bits, float[N, G] -> of their patterns, float[N, 2^G]."""
    probabilities = ones.new_ones(len(ones), 1)
    for bit in ones.unbind(-1):
        pair = torch.stack([1 - bit, bit], -1)
        probabilities = rearrange(probabilities[:, None] * pair[:, :, None], "n two p -> n (two p)")
    return probabilities
