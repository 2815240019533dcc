"""Prompts with what was found: captions of like images as examples, texts with their sources.

Captions of the nearest images as examples are those of SmallCap (Ramos et al. 2023,
arXiv:2209.15323). What was found before a question is retrieval-augmented generation (Lewis et al.
2020, arXiv:2005.11401).

Shapes: n codes of an image that the model reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from multimodal.index.hits import Hit
from multimodal.inference.codec import encode_to_read, read_images
from multimodal.inference.prompt_files import Prompt
from multimodal.inference.text import few_shot_prompt
from multimodal.inference.values import ImageSource, Results
from multimodal.model.checkpoint import ModelParts


@dataclass(frozen=True)
class Answer:
    """An answer, and what of the index stood in its prompt: a ``Hit`` each, the nearest first."""

    text: str
    sources: Results

    def __str__(self) -> str:
        return self.text


def codes_of(model: ModelParts, hit: Hit) -> Tensor:
    """The codes of an image that was found: int64[1, n].

    Raises:
        ValueError: if it has gone or cannot be read.
    """
    if hit.number is not None:
        sample, encoded = hit.sample()
        if encoded:
            return model.read(torch.from_numpy(sample.codes[:1]).flatten(1))
    return encode_to_read(model, read_images(model, [hit.image()], [hit.source])).cpu()


def examples_prompt(
    model: ModelParts,
    hits: Sequence[Hit],
    room: int,
    codes_of: Callable[[Hit], Tensor],
) -> list[int]:
    """<bos>, then images that were found, each with its first caption, the nearest last.

    An image without a caption is left out, and so is one that can no longer be read.

    Args:
        hits: the nearest first.
        room: tokens of the prompt, at most. The nearest come in first.
    """
    images: list[Tensor] = []
    captions: list[str] = []
    prompt = [model.vocabulary.bos]
    for hit in hits:
        if not hit.captions:
            continue
        try:
            more = [codes_of(hit), *images], [hit.captions[0], *captions]
        except ValueError:
            continue
        longer = few_shot_prompt(model, torch.cat(more[0]), more[1])
        if len(longer) > room:
            break
        (images, captions), prompt = more, longer
    return prompt


def sources_prompt(
    model: ModelParts, hits: Sequence[Hit], question: str, prompt: Prompt, room: int
) -> tuple[Prompt, list[Hit]]:
    """The words of a prompt behind a line for each source: ``[NAME] WORDS``.

    Args:
        hits: the nearest first.
        room: tokens of the words with the question, at most. The nearest come in first.

    Returns:
        The new prompt, and the hits that are in it.

    Raises:
        ValueError: for an empty question.
    """
    words, used = prompt, list[Hit]()
    template = prompt.template or model.config.templates.question
    lines = ""
    for hit in hits:
        if not hit.words:
            continue
        # The place of the question is {text}, once.
        line = f"[{hit.label}] {hit.words}\n".replace("{text}", "{ text }")
        longer = replace(prompt, template=lines + line + template)
        if len(model.text_tokenizer.encode(longer.fill(question, model.config.templates))) > room:
            break
        words, lines = longer, lines + line
        used.append(hit)
    return words, used


def image_room(model: ModelParts, image: ImageSource | None) -> int:
    """The tokens of a prompt that are not its words: <bos>, and an image if there is one."""
    return 1 if image is None else 3 + len(model.config.layout.indices(model.config.reads))
