"""Any mix of texts and images in; text, an image, or any mix of both out; many prompts at once.

Each prompt has a state of its own: in a text (text ids, <eos>, and <boi> where an image may begin),
in an image (codes, exactly n of them), or at its end (<eoi>). The state says what may come next.

Shapes: B prompts, V vocabulary, n codes of an image.
"""

from collections.abc import Generator, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from multimodal.data.images import to_image
from multimodal.inference.batch import Batch, check_length, closed_up
from multimodal.inference.drawing import UNKNOWN, decode_images, preview_images
from multimodal.inference.sampling import Sampling
from multimodal.inference.text import (
    before_stop,
    check_limits,
    continue_text,
    encode_images,
    read_images,
    text_mask,
)

if TYPE_CHECKING:
    from multimodal.model.network import Multimodal

IMAGES_AT_MOST = 8  # in one reply
Part: TypeAlias = str | Path | bytes | Image.Image
Output = Literal["text", "image", "any"]


@dataclass(frozen=True)
class Preview:
    """An image that is being drawn; share: of its codes, in (0, 1)."""

    image: Image.Image
    share: float


Made: TypeAlias = str | Image.Image | Preview
Piece: TypeAlias = tuple[int, Made]  # the number of the prompt, and what it gave


@dataclass
class Reply:
    """What one prompt gave.

    parts: texts and images in their order; prompt_tokens: what was read; text_tokens, image_tokens:
    what was made; log_probability: of all of it in nats, among what might have come at each place
    (0 for beam search, which does not say); ended: by the model (``end``), by max_tokens
    (``length``) or before one of the texts of ``stop``.
    """

    parts: list[str | Image.Image] = field(default_factory=list)
    prompt_tokens: int = 0
    text_tokens: int = 0
    image_tokens: int = 0
    log_probability: float = 0.0
    ended: Literal["end", "length", "stop"] = "length"


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


def check_output(
    output: Output, max_tokens: int, sampling: Sampling, stop: SequenceOf[str]
) -> None:
    """Errors: ``ValueError`` for what cannot be made so."""
    if output not in ("text", "image", "any"):
        raise ValueError(f"output {output!r}: expected text, image or any")
    check_limits(max_tokens, stop)
    if sampling.beams > 1 and output != "text":
        raise ValueError(f"beams={sampling.beams}: beam search is for texts, not for {output}")


class _Row:
    """The state of one prompt."""

    def __init__(
        self,
        model: "Multimodal",
        number: int,
        prompt: list[int],
        output: Output,
        max_tokens: int,
        stop: SequenceOf[str],
        previews: bool,
    ) -> None:
        self.model, self.number, self.output, self.stop = model, number, output, stop
        self.previews = previews
        self.reply = Reply(prompt_tokens=len(prompt))
        self.left, self.used = max_tokens, len(prompt)
        self.text: list[int] = []
        self.said: list[int] = []  # of all texts
        self.shown = ""
        self.codes: list[int] = []
        self.inside: Literal["text", "image", "end of image"]
        self.inside = "image" if output == "image" else "text"
        self.done = False

    def allow(self, texts: Tensor, images: Tensor) -> Tensor:
        """bool[V]: what may come next; texts, images: bool[V]"""
        v, n = self.model.vocabulary, self.model.image_tokenizer.config.grid**2
        if self.inside == "image":
            return images
        allowed = torch.zeros_like(texts) if self.inside == "end of image" else texts.clone()
        if self.inside == "end of image":
            allowed[v.eoi] = True
        # An image is begun only where all of it fits, and what is left of the text.
        elif self.output == "any":
            limit = self.model.config.transformer.max_position_embeddings
            fits = self.used + n + 2 + self.left <= limit
            allowed[v.boi] = fits and self.reply.image_tokens < IMAGES_AT_MOST * n
        return allowed

    def take(self, token: int, log_probability: float) -> Iterator[Made]:
        """Go on by a token; yields pieces of text as they are sure, and images when whole."""
        v, n = self.model.vocabulary, self.model.image_tokenizer.config.grid**2
        self.reply.log_probability += log_probability
        self.used += 1
        if token == v.eos:
            self.reply.ended, self.done = "end", True
            yield from self._finish_text()
        elif token == v.boi:
            yield from self._finish_text()
            self.inside = "image"
        elif token == v.eoi:
            self.inside = "text"
            self.done = self.left == 0
        elif self.inside == "image":
            self.codes.append(token - v.image_start)
            self.reply.image_tokens += 1
            if len(self.codes) == n:
                image = to_image(decode_images(self.model, torch.tensor([self.codes]))[0])
                self.reply.parts.append(image)
                self.codes, self.inside = [], "end of image"
                self.done = self.output == "image"
                self.reply.ended = "end" if self.done else "length"
                yield image
            elif self.previews and len(self.codes) % self.model.image_tokenizer.config.grid == 0:
                so_far = torch.full((1, n), UNKNOWN)
                so_far[0, : len(self.codes)] = torch.tensor(self.codes)
                shown = preview_images(self.model, so_far)[0]
                yield Preview(to_image(shown), len(self.codes) / n)
        else:
            self.text.append(token)
            self.said.append(token)
            self.reply.text_tokens += 1
            self.left -= 1
            self.done = self.left == 0
            # The end may be half of a character.
            sure = self.model.text_tokenizer.decode(self.text).rstrip("\N{REPLACEMENT CHARACTER}")
            if before_stop(sure, self.stop) != sure:
                self.reply.ended, self.done = "stop", True
            sure = sure[: len(sure) - held_back(sure, self.stop)]
            if len(sure) > len(self.shown) and not self.done:
                piece, self.shown = sure[len(self.shown) :], sure
                yield piece
            if self.done:
                yield from self._finish_text()

    def _finish_text(self) -> Iterator[str]:
        if self.text:
            whole = before_stop(self.model.text_tokenizer.decode(self.text), self.stop)
            if rest := whole[len(self.shown) :]:
                yield rest
            self.reply.parts.append(whole.strip())
            self.text, self.shown = [], ""


