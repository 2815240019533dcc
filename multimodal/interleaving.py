"""Any mix of texts and images in; text, an image, or any mix of both out."""

from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from PIL import Image

from multimodal.drawing import decode_images
from multimodal.generation import (
    Batch,
    check_length,
    continue_text,
    encode_images,
    read_images,
)
from multimodal.images import to_image
from multimodal.sampling import Sampling

if TYPE_CHECKING:
    from multimodal.model import Multimodal

Part = str | Path | bytes | Image.Image
Output = Literal["text", "image", "any"]


def prompt_ids(model: "Multimodal", parts: SequenceOf[Part]) -> list[int]:
    """<bos>, then each part in turn: a ``str`` is text, everything else an image."""
    if isinstance(parts, str | bytes | Path) or not parts:
        raise ValueError("the prompt is empty: give a list of texts (str) and images (others)")
    v = model.vocabulary
    ids = [v.bos]
    for number, part in enumerate(parts):
        if isinstance(part, str):
            ids += model.text_tokenizer.encode(part)
            continue
        pixels = read_images(
            model, [part], [str(part) if isinstance(part, Path) else f"part {number}"]
        )
        codes = encode_images(model, pixels)[0] + v.image_start
        ids += [v.boi, *codes.tolist(), v.eoi]
    return ids


@torch.inference_mode()
def generate(
    model: "Multimodal",
    parts: SequenceOf[Part],
    *,
    output: Output = "text",
    max_tokens: int = 64,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
) -> list[str | Image.Image]:
    """Go on after the prompt. ``max_tokens`` bounds the text; an image is always whole.

    output: ``text``; ``image``: exactly one; ``any``: what the model wants, until it ends.
    """
    if output not in ("text", "image", "any"):
        raise ValueError(f"output {output!r}: expected text, image or any")
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: expected at least 1")
    if sampling.beams > 1 and output != "text":
        raise ValueError(f"beams={sampling.beams}: beam search is for texts, not for {output}")
    v, n = model.vocabulary, model.image_tokenizer.config.grid**2
    ids = prompt_ids(model, parts)
    if output == "image":
        ids.append(v.boi)
    if output == "text":
        (text,) = continue_text(model, [ids], max_tokens, sampling)
        return [model.text_tokenizer.decode(text).strip()]
    room = n if output == "image" else max_tokens
    check_length(model, [ids], room)
    images = torch.zeros(v.size, dtype=torch.bool, device=model.device)
    images[v.image_start : v.image_end] = True
    texts = torch.zeros_like(images)
    texts[: v.text_size] = True
    texts[v.eos] = True
    limit = model.config.transformer.max_position_embeddings
    batch, generators = Batch(model, [ids], room), sampling.generators([0])
    found: list[str | Image.Image] = []
    text = list[int]()
    codes: list[int] = []
    left, used, drawing = max_tokens, len(ids), output == "image"

    def finish_text() -> None:
        if text:
            found.append(model.text_tokenizer.decode(text).strip())
            text.clear()

    while left > 0 or drawing:
        allowed = images.clone() if drawing else texts.clone()
        # An image is begun only where all of it fits.
        allowed[v.boi] = not drawing and used + n + 2 + left <= limit
        logits = batch.logits().masked_fill(~allowed, -torch.inf)
        token = int(sampling.choose(logits, generators))
        if token == v.eos:
            break
        follow = [token]
        if drawing:
            codes.append(token - v.image_start)
            if len(codes) == n:
                found.append(to_image(decode_images(model, torch.tensor([codes]))[0]))
                if output == "image":
                    break
                codes, drawing = [], False
                follow.append(v.eoi)
        elif token == v.boi:
            finish_text()
            drawing = True
            batch.cache.grow(n + 2)
        else:
            text.append(token)
            left -= 1
        for one in follow:
            batch.read(torch.tensor([one], device=model.device))
        used += len(follow)
    finish_text()
    return found or [""]
