"""A part of an image drawn anew, after a text: codes under a mask, the rest of the codes kept."""

from typing import TYPE_CHECKING, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from multimodal.data.images import Fit, fit_image, to_image, to_tensor
from multimodal.inference.drawing import DRAWN, UNKNOWN, DrawingOptions, decode_images, draw_codes
from multimodal.inference.sampling import Sampling
from multimodal.inference.text import caption_codes, encode_images

if TYPE_CHECKING:
    from multimodal.model.network import Multimodal

Box = tuple[int, int, int, int]


def box_mask(size: tuple[int, int], box: Box) -> Image.Image:
    """White in the box (left, top, right, bottom; pixels, the last two excluded), black elsewhere.

    Errors: ``ValueError`` for a box that is empty or not inside the image.
    """
    left, top, right, bottom = box
    if not (0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]):
        raise ValueError(
            f"box {left},{top},{right},{bottom}: expected x0 < x1 and y0 < y1 inside the image "
            f"of {size[0]} x {size[1]} pixels"
        )
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def masked_codes(mask: Image.Image, fit: Fit, grid: int) -> Tensor:
    """bool[n]: the codes of which any pixel is white in the mask, made square as its image."""
    white = torch.from_numpy(np.asarray(mask.convert("L")) > 127).float()
    (height, width), side = white.shape, min(mask.size)
    if fit == "crop":
        top, left = (height - side) // 2, (width - side) // 2
        white = white[top : top + side, left : left + side]
    elif fit == "letterbox":
        side = max(mask.size)
        left, top = (side - width) // 2, (side - height) // 2
        white = F.pad(white, (left, side - width - left, top, side - height - top))
    # The largest of every pixel that a code touches: nothing white is too thin.
    return F.adaptive_max_pool2d(white[None, None], grid).flatten().bool()


def _to_original(square: Image.Image, size: tuple[int, int], fit: Fit) -> Image.Image:
    """Undo ``fit_image``; what a crop had cut off is black."""
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
    scale = square.width / max(size)
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    left, top = (square.width - inner[0]) // 2, (square.height - inner[1]) // 2
    return square.resize(size, resample, box=(left, top, left + inner[0], top + inner[1]))


def edit_image(
    model: "Multimodal",
    image: Image.Image,
    mask: Image.Image,
    text: str,
    *,
    sampling: Sampling = DRAWN,
    **drawing: Unpack[DrawingOptions],
) -> Image.Image:
    """Draw what is white in the mask anew -> an image of the same size, unchanged elsewhere.

    The codes that any white pixel touches are drawn; of the picture they give, the white part is
    put into the image.
    """
    if mask.size != image.size:
        raise ValueError(
            f"the mask has {mask.width} x {mask.height} pixels, the image {image.width} x "
            f"{image.height}: they must be of one size"
        )
    mask = mask.convert("L").point(lambda value: 255 if value > 127 else 0)
    config = model.image_tokenizer.config
    fresh = masked_codes(mask, config.fit, config.grid)
    if not fresh.any():
        raise ValueError("the mask is black where the model looks: nothing to draw")
    pixels = to_tensor(fit_image(image, config.image_size, config.fit))[None]
    known = encode_images(model, pixels).cpu().masked_fill(fresh, UNKNOWN)
    codes = draw_codes(model, [text], method="masked", sampling=sampling, known=known, **drawing)
    drawn = to_image(decode_images(model, codes)[0])
    if config.fit == "crop":  # the model saw only the middle: leave the rest as it is
        inside = _to_original(Image.new("RGB", drawn.size, "white"), image.size, config.fit)
        mask = Image.composite(mask, Image.new("L", mask.size), inside.convert("L"))
    return Image.composite(_to_original(drawn, image.size, config.fit), image, mask)


def outpaint(
    model: "Multimodal",
    image: Image.Image,
    margins: Box,
    text: str,
    *,
    sampling: Sampling = DRAWN,
    **drawing: Unpack[DrawingOptions],
) -> Image.Image:
    """Draw what lies around an image -> a larger one, with the image unchanged inside.

    margins: pixels to add at left, top, right and bottom.
    """
    left, top, right, bottom = margins
    if min(margins) < 0 or not any(margins):
        raise ValueError(f"margins {margins}: expected pixels from 0 on, one of them more")
    size = (image.width + left + right, image.height + top + bottom)
    if model.image_tokenizer.config.fit == "crop":
        raise ValueError("this model sees the middle of an image only: it cannot draw around it")
    average = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    canvas = Image.new("RGB", size, average)
    canvas.paste(image, (left, top))
    mask = Image.new("L", size, 255)
    mask.paste(0, (left, top, left + image.width, top + image.height))
    return edit_image(model, canvas, mask, text, sampling=sampling, **drawing)


def vary(
    model: "Multimodal",
    image: Image.Image,
    share: float = 0.5,
    text: str | None = None,
    *,
    sampling: Sampling = DRAWN,
    **drawing: Unpack[DrawingOptions],
) -> Image.Image:
    """Draw a share of the codes anew, anywhere -> another picture of the same, of its size.

    text: what it shows; by default what the model says of it.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: expected a share of the codes in (0, 1]")
    config = model.image_tokenizer.config
    pixels = to_tensor(fit_image(image, config.image_size, config.fit))[None]
    codes = encode_images(model, pixels)
    if text is None and not (text := caption_codes(model, codes)[0]):
        raise ValueError("the model says nothing of this image: give a text")
    generator = torch.Generator().manual_seed(sampling.seed)
    chosen = torch.randperm(config.grid**2, generator=generator)[
        : max(1, round(share * config.grid**2))
    ]
    known = codes.cpu()
    known[:, chosen] = UNKNOWN
    drawn = draw_codes(model, [text], method="masked", sampling=sampling, known=known, **drawing)
    varied = _to_original(to_image(decode_images(model, drawn)[0]), image.size, config.fit)
    seen = Image.new("RGB", (config.image_size, config.image_size), "white")
    return Image.composite(varied, image, _to_original(seen, image.size, config.fit).convert("L"))
