"""Images after a text: code by code, or masked, many codes at a time.

Of several levels the image is drawn by meaning first, then in detail, or in detail alone: a model
says which levels it draws.

Shapes: B images, n codes of an image, m codes of the levels that are drawn, K code numbers of all
levels, D width.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeAlias, TypeVar

import torch
from einops import rearrange
from torch import Tensor

from multimodal.devices import moved
from multimodal.inference.batch import DecodeBatch, check_length
from multimodal.inference.codec import UNKNOWN, drawn_to_read, encode_text
from multimodal.inference.decode import Row, decode, guide
from multimodal.inference.likelihoods import text_likelihoods
from multimodal.inference.sampling import choose, generators
from multimodal.model.checkpoint import ModelParts
from multimodal.model.sequences import draw_prompt
from multimodal.options import DrawOptions, EditOptions
from multimodal.tokenizers.levels import Layout, Level

OnStep: TypeAlias = Callable[[Sequence[int], Tensor], object]
DRAWINGS_AT_ONCE = 64
SCORES_AT_ONCE = 1 << 24  # among which codes are chosen: 128 MB in float64
Value = TypeVar("Value")


class ImageRow(Row):
    """An image, code by code, level by level.

    Args:
        prompts: the prompt that ends with <boi>, and for guidance the one to lead away from.
        previews: yield the codes so far after each row of codes of the last level.
        among_texts: other rows of the batch write texts, so that it chooses among all ids.

    Attributes:
        codes: the m image codes so far, in [0, K).
    """

    def __init__(
        self,
        model: ModelParts,
        number: int,
        prompts: list[list[int]],
        options: EditOptions | None = None,
        previews: bool = False,
        among_texts: bool = False,
    ) -> None:
        super().__init__(number, prompts, model.codes_drawn)
        vocabulary, layout, draws = model.vocabulary, model.config.layout, model.config.draws
        self.places = layout.indices(draws)  # of the m codes among the n
        self.image_codes = layout.codes_per_image
        self.ids = slice(vocabulary.image_start, vocabulary.image_end)
        all_ids = (vocabulary.image_start, vocabulary.size)
        start, size = all_ids if among_texts else (0, layout.codebook_size)
        masks = code_masks(layout, start, size, str(model.device))
        self.masks = [masks[place] for place in self.places.tolist()]
        self.any_code = len({id(mask) for mask in masks}) == 1 and not among_texts
        self.last = layout.levels[-1]
        self.first_of_last = layout.span(self.last.name, draws).start
        self.options, self.previews = options, previews
        self.codes: list[int] = []

    def allowed(self) -> Tensor | None:
        return None if self.any_code else self.masks[len(self.codes)]

    def guidance_scale(self) -> float:
        progress = len(self.codes) / max(1, self.max_new_tokens - 1)
        return 1.0 if self.options is None else guidance_scale_at(self.options, progress)

    def take(self, token: int, log_probability: float = 0.0) -> Iterator[Tensor]:
        self.codes.append(token - self.ids.start)
        self.done = len(self.codes) == self.max_new_tokens
        row, drawn = self.last.grid * self.last.groups, len(self.codes) - self.first_of_last
        if self.previews and drawn > 0 and drawn % row == 0:
            yield self.partial()

    def partial(self) -> Tensor:
        """The codes so far: int64[n], UNKNOWN where there are none yet, and never are."""
        codes = torch.full((self.image_codes,), UNKNOWN)
        codes[self.places[: len(self.codes)]] = torch.tensor(self.codes, dtype=torch.int64)
        return codes


@lru_cache(maxsize=32)
def code_masks(layout: Layout, start: int, size: int, device: str) -> tuple[Tensor, ...]:
    """Which ids may stand at each of the n places of an image: bool[size] each.

    Places that take the same codes have the same tensor object.

    Args:
        start: the id of code 0.
        size: how many ids a mask has.
    """
    masks: dict[int, Tensor] = {}
    for first, last in zip(layout.first.tolist(), layout.last.tolist(), strict=True):
        if first not in masks:
            masks[first] = torch.zeros(size, dtype=torch.bool, device=device)
            masks[first][start + first : start + last + 1] = True
    return tuple(masks[first] for first in layout.first.tolist())


def guidance_scale_at(options: EditOptions, progress: float) -> float:
    """The guidance scale of a step. progress: 0 at the first step, 1 at the last one."""
    if options.guidance_schedule == "rising":
        return 1 + (options.guidance_scale - 1) * 2 * progress
    return options.guidance_scale


@torch.inference_mode()
def draw_codes(
    model: ModelParts,
    texts: Sequence[str],
    options: DrawOptions = DrawOptions(),  # noqa: B008 (frozen)
    *,
    known: Tensor | None = None,
    numbers: Sequence[int] | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw one image for each text.

    Args:
        texts: B texts.
        known: int64[B, n], the codes that stay, UNKNOWN where to draw. Masked drawing only.
        numbers: name the random numbers of each image. 0, 1, ... by default.
        on_step: is given the numbers of some images and their codes so far, int64[some, n]: after
            each row of codes, UNKNOWN below it, or after each step of masked drawing. There the
            undrawn codes are shown as their argmax, which makes a step two to three times slower.

    Returns:
        codes: int64[B, n] in [0, K), UNKNOWN in levels that the model does not draw.

    Raises:
        ValueError: for an empty text, one that is too long, or options that exclude one another.
    """
    numbers = range(len(texts)) if numbers is None else numbers
    if options.candidates > 1:
        if on_step is not None:
            raise ValueError("of several candidates there is nothing to see before the end")
        return _draw_best(model, texts, options, known, numbers)
    if options.method == "causal":
        if known is not None:
            raise ValueError("code by code, only whole images are drawn: use the masked method")
        prompts = guided_prompts(model, texts, options)
        return _draw_causal(model, prompts, options, numbers, on_step)
    if known is None:
        known = torch.full((len(texts), model.codes_per_image), UNKNOWN)
    return returned(masked_steps(model, texts, options, known, numbers, on_step))


