"""Images after a text: masked, in parallel, or code by code; and parts of an image drawn anew.

Guidance is ``u + guidance_scale * (c - u)`` on the logits with (c) and without (u) the text, where
the text is <null>, or a negative text that the image is to be led away from: 1 is none, 0 ignores
the text, more follows it more strictly (classifier-free guidance, Ho & Salimans 2022,
arXiv:2207.12598). A rising schedule goes from 1 to 2 scale - 1 over the drawing (Muse, Chang et al.
2023, arXiv:2301.00704): first what the image could be, then what it is to be.

Shapes: B batch, V vocabulary, n codes of an image, P longest prompt.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict, cast

import torch
from einops import rearrange
from torch import Tensor

from multimodal.inference.batch import Batch, check_length, text_ids
from multimodal.inference.likelihoods import text_likelihoods
from multimodal.inference.sampling import Sampling, SamplingOptions
from multimodal.model.sequences import draw_prompt

if TYPE_CHECKING:
    from multimodal.model.network import Multimodal

Method = Literal["masked", "causal"]
Schedule = Literal["constant", "rising"]
OnStep: TypeAlias = Callable[[SequenceOf[int], Tensor], object]
UNKNOWN = -1  # a code that is to be drawn
GREY = 0.0  # of a preview, where nothing is drawn yet
AT_ONCE = 64  # drawings
DRAWN = Sampling(temperature=0.8)  # by default: at 1 shapes are spoilt, at 0.6 photos are blank


class DrawingOptions(TypedDict, total=False):
    """Those arguments of ``draw_codes`` that all ways of drawing share."""

    steps: int
    guidance_scale: float
    guidance_schedule: Schedule
    negative: str | None


class DrawingArguments(SamplingOptions, DrawingOptions, total=False):
    """Those, and how codes are chosen."""


def divided(given: DrawingArguments) -> tuple[DrawingOptions, Sampling]:
    """What goes to ``draw_codes``, and the sampling: by default at that of ``DRAWN``."""
    options = {name: given[name] for name in DrawingOptions.__annotations__ if name in given}  # type: ignore[literal-required]
    rest = {name: value for name, value in given.items() if name not in options}
    return cast(DrawingOptions, options), replace(DRAWN, **rest)  # type: ignore[arg-type]


@torch.inference_mode()
def draw_codes(
    model: "Multimodal",
    texts: SequenceOf[str],
    *,
    method: Method = "masked",
    steps: int = 12,
    guidance_scale: float = 3.0,
    guidance_schedule: Schedule = "constant",
    negative: str | None = None,
    sampling: Sampling = DRAWN,
    candidates: int = 1,
    known: Tensor | None = None,
    numbers: SequenceOf[int] | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw one image for each text -> codes: int64[B, n] in [0, codebook_size).

    candidates: draw so many and keep the one after which the model finds the text likeliest, as a
        caption (best of n; DALL-E, Ramesh et al. 2021, arXiv:2102.12092, has another model judge);
    known: int64[B, n], the codes that stay, UNKNOWN where to draw (masked drawing only);
    steps: of masked drawing; negative: a text to be led away from, by the guidance;
    numbers: what the texts are called, for the random numbers; 0, 1, ... by default;
    on_step: is given the numbers and the codes so far, int64[some of B, n], after each step of
        masked drawing (what is not drawn yet as it is likeliest: so a step takes two to three times
        as long) and each row of codes (UNKNOWN below it).
    """
    numbers = range(len(texts)) if numbers is None else numbers
    if method not in ("masked", "causal"):
        raise ValueError(f"method {method!r}: expected masked or causal")
    if steps < 1:
        raise ValueError(f"steps={steps}: expected at least 1")
    if not 0 <= guidance_scale < float("inf"):
        raise ValueError(f"guidance_scale={guidance_scale}: expected a number from 0 on")
    if guidance_schedule not in ("constant", "rising"):
        raise ValueError(f"guidance_schedule {guidance_schedule!r}: expected constant or rising")
    if negative is not None and guidance_scale == 1:
        raise ValueError("a negative text works by guidance: give a guidance_scale other than 1")
    if sampling.beams > 1 or sampling.repetition_penalty != 1:
        raise ValueError("beams and a repetition penalty are for texts, not for images")
    if candidates < 1:
        raise ValueError(f"candidates={candidates}: expected at least 1")
    if candidates > 1:
        if on_step is not None:
            raise ValueError("of several candidates there is nothing to see before the end")
        every = [text for text in texts for _ in range(candidates)]
        known = None if known is None else known.repeat_interleave(candidates, 0)
        codes = draw_codes(model, every, method=method, steps=steps,
                           guidance_scale=guidance_scale, guidance_schedule=guidance_schedule,
                           negative=negative, sampling=sampling, known=known,
                           numbers=[candidates * n + c for n in numbers
                                    for c in range(candidates)])  # fmt: skip
        parts = [slice(start, start + AT_ONCE) for start in range(0, len(every), AT_ONCE)]
        likelihoods = torch.cat([text_likelihoods(model, codes[one], every[one]) for one in parts])
        likelihoods = likelihoods.view(len(texts), candidates)
        return codes[likelihoods.argmax(1) + candidates * torch.arange(len(texts))]
    if len(texts) > AT_ONCE:
        parts = [slice(start, start + AT_ONCE) for start in range(0, len(texts), AT_ONCE)]
        return torch.cat([
            draw_codes(model, texts[one], method=method, steps=steps,
                       guidance_scale=guidance_scale, guidance_schedule=guidance_schedule,
                       negative=negative, sampling=sampling,
                       known=None if known is None else known[one], numbers=numbers[one],
                       on_step=on_step)
            for one in parts
        ])  # fmt: skip
    prompts = [draw_prompt(model.vocabulary, text_ids(model, text)) for text in texts]
    if guidance_scale != 1:
        away = None if negative is None else text_ids(model, negative)
        prompts += [draw_prompt(model.vocabulary, away)] * len(texts)
    scale = _Scale(guidance_scale, guidance_schedule)
    n = model.image_tokenizer.config.grid**2
    check_length(model, prompts, n)
    if method == "causal":
        if known is not None:
            raise ValueError("code by code, only whole images are drawn: use the masked method")
        return _draw_causal(model, prompts, n, scale, sampling, numbers, on_step)
    if known is None:
        known = torch.full((len(texts), n), UNKNOWN)
    return _draw_masked(model, prompts, known, steps, scale, sampling, numbers, on_step)


