"""The convolutional autoencoder of VQGAN, in the shape of the released weights.

VQGAN (Esser et al. 2021, arXiv:2012.09841), whose encoder and decoder are those of DDPM's U-Net (Ho
et al. 2020, arXiv:2006.11239) without its skips: levels of residual blocks, each half the size of
the one before, attention where the grid is small. LlamaGen's VQ (arXiv:2406.06525), Janus's and
Chameleon's (arXiv:2405.09818) are of the same shape; tokenizers/released.py reads their weights.

Shapes: B batch, H W pixels, h w = H / downsample, C channels of a code vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

GROUPS = 32  # of the normalisation


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


def convolution(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1)


class ResidualBlock(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(before), convolution(before, after)
        self.norm2, self.conv2 = norm(after), convolution(after, after)
        self.shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        out: Tensor = self.shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))
        return out


class AttentionBlock(nn.Module):
    """One head over all places of the grid, beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.query, self.key, self.value, self.out = (
            nn.Conv2d(channels, channels, 1) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        read = self.norm(x)
        q, k, v = (
            rearrange(part(read), "b c h w -> b 1 (h w) c")
            for part in (self.query, self.key, self.value)
        )
        found = F.scaled_dot_product_attention(q, k, v)
        found = self.out(rearrange(found, "b 1 (h w) c -> b c h w", h=x.shape[2]))
        out: Tensor = x + found
        return out


class Downsample(nn.Conv2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        # Zeros to the right and below only: how the released weights were trained.
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks, each followed by attention or not, then what changes the size."""

    def __init__(
        self, before: int, after: int, blocks: int, attention: bool, resize: nn.Module
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(after if number else before, after) for number in range(blocks)
        )
        self.attention = nn.ModuleList(
            AttentionBlock(after) if attention else nn.Identity() for _ in range(blocks)
        )
        self.resize = resize

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attention, strict=True):
            x = attention(block(x))
        out: Tensor = self.resize(x)
        return out


def middle(channels: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels),
        AttentionBlock(channels),
        ResidualBlock(channels, channels),
    )


@dataclass(frozen=True)
class VQGAN:
    """Args:
    channels: of the first convolution; multipliers: of them, the channels of each level, from the
        pixels on: the grid is halved between levels.
    depth: residual blocks of a level (the decoder has one more).
    attention: for each level whether its blocks are followed by attention; by default the last.
    latent_channels: between the convolutions and the layer to the channels of a code.
    """

    channels: int = 128
    multipliers: Sequence[int] = (1, 1, 2, 2, 4)
    depth: int = 2
    attention: Sequence[bool] | None = None
    latent_channels: int = 256

    def __post_init__(self) -> None:
        attention = self.attention
        if attention is None:
            attention = [False] * (len(self.multipliers) - 1) + [True]
            object.__setattr__(self, "attention", attention)
        if len(attention) != len(self.multipliers):
            raise ValueError(
                f"attention has {len(attention)} entries for {len(self.multipliers)} levels"
            )
        if self.channels % GROUPS or min(self.multipliers, default=0) < 1 or self.depth < 1:
            raise ValueError(
                f"channels={self.channels}, multipliers={list(self.multipliers)}, "
                f"depth={self.depth}: expected a multiple of {GROUPS}, and numbers from 1 on"
            )

    @property
    def widths(self) -> list[int]:
        return [self.channels * multiplier for multiplier in self.multipliers]

    def build(self, downsample: int, grid: int, channels: int) -> tuple["Encoder", "Decoder"]:
        if downsample != 2 ** (len(self.multipliers) - 1):
            raise ValueError(
                f"downsample={downsample} with {len(self.multipliers)} multipliers: expected "
                f"{2 ** (len(self.multipliers) - 1)}, as each level but the last halves the image"
            )
        return Encoder(self, channels), Decoder(self, channels)


class Encoder(nn.Module):
    """images: float[B, 3, H, W] in [-1, 1] -> latents: float[B, h, w, C]"""

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
        grid: Tensor = rearrange(latents, "b c h w -> b h w c")
        return grid


class Decoder(nn.Module):
    """vectors: float[B, h, w, C] -> images: float[B, 3, H, W], near [-1, 1] but not clipped"""

    def __init__(self, vqgan: VQGAN, channels: int) -> None:
        super().__init__()
        upwards = vqgan.widths[::-1]
        last = len(upwards) - 1
        assert vqgan.attention is not None
        self.from_code = nn.Conv2d(channels, vqgan.latent_channels, 1)
        self.conv_in = convolution(vqgan.latent_channels, upwards[0])
        self.middle = middle(upwards[0])
        self.levels = nn.Sequential()
        for level, (before, after) in enumerate(pairwise([upwards[0], *upwards])):
            resize = Upsample(after) if level < last else nn.Identity()
            attention = vqgan.attention[last - level]
            self.levels.append(Level(before, after, vqgan.depth + 1, attention, resize))
        self.norm_out = norm(upwards[-1])
        self.conv_out = convolution(upwards[-1], 3)

    @property
    def last_layer(self) -> Tensor:
        """The last weights before the pixels, for losses that are balanced there."""
        return self.conv_out.weight

    def forward(self, vectors: Tensor) -> Tensor:
        x = self.conv_in(self.from_code(rearrange(vectors, "b h w c -> b c h w")))
        x = self.levels(self.middle(x))
        images: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return images
