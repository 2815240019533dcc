"""A part of an image drawn anew: codes under a mask are drawn, all other codes are kept.

Shapes: n codes of an image.
"""

from collections.abc import Callable, Generator
from fractions import Fraction
from functools import partial
from itertools import pairwise
from math import ceil, floor

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from multimodal.data.images import Fit, check_size, fit_image, to_image, to_tensor
from multimodal.inference.codec import UNKNOWN, decode_images, encode_images
from multimodal.inference.drawing import masked_steps, returned
from multimodal.inference.text import caption_codes
from multimodal.model.checkpoint import ModelParts
from multimodal.options import EditOptions
from multimodal.schemas import check_value

Box = tuple[int, int, int, int]


def box_mask(size: tuple[int, int], box: Box) -> Image.Image:
    """A mask that is white in a box and black elsewhere.

    Args:
        size: width and height of the image in pixels.
        box: left, top, right, bottom in pixels. The last two are excluded.

    Raises:
        ValueError: if the box is empty or not inside the image.
    """
    check_value("box", box, Box)
    left, top, right, bottom = box
    if not (0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]):
        raise ValueError(
            f"box {left},{top},{right},{bottom}: expected x0 < x1 and y0 < y1 inside the image "
            f"of {size[0]} x {size[1]} pixels"
        )
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def masked_codes(mask: Image.Image, fit: Fit, image_size: int, grid: int) -> Tensor:
    """The positions under the white part of a mask: bool[grid * grid].

    A position with any part of a white pixel is drawn: no line is too thin. Resampling spreads a
    pixel a little further, to positions that are not drawn.

    Args:
        mask: white where to draw.
        fit: how the image is made square.
        image_size: pixels of a side of the square.
        grid: positions per side.
    """
    white = np.asarray(mask.convert("L")) > 127
    (left, width), (top, height) = _seen(mask.size, fit, image_size)
    rows = _touched(white, top, height, grid)
    return torch.from_numpy(_touched(rows.T, left, width, grid).T).flatten()


def _seen(size: tuple[int, int], fit: Fit, image_size: int) -> list[tuple[Fraction, Fraction]]:
    """What of an image ``fit_image`` shows in its square: of columns, then of rows.

    The first pixel, and how many. With a letterbox the square shows more than the image has.
    """
    if fit == "crop":
        side = min(size)
        return [(Fraction(length - side, 2), Fraction(side)) for length in size]
    if fit == "squash":
        return [(Fraction(0), Fraction(length)) for length in size]
    inner, corner = _letterbox(size, image_size)
    scales = [Fraction(length, part) for length, part in zip(size, inner, strict=True)]
    return [
        (-start * scale, image_size * scale) for start, scale in zip(corner, scales, strict=True)
    ]