def guided_prompts(
    model: ModelParts, texts: Sequence[str], options: EditOptions
) -> list[list[list[int]]]:
    """The prompts of each drawing: one, or two with guidance.

    Raises:
        ValueError: for an empty text, or one that is too long.
    """
    prompts = [[draw_prompt(model.vocabulary, encode_text(model, text))] for text in texts]
    if options.guidance_scale != 1:
        away = None if options.negative is None else encode_text(model, options.negative)
        prompts = [[*several, draw_prompt(model.vocabulary, away)] for several in prompts]
    for several in prompts:
        check_length(model.network, several, model.codes_drawn)
    return prompts


@torch.inference_mode()
def masked_steps(
    model: ModelParts,
    texts: Sequence[str],
    options: EditOptions,
    known: Tensor,
    numbers: Sequence[int],
    on_step: OnStep | None = None,
) -> Generator[Callable[[], Tensor] | None, None, Tensor]:
    """Masked drawing, a step at a time. Arguments and result as for ``draw_codes``.

    Yields a function for the codes so far, as ``on_step`` is given them. None: there are no pixels.
    """
    prompts = guided_prompts(model, texts, options)
    parts = [slice(at, at + DRAWINGS_AT_ONCE) for at in range(0, len(texts), DRAWINGS_AT_ONCE)]
    drawn = [known[:0]]
    for part in parts:
        codes, dice = known[part], generators(options, numbers[part])
        for level in model.config.layout.chosen(model.config.draws):
            codes = yield from _draw_masked(
                model, level, prompts[part], codes, options, dice, numbers[part], on_step
            )
        drawn.append(codes)
    return torch.cat(drawn)


