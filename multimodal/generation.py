"""Generation: text after a prompt, images after a text; with a KV cache, in batches, by a grammar.

The grammar masks the logits at every step: where text belongs only text ids and <eos> can be drawn,
where an image belongs exactly h * w codes.

Shapes: B batch, L longest prompt, S tokens in the cache, V vocabulary, n codes of an image.
"""

from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from multimodal.attention import attention_mask
from multimodal.images import fit_image, open_image, to_tensor
from multimodal.sequences import describe_prompt, draw_prompt
from multimodal.transformer import Cache

if TYPE_CHECKING:
    from PIL import Image

    from multimodal.model import Multimodal


def read_images(
    model: "Multimodal", images: SequenceOf["str | Path | bytes | Image.Image"]
) -> Tensor:
    """float32[B, 3, H, W] in [-1, 1], made square as the model was trained"""
    config = model.image_tokenizer.config
    pixels = []
    for number, image in enumerate(images):
        name = None if isinstance(image, str | Path) else f"image {number}"
        whole = open_image(image, name=name)
        pixels.append(to_tensor(fit_image(whole, config.image_size, config.fit)))
    return torch.stack(pixels)


def encode_images(model: "Multimodal", pixels: Tensor) -> Tensor:
    """float32[B, 3, H, W] in [-1, 1] -> codes: int64[B, n]"""
    codes = model.image_tokenizer.encode(pixels.to(model.device))
    return rearrange(codes, "b h w -> b (h w)")


class Batch:
    """Prompts of different lengths, read once into a cache and then continued token by token.

    Prompts are padded on the left; padding is a document of its own that no real token sees.
    """

    def __init__(self, model: "Multimodal", prompts: list[list[int]], room: int) -> None:
        self.model = model
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), model.vocabulary.pad)
        documents = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            documents[row, longest - len(prompt) :] = 1
        ids, documents = ids.to(model.device), documents.to(model.device)
        self.positions = documents.cumsum(1).sub(1).clamp(min=0)
        weight = model.transformer.embed_tokens.weight
        self.cache = Cache.empty(model.config.transformer, len(prompts), longest + room, weight)
        mask = attention_mask(documents, torch.zeros_like(documents))
        hidden = model.transformer(ids, self.positions, mask, self.cache)
        self.last = self.positions[:, -1:]
        self.visible = documents.bool()
        self.hidden = hidden[:, -1]

    def logits(self) -> Tensor:
        """float32[B, V] for the next token"""
        return self.model.transformer.logits(self.hidden)

    def read(self, ids: Tensor) -> None:
        """Go on by ids: int64[B]"""
        self.last = self.last + 1
        self.visible = torch.cat([self.visible, torch.ones_like(self.visible[:, :1])], dim=1)
        # Nothing is padded: every key may be seen, and SDPA needs no mask.
        mask = None if self.visible.all() else self.visible[:, None, None, :]
        self.hidden = self.model.transformer(ids[:, None], self.last, mask, self.cache)[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only: int64[rows]"""
        self.last, self.visible, self.hidden = (
            x[rows] for x in (self.last, self.visible, self.hidden)
        )
        self.cache.keys, self.cache.values = self.cache.keys[:, rows], self.cache.values[:, rows]


@torch.inference_mode()
def continue_text(
    model: "Multimodal", prompts: list[list[int]], max_tokens: int
) -> list[list[int]]:
    """Greedy text after each prompt: ids up to <eos> (not included), at most ``max_tokens``."""
    vocabulary = model.vocabulary
    room = model.config.transformer.max_position_embeddings - max(map(len, prompts))
    if max_tokens < 1 or max_tokens > room:
        raise ValueError(f"max_tokens={max_tokens}: expected 1 to {room}")
    batch = Batch(model, prompts, max_tokens)
    allowed = torch.zeros(vocabulary.size, dtype=torch.bool, device=model.device)
    allowed[: vocabulary.text_size] = True
    allowed[vocabulary.eos] = True
    out: list[list[int]] = [[] for _ in prompts]
    rows = torch.arange(len(prompts), device=model.device)
    for step in range(max_tokens):
        ids = batch.logits().masked_fill(~allowed, -torch.inf).argmax(-1)
        going = (ids != vocabulary.eos).nonzero()[:, 0]
        rows, ids = rows[going], ids[going]
        for row, token in zip(rows.tolist(), ids.tolist(), strict=True):
            out[row].append(token)
        if not len(rows) or step == max_tokens - 1:
            break
        # Finished rows leave the batch at once.
        if len(going) < len(batch.last):
            batch.keep(going)
        batch.read(ids)
    return out


def caption(
    model: "Multimodal",
    images: SequenceOf["str | Path | bytes | Image.Image"],
    *,
    batch_size: int = 32,
    max_tokens: int = 64,
) -> list[str]:
    """One caption an image, greedy, in the order given."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected at least 1")
    if isinstance(images, str | Path | bytes) or not hasattr(images, "__len__"):
        raise ValueError("images: expected a list of images, even for one")
    captions: list[str] = []
    for start in range(0, len(images), batch_size):
        pixels = read_images(model, images[start : start + batch_size])
        captions += caption_pixels(model, pixels, max_tokens)
    return captions


