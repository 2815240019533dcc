"""Features of a frozen network, for perceptual distance and FID.

Distances between features of a trained network agree with human judgement (LPIPS, Zhang et al.
2018, arXiv:1801.03924). Those of a random network agree less, but more than pixels do. Trained
weights must be available locally. Without them, the random network here gives the same values
everywhere. They compare tokenizers with each other. Never compare them with published LPIPS or FID.

Shapes: B batch, H W pixels, D features.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RANDOM = "random"


class Features(nn.Module):
    """A frozen network by name.

    Args:
        name: ``random`` is four convolutions with weights of a fixed seed. ``timm:MODEL`` is a
            trained model of timm, from its cache or the network. ``timm:MODEL=FILE`` takes the
            weights from a file (safetensors).

    Raises:
        ValueError: if the name is unknown or the weights are not available.
    """

    num_features: int  # D. torchmetrics reads it.
    mean: Tensor
    std: Tensor
    network: nn.Module

    def __init__(self, name: str = RANDOM) -> None:
        super().__init__()
        self.name = name
        if name == RANDOM:
            self.network, mean, std = _random_network(), [0.5] * 3, [0.5] * 3
            self.num_features = _WIDTHS[-1]
        else:
            self.network, mean, std = _timm_network(name)
            with torch.no_grad():
                self.num_features = self.network(torch.zeros(1, 3, 64, 64))[-1].shape[1]
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

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
        return self.network(((images + 1) / 2 - self.mean) / self.std)

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
            squared = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1)
            total = total + squared.mean((1, 2))
        return total


_WIDTHS = (32, 64, 128, 256)


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(before, after, 3, 2, padding=1)
            for before, after in zip((3, *_WIDTHS), _WIDTHS, strict=False)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for layer in self.layers:
            x = F.relu(layer(x))
            maps.append(x)
        return maps


def _random_network() -> _Layers:
    """He initialisation with a separate generator, so the weights are the same everywhere."""
    network, generator = _Layers(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in network.layers:
            assert isinstance(layer, nn.Conv2d) and layer.bias is not None
            deviation = (2 / layer.weight[0].numel()) ** 0.5
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * deviation)
            layer.bias.zero_()
    return network


def _timm_network(name: str) -> tuple[nn.Module, list[float], list[float]]:
    import timm

    kind, _, model = name.partition(":")
    if kind != "timm" or not model:
        raise ValueError(f"features {name!r}: expected {RANDOM}, timm:MODEL or timm:MODEL=FILE")
    model, _, file = model.partition("=")
    if file and not Path(file).is_file():
        raise ValueError(f"features {name!r}: {file}: no such file")
    try:
        network = timm.create_model(
            model,
            pretrained=True,
            features_only=True,
            pretrained_cfg_overlay={"file": file} if file else None,
        )
    except (
        Exception
    ) as error:  # timm and its hub raise any type: unknown model, no cache, no network
        raise ValueError(
            f"features {name!r}: the weights are not available ({type(error).__name__}: {error}). "
            f"Give a file: timm:{model}=FILE, or use the features that need no weights: {RANDOM}"
        ) from error
    config: dict[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
    network.eval()  # before the first forward pass: batch statistics must not change
    return network, list(config["mean"]), list(config["std"])
