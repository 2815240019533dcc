"""Images, from untrusted bytes to pixels and back.

Pillow decodes. ``torchvision.io`` is not used: it crashes the process on corrupt PNGs. This module
decides what a valid image is. A truncated or damaged image is an error, and so is one whose values
have no defined meaning. H and W are pixels. Tensors are float32[3, H, W] in [-1, 1].
"""

import io
import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from multimodal.data.formats.damage import check_damage
from multimodal.files import UnreadableFile, read_bytes

if TYPE_CHECKING:
    from torch import Tensor

# Pillow warns about damaged metadata in the middle of everything. The pixels are what counts.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

Fit = Literal["squash", "crop", "letterbox"]
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # and HEIC with pillow-heif
MAX_PIXELS = 100_000_000
MAX_ASPECT = 200
LETTERBOX_GREY = (127, 127, 127)

_ORIENTATION_TAG = 0x0112
_BITS_TAG, _PHOTOMETRIC_TAG = 258, 262  # of TIFF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# Adam7: first column, first row, step between columns, step between rows, of each pass.
_PNG_PASSES = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)


def open_image(
    source: str | Path | bytes | Image.Image,
    *,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> Image.Image:
    """Decode one image to mode RGB, upright.

    Transparency is composed on white. CMYK and palettes become RGB. 16-bit grey is scaled to 8
    bits. An animation gives its first frame. EXIF orientation is applied (an image with unreadable
    EXIF counts as upright). Colour profiles are ignored. The result has no metadata.

    Args:
        source: a path, the bytes of a file, or a Pillow image.
        max_pixels: checked in the header, before anything is decoded. Pillow's limit (twice
            ``PIL.Image.MAX_IMAGE_PIXELS``) applies too.
        name: what errors call the image. By default its path.

    Returns:
        A new Pillow image of mode RGB.

    Raises:
        ValueError: one line with the name, for anything that is not a complete image of FORMATS:
            missing, a folder, truncated, damaged, too large, or over 200 times as long as wide.
    """
    name = name or (str(source) if isinstance(source, str | Path) else "<image>")
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source, max_pixels)
        data = source if isinstance(source, bytes) else read_bytes(source)
        if not data:
            raise ValueError("the file is empty")
        with open_header(data) as image, _no_truncated_images():
            check_size(image.size, max_pixels)
            if image.format == "PNG":
                _verify_png(data)
            check_damage(image, data)
            return _to_rgb(image, max_pixels)
    except MemoryError:
        raise
    except UnreadableFile as error:
        reason = error.reason
    except UnidentifiedImageError:
        reason = f"not an image that can be read ({', '.join(FORMATS)})"
        if _is_heic(data):
            reason = "HEIC needs pillow-heif: pip install 'multimodal[heic]'"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = f"too large: {error}"
    except ValueError as error:
        reason = str(error)
    except Exception as error:  # Pillow's plugins raise many kinds of errors
        reason = f"damaged image ({str(error) or type(error).__name__})"
    raise ValueError(f"{name}: {' '.join(reason.split())}")