@torch.inference_mode()
def caption_pixels(model: "Multimodal", pixels: Tensor, max_tokens: int = 64) -> list[str]:
    """float32[B, 3, H, W] in [-1, 1] -> B captions"""
    if not len(pixels):
        return []
    codes = encode_images(model, pixels) + model.vocabulary.image_start
    prompts = [describe_prompt(model.vocabulary, row) for row in codes.tolist()]
    texts = continue_text(model, prompts, max_tokens)
    return [model.text_tokenizer.decode(ids).strip() for ids in texts]


@torch.inference_mode()
def draw_masked(
    model: "Multimodal",
    texts: SequenceOf[str],
    *,
    steps: int = 12,
    guidance_scale: float = 3.0,
    temperature: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Draw by reconstructing masked codes in parallel -> codes: int64[B, n].

    MaskGIT (Chang et al. 2022, arXiv:2202.04200): all codes start masked; at each step the most
    confident are kept, by the cosine schedule, with Gumbel noise that is annealed to zero. Guidance
    is ``u + guidance_scale * (c - u)``: 1 is none, 0 ignores the text.
    """
    vocabulary, n = model.vocabulary, model.image_tokenizer.config.grid**2
    prompts = [draw_prompt(vocabulary, model.text_tokenizer.encode(text)) for text in texts]
    guided = guidance_scale != 1
    if guided:
        prompts += [draw_prompt(vocabulary, None)] * len(texts)
    generator = torch.Generator().manual_seed(seed)
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest + n), vocabulary.mask)
    documents, blocks = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, :longest] = vocabulary.pad
        ids[row, longest - len(prompt) : longest] = torch.tensor(prompt)
        documents[row, longest - len(prompt) :] = 1
    blocks[:, longest:] = 1
    positions = documents.cumsum(1).sub(1).clamp(min=0).to(model.device)
    mask = attention_mask(documents, blocks).to(model.device)
    codes = torch.full((len(texts), n), -1)
    for step in range(steps):
        hidden = model.transformer(ids.to(model.device), positions, mask)[:, longest:]
        logits = model.transformer.logits(hidden)
        logits = logits[..., vocabulary.image_start : vocabulary.image_end]
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + guidance_scale * (conditional - unconditional)
        logits = logits.cpu()
        noise = -torch.empty(logits.shape).exponential_(generator=generator).log()
        drawn = (logits + temperature * noise).argmax(-1)
        confidence = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        progress = (step + 1) / steps
        gumbel = -torch.empty(confidence.shape).exponential_(generator=generator).log()
        confidence = confidence + temperature * (1 - progress) * gumbel
        known = codes >= 0
        drawn = torch.where(known, codes, drawn)
        confidence = confidence.masked_fill(known, torch.inf)
        left = int(n * torch.cos(torch.tensor(progress * torch.pi / 2)))
        keep = n if step == steps - 1 else max(1, n - left)
        chosen = confidence.topk(keep, dim=-1).indices
        codes = torch.full_like(codes, -1).scatter(1, chosen, drawn.gather(1, chosen))
        image = torch.where(codes >= 0, codes + vocabulary.image_start, vocabulary.mask)
        ids[:, longest:] = image.repeat(2 if guided else 1, 1)
    return codes


@torch.inference_mode()
def decode_images(model: "Multimodal", codes: Tensor) -> Tensor:
    """codes: int64[B, n] -> float32[B, 3, H, W] in [-1, 1]"""
    side = model.image_tokenizer.config.grid
    grid = rearrange(codes, "b (h w) -> b h w", h=side).to(model.device)
    images: Tensor = model.image_tokenizer.decode(grid)
    return images