def held_back(text: str, stop: SequenceOf[str]) -> int:
    """How many characters at the end of a text may yet become one of the stop texts."""
    return max((n for one in stop for n in range(1, len(one)) if text.endswith(one[:n])), default=0)


@torch.inference_mode()
def run(
    model: "Multimodal",
    prompts: SequenceOf[list[int]],
    output: Output,
    max_tokens: int,
    sampling: Sampling,
    numbers: SequenceOf[int] | None = None,
    stop: SequenceOf[str] = (),
    previews: bool = False,
) -> Generator[Piece, None, list[Reply]]:
    """Go on after all prompts together: yields pieces as they come, returns the replies.

    numbers: what the prompts are called, for the random numbers; 0, 1, ... by default.
    """
    v, n = model.vocabulary, model.image_tokenizer.config.grid**2
    numbers = range(len(prompts)) if numbers is None else numbers
    begun = [[*prompt, *([v.boi] if output == "image" else [])] for prompt in prompts]
    rows = [_Row(model, i, ids, output, max_tokens, stop, previews) for i, ids in enumerate(begun)]
    replies = [row.reply for row in rows]
    if sampling.beams > 1:
        for row, said in zip(
            rows, continue_text(model, begun, max_tokens, sampling, stop=stop), strict=True
        ):
            text = model.text_tokenizer.decode(said).strip()
            row.reply.parts, row.reply.text_tokens = [text], len(said)
            row.reply.ended = "end" if len(said) < max_tokens else "length"
            yield row.number, text
        return replies
    texts, images = text_mask(model), torch.zeros(v.size, dtype=torch.bool, device=model.device)
    images[v.image_start : v.image_end] = True
    room = n if output == "image" else max_tokens
    reach = slice(0, v.image_start) if output == "text" else slice(None)
    batch, generators = Batch(model, begun, room), sampling.generators(numbers)
    while True:
        allowed = torch.stack([row.allow(texts, images) for row in rows])[:, reach]
        logits = batch.logits(reach).masked_fill(~allowed, -torch.inf)
        logits = sampling.penalise(logits, [row.said for row in rows])
        ids = sampling.choose(logits, [generators[row.number] for row in rows])
        likely = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0].tolist()
        for row, token, one in zip(rows, ids.tolist(), likely, strict=True):
            for piece in row.take(token, one):
                yield row.number, piece
        going = closed_up([place for place, row in enumerate(rows) if not row.done])
        if not going:
            return replies
        if len(going) < len(rows):
            rows = [rows[place] for place in going]
            batch.keep(going)
            ids = ids[going]
        if batch.cache.length == batch.cache.room:
            batch.grow(n + 2)
        batch.read(ids)


def reply(
    model: "Multimodal",
    prompts: SequenceOf[SequenceOf[Part]],
    *,
    output: Output = "text",
    max_tokens: int = 64,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    stop: SequenceOf[str] = (),
    batch_size: int = 32,
) -> list[Reply | ValueError]:
    """Go on after every prompt; one that cannot be read has its error in its place.

    stop: a text, and with it the reply, ends before the first of these;
    batch_size: prompts at once; those of one length are together.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected at least 1")
    check_output(output, max_tokens, sampling, stop)
    found: list[Reply | ValueError] = []
    good: list[tuple[int, list[int]]] = []
    n = model.image_tokenizer.config.grid**2
    for number, parts in enumerate(prompts):
        try:
            ids = prompt_ids(model, parts)
            check_length(model, [ids], n + 1 if output == "image" else max_tokens)
            good.append((number, ids))
            found.append(Reply())
        except ValueError as error:
            found.append(error)
    good.sort(key=lambda one: len(one[1]))
    for start in range(0, len(good), batch_size):
        some = good[start : start + batch_size]
        numbers = [number for number, _ in some]
        steps = run(model, [ids for _, ids in some], output, max_tokens, sampling, numbers, stop)
        for number, one in zip(numbers, _last(steps), strict=True):
            found[number] = one
    return found


def _last(steps: Generator[Piece, None, list[Reply]]) -> list[Reply]:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            replies: list[Reply] = end.value
            return replies


def generate(
    model: "Multimodal",
    parts: SequenceOf[Part],
    *,
    output: Output = "text",
    max_tokens: int = 64,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    stop: SequenceOf[str] = (),
) -> list[str | Image.Image]:
    """Go on after the prompt. ``max_tokens`` bounds the text; an image is always whole.

    output: ``text``; ``image``: exactly one; ``any``: what the model wants, until it ends, with at
    most IMAGES_AT_MOST images.
    """
    (one,) = reply(
        model, [parts], output=output, max_tokens=max_tokens, sampling=sampling, stop=stop
    )
    if isinstance(one, ValueError):
        raise one
    return one.parts or [""]


def stream(
    model: "Multimodal",
    parts: SequenceOf[Part],
    *,
    output: Output = "text",
    max_tokens: int = 64,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    stop: SequenceOf[str] = (),
    previews: bool = False,
) -> Iterator[Made]:
    """``generate``, piece by piece as it comes: texts in whole characters, images when whole and,
    with ``previews``, after each row of codes."""
    check_output(output, max_tokens, sampling, stop)
    ids = prompt_ids(model, parts)
    n = model.image_tokenizer.config.grid**2
    check_length(model, [ids], n + 1 if output == "image" else max_tokens)
    return (
        piece
        for _, piece in run(
            model, [ids], output, max_tokens, sampling, stop=stop, previews=previews
        )
    )
