"""Features of a frozen network, for perceptual distance and FID.

Distances between features of a trained network agree with human judgement (LPIPS, Zhang et al.
2018, arXiv:1801.03924). Those of a random network agree less, but more than pixels do. Trained
weights must be available locally. Without them, the random network here gives the same values
everywhere. They compare tokenizers with each other. Never compare them with published LPIPS or FID.

Shapes: B batch, H W pixels, D features.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.tokenizers.encoder import Encoder

RANDOM = "random"


class Features(nn.Module):
    """A frozen network by name.

    Args:
        name: ``random`` is four convolutions with weights of a fixed seed. Else a pretrained
            encoder, ``timm:MODEL[=FILE]`` or ``open_clip:MODEL[=FILE]`` (tokenizers/encoder.py).
        stages: numbers of its feature maps, -1 the last. None: all.

    Raises:
        ValueError: if the name or a stage is unknown, or the weights are not available.
    """

    num_features: int  # D. torchmetrics reads it.
    network: nn.Module

    def __init__(self, name: str = RANDOM, stages: Sequence[int] | None = None) -> None:
        super().__init__()
        if name == RANDOM:
            self.name, self.network = name, _RandomNetwork(stages)
        else:
            try:
                self.network = Encoder(name, stages)
            except ValueError as error:
                raise ValueError(
                    f"features: {error}. Features that need no weights: {RANDOM}"
                ) from error
            self.name = self.network.name  # the file is of this machine
        self.requires_grad_(False).eval()
        with torch.no_grad():
            self.num_features = self.maps(torch.zeros(1, 3, self._size, self._size))[-1].shape[1]

    @property
    def _size(self) -> int:
        return self.network.image_size if isinstance(self.network, Encoder) else 64

    @property
    def label(self) -> str:
        """The name of these features in reports."""
        return "random features, seed 0" if self.name == RANDOM else f"features of {self.name}"

    def train(self, mode: bool = True) -> "Features":
        return super().train(False)  # always in eval mode, also inside a module in training

    def maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps of each layer.

        Args:
            images: float[B, 3, H, W] in [-1, 1].

        Returns:
            float[B, C, h, w] for each layer.
        """
        return self.network.maps(images)  # type: ignore[operator]

    def forward(self, images: Tensor) -> Tensor:
        """The mean of the last layer.

        Args:
            images: float[B, 3, H, W] in [-1, 1].

        Returns:
            float[B, D].
        """
        return self.maps(images)[-1].mean((2, 3))

    def distance(self, images: Tensor, others: Tensor) -> Tensor:
        """Perceptual distance: LPIPS without its learned weights.

        At each position of each layer, it is the squared distance of the two unit vectors.

        Args:
            images: float[B, 3, H, W] in [-1, 1].
            others: float[B, 3, H, W] in [-1, 1].

        Returns:
            float[B], 0 for equal images.
        """
        total = images.new_zeros(len(images))
        for a, b in zip(self.maps(images), self.maps(others), strict=True):
            squared = (
                (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1)
            )
            total = total + squared.mean((1, 2))
        return total


_WIDTHS = (32, 64, 128, 256)


class _RandomNetwork(nn.Module):
    """He initialisation with a separate generator, so the weights are the same everywhere."""

    def __init__(self, stages: Sequence[int] | None) -> None:
        super().__init__()
        self.stages = range(len(_WIDTHS)) if stages is None else stages
        if not all(-len(_WIDTHS) <= stage < len(_WIDTHS) for stage in self.stages):
            raise ValueError(f"stages {list(self.stages)}: {RANDOM} has {len(_WIDTHS)}")
        self.layers = nn.ModuleList(
            nn.Conv2d(before, after, 3, 2, padding=1)
            for before, after in zip((3, *_WIDTHS), _WIDTHS, strict=False)
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in self.layers:
                assert isinstance(layer, nn.Conv2d) and layer.bias is not None
                deviation = (2 / layer.weight[0].numel()) ** 0.5
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * deviation)
                layer.bias.zero_()

    def maps(self, images: Tensor) -> list[Tensor]:
        maps, x = [], images
        for layer in self.layers:
            x = F.relu(layer(x))
            maps.append(x)
        return [maps[stage] for stage in self.stages]
