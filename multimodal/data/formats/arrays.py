"""Images as arrays of numpy and tensors of torch.

Shapes: H W pixels, C channels (1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha).
"""

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from einops import rearrange
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

Array: TypeAlias = np.ndarray[Any, Any]


def image_of_array(given: "Array | Tensor", name: str) -> Image.Image:
    """A Pillow image of the same pixels.

    Numbers of 16 bits become what Pillow makes of a PNG of them: grey keeps all 16, others the
    upper 8.

    Args:
        given: a numpy array [H, W] or [H, W, C], or a torch tensor [H, W] or [C, H, W], of uint8,
            uint16, bool (white is true) or floats in [0, 1].
        name: what errors call it.

    Raises:
        ValueError: for other shapes, types and values.
    """
    layout = "[H, W, C]" if isinstance(given, np.ndarray) else "[C, H, W]"
    try:
        array = given if isinstance(given, np.ndarray) else as_numpy(given)
    except (NotImplementedError, TypeError) as error:  # sparse, or without values
        raise ValueError(f"{name}: a tensor without pixels ({error})") from error
    what = f"{name}: an array of shape {list(array.shape)} and type {array.dtype}"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4)):
        raise ValueError(f"{what}; expected [H, W] or {layout} with 1 to 4 channels")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype.kind == "f":
        if array.size and not (np.isfinite(array).all() and 0 <= array.min() <= array.max() <= 1):
            raise ValueError(f"{what}, with values outside [0, 1]; expected [0, 1], or uint8")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:  # of either byte order
        array = (array >> 8).astype(np.uint8) if array.ndim == 3 else array.astype(np.uint16)
    elif array.dtype != np.uint8:
        raise ValueError(f"{what}; expected uint8, uint16, bool, or floats in [0, 1]")
    if not array.size:
        raise ValueError(f"{what}: it has no pixels")
    return Image.fromarray(np.ascontiguousarray(array))


def as_numpy(tensor: "Tensor") -> Array:
    """[C, H, W] as [H, W, C]."""
    tensor = tensor.detach().cpu()
    array: Array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return rearrange(array, "c h w -> h w c") if array.ndim == 3 else array
