"""From image files to codes, from codes to images, and from texts to ids.

Shapes: B images, n codes of an image, H W pixels.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from multimodal.data.images import fit_image, to_tensor
from multimodal.devices import full_float32
from multimodal.inference.values import ImageSource, name_of, open_source
from multimodal.memory import check_memory
from multimodal.model.checkpoint import ModelParts
from multimodal.schemas import check_value
from multimodal.tokenizers.weights import resize

ROOM_AROUND = 64  # tokens around a text: specials, the words of a template, an answer
UNKNOWN = -1  # a code that is not drawn yet
GREY = 0.0  # pixels of a preview where nothing is drawn yet


def encode_text(model: ModelParts, text: str) -> list[int]:
    """What a user wrote, as ids. It never becomes a special id.

    Raises:
        ValueError: for an empty text.
    """
    check_value("text", text, str)
    if not text.strip():
        raise ValueError("the text is empty")
    return model.text_tokenizer.encode(text.strip())


def check_pixels(model: ModelParts, count: int) -> None:
    """Raises ``ValueError`` for so many images at once that memory would not hold their pixels."""
    of_one = 4 * 3 * model.image_tokenizer.image_size**2
    check_memory(2 * count * of_one, f"the pixels of {count:,} images at once", "batch_size")


def read_images(
    model: ModelParts, images: Sequence[ImageSource], names: Sequence[str] | None = None
) -> Tensor:
    """Open images and fit them to the size that the model was trained on.

    Args:
        names: what to call them in errors.

    Returns:
        float32[B, 3, H, W] in [-1, 1].

    Raises:
        ValueError: for an image that cannot be read.
    """
    tokenizer = model.image_tokenizer
    check_pixels(model, len(images))
    pixels = []
    for number, image in enumerate(images):
        name = names[number] if names else name_of(image, number)
        opened = open_source(image, name, model.urls)
        pixels.append(to_tensor(fit_image(opened, tokenizer.image_size, tokenizer.fit)))
    return torch.stack(pixels)


def text_fits(model: ModelParts, text: str) -> bool:
    """Whether a text fits into the context beside an image, with ROOM_AROUND tokens."""
    codes, limit = model.image_tokenizer.codes_per_image, model.config.transformer
    room = limit.max_position_embeddings - codes - ROOM_AROUND
    # A token has a byte at least, so most texts need not be encoded.
    longest = len(text.encode("utf-8", "surrogatepass"))
    return longest <= room or len(model.text_tokenizer.encode(text)) <= room


def encode_images(model: ModelParts, pixels: Tensor) -> Tensor:
    """float32[B, 3, H, W] in [-1, 1] -> the codes of all levels: int64[B, n]."""
    return model.image_tokenizer.encode(pixels.to(model.device))


def encode_to_read(model: ModelParts, pixels: Tensor) -> Tensor:
    """The codes of the levels that the model reads, and no others.

    float32[B, 3, H, W] in [-1, 1] -> int64[B, n or fewer]
    """
    return model.image_tokenizer.encode(pixels.to(model.device), model.config.reads)


def encode_as_drawn(model: ModelParts, pixels: Tensor) -> Tensor:
    """The codes of the levels that the model draws: float32[B, 3, H, W] -> int64[B, m]."""
    return model.image_tokenizer.encode(pixels.to(model.device), model.config.draws)


@full_float32()
def drawn_to_read(model: ModelParts, codes: Tensor) -> Tensor:
    """Of images that were drawn the codes that are read: int64[B, n] -> int64[B, n or fewer].

    What is read and was not drawn is seen in the decoded images.
    """
    if set(model.config.reads) <= set(model.config.draws):
        return model.read(codes)
    pixels = resize(decode_images(model, codes), model.image_tokenizer.image_size)
    return encode_to_read(model, pixels.clamp(-1, 1)).cpu()


@torch.inference_mode()
def decode_images(model: ModelParts, codes: Tensor) -> Tensor:
    """codes: int64[B, n] -> float32[B, 3, H, W] in [-1, 1]."""
    return model.image_tokenizer.decode(codes.to(model.device))


@torch.inference_mode()
def preview_images(model: ModelParts, codes: Tensor) -> Tensor:
    """What is drawn so far of images whose lower rows of the last level are missing.

    The decoder looks at neighbours. So it is given the last known row again in the place of the
    missing ones, and their pixels are hidden afterwards.

    Args:
        codes: int64[B, n], UNKNOWN after the same row in all of them.

    Returns:
        float32[B, 3, H, W] in [-1, 1], GREY where nothing is drawn yet.
    """
    layout = model.config.layout
    last = layout.levels[-1]
    span = layout.span(last.name)
    grid = rearrange(codes[:, span], "b (h w) -> b h w", h=last.grid).clone()
    rows = int((grid != UNKNOWN).all(-1).all(0).sum())
    if rows == 0:
        raise ValueError("a preview needs at least one row of codes")
    grid[:, rows:] = grid[:, rows - 1 : rows]
    shown = torch.cat([codes[:, : span.start], rearrange(grid, "b h w -> b (h w)")], 1)
    images = decode_images(model, shown)
    images[:, :, rows * images.shape[2] // last.grid :] = GREY
    return images