def fit_image(image: Image.Image, size: int, fit: Fit) -> Image.Image:
    """Bring an image to ``size`` x ``size`` (bicubic, antialiased).

    Args:
        image: mode RGB.
        size: pixels of a side.
        fit: ``squash`` changes the aspect ratio. ``crop`` keeps the centre square. ``letterbox``
            keeps the full image and pads it with grey 127.

    Raises:
        ValueError: for an unknown fit or a size below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, not {size}")
    width, height = image.size
    if fit == "squash":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if fit == "letterbox":
        scale = size / max(width, height)
        inner = (max(1, round(width * scale)), max(1, round(height * scale)))
        canvas = Image.new("RGB", (size, size), LETTERBOX_GREY)
        corner = ((size - inner[0]) // 2, (size - inner[1]) // 2)
        canvas.paste(image.resize(inner, Image.Resampling.BICUBIC), corner)
        return canvas
    raise ValueError(f"fit must be one of {', '.join(get_args(Fit))}, not {fit!r}")


def augment_image(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.6, 1.0),
    flip: bool = True,
) -> Image.Image:
    """A random crop, resized to ``size`` x ``size``, mirrored half of the time.

    The aspect ratio of the crop, relative to that of the image, is log-uniform in [4/5, 5/4]. So
    the crop is squashed as with ``fit_image(..., "squash")``.

    Args:
        image: mode RGB.
        size: pixels of a side of the result.
        rng: always gives five numbers, so later draws do not depend on the options.
        scale: the crop covers a share of the area that is uniform in this range.
        flip: whether to mirror at all.

    Raises:
        ValueError: if ``scale`` is not 0 < low <= high <= 1.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale must be 0 < low <= high <= 1, not {scale}")
    area_draw, aspect_draw, x_draw, y_draw, flip_draw = rng.random(5).tolist()
    area = scale[0] + (scale[1] - scale[0]) * area_draw
    stretch = 1.25 ** (2 * aspect_draw - 1)
    width = image.width * min(1.0, (area * stretch) ** 0.5)
    height = image.height * min(1.0, (area / stretch) ** 0.5)
    left, top = (image.width - width) * x_draw, (image.height - height) * y_draw
    # Rounding can push the box over the edge by one ulp. Then resize would raise an error.
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    result = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if flip and flip_draw < 0.5:
        result = result.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return result


def to_tensor(image: Image.Image) -> "Tensor":
    """Convert a Pillow image of mode RGB to float32[3, H, W] in [-1, 1]."""
    import torch
    from einops import rearrange

    if image.mode != "RGB":
        raise ValueError(f"expected an image of mode RGB (see open_image), not {image.mode}")
    pixels: Tensor = rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w")
    whole = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    return whole.div_(127.5).sub_(1)


def to_image(tensor: "Tensor") -> Image.Image:
    """Convert float[3, H, W] to a Pillow image. Values outside [-1, 1] are clamped.

    Raises:
        ValueError: for another shape, or for values that are not finite.
    """
    import torch
    from einops import rearrange

    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ValueError(f"expected a tensor [3, H, W], not {list(tensor.shape)}")
    values = tensor.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise ValueError("the image tensor has values that are not finite")
    pixels = ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(rearrange(pixels, "c h w -> h w c").contiguous().numpy())


