"""Text after a prompt of text and images: with a KV cache, in batches, by a grammar.

The grammar masks the logits at every step: where text belongs only text ids and <eos> can be drawn,
where an image belongs exactly h * w codes (multimodal/inference/drawing.py).

Shapes: B batch, L longest prompt, S tokens in the cache, V vocabulary, n codes of an image.
"""

from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from multimodal.data.images import fit_image, open_image, to_tensor
from multimodal.inference.batch import Batch, check_length, closed_up, text_ids
from multimodal.inference.beams import search
from multimodal.inference.json_schema import Schema
from multimodal.inference.likelihoods import choice_likelihoods
from multimodal.inference.prompt_files import Prompt
from multimodal.inference.sampling import Sampling
from multimodal.model.sequences import describe_prompt

if TYPE_CHECKING:
    from PIL import Image

    from multimodal.model.network import Multimodal

GREEDY = Sampling()
REFILL = 0.75  # of a batch that are left when others join


def read_images(
    model: "Multimodal",
    images: SequenceOf["str | Path | bytes | Image.Image"],
    names: SequenceOf[str] | None = None,
) -> Tensor:
    """float32[B, 3, H, W] in [-1, 1], made square as the model was trained; names: for errors"""
    config = model.image_tokenizer.config
    pixels = []
    for number, image in enumerate(images):
        name = names[number] if names else name_of(image, number)
        whole = open_image(image, name=name)
        pixels.append(to_tensor(fit_image(whole, config.image_size, config.fit)))
    return torch.stack(pixels)


def encode_images(model: "Multimodal", pixels: Tensor) -> Tensor:
    """float32[B, 3, H, W] in [-1, 1] -> codes: int64[B, n]"""
    codes = model.image_tokenizer.encode(pixels.to(model.device))
    return rearrange(codes, "b h w -> b (h w)")


def text_mask(model: "Multimodal") -> Tensor:
    """bool[V]: the ids that may stand in a text, <eos> among them"""
    allowed = torch.zeros(model.vocabulary.size, dtype=torch.bool, device=model.device)
    allowed[: model.vocabulary.text_size] = True
    allowed[model.vocabulary.eos] = True
    return allowed


@torch.inference_mode()
def continue_text(
    model: "Multimodal",
    prompts: list[list[int]],
    max_tokens: int,
    sampling: Sampling = GREEDY,
    numbers: SequenceOf[int] | None = None,
    schema: Schema | None = None,
    stop: SequenceOf[str] = (),
    batch_size: int = 0,
) -> list[list[int]]:
    """Text after each prompt: ids up to <eos> (not included), at most ``max_tokens``.

    numbers: what the prompts are called, for the random numbers; 0, 1, ... by default; schema: what
    the texts have to follow; stop: a text ends with the token that completes one of these;
    batch_size: prompts at once (all by default), others take the places of those that are done.
    Errors: ``ValueError`` where a text does not follow the schema to its end.
    """
    vocabulary, decode = model.vocabulary, model.text_tokenizer.decode
    check_limits(max_tokens, stop)
    if schema is not None and stop:
        raise ValueError("stop, and a JSON schema that says where a text ends: give one of the two")
    at_once = batch_size or len(prompts)
    # No code can be said, and they come last: their logits are not made.
    allowed, spoken = text_mask(model), slice(0, vocabulary.image_start)
    if sampling.beams > 1:
        if schema is not None or stop:
            raise ValueError("beams, and a JSON schema or stop: give one of the two")
        found: list[list[int]] = []
        for start in range(0, len(prompts), at_once):
            batch = Batch(model, prompts[start : start + at_once], max_tokens)
            found += search(batch, allowed, vocabulary.eos, max_tokens, sampling.beams,
                            sampling.length_penalty)  # fmt: skip
        return found
    check_length(model, prompts, max_tokens)
    out: list[list[int]] = [[] for _ in prompts]
    generators = sampling.generators(range(len(prompts)) if numbers is None else numbers)
    states = [schema.follow() for _ in prompts] if schema is not None else []
    # Those of one length together: the less of a row is padding, the less is read for nothing.
    waiting = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    rows: list[int] = []
    while rows or waiting:
        if waiting and len(rows) <= REFILL * at_once:
            fresh, waiting = waiting[: at_once - len(rows)], waiting[at_once - len(rows) :]
            others = Batch(model, [prompts[row] for row in fresh], max_tokens)
            if rows:
                batch.join(others, max_tokens)
            else:
                batch = others
            rows += fresh
        logits = batch.logits(spoken).masked_fill(~allowed[spoken], -torch.inf)
        logits = sampling.penalise(logits, [out[row] for row in rows])
        if states:
            may = [states[row].allowed(one) for row, one in zip(rows, logits, strict=True)]
            logits = logits.masked_fill(~torch.stack(may), -torch.inf)
        ids = sampling.choose(logits, [generators[row] for row in rows])
        going = []
        for place, (row, token) in enumerate(zip(rows, ids.tolist(), strict=True)):
            if token == vocabulary.eos:
                continue
            out[row].append(token)
            if states:
                states[row].read(token)
            stopped = bool(stop) and any(one in decode(out[row]) for one in stop)
            if len(out[row]) < max_tokens and not stopped:
                going.append(place)
        if len(going) < len(rows):  # finished rows leave the batch at once
            going = closed_up(going)
            rows = [rows[place] for place in going]
            batch.keep(going)
            ids = ids[going]
        if rows:
            batch.read(ids)
    if unfinished := sum(not state.done for state in states):
        raise ValueError(
            f"{unfinished} of {len(states)} texts do not follow the schema to its end in "
            f"{max_tokens} tokens: raise max_tokens, or bound its strings (maxLength)"
        )
    return out


