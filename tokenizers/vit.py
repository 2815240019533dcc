"""A ViT image autoencoder: a convolutional stem, timm's transformer blocks, and back.

ViT-VQGAN (Yu et al. 2021, arXiv:2110.04627) with a convolutional stem, as in Xiao et al. 2021
(arXiv:2106.14881), here of residual blocks: it learns shapes from little data, where one big patch
projection sees colours only (docs/decisions.md has the numbers). The decoder goes back in the same
steps, so that patches meet without seams; what a code means depends on its neighbours, so they are
mixed first.

Shapes: B batch, H W pixels, h w = H / downsample, D width, C channels of a code vector.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

PIXELS_PER_STEP = 2  # the last layer unfolds 2 x 2 pixels from channels


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of float[B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(super().forward(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside the identity, float[B, C, H, W] (He et al., arXiv:1603.05027).

    Batch normalisation learns shapes several times sooner here than LayerNorm over channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


def _stage_widths(dim: int, downsample: int) -> list[int]:
    """Channels after each halving, up to ``dim``: 16 -> [D/8, D/4, D/2, D], at least 32."""
    halvings = downsample.bit_length() - 1
    return [max(32, dim >> (halvings - 1 - i)) for i in range(halvings)]


class Standardise(nn.BatchNorm1d):
    """Zero mean, unit variance for each channel of float[B, h, w, C], over the batch.

    So that a quantizer meets latents that fill its range from the first step on. Without it tokens
    start almost equal, and fall into a few codes (docs/decisions.md has the numbers).
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float().flatten(0, -2)).view(x.shape)


class PositionedBlocks(nn.Module):
    """Transformer blocks over a grid of tokens; learned positions, interpolated to other grids."""

    def __init__(self, dim: int, depth: int, heads: int, grid: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(1, dim, grid, grid))
        self.blocks = nn.Sequential(*(Block(dim, heads, qk_norm=True) for _ in range(depth)))
        for module in self.blocks.modules():
            if isinstance(module, Attention):
                # Written out: for so few tokens torch's kernel is slower, on a CPU eight times.
                module.fused_attn = False  # type: ignore[misc]  # Final, for TorchScript's sake
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """float[B, D, h, w] -> float[B, h, w, D]"""
        positions: Tensor = self.positions
        if positions.shape[-2:] != x.shape[-2:]:
            positions = F.interpolate(positions, x.shape[-2:], mode="bicubic", antialias=True)
        h = x.shape[-2]
        tokens = self.norm(self.blocks(rearrange(x + positions, "b d h w -> b (h w) d")))
        grid: Tensor = rearrange(tokens, "b (h w) d -> b h w d", h=h)
        return grid


class Encoder(nn.Module):
    """images: float[B, 3, H, W] in [-1, 1] -> latents: float[B, h, w, C]"""

    def __init__(
        self, dim: int, depth: int, heads: int, downsample: int, grid: int, channels: int
    ) -> None:
        super().__init__()
        widths = _stage_widths(dim, downsample)
        # Texture is in the first layer or nowhere: it needs its non-linearity before the next step.
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, 2, padding=1)]
        layers += [nn.BatchNorm2d(widths[0]), nn.GELU()]
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, 2, padding=1), Residual(after), Residual(after)]
        self.stem = nn.Sequential(*layers)
        self.transformer = PositionedBlocks(dim, depth, heads, grid)
        self.to_latents = nn.Sequential(nn.Linear(dim, channels), Standardise(channels))

    def forward(self, images: Tensor) -> Tensor:
        latents: Tensor = self.to_latents(self.transformer(self.stem(images)))
        return latents


class Decoder(nn.Module):
    """vectors: float[B, h, w, C] -> images: float[B, 3, H, W], near [-1, 1] but not clipped"""

    def __init__(
        self, dim: int, depth: int, heads: int, downsample: int, grid: int, channels: int
    ) -> None:
        super().__init__()
        self.from_vectors = nn.Linear(channels, dim)
        self.mix = nn.Sequential(Residual(dim), Residual(dim))
        self.transformer = PositionedBlocks(dim, depth, heads, grid)
        widths = _stage_widths(dim, downsample)[::-1]
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, 4 * after, 1), nn.PixelShuffle(2), Residual(after)]
        layers += [nn.BatchNorm2d(widths[-1]), nn.GELU()]
        layers += [nn.Conv2d(widths[-1], 3 * PIXELS_PER_STEP**2, 3, padding=1)]
        self.to_pixels = nn.Sequential(*layers, nn.PixelShuffle(PIXELS_PER_STEP))

    def forward(self, vectors: Tensor) -> Tensor:
        x = self.mix(rearrange(self.from_vectors(vectors), "b h w d -> b d h w"))
        tokens = rearrange(self.transformer(x), "b h w d -> b d h w")
        images: Tensor = self.to_pixels(tokens)
        return images
