"""What all levels of an image tokenizer share: their folders, hashes of weights, image sizes."""

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from multimodal.files import open_file, read_json
from multimodal.memory import check_memory
from multimodal.schemas import construct

MAX_CONFIG = 2**22  # bytes of a config.json
Fit: TypeAlias = Literal["squash", "crop", "letterbox"]


class Stored(Protocol):
    """A module that is a folder: ``config.json`` and ``model.safetensors``."""

    @property
    def fingerprint(self) -> str: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, weights: Mapping[str, Tensor]) -> object: ...


StoredT = TypeVar("StoredT", bound=Stored)
ConfigT = TypeVar("ConfigT")


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
    make: Callable[[ConfigT], StoredT],
    config_class: type[ConfigT],
    expected: Callable[[ConfigT], Mapping[str, Tensor]],
    folder: str | Path,
    kind: str,
    verify: bool = True,
) -> StoredT:
    """Read a folder that ``save_folder`` wrote.

    Args:
        make: makes the module of its config.
        config_class: the dataclass of its config. Its types and ranges are the schema of the file.
        expected: of a config, the weights whose sizes it decides, on torch's device ``meta``. They
            are compared with those of the file before the module is made.
        kind: what the folder should be, for errors.
        verify: compare the fingerprint of what was read with that in the config.

    Raises:
        ValueError: for any other folder, or if weights and config do not match.
    """
    folder = Path(folder)
    try:
        stored = read_config_file(folder / "config.json")
        fingerprint = stored.pop("fingerprint", None)
        config = construct(config_class, stored)
        weights = load_weights(folder / "model.safetensors", expected(config), optional=None)
        module = make(config)
        module.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        reason = str(error)
        if not isinstance(error, ValueError):
            reason = " ".join(reason.split())[:300]  # torch lists every wrong weight
        raise ValueError(f"{folder}: not {kind} of this release: {reason}") from error
    if verify and module.fingerprint != fingerprint:
        raise ValueError(
            f"{folder}: fingerprint is {module.fingerprint}, its config says {fingerprint!r:.80}: "
            "weights and config do not belong together"
        )
    return module


def _shortest(weight: Tensor) -> Tensor:
    half = weight.half()
    exact = weight.dtype == torch.float32 and torch.equal(half.float(), weight)
    return (half if exact else weight).contiguous()


def read_config_file(path: Path) -> dict[str, Any]:
    """The object in a ``config.json``. Raises ``ValueError`` for anything else."""
    config = read_json(path, MAX_CONFIG)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an object")
    return config


def load_weights(
    path: Path,
    expected: Mapping[str, Tensor] | None = None,
    optional: Collection[str] | None = (),
) -> dict[str, Tensor]:
    """Read a safetensors file.

    Names and shapes are compared with those expected before a weight is read. So it costs nothing
    to expect the weights of a module on torch's device ``meta``, whatever sizes a config names.

    Args:
        expected: the weights that have to be there, and no others. None: any.
        optional: names that may be there, too. None: any.

    Returns:
        The weights by name, on the CPU, in the dtype in which they are stored.

    Raises:
        ValueError: for a file that cannot be read, or other weights than those expected.
    """
    open_file(path).close()  # a regular file
    try:
        with safe_open(path, "pt") as file:
            stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in stored.items()}
            if expected is not None:
                of_config = {name: tuple(weight.shape) for name, weight in expected.items()}
                _check_shapes(path, shapes, of_config, optional)
            numbers = sum(math.prod(shape) for shape in shapes.values())
            check_memory(4 * numbers, f"{path}: reading the weights")
            return {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not readable as safetensors: {error}") from error


def _check_shapes(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    optional: Collection[str] | None,
) -> None:
    if missing := [name for name in expected if name not in shapes]:
        raise ValueError(f"{path}: {len(missing)} weights are missing, such as {missing[0]}")
    unknown = [name for name in shapes if name not in expected]
    if optional is not None and (unknown := [name for name in unknown if name not in optional]):
        raise ValueError(f"{path}: {len(unknown)} weights are unknown, such as {unknown[0]!r:.80}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(f"{path}: {name} has shape {shapes[name]}, config.json says {shape}")


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
