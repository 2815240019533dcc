"""Texts after prompts of text and images.

Only text ids and <eos> can be chosen: a mask removes all other ids at every step.

Shapes: B prompts, V vocabulary, n codes of an image.
"""

import textwrap
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from multimodal.inference.batch import DecodeBatch, check_length
from multimodal.inference.beams import beam_search
from multimodal.inference.codec import encode_text, encode_to_read, read_images
from multimodal.inference.decode import Row, decode
from multimodal.inference.embedding import embed_codes, embed_texts
from multimodal.inference.json_schema import Schema, SchemaState
from multimodal.inference.likelihoods import choice_likelihoods
from multimodal.inference.prompt_files import Prompt
from multimodal.inference.values import ImageSource, name_of
from multimodal.model.checkpoint import ModelParts
from multimodal.model.sequences import image_tokens
from multimodal.options import AnswerOptions, CaptionOptions, TextOptions
from multimodal.schemas import check_value

GREEDY = TextOptions()
PARTIAL_TEXT = 200  # characters of an unfinished text that an error shows


def text_mask(model: ModelParts) -> Tensor:
    """bool[V]: the ids that may stand in a text, with <eos>."""
    mask = torch.zeros(model.vocabulary.size, dtype=torch.bool, device=model.device)
    mask[: model.vocabulary.text_size] = True
    mask[model.vocabulary.eos] = True
    return mask