def _letterbox(size: tuple[int, int], image_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size of the image inside the grey of ``fit_image``, and its corner: x, y."""
    scale = image_size / max(size)
    inner = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    return inner, ((image_size - inner[0]) // 2, (image_size - inner[1]) // 2)


def _touched(
    white: NDArray[np.bool_], first: Fraction, count: Fraction, parts: int
) -> NDArray[np.bool_]:
    """Which of equal parts of some rows have a white pixel: bool[R, C] -> bool[parts, C].

    Args:
        first, count: the rows. Those at both ends of a part may belong to it in part.
    """
    edges = [first + count * part / parts for part in range(parts + 1)]
    return np.stack([white[max(0, floor(a)) : max(0, ceil(b))].any(0) for a, b in pairwise(edges)])


def _to_original(square: Image.Image, size: tuple[int, int], fit: Fit) -> Image.Image:
    """Undo ``fit_image``. What a crop had cut off is black."""
    width, height = size
    resample = Image.Resampling.BICUBIC
    if fit == "squash":
        return square.resize(size, resample)
    if fit == "crop":
        side = min(size)
        whole = Image.new("RGB", size)
        whole.paste(
            square.resize((side, side), resample), ((width - side) // 2, (height - side) // 2)
        )
        return whole
    inner, (left, top) = _letterbox(size, square.width)
    return square.resize(size, resample, box=(left, top, left + inner[0], top + inner[1]))


def edit_image(
    model: ModelParts, image: Image.Image, mask: Image.Image, text: str, options: EditOptions
) -> Image.Image:
    """As ``edit_steps``, at once."""
    return returned(edit_steps(model, image, mask, text, options))


def edit_steps(
    model: ModelParts,
    image: Image.Image,
    mask: Image.Image,
    text: str,
    options: EditOptions,
    number: int = 0,
) -> Generator[Callable[[], Image.Image] | None, None, Image.Image]:
    """Draw the white part of a mask anew, a step at a time.

    Every code that a white pixel touches is drawn. Of the picture that the codes give, only the
    white part is put into the image.

    Args:
        number: with the seed, decides the random numbers.

    Yields:
        A function for the image so far, to be called before the next step. None: there is none.

    Returns:
        An image of the same size, unchanged outside the mask.

    Raises:
        ValueError: if the mask has another size than the image, or no white that the model sees.
    """
    if mask.size != image.size:
        raise ValueError(
            f"the mask has {mask.width} x {mask.height} pixels, the image {image.width} x "
            f"{image.height}: they must be of one size"
        )
    tokenizer, levels = model.image_tokenizer, model.config.layout.levels
    places = [masked_codes(mask, tokenizer.fit, tokenizer.image_size, v.grid) for v in levels]
    fresh = torch.cat(
        [part.repeat_interleave(v.groups) for part, v in zip(places, levels, strict=True)]
    )
    if not fresh.any():
        raise ValueError("the mask is black where the model looks: nothing to draw")
    known = _codes_of(model, image).masked_fill(fresh, UNKNOWN)
    return (yield from _redraw(model, image, mask, known, text, options, number))


def _redraw(
    model: ModelParts,
    image: Image.Image,
    mask: Image.Image,
    known: Tensor,
    text: str,
    options: EditOptions,
    number: int = 0,
) -> Generator[Callable[[], Image.Image] | None, None, Image.Image]:
    """Draw the codes that are not known, and put the white part of a mask into the image.

    Args:
        known: int64[1, n], UNKNOWN where a code is drawn.
    """
    fit, side = model.image_tokenizer.fit, model.image_tokenizer.image_size
    mask = mask.convert("L").point(lambda value: 255 if value > 127 else 0)
    if fit == "crop":  # the model sees only the middle: leave the rest as it is
        inside = _to_original(Image.new("RGB", (side, side), "white"), image.size, fit)
        mask = Image.composite(mask, Image.new("L", mask.size), inside.convert("L"))

    def edited(codes: Tensor) -> Image.Image:
        drawn = to_image(decode_images(model, codes)[0])
        return Image.composite(_to_original(drawn, image.size, fit), image, mask)

    def edited_so_far(codes: Callable[[], Tensor]) -> Image.Image:
        return edited(codes())

    steps = masked_steps(model, [text], options, known, [number])
    while True:
        try:
            codes = next(steps)
        except StopIteration as end:
            return edited(end.value)
        yield None if codes is None else partial(edited_so_far, codes)


def outpaint_image(
    model: ModelParts, image: Image.Image, margins: Box, text: str, options: EditOptions
) -> Image.Image:
    """Draw what lies around an image.

    Args:
        margins: pixels to add at left, top, right and bottom.

    Returns:
        A larger image that has the given one unchanged inside.
    """
    check_value("margins", margins, Box)
    left, top, right, bottom = margins
    if min(margins) < 0 or not any(margins):
        raise ValueError(f"margins={margins}: expected pixels from 0 on, and one above 0")
    size = (image.width + left + right, image.height + top + bottom)
    try:
        check_size(size)
    except ValueError as error:
        raise ValueError(f"margins={margins}: {error}") from error
    if model.image_tokenizer.fit == "crop":
        raise ValueError("this model sees the middle of an image only: it cannot draw around it")
    average = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    canvas = Image.new("RGB", size, average)
    canvas.paste(image, (left, top))
    mask = Image.new("L", size, 255)
    mask.paste(0, (left, top, left + image.width, top + image.height))
    return edit_image(model, canvas, mask, text, options)


def vary_image(
    model: ModelParts,
    image: Image.Image,
    share: float,
    text: str | None,
    options: EditOptions,
) -> Image.Image:
    """Draw a share of an image anew: places of the last level, anywhere. All other codes stay.

    Args:
        share: of the places, in (0, 1].
        text: what the image shows. None: the model's caption of it.
    """
    check_value("share", share, float)
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: expected a share of the codes in (0, 1]")
    codes = _codes_of(model, image)
    if text is None and not (text := caption_codes(model, codes)[0]):
        raise ValueError("the model says nothing of this image: give a text")
    level = model.config.layout.levels[-1]
    side = level.grid
    generator = torch.Generator().manual_seed(options.seed)
    count = max(1, round(share * side * side))
    places = torch.zeros(side * side, dtype=torch.bool)
    places[torch.randperm(side * side, generator=generator)[:count]] = True
    kept = torch.zeros(codes.shape[1] - level.codes, dtype=torch.bool)
    known = codes.masked_fill(torch.cat([kept, places.repeat_interleave(level.groups)]), UNKNOWN)
    white = 255 * rearrange(places, "(h w) -> h w", h=side).byte()
    cells = Image.fromarray(white.numpy())
    tokenizer = model.image_tokenizer
    square = cells.resize((tokenizer.image_size, tokenizer.image_size), Image.Resampling.NEAREST)
    mask = _to_original(square.convert("RGB"), image.size, tokenizer.fit)
    return returned(_redraw(model, image, mask, known, text, options))


def _codes_of(model: ModelParts, image: Image.Image) -> Tensor:
    """int64[1, n], on the CPU"""
    tokenizer = model.image_tokenizer
    pixels = to_tensor(fit_image(image, tokenizer.image_size, tokenizer.fit))[None]
    return encode_images(model, pixels).cpu()
