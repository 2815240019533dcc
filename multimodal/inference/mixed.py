"""Any mix of texts and images in. Text, an image, or any mix of both out. Many prompts at once.

A prompt continues in a text (text ids, <eos>, and <boi> where an image may begin), in an image
(exactly n codes), or at the end of an image (<eoi>). That says which ids may come next.

Shapes: B prompts, V vocabulary, n codes of an image.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from multimodal.data.images import to_image
from multimodal.inference.batch import check_length
from multimodal.inference.codec import (
    decode_images,
    encode_as_drawn,
    encode_to_read,
    preview_images,
    read_images,
)
from multimodal.inference.decode import Row, decode
from multimodal.inference.drawing import ImageRow, returned
from multimodal.inference.json_schema import SchemaState
from multimodal.inference.text import TextRow, generate_ids, text_mask
from multimodal.inference.values import ImageSource
from multimodal.model.checkpoint import ModelParts
from multimodal.model.layers.transformer import ALL
from multimodal.model.sequences import image_tokens
from multimodal.options import TextOptions, check

MAX_IMAGES = 8  # in one reply
OutputKind = Literal["text", "image", "any"]


@dataclass(frozen=True)
class Preview:
    """An image that is being drawn. share: how many of its codes there are, in (0, 1)."""

    image: Image.Image
    share: float


Output: TypeAlias = str | Image.Image | Preview
Parts: TypeAlias = Sequence[ImageSource] | Sequence[Mapping[str, str]]  # or messages of a chat


@dataclass
class Reply:
    """What one prompt gave.

    Attributes:
        parts: texts and images in their order.
        prompt_tokens: tokens that were read.
        text_tokens, image_tokens: tokens that were generated.
        log_probability: of all generated tokens in nats, each among those that the grammar allows.
            0 for beam search.
        ended: by the model (``end``), by max_tokens (``length``), or by a stop text (``stop``).
    """

    parts: list[str | Image.Image] = field(default_factory=list)
    prompt_tokens: int = 0
    text_tokens: int = 0
    image_tokens: int = 0
    log_probability: float = 0.0
    ended: str = "length"


def prompt_ids(model: ModelParts, parts: Parts) -> list[int]:
    """<bos>, then each part in its order. A ``str`` is text, everything else an image.

    Messages (``role`` and ``content``) are read in the chat template of the model.
    """
    if isinstance(parts, str | bytes | Path | Mapping) or not parts:
        raise ValueError("the prompt is empty: give a list of texts (str) and images (others)")
    messages = [part for part in parts if isinstance(part, Mapping)]
    if len(messages) == len(parts):
        return model.text_tokenizer.encode_chat(messages)
    if messages:
        raise ValueError("a prompt is messages of a chat, or texts and images, not both")
    ids = [model.vocabulary.bos]
    for number, part in enumerate(parts):
        assert not isinstance(part, Mapping)
        if isinstance(part, str):
            ids += model.text_tokenizer.encode(part)
            continue
        name = str(part) if isinstance(part, Path) else f"part {number}"
        ids += image_ids(model, read_images(model, [part], [name]), opens=len(ids) == 1)
    return ids


def image_ids(model: ModelParts, pixels: Tensor, opens: bool) -> list[int]:
    """The ids of an image in a prompt.

    Args:
        pixels: float32[1, 3, H, W] in [-1, 1].
        opens: it opens the prompt. Then it has the levels that the model reads. Others have those
            of drawn images.
    """
    codes = encode_to_read(model, pixels) if opens else encode_as_drawn(model, pixels)
    return image_tokens(model.vocabulary, codes[0].tolist())


@dataclass(frozen=True)
class Grammar:
    """The ids that may come next, bool[V] each. All rows share them."""

    text: Tensor
    text_only: Tensor  # the text ids of a row that has no others, bool[V'] of TextRow.ids
    text_or_image: Tensor
    end_of_image: Tensor

    @classmethod
    def of(cls, model: ModelParts) -> "Grammar":
        vocabulary, text = model.vocabulary, text_mask(model)
        text_or_image, end = text.clone(), torch.zeros_like(text)
        text_or_image[vocabulary.boi] = True
        end[vocabulary.eoi] = True
        return cls(text, text[: vocabulary.image_start], text_or_image, end)


class MixedRow(Row):
    """Texts and images in turn: each is a ``TextRow`` or an ``ImageRow`` of its own.

    Args:
        kind: ``text``, ``image`` (exactly one), or ``any``.
        options: max_tokens bounds all texts together.
        streams: yield texts in pieces of whole characters, and not only images.
        previews: yield a ``Preview`` after each row of codes.
        state: of the schema that the text follows. Only for the kind ``text``.
    """

    def __init__(
        self,
        model: ModelParts,
        number: int,
        prompt: list[int],
        kind: OutputKind,
        options: TextOptions,
        grammar: Grammar,
        streams: bool = False,
        previews: bool = False,
        state: SchemaState | None = None,
    ) -> None:
        vocabulary = model.vocabulary
        if kind == "image":
            prompt = [*prompt, vocabulary.boi]
        new_tokens = model.codes_drawn if kind == "image" else options.max_tokens
        super().__init__(number, [prompt], new_tokens)
        self.model, self.kind, self.options, self.grammar = model, kind, options, grammar
        self.streams, self.previews, self.state = streams, previews, state
        self.reply = Reply(prompt_tokens=len(prompt))
        self.used = len(prompt)  # tokens read so far
        self.left = options.max_tokens  # of texts
        self.ids = {
            "text": slice(0, vocabulary.image_start),
            "image": slice(vocabulary.image_start, vocabulary.image_end),
            "any": ALL,
        }[kind]
        # None: at the end of an image, where <eoi> follows.
        self.part: TextRow | ImageRow | None = self._image() if kind == "image" else self._text()

    def _text(self) -> TextRow:
        stop, grammar = self.options.stop, self.grammar
        mask = grammar.text_only if self.kind == "text" else grammar.text
        return TextRow(self.model, self.number, [], self.left, stop, mask, self.state, self.streams)

    def _image(self) -> ImageRow:
        mixed = self.kind == "any"
        return ImageRow(self.model, self.number, [], previews=self.previews, among_texts=mixed)

    def allowed(self) -> Tensor | None:
        if self.part is None:
            return self.grammar.end_of_image
        if isinstance(self.part, ImageRow) or self.kind == "text":
            return self.part.allowed()
        # An image begins only where all of it fits, and what is left of the text.
        codes = self.model.codes_drawn
        limit = self.model.config.transformer.max_position_embeddings
        fits = self.used + codes + 2 + self.left <= limit
        fits = fits and self.reply.image_tokens < MAX_IMAGES * codes
        return self.grammar.text_or_image if fits else self.grammar.text

    def take(self, token: int, log_probability: float) -> Iterator[Output]:
        vocabulary, reply = self.model.vocabulary, self.reply
        reply.log_probability += log_probability
        self.used += 1
        if token == vocabulary.boi:
            assert isinstance(self.part, TextRow)
            yield from self._finish_text(self.part)
            self.part = self._image()
        elif token == vocabulary.eoi:
            self.part, self.done = self._text(), self.left == 0
        elif isinstance(self.part, ImageRow):
            yield from self._take_code(self.part, token)
        elif self.part is not None:
            yield from self.part.take(token)
            if token not in self.part.end_ids:
                self.generated.append(token)
                reply.text_tokens += 1
                self.left -= 1
            if self.part.done:
                reply.ended, self.done = self.part.ended, True
                yield from self._finish_text(self.part)

    def _take_code(self, image: ImageRow, token: int) -> Iterator[Output]:
        self.reply.image_tokens += 1
        pieces = list(image.take(token))
        if image.done:
            picture = to_image(decode_images(self.model, image.partial()[None])[0])
            self.reply.parts.append(picture)
            self.part = None
            self.done = self.kind == "image"
            self.reply.ended = "end" if self.done else "length"
            yield picture
        else:
            for codes in pieces:
                shown = to_image(preview_images(self.model, codes[None])[0])
                yield Preview(shown, len(image.codes) / image.max_new_tokens)

    def _finish_text(self, text: TextRow) -> Iterator[str]:
        yield from text.rest()
        if text.tokens:
            self.reply.parts.append(text.text().strip())


def check_output(kind: OutputKind, options: TextOptions) -> None:
    """Raises ``ValueError`` for an output that cannot be generated so."""
    check(kind in ("text", "image", "any"), "output", kind, "text, image or any")
    if options.beams > 1 and kind != "text":
        raise ValueError(f"beams={options.beams}: beam search is for texts, not for {kind}")


def check_prompt(model: ModelParts, ids: list[int], kind: OutputKind, options: TextOptions) -> None:
    """Raises ``ValueError`` if a prompt and its output are more than the model reads."""
    new_tokens = model.codes_drawn + 1 if kind == "image" else options.max_tokens
    check_length(model.network, [ids], new_tokens)


def decode_stream(
    model: ModelParts,
    prompts: Sequence[list[int]],
    kind: OutputKind,
    options: TextOptions,
    numbers: Sequence[int] | None = None,
    batch_size: int = 0,
    streams: bool = False,
    previews: bool = False,
) -> Generator[Output, None, list[Reply]]:
    """Continue all prompts together.

    Args:
        numbers: name the random numbers of each prompt. 0, 1, ... by default.
        batch_size: prompts at once. 0: all.

    Yields:
        What becomes whole.

    Returns:
        The replies, in the order of the prompts.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    grammar = Grammar.of(model)
    rows = [
        MixedRow(model, number, ids, kind, options, grammar, streams, previews)
        for number, ids in zip(numbers, prompts, strict=True)
    ]
    if options.beams > 1:
        searched = generate_ids(model, prompts, options, batch_size=batch_size)
        for row, ids in zip(rows, searched, strict=True):
            text = model.text_tokenizer.decode(ids).strip()
            row.reply.parts, row.reply.text_tokens = [text], len(ids)
            row.reply.ended = "end" if len(ids) < options.max_tokens else "length"
            yield text
    else:
        for pieces in decode(
            model.network,
            rows,
            options,
            batch_size=batch_size,
            repetition_penalty=options.repetition_penalty,
            log_probabilities=True,
        ):
            yield from (piece for _, piece in pieces)
    return [row.reply for row in rows]


