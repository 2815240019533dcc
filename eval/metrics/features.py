"""What pictures look like to a frozen network: perceptual distance, and features for FID.

LPIPS (Zhang et al. 2018, arXiv:1801.03924) showed that distances between features of a trained
network agree with people, and that those of a random one do so less, but better than pixels.
Trained weights have to be at hand; without any, the random network here is a fixed yardstick: the
same for everyone, comparable between tokenizers, and never to be set beside published LPIPS or FID.

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
    name: ``random``: four layers of convolutions with weights of a fixed seed. ``timm:MODEL``: a
        trained model of timm, from its cache or the net; ``timm:MODEL=FILE``: with the weights in
        a file (safetensors).
    Errors: ``ValueError`` for a name that is not known and weights that cannot be had.
    """

    num_features: int  # D; torchmetrics reads it
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
        """How a figure made with these features is to be called."""
        return "random features, seed 0" if self.name == RANDOM else f"features of {self.name}"

    def train(self, mode: bool = True) -> "Features":
        return super().train(False)  # a yardstick, whatever the module around it does

    def maps(self, images: Tensor) -> list[Tensor]:
        """images: float[B, 3, H, W] in [-1, 1] -> float[B, C, h, w] of each layer"""
        maps: list[Tensor] = self.network(((images + 1) / 2 - self.mean) / self.std)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """images: float[B, 3, H, W] in [-1, 1] -> float[B, D], the mean of the last layer"""
        return self.maps(images)[-1].mean((2, 3))

    def distance(self, images: Tensor, others: Tensor) -> Tensor:
        """Perceptual distance, float[B]: LPIPS without its learned weights.

        At each place of each layer, the squared distance of the two unit vectors.
        """
        total = images.new_zeros(len(images))
        for a, b in zip(self.maps(images), self.maps(others), strict=True):
            apart = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1)
            total = total + apart.mean((1, 2))
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
    """He initialisation from a generator of its own, so that it is the same everywhere."""
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
    except Exception as error:  # unknown model, no cache, no net: timm and its hub raise anything
        raise ValueError(
            f"features {name!r}: the weights cannot be had ({type(error).__name__}: {error}). "
            f"Name a file: timm:{model}=FILE, or use the features that need none: {RANDOM}"
        ) from error
    config: dict[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
    network.eval()  # before anything goes through it: the statistics of batches must not move
    return network, list(config["mean"]), list(config["std"])