def grid_of(images: list[Image.Image]) -> Image.Image:
    """Arrange images of one size in a nearly square grid, with two white pixels between them."""
    columns = math.ceil(math.sqrt(len(images)))
    width, height = (side + 2 for side in images[0].size)
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * width - 2, rows * height - 2), "white")
    for number, image in enumerate(images):
        grid.paste(image, (number % columns * width, number // columns * height))
    return grid


def open_header(data: bytes) -> Image.Image:
    """Open an image file with Pillow, as one of FORMATS. Its pixels are neither read nor checked.

    Raises:
        UnidentifiedImageError: for another format.
    """
    return Image.open(io.BytesIO(without_texts(data)), formats=_formats())


@lru_cache(1)
def _formats() -> tuple[str, ...]:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return FORMATS
    register_heif_opener()
    return (*FORMATS, "HEIF")


def _is_heic(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")


@contextmanager
def _no_truncated_images() -> Iterator[None]:
    """Make a truncated image an error, even if a library changed Pillow's global setting."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def check_size(size: tuple[int, int], max_pixels: int = MAX_PIXELS) -> None:
    """Raises ``ValueError`` for a width and height that no image may have."""
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width}x{height} has no pixels")
    if width * height > max_pixels:
        raise ValueError(f"too large: {width}x{height} is over the limit of {max_pixels:,} pixels")
    if max(size) > MAX_ASPECT * min(size):
        raise ValueError(f"a strip of {width}x{height}: over {MAX_ASPECT} times as long as wide")


def without_texts(data: bytes) -> bytes:
    """A PNG without its texts and colour profile, which nobody needs. Other files as they are.

    Pillow unpacks them, and refuses an image where they are over 1 MB.
    """
    if not data.startswith(_PNG_SIGNATURE):
        return data
    position, kept = len(_PNG_SIGNATURE), [_PNG_SIGNATURE]
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind, end = data[position + 4 : position + 8], position + length + 12
        if kind == b"IEND":
            break
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(data[position:end])
        position = end
    return b"".join([*kept, data[position:]])


def _verify_png(data: bytes) -> None:
    """Check the CRC of the pixel chunks, and that no row is missing.

    Pillow does not check the CRC of ``IDAT``, and leaves missing rows black.
    """
    position, header, ended = len(_PNG_SIGNATURE), b"", False
    pixels: list[bytes] = []
    while not ended:
        if position + 12 > len(data):
            raise ValueError("truncated PNG: it has no end chunk")
        (length,) = struct.unpack_from(">I", data, position)
        kind, body = data[position + 4 : position + 8], position + 8
        if body + length + 4 > len(data):
            raise ValueError(f"truncated PNG: chunk {kind!r} goes past the end of the file")
        (checksum,) = struct.unpack_from(">I", data, body + length)
        if zlib.crc32(data[position + 4 : body + length]) != checksum:
            raise ValueError(f"damaged PNG: the checksum of chunk {kind!r} does not match")
        if kind == b"IHDR":
            header = data[body : body + length]
        elif kind == b"IDAT":
            pixels.append(data[body : body + length])
        ended = kind == b"IEND"
        position = body + length + 4
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    passes = _PNG_PASSES if interlaced else ((0, 0, 1, 1),)
    expected = 0
    for column, row, column_step, row_step in passes:
        columns = -(-(width - column) // column_step) if width > column else 0
        rows = -(-(height - row) // row_step) if height > row else 0
        if columns and rows:
            expected += rows * (1 + -(-columns * depth * _PNG_CHANNELS[colour] // 8))
    stream, inflater, size = b"".join(pixels), zlib.decompressobj(), 0
    for start in range(0, len(stream), 1 << 16):  # in steps, so a zip bomb stops after 64 MiB
        size += len(inflater.decompress(stream[start : start + (1 << 16)]))
        if size > expected or inflater.eof:
            break
    if size < expected or (size == expected and not inflater.eof):
        raise ValueError(f"truncated PNG: {size:,} of {expected:,} bytes of pixels")


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8. 1 if there is none or it cannot be read."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # EXIF is often damaged, and the pixels are still good
        return 1


def upright(image: Image.Image, pixels: Image.Image) -> Image.Image:
    """Pixels of a loaded image, turned as its EXIF says."""
    turn = orientation(image)
    return pixels.transpose(_UPRIGHT[turn]) if turn in _UPRIGHT else pixels


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits (65535 -> 255). Pillow's conversion would clip at 255.

    A TIFF may have 12 bits (4095 -> 255), and may say that 0 is white.
    """
    tags = getattr(image, "tag_v2", {})
    top = 2 ** min(16, *tags.get(_BITS_TAG, (16,))) - 1
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > top:
        raise ValueError(f"mode {image.mode} with values outside 0..{top}: the scale is unknown")
    if tags.get(_PHOTOMETRIC_TAG) == 0:
        values = top - values
    grey = ((255 * values + top // 2) // top).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _to_rgb(image: Image.Image, max_pixels: int) -> Image.Image:
    check_size(image.size, max_pixels)
    image.load()
    if image.mode == "F":
        raise ValueError("mode F (floating point) has no defined range; convert it to RGB first")
    if image.mode == "I" or image.mode.startswith("I;16"):
        result = _grey16_to_rgb(image)
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        result = Image.new("RGB", layer.size, (255, 255, 255))
        result.paste(layer, mask=layer.getchannel("A"))
    else:
        result = image.convert("RGB")
    result = upright(image, result)
    result.info = {}  # otherwise the next reader would apply the orientation again
    return result