@dataclass(frozen=True)
class _Scale:
    """How strong the guidance is; ``guided``: whether there is any."""

    scale: float
    schedule: Schedule

    @property
    def guided(self) -> bool:
        return self.scale != 1

    def at(self, progress: float) -> float:
        """progress: 0 at the first step, 1 at the last"""
        rising = self.schedule == "rising"
        return 1 + (self.scale - 1) * 2 * progress if rising else self.scale


def _image_logits(model: "Multimodal", hidden: Tensor, guidance: _Scale, progress: float) -> Tensor:
    """float[B or 2 B, ..., D] -> float32[B, ..., K] on the CPU: of the codes only, guided"""
    vocabulary = model.vocabulary
    codes = slice(vocabulary.image_start, vocabulary.image_end)
    logits = model.transformer.logits(hidden, codes)
    if guidance.guided:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + guidance.at(progress) * (conditional - unconditional)
    return logits.cpu()


def _draw_causal(
    model: "Multimodal",
    prompts: list[list[int]],
    n: int,
    guidance: _Scale,
    sampling: Sampling,
    numbers: SequenceOf[int],
    on_step: OnStep | None,
) -> Tensor:
    count, side = len(numbers), model.image_tokenizer.config.grid
    batch = Batch(model, prompts, n)
    generators = sampling.generators(numbers)
    codes: list[Tensor] = []
    for step in range(n):
        logits = _image_logits(model, batch.hidden, guidance, step / max(1, n - 1))
        codes.append(sampling.choose(logits, generators))
        if on_step is not None and len(codes) % side == 0:
            so_far = torch.full((count, n), UNKNOWN)
            so_far[:, : len(codes)] = torch.stack(codes, 1)
            on_step(numbers, so_far)
        if step < n - 1:
            ids = codes[-1] + model.vocabulary.image_start
            batch.read(ids.repeat(len(prompts) // count).to(model.device))
    return torch.stack(codes, 1)


def _draw_masked(
    model: "Multimodal",
    prompts: list[list[int]],
    codes: Tensor,
    steps: int,
    guidance: _Scale,
    sampling: Sampling,
    numbers: SequenceOf[int],
    on_step: OnStep | None,
) -> Tensor:
    """MaskGIT (Chang et al. 2022, arXiv:2202.04200): some codes are drawn at each step, how many by
    the cosine schedule. Which ones is not left to how sure the model is of them, or even
    backgrounds would always come first: they are spread over the image (``spread_order``)."""
    vocabulary, (count, n) = model.vocabulary, codes.shape
    copies, order = len(prompts) // count, spread_order(model.image_tokenizer.config.grid)
    # What a text means does not depend on the image after it: it is read once, into the cache.
    batch = Batch(model, prompts, n)
    generators = sampling.generators(numbers)

    def logits_of(asked: Tensor, codes: Tensor, progress: float) -> Tensor:
        """asked: bool[B, n], some of the codes that are UNKNOWN; progress: in [0, 1], of the
        guidance -> float32[so many, K], guided, row by row

        Those and what is known are read; a mask that nobody asks for would say nothing.
        """
        known = codes != UNKNOWN
        places = (2 * asked.int() + known.int()).argsort(dim=-1, descending=True, stable=True)
        places = places[:, : int((asked | known).sum(1).max())]
        ids = torch.where(known, codes + vocabulary.image_start, vocabulary.mask)
        block = ids.gather(1, places), places, (asked | known).gather(1, places)
        ids, places, real = (x.repeat(copies, 1).to(model.device) for x in block)
        counts = asked.sum(1)
        hidden = batch.read_block(ids, places, real, int(counts.max()))
        first = (torch.arange(hidden.shape[1]) < counts[:, None]).repeat(copies, 1)
        return _image_logits(model, hidden[first.to(model.device)], guidance, progress)

    to_draw = (codes == UNKNOWN).sum(1)
    for step in range(steps):
        known, progress = codes != UNKNOWN, (step + 1) / steps
        left = (to_draw * torch.cos(torch.tensor(progress * torch.pi / 2))).long()
        if step == steps - 1:
            left = torch.zeros_like(left)
        # The rank of each code in the order, known ones first: those before n - left are kept.
        rank = order.expand(count, -1).masked_fill(known, -1).argsort(-1).argsort(-1)
        keep = rank < (n - left.minimum((~known).sum(1) - 1).clamp(min=0))[:, None]
        fresh, guided = keep & ~known, step / max(1, steps - 1)
        if fresh.any():  # fewer codes than steps: the last ones have nothing to do
            rows = torch.split(logits_of(fresh, codes, guided), fresh.sum(1).tolist())
            chosen = [sampling.choose(own[None], [generator])[0]
                      for own, generator in zip(rows, generators, strict=True)]  # fmt: skip
            codes = codes.masked_scatter(fresh, torch.cat(chosen))
        if on_step is not None:
            rest, shown = codes == UNKNOWN, codes
            if rest.any():
                shown = codes.masked_scatter(rest, logits_of(rest, codes, guided).argmax(-1))
            on_step(numbers, shown)
    return codes


def spread_order(side: int) -> Tensor:
    """int64[side * side]: when each code is drawn, so that those drawn together lie far apart.

    The order of the Halton points of bases 2 and 3 (Besnier et al. 2025, arXiv:2503.17076).
    """
    order: dict[int, int] = {}
    number = 0
    while len(order) < side * side:
        number += 1
        row, column = (int(side * _radical_inverse(number, base)) for base in (2, 3))
        order.setdefault(row * side + column, len(order))
    return torch.tensor([order[code] for code in range(side * side)])


def _radical_inverse(number: int, base: int) -> float:
    """The digits of a number, mirrored behind the point: in [0, 1)."""
    value, share = 0.0, 1.0
    while number:
        number, digit = divmod(number, base)
        share /= base
        value += digit * share
    return value


@torch.inference_mode()
def decode_images(model: "Multimodal", codes: Tensor) -> Tensor:
    """codes: int64[B, n] -> float32[B, 3, H, W] in [-1, 1]"""
    side = model.image_tokenizer.config.grid
    grid = rearrange(codes, "b (h w) -> b h w", h=side).to(model.device)
    images: Tensor = model.image_tokenizer.decode(grid)
    return images


@torch.inference_mode()
def preview_images(model: "Multimodal", codes: Tensor) -> Tensor:
    """What is drawn of images so far: codes: int64[B, n], UNKNOWN after some row -> float32[B, 3,
    H, W] in [-1, 1], GREY where there is nothing yet.

    The decoder looks at neighbours: what is below is given the codes above it, and then hidden.
    """
    side = model.image_tokenizer.config.grid
    grid = rearrange(codes, "b (h w) -> b h w", h=side).clone()
    rows = int((grid != UNKNOWN).all(-1).all(0).sum())
    if rows == 0:
        raise ValueError("a preview needs at least one row of codes")
    grid[:, rows:] = grid[:, rows - 1 : rows]
    images = decode_images(model, rearrange(grid, "b h w -> b (h w)"))
    images[:, :, rows * model.image_tokenizer.downsample :] = GREY
    return images