def returned(steps: Generator[Any, None, Value]) -> Value:
    """Run a generator to its end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def _draw_best(
    model: ModelParts,
    texts: Sequence[str],
    options: DrawOptions,
    known: Tensor | None,
    numbers: Sequence[int],
) -> Tensor:
    """Of several drawings of each text, the one after which the text is most likely."""
    count = options.candidates
    repeated = [text for text in texts for _ in range(count)]
    codes = draw_codes(
        model,
        repeated,
        replace(options, candidates=1),
        known=None if known is None else known.repeat_interleave(count, 0),
        numbers=[count * number + candidate for number in numbers for candidate in range(count)],
    )
    parts = [slice(at, at + DRAWINGS_AT_ONCE) for at in range(0, len(repeated), DRAWINGS_AT_ONCE)]
    likelihoods = [
        text_likelihoods(model, drawn_to_read(model, codes[part]), repeated[part]) for part in parts
    ]
    best = torch.cat(likelihoods).view(len(texts), count).argmax(1)
    return codes[best + count * torch.arange(len(texts))]


def _draw_causal(
    model: ModelParts,
    prompts: list[list[list[int]]],
    options: DrawOptions,
    numbers: Sequence[int],
    on_step: OnStep | None,
) -> Tensor:
    rows = [
        ImageRow(model, number, several, options, previews=on_step is not None)
        for number, several in zip(numbers, prompts, strict=True)
    ]
    for pieces in decode(model.network, rows, options, batch_size=DRAWINGS_AT_ONCE):
        if pieces and on_step is not None:
            on_step([row.number for row, _ in pieces], torch.stack([codes for _, codes in pieces]))
    drawn = [row.partial() for row in rows]
    return torch.stack(drawn) if drawn else torch.zeros(0, model.codes_per_image, dtype=torch.int64)


def _draw_masked(
    model: ModelParts,
    level: Level,
    prompts: list[list[list[int]]],
    image: Tensor,
    options: EditOptions,
    dice: Sequence[torch.Generator],
    numbers: Sequence[int],
    on_step: OnStep | None,
) -> Generator[Callable[[], Tensor] | None, None, Tensor]:
    """Masked drawing of one level, of MaskGIT (Chang et al. 2022, arXiv:2202.04200).

    Each step draws some codes. How many is given by the cosine schedule. Which ones does not depend
    on the model's confidence, or even backgrounds would always come first: they are spread over the
    image (``spread_order``). So the host knows the places, and codes and scores stay on the device.

    Args:
        level: what to draw. The levels drawn before it are known and come after the prompt.
        prompts: for each image its prompts, all conditional ones or with unconditional ones.
        image: int64[B, n], UNKNOWN where to draw.
        dice: the random numbers of each image.

    Returns:
        int64[B, n], without UNKNOWN in this level.
    """
    layout, draws, device = model.config.layout, model.config.draws, model.device
    start, span = model.vocabulary.image_start, layout.span(level.name)
    numbers_of_level = layout.numbers(level.name)
    known = image[:, span] != UNKNOWN
    if known.all():
        return image
    codes, (count, n) = moved(image[:, span], device), known.shape
    copies, order = len(prompts[0]), spread_order(level.grid)
    order = (order[:, None] * level.groups + torch.arange(level.groups)).flatten()
    # All conditional prompts come first. They are read once, into the cache.
    places = layout.indices(draws)[: layout.span(level.name, draws).start]
    pairs = list(zip(prompts, (image[:, places] + start).tolist(), strict=True))
    read = [[*each[i], *before] for i in range(copies) for each, before in pairs]
    batch = DecodeBatch(model.network, read, n)
    code_ids = slice(start + numbers_of_level.start, start + numbers_of_level.stop)
    group_of_number = moved(torch.arange(level.numbers) // level.codebook_size, device)

    def whole(codes: Tensor) -> Tensor:
        return torch.cat([image[:, : span.start], codes.cpu(), image[:, span.stop :]], 1)

    def filled(places: Tensor, chosen: Tensor) -> Tensor:
        """The codes, with those that were chosen for some places: bool[B, n], image by image."""
        index = moved(places.flatten().nonzero()[:, 0], device)
        return codes.flatten().scatter(0, index, chosen + numbers_of_level.start).view(count, n)

    def logits_of(to_predict: Tensor, progress: float) -> Tensor:
        """Guided scores of some UNKNOWN codes, image by image: float32[codes, numbers of level].

        Only they and the known codes are read. A mask that is not predicted would say nothing.
        to_predict: bool[B, n]. progress: of the guidance, in [0, 1].
        """
        needed, counts = to_predict | known, to_predict.sum(1)
        # Codes to predict come first, then the known ones.
        index = (2 * to_predict.int() + known.int()).argsort(dim=-1, descending=True, stable=True)
        index = index[:, : int(needed.sum(1).max())]
        queries = int(counts.max())
        predicted = (torch.arange(queries) < counts[:, None]).repeat(copies, 1).flatten()
        rows = moved(predicted.nonzero()[:, 0], device)
        block = index, needed.gather(1, index), known.gather(1, index)
        positions, valid, is_known = (moved(x, device) for x in block)
        ids = torch.where(is_known, codes.gather(1, positions) + start, model.vocabulary.mask)
        ids, positions, valid = (x.repeat(copies, 1) for x in (ids, positions, valid))
        hidden = batch.forward_block(ids, positions, valid, queries)
        logits = model.network.transformer.logits(hidden.flatten(0, 1)[rows], code_ids)
        if copies > 1:
            conditional, unconditional = logits.chunk(2)
            logits = guide(conditional, unconditional, guidance_scale_at(options, progress))
        if level.groups > 1:  # a place takes the codes of its group
            groups = moved((torch.arange(n) % level.groups).expand(count, -1)[to_predict], device)
            logits = logits.masked_fill(groups[:, None] != group_of_number, -torch.inf)
        return logits

    def shown() -> Tensor:  # codes that are not drawn yet as the likeliest
        return whole(
            codes if known.all() else filled(~known, logits_of(~known, progress).argmax(-1))
        )

    to_draw = (~known).sum(1)
    for step in range(options.steps):
        if known.all():  # each step draws one code at least
            break
        angle = torch.tensor((step + 1) / options.steps * torch.pi / 2)
        remaining = (to_draw * torch.cos(angle)).long()
        if step == options.steps - 1:
            remaining = torch.zeros_like(remaining)
        # The rank of each code in the order, known ones first: those before n - remaining are known
        # after this step. At least one code is drawn.
        rank = order.expand(count, -1).masked_fill(known, -1).argsort(-1).argsort(-1)
        remaining = remaining.minimum((~known).sum(1) - 1).clamp(min=0)
        fresh = (rank < (n - remaining)[:, None]) & ~known
        progress = step / max(1, options.steps - 1)
        if fresh.any():  # with fewer codes than steps the last steps have nothing to draw
            logits = logits_of(fresh, progress)
            codes = filled(fresh, _choose_codes(logits, fresh.sum(1).tolist(), options, dice))
            known = known | fresh
        has_pixels = level == layout.levels[-1]
        if on_step is not None and has_pixels:
            on_step(numbers, shown())
        yield shown if has_pixels else None
    return whole(codes)


def _choose_codes(
    logits: Tensor, counts: list[int], options: EditOptions, dice: Sequence[torch.Generator]
) -> Tensor:
    """``choose`` for so many codes of each image, where the logits are: float[N, V] -> int64[N].

    Images with equally many codes go together, for each call makes the host wait for a GPU.
    """
    given = logits.cpu() if logits.device.type == "mps" else logits  # mps has no float64
    size = max(1, SCORES_AT_ONCE // (counts[0] * logits.shape[1])) if len(set(counts)) == 1 else 1
    parts = [slice(at, at + size) for at in range(0, len(counts), size)]
    sizes = [sum(counts[part]) for part in parts]
    chosen = [
        choose(rearrange(scores, "(b n) v -> b n v", b=len(some)), options, some).flatten()
        for scores, some in zip(torch.split(given, sizes), [dice[p] for p in parts], strict=True)
    ]
    return torch.cat(chosen).to(logits.device)


def spread_order(side: int) -> Tensor:
    """The step at which each code is drawn: int64[side * side].

    Codes that are drawn together lie far apart: the order is that of the Halton points of bases 2
    and 3 (Besnier et al. 2025, arXiv:2503.17076).
    """
    order, number = dict[int, int](), 0
    while len(order) < side * side:
        number += 1
        row, column = (int(side * _radical_inverse(number, base)) for base in (2, 3))
        order.setdefault(row * side + column, len(order))
    return torch.tensor([order[code] for code in range(side * side)])


def _radical_inverse(number: int, base: int) -> float:
    """The digits of a number, mirrored behind the decimal point: in [0, 1)."""
    value, share = 0.0, 1.0
    while number:
        number, digit = divmod(number, base)
        share /= base
        value += digit * share
    return value