def check_limits(max_tokens: int, stop: SequenceOf[str]) -> None:
    """Errors: ``ValueError`` for limits that no text can have."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: expected at least 1")
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop={stop!r}: expected a list of texts, none of them empty")


def before_stop(text: str, stop: SequenceOf[str]) -> str:
    """The text up to the first of the stop texts in it."""
    places = [place for one in stop if (place := text.find(one)) >= 0]
    return text[: min(places)] if places else text


def caption(
    model: "Multimodal",
    images: SequenceOf["str | Path | bytes | Image.Image"],
    *,
    batch_size: int = 32,
    max_tokens: int = 64,
    sampling: Sampling = GREEDY,
    stop: SequenceOf[str] = (),
    examples: SequenceOf[tuple["str | Path | bytes | Image.Image", str]] = (),
    candidates: int = 1,
) -> list[str]:
    """One caption an image, in the order given; stop: a caption ends before the first of these;
    examples: images with texts to go by; candidates: write so many, with a temperature, and keep
    the one nearest to the image by the embeddings."""
    if candidates < 1 or (candidates > 1 and not sampling.temperature):
        raise ValueError(f"candidates={candidates}: expected 1, or more and a temperature above 0")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected at least 1")
    if isinstance(images, str | Path | bytes) or not hasattr(images, "__len__"):
        raise ValueError("images: expected a list of images, even for one")
    captions: list[str] = []
    begun = [model.vocabulary.bos]
    if examples:
        shown = encode_images(model, read_images(model, [image for image, _ in examples]))
        pairs = zip(shown, (text for _, text in examples), strict=True)
        begun = examples_prompt(model, [(codes, text) for codes, text in pairs])
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        numbers = range(start, start + len(batch))
        pixels = read_images(model, batch, [name_of(images[number], number) for number in numbers])
        codes = encode_images(model, pixels)
        every = codes.repeat_interleave(candidates, 0)
        names = [number * candidates + one for number in numbers for one in range(candidates)]
        texts = text_after(model, every, [""] * len(every), max_tokens, sampling, names,
                           begun=begun, stop=stop)  # fmt: skip
        captions += nearest(model, codes, texts) if candidates > 1 else texts
    return captions


def nearest(model: "Multimodal", codes: Tensor, texts: SequenceOf[str]) -> list[str]:
    """codes: int64[B, n]; texts: as many for each image, in turn -> of each the nearest to it"""
    from multimodal.inference.embedding import embed_codes, embed_texts

    rows = embed_texts(model, [text or "?" for text in texts])  # nothing is nearest to nothing
    likeness = (embed_codes(model, codes)[:, None] * rows.view(len(codes), -1, rows.shape[-1])).sum(
        -1
    )
    likeness[torch.tensor([not text for text in texts]).view_as(likeness)] = -torch.inf
    count = likeness.shape[1]
    return [texts[row * count + int(best)] for row, best in enumerate(likeness.argmax(1))]


def examples_prompt(model: "Multimodal", examples: SequenceOf[tuple[Tensor, str]]) -> list[int]:
    """<bos>, then each image, codes: int64[n], with its text: what few-shot prompts begin with."""
    v = model.vocabulary
    ids = [v.bos]
    for codes, text in examples:
        ids += [v.boi, *(codes + v.image_start).tolist(), v.eoi, *text_ids(model, text)]
    return ids


def name_of(image: object, number: int) -> str:
    """What to call an image in errors."""
    return str(image) if isinstance(image, str | Path) else f"image {number}"


def caption_codes(
    model: "Multimodal",
    codes: Tensor,
    max_tokens: int = 64,
    sampling: Sampling = GREEDY,
    numbers: SequenceOf[int] | None = None,
    stop: SequenceOf[str] = (),
    batch_size: int = 0,
) -> list[str]:
    """codes: int64[B, n] -> B captions; batch_size: written at once, by default all"""
    prompts = [""] * len(codes)
    return text_after(model, codes, prompts, max_tokens, sampling, numbers, stop=stop,
                      batch_size=batch_size)  # fmt: skip


def answer_codes(
    model: "Multimodal",
    codes: Tensor,
    questions: SequenceOf[str],
    max_tokens: int = 32,
    sampling: Sampling = GREEDY,
    choices: SequenceOf[str] | None = None,
    schema: dict[str, Any] | None = None,
    stop: SequenceOf[str] = (),
    prompt: Prompt | None = None,
) -> list[str]:
    """codes: int64[B, n], B questions -> B answers: free, the likeliest of the choices, or JSON
    that follows the schema; prompt: the words around the questions, else the model's own"""
    words = model.config.templates
    prompts = [words.ask(one) if prompt is None else prompt.fill(one, words) for one in questions]
    if choices is None:
        follow = None if schema is None else Schema(model, schema)
        return text_after(model, codes, prompts, max_tokens, sampling, schema=follow, stop=stop)
    if schema is not None or isinstance(choices, str) or len(set(choices)) < 2:
        raise ValueError(f"choices={list(choices)}: expected two or more, without a schema")
    likely = choice_likelihoods(model, codes, prompts, [choices] * len(prompts))
    return [choices[int(one.argmax())].strip() for one in likely]


@torch.inference_mode()
def text_after(
    model: "Multimodal",
    codes: Tensor,
    prompts: SequenceOf[str],
    max_tokens: int,
    sampling: Sampling = GREEDY,
    numbers: SequenceOf[int] | None = None,
    schema: Schema | None = None,
    begun: SequenceOf[int] = (),
    stop: SequenceOf[str] = (),
    batch_size: int = 0,
) -> list[str]:
    """codes: int64[B, n], B texts to follow the images -> B texts that go on; begun: what stands
    before the images, by default <bos>; the rest as for ``continue_text``"""
    if not len(codes):
        return []
    before = list(begun) or [model.vocabulary.bos]
    ids = [
        before + describe_prompt(model.vocabulary, row)[1:] + model.text_tokenizer.encode(prompt)
        for row, prompt in zip(
            (codes + model.vocabulary.image_start).tolist(), prompts, strict=True
        )
    ]
    texts = continue_text(model, ids, max_tokens, sampling, numbers, schema, stop, batch_size)
    return [before_stop(model.text_tokenizer.decode(text), stop).strip() for text in texts]