def reply(
    model: ModelParts,
    prompts: Sequence[Parts],
    kind: OutputKind,
    options: TextOptions,
    batch_size: int = 32,
) -> list[Reply | ValueError]:
    """Continue every prompt.

    Args:
        prompts: texts (``str``) and images (others) in any order, or messages of a chat.
        kind: ``text``, one ``image``, or ``any``: what the model chooses, with at most MAX_IMAGES
            images. max_tokens bounds the text. An image is always whole.
        batch_size: prompts at once.

    Returns:
        A reply for each prompt, or the error of one that cannot be read.
    """
    check(batch_size >= 1, "batch_size", batch_size, "at least 1")
    check_output(kind, options)
    results: list[Reply | ValueError] = []
    ids: dict[int, list[int]] = {}
    for number, parts in enumerate(prompts):
        try:
            prompt = prompt_ids(model, parts)
            check_prompt(model, prompt, kind, options)
            ids[number] = prompt
            results.append(Reply())
        except ValueError as error:
            results.append(error)
    stream = decode_stream(model, list(ids.values()), kind, options, list(ids), batch_size)
    for number, one in zip(ids, returned(stream), strict=True):
        results[number] = one
    return results


def stream(
    model: ModelParts,
    parts: Parts,
    kind: OutputKind,
    options: TextOptions,
    previews: bool = False,
) -> Iterator[Output]:
    """Continue one prompt, piece by piece: texts in whole characters, images when they are whole.

    Args:
        previews: yield a ``Preview`` of an image after each row of codes, too.
    """
    check_output(kind, options)
    ids = prompt_ids(model, parts)
    check_prompt(model, ids, kind, options)
    return decode_stream(model, [ids], kind, options, streams=True, previews=previews)
