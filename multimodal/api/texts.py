"""The texts that a model writes: captions, answers, and replies to any mix of texts and images."""

from __future__ import annotations  # help() shows the names of types as they are written

from collections.abc import Iterator, Sequence
from typing import Any, Unpack, overload

from PIL import Image

from multimodal.inference import mixed
from multimodal.inference.codec import encode_to_read, read_images
from multimodal.inference.json_schema import Schema
from multimodal.inference.mixed import Output, OutputKind, Parts, Reply
from multimodal.inference.prompt_files import Prompt, find_prompt
from multimodal.inference.text import answer_codes, caption_images
from multimodal.inference.values import (
    Images,
    ImageSource,
    OnError,
    Results,
    is_one,
    name_of,
    to_list,
    to_texts,
)
from multimodal.model.checkpoint import ModelParts
from multimodal.options import (
    AnswerOptions,
    CaptionArguments,
    CaptionOptions,
    TextArguments,
    TextOptions,
    check,
    make_options,
    takes_options,
)


class CaptionCall(CaptionArguments, total=False):
    examples: Sequence[tuple[ImageSource, str]]
    batch_size: int
    on_error: OnError


class AnswerCall(TextArguments, total=False):
    prompt: str | Prompt
    choices: Sequence[str] | None
    schema: dict[str, Any] | None
    batch_size: int


class TextMethods(ModelParts):
    """The methods of ``Model`` that give texts (``generate`` and its kin images, too)."""

    @overload
    def caption(  # type: ignore[overload-overlap]  # a str is one image, not many
        self, images: ImageSource, **options: Unpack[CaptionCall]
    ) -> str: ...
    @overload
    def caption(self, images: Images, **options: Unpack[CaptionCall]) -> Results: ...
    @takes_options(CaptionOptions)
    def caption(
        self,
        images: ImageSource | Images,
        *,
        examples: Sequence[tuple[ImageSource, str]] = (),
        batch_size: int = 32,
        on_error: OnError = "raise",
        **options: Unpack[CaptionArguments],
    ) -> str | Results:
        """The caption of an image, or one caption for each of several.

        Args:
            images: one image, or several.
            examples: images with captions that the prompts begin with (few-shot).
            batch_size: images at once.
            on_error: ``skip`` gives None for an image that cannot be read. ``skipped`` of the
                result has the errors.
            options: see CaptionOptions.
        """
        check(on_error in ("raise", "skip"), "on_error", on_error, "raise or skip")
        captions = Results()
        for caption in self.caption_each(
            images, examples=examples, batch_size=batch_size, **options
        ):
            captions.add(caption, on_error)
        return captions[0] if is_one(images) else captions

    @takes_options(CaptionOptions)
    def caption_each(
        self,
        images: ImageSource | Images,
        *,
        examples: Sequence[tuple[ImageSource, str]] = (),
        batch_size: int = 32,
        first: int = 0,
        **options: Unpack[CaptionArguments],
    ) -> Iterator[str | ValueError]:
        """As ``caption``, but batch by batch, and an image that cannot be read gives its error.

        first: the number of the first image, where a list is done in parts.
        """
        check(batch_size >= 1, "batch_size", batch_size, "at least 1")
        caption_options = make_options(CaptionOptions, options)
        return caption_images(
            self, to_list(images), caption_options, examples, batch_size, first=first
        )

    @overload
    def answer(  # type: ignore[overload-overlap]
        self, image: ImageSource, question: str, **options: Unpack[AnswerCall]
    ) -> str: ...
    @overload
    def answer(
        self,
        image: ImageSource | Images,
        question: str | Sequence[str],
        **options: Unpack[AnswerCall],
    ) -> list[str]: ...
    @takes_options(AnswerOptions)
    def answer(
        self,
        image: ImageSource | Images,
        question: str | Sequence[str],
        *,
        prompt: str | Prompt = "question",
        choices: Sequence[str] | None = None,
        schema: dict[str, Any] | None = None,
        batch_size: int = 32,
        **options: Unpack[TextArguments],
    ) -> str | list[str]:
        """The answer to a question about an image, or the answers to several.

        Args:
            image: one image, or several: one for each question.
            question: one question about every image, or several: one for each image.
            prompt: a prompt file by its name (inference/prompt_files.py): the words around the
                question, and choices and options where they are not given here.
            choices: the answer is the most likely one of these.
            schema: the answer is JSON that follows this JSON schema.
            batch_size: questions at once.
            options: see AnswerOptions.
        """
        check(batch_size >= 1, "batch_size", batch_size, "at least 1")
        words = prompt if isinstance(prompt, Prompt) else find_prompt(prompt)
        if schema is not None and "stop" not in options:
            options = {**options, "stop": ()}
        answer_options = words.answer_options(**options)
        images, questions = to_list(image), to_texts(question, "questions")
        for each in questions:
            words.fill(each, self.config.templates)  # an empty question is an error at once
        if choices is None and schema is None:
            choices = words.choices or None
        follow = None if schema is None else Schema(self, schema)
        count = len(questions) if is_one(image) else len(images)
        if not isinstance(question, str) and len(questions) != count:
            raise ValueError(f"{count} images and {len(questions)} questions: expected as many")
        answers: list[str] = []
        names = [name_of(each, number) for number, each in enumerate(images)]
        of_one = encode_to_read(self, read_images(self, images)) if is_one(image) else None
        for start in range(0, count, batch_size):
            numbers = range(start, min(start + batch_size, count))
            part = slice(start, numbers.stop)
            asked = questions[part] if len(questions) > 1 else questions * len(numbers)
            if of_one is None:
                codes = encode_to_read(self, read_images(self, images[part], names[part]))
            else:
                codes = of_one.expand(len(asked), -1)
            answers += answer_codes(
                self, codes, asked, answer_options, words, choices, follow, numbers
            )
        return answers[0] if is_one(image) and isinstance(question, str) else answers

    @takes_options(TextOptions)
    def generate(
        self,
        parts: Parts,
        *,
        output: OutputKind = "text",
        **options: Unpack[TextArguments],
    ) -> list[str | Image.Image]:
        """Continue any mix of texts and images.

        Args:
            parts: a ``str`` is text, everything else an image (a path is a ``Path``). Or messages
                with ``role`` and ``content``, for a language model that was taught to talk: they
                are read in its chat template.
            output: ``text``, one ``image``, or ``any`` mix of both. max_tokens bounds the text. An
                image is always whole.
            options: see TextOptions.
        """
        (reply,) = self.reply([parts], output=output, **options)
        if isinstance(reply, ValueError):
            raise reply
        return reply.parts or [""]

    @takes_options(TextOptions)
    def reply(
        self,
        prompts: Sequence[Parts],
        *,
        output: OutputKind = "text",
        batch_size: int = 32,
        **options: Unpack[TextArguments],
    ) -> list[Reply | ValueError]:
        """``generate`` for many prompts, each with its token counts and its log probability.

        A prompt that cannot be read has its error in its place, and the others are done.
        """
        return mixed.reply(self, prompts, output, make_options(TextOptions, options), batch_size)

    @takes_options(TextOptions)
    def stream(
        self,
        parts: Parts,
        *,
        output: OutputKind = "text",
        previews: bool = False,
        **options: Unpack[TextArguments],
    ) -> Iterator[Output]:
        """``generate`` piece by piece: texts in whole characters, and whole images.

        Args:
            previews: yield a ``Preview`` after each row of codes of an image.
        """
        return mixed.stream(self, parts, output, make_options(TextOptions, options), previews)