def text_ends(model: ModelParts) -> frozenset[int]:
    """The ids that end a text: <eos>, and what ends texts and turns of the language model."""
    return frozenset({model.vocabulary.eos, *model.text_tokenizer.end_ids})


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the stop texts in it."""
    starts = [start for one in stop if (start := text.find(one)) >= 0]
    return text[: min(starts)] if starts else text


def partial_stop_length(text: str, stop: Sequence[str]) -> int:
    """The length of the end of a text that may be the beginning of a stop text."""
    ends = (
        n for one in stop for n in range(1, min(len(one), len(text) + 1)) if text.endswith(one[:n])
    )
    return max(ends, default=0)


class TextRow(Row):
    """A text: text ids until one of ``text_ends``, a stop text, or ``max_tokens``.

    Args:
        mask: bool, an entry for each id of the range ``ids``: whether a text may contain it.
        state: how far a JSON text has come, if it follows a schema.
        streams: yield the text in pieces of whole characters.

    Attributes:
        tokens: the ids of the text, without its end. end: the id that ended it, if one did.
        ended: by the model (``end``), by max_tokens (``length``), or by a stop text (``stop``).
    """

    def __init__(
        self,
        model: ModelParts,
        number: int,
        prompt: list[int],
        max_tokens: int,
        stop: Sequence[str],
        mask: Tensor,
        state: SchemaState | None = None,
        streams: bool = False,
    ) -> None:
        super().__init__(number, [prompt], max_tokens)
        self.ids = slice(0, model.vocabulary.image_start)
        self.tokenizer = model.text_tokenizer
        # A schema says by itself where a text ends.
        self.end_ids = text_ends(model) if state is None else frozenset({model.vocabulary.eos})
        self.stop, self.mask, self.state, self.streams = stop, mask, state, streams
        self.tokens: list[int] = self.generated
        self.ended, self.end = "length", list[int]()
        self._streamed = ""

    def allowed(self) -> Tensor:
        return self.mask if self.state is None else self.mask & self.state.allowed(self.mask)

    def take(self, token: int, log_probability: float = 0.0) -> Iterator[str]:
        if token in self.end_ids:
            self.ended, self.done, self.end = "end", True, [token]
        else:
            self.tokens.append(token)
            if self.state is not None:
                self.state.read(token)
            self.done = len(self.tokens) >= self.max_new_tokens
            if self.stop or self.streams:
                # The last bytes may be half of a character.
                text = self.tokenizer.decode(self.tokens).rstrip("\N{REPLACEMENT CHARACTER}")
                if before_stop(text, self.stop) != text:
                    self.ended, self.done = "stop", True
                certain = text[: len(text) - partial_stop_length(text, self.stop)]
                if self.streams and not self.done and len(certain) > len(self._streamed):
                    piece, self._streamed = certain[len(self._streamed) :], certain
                    yield piece
        if self.done:
            yield from self.rest()

    def rest(self) -> Iterator[str]:
        """What a stream has held back until now."""
        if self.streams and (rest := self.text()[len(self._streamed) :]):
            self._streamed += rest
            yield rest

    def text(self) -> str:
        return before_stop(self.tokenizer.decode(self.tokens), self.stop)


@torch.inference_mode()
def generate_ids(
    model: ModelParts,
    prompts: Sequence[list[int]],
    options: TextOptions = GREEDY,
    numbers: Sequence[int] | None = None,
    schema: Schema | None = None,
    batch_size: int = 0,
    with_ends: bool = False,
) -> list[list[int]]:
    """Continue each prompt by a text.

    Args:
        prompts: B lists of ids.
        numbers: with the seed, they decide the random numbers of each prompt. 0, 1, ... by default.
        schema: the texts follow it.
        batch_size: prompts at once. 0: all. Others take the places of those that are done.
        with_ends: keep the id that ended a text, where one did. Not for beams.

    Returns:
        B lists of ids, without what ended them. The token that completes a stop text is the last.

    Raises:
        ValueError: if a prompt is too long, or a text does not follow the schema to its end.
    """
    if schema is not None and options.stop:
        raise ValueError("a JSON schema says where a text ends: give it or stop, not both")
    vocabulary, mask = model.vocabulary, text_mask(model)
    if options.beams > 1:
        if schema is not None:
            raise ValueError("beams and a JSON schema: give one of the two")
        texts: list[list[int]] = []
        size = batch_size or len(prompts)
        for start in range(0, len(prompts), size):
            batch = DecodeBatch(model.network, prompts[start : start + size], options.max_tokens)
            texts += beam_search(
                batch,
                mask,
                text_ends(model),
                options.max_tokens,
                options.beams,
                options.length_penalty,
            )
        return texts
    check_length(model.network, prompts, options.max_tokens)
    mask = mask[: vocabulary.image_start]
    rows = [
        TextRow(
            model,
            number,
            prompt,
            options.max_tokens,
            options.stop,
            mask,
            schema.start() if schema else None,
        )
        for number, prompt in zip(numbers or range(len(prompts)), prompts, strict=True)
    ]
    for _ in decode(
        model.network,
        rows,
        options,
        batch_size=batch_size,
        repetition_penalty=options.repetition_penalty,
    ):
        pass
    if unfinished := [row for row in rows if row.state is not None and not row.state.done]:
        raise ValueError(
            f"{len(unfinished)} of {len(rows)} texts do not follow the schema to its end in "
            f"{options.max_tokens} tokens: raise max_tokens, or bound its strings (maxLength), "
            "numbers (maximum) and lists (maxItems). The text so far: "
            f"{textwrap.shorten(unfinished[0].text(), PARTIAL_TEXT)!r}"
        )
    return [row.tokens + (row.end if with_ends else []) for row in rows]


def complete_prompts(
    model: ModelParts,
    codes: Tensor,
    prompts: Sequence[str],
    options: TextOptions = GREEDY,
    numbers: Sequence[int] | None = None,
    schema: Schema | None = None,
    begin: Sequence[Sequence[int]] = (),
    batch_size: int = 0,
) -> list[str]:
    """For each image and the text after it, write the continuation.

    Args:
        codes: int64[B, n].
        prompts: B texts that follow the images. They may be empty.
        begin: B lists of ids, each before its image. By default <bos>.
        numbers, schema, batch_size: as for ``generate_ids``.

    Returns:
        B texts.
    """
    if not len(codes):
        return []
    begin = begin or [[model.vocabulary.bos]] * len(codes)
    ids = [
        [*before, *image_tokens(model.vocabulary, row), *model.text_tokenizer.encode(prompt)]
        for before, row, prompt in zip(begin, model.read(codes).tolist(), prompts, strict=True)
    ]
    texts = generate_ids(model, ids, options, numbers, schema, batch_size)
    return [before_stop(model.text_tokenizer.decode(t), options.stop).strip() for t in texts]


def caption_codes(
    model: ModelParts,
    codes: Tensor,
    options: TextOptions = GREEDY,
    numbers: Sequence[int] | None = None,
    batch_size: int = 0,
) -> list[str]:
    """codes: int64[B, n] -> B captions. Other arguments as for ``generate_ids``."""
    prompts = [""] * len(codes)
    return complete_prompts(model, codes, prompts, options, numbers, batch_size=batch_size)


def answer_codes(
    model: ModelParts,
    codes: Tensor,
    questions: Sequence[str],
    options: AnswerOptions,
    prompt: Prompt | None = None,
    choices: Sequence[str] | None = None,
    schema: Schema | None = None,
    numbers: Sequence[int] | None = None,
) -> list[str]:
    """Answer questions about images.

    Args:
        codes: int64[B, n].
        questions: B texts.
        prompt: the words around a question. The model's own template by default.
        choices: the answer is the most likely one of these.
        schema: the answer is JSON that follows it.
        numbers: name the random numbers of each question. 0, 1, ... by default.

    Returns:
        B answers.
    """
    templates = model.config.templates
    prompts = [
        templates.ask(question) if prompt is None else prompt.fill(question, templates)
        for question in questions
    ]
    if choices is None:
        return complete_prompts(model, codes, prompts, options, numbers, schema)
    if schema is not None or isinstance(choices, str) or len(set(choices)) < 2:
        raise ValueError(f"choices={choices!r}: expected a list of two or more, without a schema")
    check_value("choices", choices, Sequence[str])
    if not all(map(str.strip, choices)):
        raise ValueError(f"choices={choices!r}: one of them is empty")
    likelihoods = choice_likelihoods(model, codes, prompts, [choices] * len(prompts))
    return [choices[int(scores.argmax())].strip() for scores in likelihoods]


def few_shot_prompt(model: ModelParts, codes: Tensor, texts: Sequence[str]) -> list[int]:
    """What few-shot prompts begin with: <bos>, then each image with its text.

    All images are read. The training has the same documents with ``data.few_shot``
    (train/mixing/few_shot.py). Other documents hold the later images as a whole, which would make
    the prompt longer by all codes of detail.

    Args:
        codes: int64[B, n].
        texts: B texts, none of them empty.
    """
    ids = [model.vocabulary.bos]
    for row, text in zip(model.read(codes).tolist(), texts, strict=True):
        ids += [*image_tokens(model.vocabulary, row), *encode_text(model, text)]
    return ids


def caption_images(
    model: ModelParts,
    images: Sequence[ImageSource],
    options: CaptionOptions,
    examples: Sequence[tuple[ImageSource, str]] = (),
    batch_size: int = 32,
    begin_of: Callable[[Tensor], Sequence[Sequence[int]]] | None = None,
    first: int = 0,
) -> Iterator[str | ValueError]:
    """Caption images, a batch at a time.

    Args:
        examples: images with captions that the prompts begin with (few-shot).
        begin_of: int64[B, n], codes of images -> B lists of ids that their prompts begin with. It
            takes the place of the examples.
        first: the number of the first image. What is drawn at random depends on the number.

    Yields:
        The caption of each image in its order, or what was wrong with the image.
    """
    shared = [model.vocabulary.bos]
    if examples:
        codes = encode_to_read(model, read_images(model, [image for image, _ in examples]))
        shared = few_shot_prompt(model, codes, [text for _, text in examples])
    for start in range(0, len(images), batch_size):
        results: dict[int, str | ValueError] = {}
        pixels: dict[int, Tensor] = {}
        for number in range(start, min(start + batch_size, len(images))):
            image = images[number]
            try:
                pixels[number] = read_images(model, [image], [name_of(image, first + number)])
            except ValueError as error:
                results[number] = error
        if pixels:
            codes = encode_to_read(model, torch.cat(list(pixels.values())))
            begin = begin_of(codes) if begin_of else [shared] * len(codes)
            numbers = [first + number for number in pixels]
            captions = best_captions(model, codes, options, numbers, begin)
            results |= dict(zip(pixels, captions, strict=True))
        yield from (results[number] for number in sorted(results))


def best_captions(
    model: ModelParts,
    codes: Tensor,
    options: CaptionOptions,
    numbers: Sequence[int],
    begin: Sequence[Sequence[int]] = (),
    batch_size: int = 0,
) -> list[str]:
    """Caption images, and keep the best of each image's candidates.

    Args:
        codes: int64[B, n].
        numbers: with the seed, they decide the random numbers of each image.
        begin, batch_size: as for ``complete_prompts``.

    Returns:
        B captions.
    """
    count = options.candidates
    repeated = codes.repeat_interleave(count, 0)
    numbers = [number * count + candidate for number in numbers for candidate in range(count)]
    prompts = [""] * len(repeated)
    begin = [before for before in begin for _ in range(count)]
    texts = complete_prompts(
        model, repeated, prompts, options, numbers, begin=begin, batch_size=batch_size
    )
    if count == 1:
        return texts
    size = batch_size or max(1, len(codes))
    return [
        text
        for start in range(0, len(codes), size)
        for text in nearest_texts(
            model, codes[start : start + size], texts[start * count : (start + size) * count]
        )
    ]


def nearest_texts(model: ModelParts, codes: Tensor, texts: Sequence[str]) -> list[str]:
    """For each image, the candidate text whose embedding is nearest to that of the image.

    Args:
        codes: int64[B, n].
        texts: the candidates of the first image, then those of the second, and so on.
    """
    embedded = embed_texts(model, [text or "?" for text in texts])
    embedded = embedded.view(len(codes), -1, embedded.shape[-1])
    similarity = (embed_codes(model, codes)[:, None] * embedded).sum(-1)
    empty = torch.tensor([not text for text in texts]).view_as(similarity)
    similarity[empty] = -torch.inf
    count = similarity.shape[1]
    return [texts[row * count + int(best)] for row, best in enumerate(similarity.argmax(1))]
