"""A ViT image autoencoder: a convolutional stem, timm's transformer blocks, and a mirrored decoder.

ViT-VQGAN (Yu et al. 2021, arXiv:2110.04627) with a convolutional stem (Xiao et al. 2021,
arXiv:2106.14881) of residual blocks. The stem learns shapes from little data. A single large patch
projection learns colours only (docs/decisions/semantic_loss.md has the numbers). The decoder
upsamples in the same steps, so that patches meet without seams. The meaning of a code depends on
its neighbours, so the decoder mixes neighbours first.

Shapes: B batch, H W pixels, h w = H / downsample, D width, C channels of a code vector.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from multimodal.schemas import Between, check_fields

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
        return x + self.layers(x)


def _stage_widths(dim: int, downsample: int) -> list[int]:
    """Channels after each halving, up to ``dim``: 16 -> [D/8, D/4, D/2, D], at least 32."""
    halvings = downsample.bit_length() - 1
    return [max(32, dim >> (halvings - 1 - i)) for i in range(halvings)]


class Standardise(nn.BatchNorm1d):
    """Zero mean, unit variance for each channel of float[B, h, w, C], over the batch.

    The latents then fill the range of the quantizer from the first step on. Without it tokens start
    almost equal, and only a few codes are used (docs/decisions/quantizers.md has the numbers).
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
                # Plain attention: for few tokens torch's fused kernel is slower, 8 times on a CPU.
                module.fused_attn = False  # type: ignore[misc]  # Final, for TorchScript's sake
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """float[B, D, h, w] -> float[B, h, w, D]."""
        positions: Tensor = self.positions
        if positions.shape[-2:] != x.shape[-2:]:
            positions = F.interpolate(positions, x.shape[-2:], mode="bicubic", antialias=True)
        h = x.shape[-2]
        tokens = self.norm(self.blocks(rearrange(x + positions, "b d h w -> b (h w) d")))
        return rearrange(tokens, "b (h w) d -> b h w d", h=h)


@dataclass(frozen=True)
class ViT:
    """Configuration of the ViT autoencoder.

    Args:
        dim: width of the transformers, a multiple of ``heads``.
        encoder_depth: blocks of the encoder. With 0 each code depends only on the pixels around it.
        decoder_depth: blocks of the decoder.
        heads: of attention.

    Raises:
        ValueError: if ``dim`` is not a multiple of ``heads``, or a number is out of its range.
    """

    dim: Annotated[int, Between(1, 2**14)] = 256
    encoder_depth: Annotated[int, Between(0, 256)] = 4
    decoder_depth: Annotated[int, Between(0, 256)] = 4
    heads: Annotated[int, Between(1, 1024)] = 4

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dim % self.heads:
            raise ValueError(f"dim={self.dim} is not a multiple of heads={self.heads}")

    def encoder(self, downsample: int, grid: int, channels: int) -> "Encoder":
        """Make the encoder to so many channels. Raises ValueError for a ``downsample`` below 4."""
        if downsample < 4:
            raise ValueError(f"downsample={downsample}: vit expects a power of two from 4 on")
        return Encoder(self, downsample, grid, channels)

    def decoder(self, downsample: int, grid: int, channels: int) -> "Decoder":
        """Make the decoder from so many channels."""
        return Decoder(self, downsample, grid, channels)


class Encoder(nn.Module):
    """images: float[B, 3, H, W] in [-1, 1] -> latents: float[B, h, w, C]."""

    def __init__(self, vit: ViT, downsample: int, grid: int, channels: int) -> None:
        super().__init__()
        widths = _stage_widths(vit.dim, downsample)
        # A non-linearity after the first layer, or texture is lost before the next step.
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, 2, padding=1)]
        layers += [nn.BatchNorm2d(widths[0]), nn.GELU()]
        # Without attention, no residuals on the grid of codes: they would mix codes as attention
        # does. With two levels the first gets them instead, or there would be none.
        if len(widths) == 2 and not vit.encoder_depth:
            layers += [Residual(widths[0]), Residual(widths[0])]
        for number, (before, after) in enumerate(pairwise(widths), start=2):
            layers += [nn.Conv2d(before, after, 3, 2, padding=1)]
            if number < len(widths) or vit.encoder_depth:
                layers += [Residual(after), Residual(after)]
        self.stem = nn.Sequential(*layers)
        if vit.encoder_depth:
            self.tokens: nn.Module = PositionedBlocks(vit.dim, vit.encoder_depth, vit.heads, grid)
        else:
            self.tokens = TokenMLP(vit.dim)
        self.to_latents = nn.Sequential(nn.Linear(vit.dim, channels), Standardise(channels))

    def forward(self, images: Tensor) -> Tensor:
        return self.to_latents(self.tokens(self.stem(images)))


class TokenMLP(nn.Module):
    """An MLP on every token: float[B, D, h, w] -> float[B, h, w, D].

    With attention instead, the codes of an empty background store details of the objects. This uses
    the bits well. But a code that depends on the full image is hard to draw
    (docs/decisions/image_tokenizers.md).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(dim), nn.Conv2d(dim, 2 * dim, 1), nn.GELU(), nn.Conv2d(2 * dim, dim, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(x + self.layers(x), "b d h w -> b h w d")


class Decoder(nn.Module):
    """vectors: float[B, h, w, C] -> images: float[B, 3, H, W], near [-1, 1] but not clipped."""

    def __init__(self, vit: ViT, downsample: int, grid: int, channels: int) -> None:
        super().__init__()
        self.from_vectors = nn.Linear(channels, vit.dim)
        self.mix = nn.Sequential(Residual(vit.dim), Residual(vit.dim))
        self.transformer = PositionedBlocks(vit.dim, vit.decoder_depth, vit.heads, grid)
        widths = _stage_widths(vit.dim, downsample)[::-1]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, 4 * after, 1), nn.PixelShuffle(2), Residual(after)]
        layers += [nn.BatchNorm2d(widths[-1]), nn.GELU()]
        layers += [nn.Conv2d(widths[-1], 3 * PIXELS_PER_STEP**2, 3, padding=1)]
        self.to_pixels = nn.Sequential(*layers, nn.PixelShuffle(PIXELS_PER_STEP))

    @property
    def first_layer(self) -> Tensor:
        """The weights that read the vectors, float[D, C]."""
        return self.from_vectors.weight

    @property
    def last_layer(self) -> Tensor:
        """The last weights before the pixels, where the adversarial loss is balanced."""
        convolution = self.to_pixels[-2]
        assert isinstance(convolution, nn.Conv2d)
        return convolution.weight

    def forward(self, vectors: Tensor) -> Tensor:
        x = self.mix(rearrange(self.from_vectors(vectors), "b h w d -> b d h w"))
        tokens = rearrange(self.transformer(x), "b h w d -> b d h w")
        return self.to_pixels(tokens)
