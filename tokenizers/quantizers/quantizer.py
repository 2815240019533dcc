"""The result type of all quantizers, and statistics of the use of a codebook.

Shapes: B batch, h w the grid of codes, N = B h w, C the channels of a code vector, K the codebook
size.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.distributed as dist
from torch import Tensor, nn

from multimodal.schemas import Between

MAX_CODEBOOK = 2**22  # codes of a quantizer, and the rows of an embedding table they take
CodebookSize = Annotated[int, Between(2, MAX_CODEBOOK)]
Channels = Annotated[int, Between(2, 2**14)]


@dataclass(frozen=True)
class Quantized:
    """The result of a quantizer.

    Args:
        codes: int64[B, h, w] in [0, K).
        vectors: float[B, h, w, C], the input of the decoder. Gradients pass straight through.
        losses: by name, float32[] each, already weighted. The quantizer needs them minimised.
        codebook_size: K.
    """

    codes: Tensor
    vectors: Tensor
    losses: dict[str, Tensor]
    codebook_size: int

    @property
    def usage(self) -> float:
        """Share of the codebook among these codes, in (0, 1]."""
        return len(torch.unique(self.codes)) / self.codebook_size


class Quantizer(nn.Module, ABC):
    """Base of all quantizers.

    Attributes:
        codebook_size: K.
        channels: C, of a latent and of a code vector.
    """

    codebook_size: int
    channels: int

    @abstractmethod
    def forward(self, latents: Tensor) -> Quantized:
        """latents: float[B, h, w, C] -> the nearest codes and what the decoder reads."""

    @abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """codes: int64[...] in [0, K) -> code vectors: float[..., C]."""


def distributed() -> bool:
    """Whether there are several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def sample_codebook(flat: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draw a codebook from the latents of the first rank, the same on all ranks.

    A little noise keeps latents apart that are drawn several times.

    Args:
        flat: float[N, C], latents. N may be 0.
        count: number of codes.

    Returns:
        float[count, C], and whether the first rank had latents at all: bool[].
    """
    # The last row says whether there were any. So ranks meet once, and no host waits for a GPU.
    drawn = flat.new_zeros(count + 1, flat.shape[1])
    if len(flat):
        latents = flat[torch.randint(len(flat), (count,), device=flat.device)]
        drawn[:count] = latents + 0.01 * torch.randn_like(latents)
        drawn[count] = 1
    if distributed():
        dist.broadcast(drawn, 0)
    return drawn[:count], drawn[count, 0] > 0


class LearnedCodebook(Quantizer):
    """Base of quantizers whose codebook starts at latents of the first batch that has any.

    Attributes:
        codebook: K vectors of C.
        initialised: bool[], a buffer.
    """

    codebook: nn.Embedding
    initialised: Tensor
    _is_initialised = False  # what the buffer says, once it is true: no step waits for a GPU

    def _scaled(self, vectors: Tensor) -> Tensor:
        """Vectors as the codebook holds them."""
        return vectors

    @torch.no_grad()
    def _initialise(self, flat: Tensor) -> None:
        if self._is_initialised:
            return
        if not self.initialised:
            drawn, found = sample_codebook(flat, self.codebook_size)
            weight = self.codebook.weight
            weight.copy_(torch.where(found, self._scaled(drawn), weight))
            self.initialised.copy_(found)
        self._is_initialised = bool(self.initialised)


def entropy_of(probabilities: Tensor) -> Tensor:
    """float[..., K] that sum to 1 -> float[...], in nats."""
    return -(probabilities * probabilities.clamp(min=1e-12).log()).sum(-1)


class CodebookUsage:
    """Counts codes over many batches: the share of the codebook in use, and its perplexity."""

    def __init__(self, codebook_size: int) -> None:
        self._counts = torch.zeros(codebook_size, dtype=torch.int64)  # where the codes are

    @property
    def counts(self) -> Tensor:
        """int64[K], on the CPU."""
        return self._counts.cpu()

    def update(self, codes: Tensor) -> None:
        """Count codes, int64[...] in [0, K). The host does not wait for a GPU."""
        flat = codes.flatten()
        self._counts = self._counts.to(flat.device).index_add_(0, flat, torch.ones_like(flat))

    def add_other_ranks(self, device: torch.device) -> None:
        """Count what all ranks have counted. device: where ranks can exchange tensors."""
        if distributed():
            self._counts = self._counts.to(device)
            dist.all_reduce(self._counts)

    @property
    def used(self) -> float:
        """Share of the codes that appeared at least once, in [0, 1]."""
        return float((self.counts > 0).float().mean())

    @property
    def perplexity(self) -> float:
        """exp(entropy) of the codes, in [1, K].

        A codebook of this size, used equally, would have the same entropy.
        """
        counts = self.counts.double()
        p = counts / counts.sum().clamp(min=1)
        return float(entropy_of(p).exp())

    @property
    def has_enough_codes(self) -> bool:
        """Whether the counts suffice to judge the codebook: 4 for each of its codes."""
        return int(self._counts.sum()) >= 4 * len(self._counts)

    def collapse_warning(self) -> str | None:
        """A message if the codebook collapses. None if it does not, or there are too few codes."""
        total, size = int(self._counts.sum()), len(self._counts)
        if not self.has_enough_codes:
            return None
        if self.used >= 0.5 and self.perplexity >= 0.05 * size:
            return None
        return (
            f"the codebook collapses: {self.used:.1%} of {size} codes appeared among the last "
            f"{total}, as if only {self.perplexity:.0f} were in use. Try a smaller learning rate, "
            "a smaller codebook, fewer channels, or fsq, which has no codebook to collapse"
        )
