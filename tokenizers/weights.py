"""What all levels of an image tokenizer share: their folders, hashes of weights, image sizes."""

import hashlib
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

Fit: TypeAlias = Literal["squash", "crop", "letterbox"]


class Stored(Protocol):
    """A module that is a folder: ``config.json`` and ``model.safetensors``."""

    @property
    def fingerprint(self) -> str: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, weights: Mapping[str, Tensor]) -> object: ...


StoredT = TypeVar("StoredT", bound=Stored)


def save_folder(module: Stored, config: dict[str, Any], folder: str | Path) -> None:
    """Write config and fingerprint, and the weights.

    Weights that are numbers of half precision are stored in half precision. Nothing is lost.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: _shortest(weight) for name, weight in module.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    stored = json.dumps({**config, "fingerprint": module.fingerprint}, indent=1)
    (folder / "config.json").write_text(stored + "\n", encoding="utf-8")


def load_folder(
    make: Callable[[dict[str, Any]], StoredT], folder: str | Path, kind: str
) -> StoredT:
    """Read a folder that ``save_folder`` wrote.

    Args:
        make: makes the module of its config.
        kind: what the folder should be, for errors.

    Raises:
        ValueError: for any other folder, or if weights and config do not match.
    """
    folder = Path(folder)
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        fingerprint = stored.pop("fingerprint")
        with at_most(folder / "model.safetensors"):
            module = make(stored)
        module.load_state_dict(load_file(folder / "model.safetensors"))
    except FileNotFoundError as error:
        missing = error.filename or error
        raise ValueError(f"{folder}: not {kind} ({missing} is missing)") from error
    except (
        AttributeError, KeyError, TypeError, RuntimeError, ArithmeticError, SafetensorError,
        json.JSONDecodeError,
    ) as error:  # fmt: skip
        reason = textwrap.shorten(str(error), 300)  # torch lists every wrong weight
        raise ValueError(f"{folder}: not {kind} of this release: {reason}") from error
    if module.fingerprint != fingerprint:
        raise ValueError(
            f"{folder}: fingerprint is {module.fingerprint}, its config says {fingerprint}: "
            "weights and config do not belong together"
        )
    return module


@contextmanager
def at_most(*files: Path) -> Iterator[None]:
    """While a module is built: no more weights than these files can hold.

    A config may name any sizes. Memory and minutes would be spent on them before the weights are
    compared. Twice the bytes of the files are the limit, because tied weights are built twice.

    Raises:
        RuntimeError: as soon as a layer is too much, like other weights that do not fit.
    """
    limit, built, thread = 2 * sum(file.stat().st_size for file in files), 0, get_ident()

    def count(module: object, name: str, weight: Tensor | None) -> None:
        nonlocal built
        if weight is not None and get_ident() == thread:
            built += weight.numel()
            if built > limit:
                raise RuntimeError("its config describes more weights than its files hold")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _shortest(weight: Tensor) -> Tensor:
    half = weight.half()
    exact = weight.dtype == torch.float32 and torch.equal(half.float(), weight)
    return (half if exact else weight).contiguous()


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
