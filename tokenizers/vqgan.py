"""The convolutional autoencoder of VQGAN, in the shape of the released weights.

VQGAN (Esser et al. 2021, arXiv:2012.09841) has the encoder and decoder of DDPM's U-Net (Ho et al.
2020, arXiv:2006.11239) without its skip connections: levels of residual blocks, each level half the
size of the last, with attention where the grid is small. The VQ tokenizers of LlamaGen
(arXiv:2406.06525), Janus and Chameleon (arXiv:2405.09818) have the same shape. released.py reads
their weights.

Shapes: B batch, H W pixels, h w = H / downsample, C channels of a code vector.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from multimodal.schemas import Between, check_fields

GROUPS = 32  # of group normalisation


Norm: TypeAlias = Callable[[int], nn.Module]  # of so many channels


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


def convolution(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside the identity: float[B, before, H, W] -> float[B, after, H, W].

    The identity is a 1 x 1 convolution if the channels change. condition: what the norms also read.
    """

    def __init__(self, before: int, after: int, norm: Norm = norm) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(before), convolution(before, after)
        self.norm2, self.conv2 = norm(after), convolution(after, after)
        self.shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x, *condition)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(hidden, *condition)))


class AttentionBlock(nn.Module):
    """Attention of one head over all positions of the grid, beside the identity."""

    def __init__(self, channels: int, norm: Norm = norm) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.query, self.key, self.value, self.out = (
            nn.Conv2d(channels, channels, 1) for _ in range(4)
        )

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        normed = self.norm(x, *condition)
        q, k, v = (
            rearrange(part(normed), "b c h w -> b 1 (h w) c")
            for part in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(attended, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Conv2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        # Pad to the right and below only, as the released weights were trained.
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks, each with or without attention, then ``resize``."""

    def __init__(
        self,
        before: int,
        after: int,
        blocks: int,
        attention: bool,
        resize: nn.Module,
        norm: Norm = norm,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(after if number else before, after, norm) for number in range(blocks)
        )
        self.attention = nn.ModuleList(
            AttentionBlock(after, norm) for _ in range(blocks if attention else 0)
        )
        self.resize = resize

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x, *condition)
            if self.attention:
                x = self.attention[number](x, *condition)
        return self.resize(x)


def middle(channels: int, norm: Norm = norm) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels, norm),
        AttentionBlock(channels, norm),
        ResidualBlock(channels, channels, norm),
    )


@dataclass(frozen=True)
class VQGAN:
    """Configuration of the VQGAN autoencoder.

    Args:
        channels: of the first convolution, a multiple of 32.
        multipliers: for each level, its channels as a multiple of ``channels``. The first level is
            at the pixels. The grid is halved between levels.
        depth: residual blocks of a level. The decoder has one more.
        attention: for each level, whether attention follows its blocks. By default in the last
            level only.
        latent_channels: between the convolutions and the layer to the channels of a code.
        decodes: whether there is a decoder. Chameleon's was not released.

    Raises:
        ValueError: for numbers that do not fit.
    """

    channels: Annotated[int, Between(GROUPS, 2**14)] = 128
    multipliers: Sequence[Annotated[int, Between(1, 64)]] = (1, 1, 2, 2, 4)
    depth: Annotated[int, Between(1, 64)] = 2
    attention: Sequence[bool] | None = None
    latent_channels: Annotated[int, Between(1, 2**14)] = 256
    decodes: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        attention = self.attention
        if attention is None:
            attention = [False] * (len(self.multipliers) - 1) + [True]
            object.__setattr__(self, "attention", attention)
        if len(attention) != len(self.multipliers):
            raise ValueError(
                f"attention has {len(attention)} entries for {len(self.multipliers)} levels"
            )
        if self.channels % GROUPS or not self.multipliers:
            raise ValueError(
                f"channels={self.channels}, multipliers={list(self.multipliers)}: expected a "
                f"multiple of {GROUPS}, and at least one"
            )

    @property
    def widths(self) -> list[int]:
        """The channels of each level."""
        return [self.channels * multiplier for multiplier in self.multipliers]

    def encoder(self, downsample: int, grid: int, channels: int) -> "Encoder":
        """Make the encoder. Raises ValueError if ``downsample`` does not fit the levels."""
        if downsample != 2 ** (len(self.multipliers) - 1):
            raise ValueError(
                f"downsample={downsample} with {len(self.multipliers)} multipliers: expected "
                f"{2 ** (len(self.multipliers) - 1)}, as each level but the last halves the image"
            )
        return Encoder(self, channels)

    def decoder(self, downsample: int, grid: int, channels: int) -> "Decoder | NoDecoder":
        """Make the decoder from so many channels."""
        return Decoder(self, channels) if self.decodes else NoDecoder()


class Encoder(nn.Module):
    """images: float[B, 3, H, W] in [-1, 1] -> latents: float[B, h, w, C]."""

    def __init__(self, vqgan: VQGAN, channels: int) -> None:
        super().__init__()
        widths, last = vqgan.widths, len(vqgan.widths) - 1
        assert vqgan.attention is not None
        self.conv_in = convolution(3, vqgan.channels)
        self.levels = nn.Sequential()
        for level, (before, after) in enumerate(pairwise([vqgan.channels, *widths])):
            resize = Downsample(after) if level < last else nn.Identity()
            self.levels.append(Level(before, after, vqgan.depth, vqgan.attention[level], resize))
        self.middle = middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = convolution(widths[-1], vqgan.latent_channels)
        self.to_code = nn.Conv2d(vqgan.latent_channels, channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.middle(self.levels(self.conv_in(images)))
        latents = self.to_code(self.conv_out(F.silu(self.norm_out(x))))
        return rearrange(latents, "b c h w -> b h w c")


class Decoder(nn.Module):
    """vectors: float[B, h, w, C] -> images: float[B, 3, H, W], near [-1, 1] but not clipped."""

    def __init__(self, vqgan: VQGAN, channels: int, norm: Norm = norm) -> None:
        super().__init__()
        upwards = vqgan.widths[::-1]
        last = len(upwards) - 1
        assert vqgan.attention is not None
        self.from_code = nn.Conv2d(channels, vqgan.latent_channels, 1)
        self.conv_in = convolution(vqgan.latent_channels, upwards[0])
        self.middle = middle(upwards[0], norm)
        self.levels = nn.Sequential()
        for level, (before, after) in enumerate(pairwise([upwards[0], *upwards])):
            resize = Upsample(after) if level < last else nn.Identity()
            attention = vqgan.attention[last - level]
            self.levels.append(Level(before, after, vqgan.depth + 1, attention, resize, norm))
        self.norm_out = norm(upwards[-1])
        self.conv_out = convolution(upwards[-1], 3)

    @property
    def first_layer(self) -> Tensor:
        """The weights that read the vectors, float[latent_channels, C, 1, 1]."""
        return self.from_code.weight

    @property
    def last_layer(self) -> Tensor:
        """The last weights before the pixels, where the adversarial loss is balanced."""
        return self.conv_out.weight

    def forward(self, vectors: Tensor) -> Tensor:
        return self.draw(self.from_code(rearrange(vectors, "b h w c -> b c h w")))

    def draw(self, x: Tensor, *condition: Tensor) -> Tensor:
        """float[B, latent_channels, h, w] -> float[B, 3, H, W]."""
        x = self.conv_in(x)
        for part in (*self.middle, *self.levels):
            x = part(x, *condition)
        return self.conv_out(F.silu(self.norm_out(x, *condition)))


class NoDecoder(nn.Module):
    """In the place of a decoder that was not released. Whatever is asked of it is refused."""

    @property
    def first_layer(self) -> Tensor:
        return self(torch.empty(0))

    @property
    def last_layer(self) -> Tensor:
        return self(torch.empty(0))

    def forward(self, vectors: Tensor) -> Tensor:
        raise ValueError(
            "this image tokenizer has no decoder: it reads images, and cannot draw them"
        )
