"""The convolutional autoencoder of Emu3 (arXiv:2409.18869), for images.

It is made for films: VQGAN's encoder for each frame, then convolutions over time. An image is a
film of equal frames, of which the first is drawn. The norms of the decoder are scaled and shifted
by the vectors of the codes (MoVQ, Zheng et al. 2022, arXiv:2209.09002).

Shapes: B batch, H W pixels, h w = H / downsample, C channels of a code vector, T frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from multimodal.schemas import Between
from multimodal.tokenizers import vqgan


class FilmConvolution(nn.Conv3d):
    """A convolution that sees two earlier frames: float[B, C, T, h, w]. Before the first is 0."""

    def forward(self, film: Tensor) -> Tensor:
        side = self.kernel_size[1] // 2
        return super().forward(F.pad(film, (side, side, side, side, 2, 0)))


class FilmBlock(nn.Module):
    """Two convolutions over space and time beside the identity, float[B, C, T, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm3d(channels), FilmConvolution(channels, channels, 3)
        self.norm2, self.conv2 = nn.BatchNorm3d(channels), FilmConvolution(channels, channels, 3)

    def forward(self, film: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(film)))
        return film + self.conv2(F.silu(self.norm2(hidden)))


class FilmToCode(nn.Module):
    """Latents of an image to what is quantized: float[B, latent C, h, w] -> float[B, C, h, w]."""

    def __init__(self, emu3: "Emu3", channels: int) -> None:
        super().__init__()
        latent, self.frames = emu3.latent_channels, emu3.frames
        self.shrink = nn.ModuleList(
            FilmConvolution(latent, latent, (4, 3, 3), (2, 1, 1)) for _ in range(emu3.halvings)
        )
        self.blocks = nn.ModuleList(FilmBlock(latent) for _ in range(emu3.depth))
        self.out = FilmConvolution(latent, channels, (3, 1, 1))

    def forward(self, latents: Tensor) -> Tensor:
        film = latents[:, :, None].expand(-1, -1, self.frames, -1, -1)
        for shrink in self.shrink:
            film = F.silu(shrink(film))
        for block in self.blocks:
            film = block(film)
        return self.out(film)[:, :, 0]


class SpatialNorm(nn.Module):
    """GroupNorm, scaled and shifted by the code vectors v at each place.

    x: float[B, channels, H, W], v: float[B, C, h, w] -> float[B, channels, H, W].
    """

    def __init__(self, channels: int, code_channels: int) -> None:
        super().__init__()
        self.norm = vqgan.norm(channels)
        self.scale = nn.Conv2d(code_channels, channels, 1)
        self.shift = nn.Conv2d(code_channels, channels, 1)

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:
        v = F.interpolate(vectors, x.shape[-2:], mode="nearest")
        return self.norm(x) * self.scale(v) + self.shift(v)


class Decoder(vqgan.Decoder):
    """vectors: float[B, h, w, C] -> images: float[B, 3, H, W], near [-1, 1] but not clipped."""

    def __init__(self, emu3: "Emu3", channels: int) -> None:
        super().__init__(emu3, channels, partial(SpatialNorm, code_channels=channels))
        latent = emu3.latent_channels
        if latent != channels:
            raise ValueError(f"latent_channels={latent}: expected those of a code, {channels}")
        from_code: Any = FilmConvolution(channels, latent, (3, 1, 1))
        self.from_code = from_code
        self.blocks = nn.ModuleList(FilmBlock(latent) for _ in range(emu3.depth))
        self.grow = nn.ModuleList(FilmConvolution(latent, latent, 3) for _ in range(emu3.halvings))

    def forward(self, vectors: Tensor) -> Tensor:
        film = rearrange(vectors, "b h w c -> b c 1 h w")
        # What is drawn and what the norms read go through the same layers.
        film = torch.cat([self.from_code(film), film])
        for block in self.blocks:
            film = block(film)
        for grow in self.grow:
            film = F.silu(grow(film.repeat_interleave(2, dim=2)))
        return self.draw(*film[:, :, 0].chunk(2))


@dataclass(frozen=True)
class Emu3(vqgan.VQGAN):
    """Configuration of the Emu3 autoencoder.

    Args:
        frames: of a film that one grid of codes stands for, a power of two. Others: see VQGAN.
    """

    channels: Annotated[int, Between(vqgan.GROUPS, 2**14)] = 256
    multipliers: Sequence[Annotated[int, Between(1, 64)]] = (1, 2, 2, 4)
    latent_channels: Annotated[int, Between(1, 2**14)] = 4
    frames: Annotated[int, Between(1, 64)] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames & (self.frames - 1):
            raise ValueError(f"frames={self.frames}: expected a power of two")

    @property
    def halvings(self) -> int:
        """How often the frames are halved until one is left."""
        return self.frames.bit_length() - 1

    def encoder(self, downsample: int, grid: int, channels: int) -> vqgan.Encoder:
        encoder = super().encoder(downsample, grid, channels)
        to_code: Any = FilmToCode(self, channels)
        encoder.to_code = to_code
        return encoder

    def decoder(self, downsample: int, grid: int, channels: int) -> vqgan.Decoder:
        return Decoder(self, channels)
