"""What all levels of an image tokenizer share: images of the right size, hashes of weights."""

import hashlib
import json
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Fit: TypeAlias = Literal["squash", "crop", "letterbox"]


def digest_of(config: dict[str, Any], weights: dict[str, Tensor]) -> str:
    """Hash of config and weights, 16 hex digits."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    hash_weights(digest, weights)
    return digest.hexdigest()[:16]


def hash_weights(digest: "hashlib._Hash", weights: dict[str, Tensor]) -> None:
    """Update the hash with name, shape, dtype and bytes of every weight, sorted by name."""
    for name, value in sorted(weights.items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def resize(images: Tensor, side: int) -> Tensor:
    """float[B, 3, H, W] in [-1, 1] -> float[B, 3, side, side] in [-1, 1], bicubic."""
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)


def check_shape(images: Tensor) -> None:
    """Raises ``ValueError`` for images that are not float[B, 3, H, W]."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images of shape {tuple(images.shape)}: expected [B, 3, H, W]")
    if not images.is_floating_point():
        raise ValueError(f"images of {images.dtype}: expected floating point, in [-1, 1]")


def check_range(images: Tensor) -> None:
    """Raises ``ValueError`` for images that are not in [-1, 1]."""
    # Pixels from 0 to 255 would give meaningless codes without an error. NaN fails here too.
    if images.numel() and not images.abs().amax() <= 1 + 1e-3:
        raise ValueError(
            f"images from {images.min():.3g} to {images.max():.3g}: expected -1 to 1, "
            "that is uint8 / 127.5 - 1"
        )
