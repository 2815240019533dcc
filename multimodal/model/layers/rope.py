"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), and how they are stretched.

Shapes: B batch, L tokens, H heads, d head size.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

import torch
from torch import Tensor

from multimodal.schemas import Between, Positive, check_fields, construct


@dataclass(frozen=True)
class RopeScaling:
    """Slower rotations, for longer texts than those of the first training.

    Args:
        rope_type: ``linear`` (all rotations are slower by the factor: Chen et al. 2023,
            arXiv:2306.15595) or ``llama3`` (those whose wavelength is long, arXiv:2407.21783).
        factor: by how much.
        low_freq_factor, high_freq_factor: of llama3. Wavelengths above the original length over the
            first are long. Below the original length over the second they stay. In between they
            change gradually.
        original_max_position_embeddings: of llama3, the length of the first training.

    Raises:
        ValueError: for another type or wrong numbers.
    """

    rope_type: str
    factor: Annotated[float, Between(1, 2**20)]
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_max_position_embeddings: Annotated[int, Between(1, 2**24)] = 8192

    def __post_init__(self) -> None:
        if self.rope_type not in ("linear", "llama3"):
            raise ValueError(f"RoPE of type {self.rope_type!r:.80} is not supported")
        check_fields(self)
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(f"{self}: expected low < high")

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> "RopeScaling | None":
        """What config.json of a stock model says. None: no scaling."""
        kind = stored.get("rope_type", stored.get("type", "default"))
        if kind == "default":
            return None
        given = {f.name: stored[f.name] for f in fields(cls) if f.name in stored}
        return construct(cls, {**given, "rope_type": kind})

    @classmethod
    def of_factors(cls, factors: Tensor, frequencies: Tensor) -> "RopeScaling":
        """The llama3 scaling that makes rotations slower by these factors, which GGUF stores.

        Args:
            factors: float[d / 2].
            frequencies: those without scaling, float[d / 2].

        Raises:
            ValueError: if there is none.
        """
        factors, frequencies = factors.double(), frequencies.double()
        factor = round(float(factors.max()), 3)
        kept = (1 / factors - 1 / factor) / (1 - 1 / factor)
        between = (kept > 1e-4) & (kept < 1 - 1e-4)
        # There it is a line: (length * frequency / 2 pi - low) / (high - low), with a low of 1.
        line = torch.stack([frequencies, torch.ones_like(frequencies)], -1)[between]
        if factor > 1 and len(line) >= 2:
            slope, start = torch.linalg.lstsq(line, kept[between, None]).solution.flatten().tolist()
            high = round(1 - 1 / start, 3)
            length = round(slope * (high - 1) * 2 * math.pi)
            if high > 1 and length > 0:
                found = cls("llama3", factor, 1.0, high, length)
                if torch.allclose(found.scale(frequencies) * factors, frequencies, 1e-5, 0):
                    return found
        raise ValueError("its factors of RoPE are not those of a known scaling")

    def stored(self) -> dict[str, Any]:
        """As in config.json of a stock model."""
        if self.rope_type == "linear":
            return {"rope_type": self.rope_type, "factor": self.factor}
        return asdict(self)

    def scale(self, frequencies: Tensor) -> Tensor:
        """Radians per position, float[d / 2] -> float[d / 2]."""
        if self.rope_type == "linear":
            return frequencies / self.factor
        wavelengths_in_text = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = ((wavelengths_in_text - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True)
class Rope:
    """The rotations of one head.

    Args:
        head_dim: d.
        theta: the base of the wavelengths.
        scaling: for longer texts.
    """

    head_dim: int
    theta: float
    scaling: RopeScaling | None = None

    def frequencies(self, device: torch.device | None = None) -> Tensor:
        """Radians per position of each pair: float32[d / 2]."""
        half = torch.arange(0, self.head_dim, 2, device=device).float()
        frequencies = self.theta ** (-half / self.head_dim)
        return frequencies if self.scaling is None else self.scaling.scale(frequencies)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles at positions.

        Args:
            positions: int64[B, L].

        Returns:
            float32[B, L, 1, d] each. The first half of sin is negated for ``rotate``.
        """
        angles = positions[:, :, None, None].float() * self.frequencies(positions.device)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d/2) of float[B, L, H, d] by the angles of their positions."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
