"""What a person does with a model: the methods of ``Multimodal`` that use it.

Images are paths, bytes or Pillow images. What is wrong with them, or with an argument, is a
``ValueError``. How tokens are chosen, and the seed: see inference/sampling.py; texts take
the likeliest ones (temperature 0), and so do images of ``generate``, ``reply`` and ``stream``;
drawings and edits are drawn (temperature 0.8).
"""

import shutil
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Unpack, cast

import torch
from torch import Tensor

from multimodal.data.images import open_image, to_image
from multimodal.inference.sampling import Sampling, SamplingOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from PIL import Image

    from multimodal.inference.drawing import DrawingArguments
    from multimodal.inference.mixed import Preview, Reply
    from multimodal.inference.prompt_files import Prompt
    from multimodal.model.network import Multimodal

ImageSource: TypeAlias = "str | Path | bytes | Image.Image"


class Usable:
    """Mixed into ``Multimodal``, which has the weights."""

    @property
    def _model(self) -> "Multimodal":
        return cast("Multimodal", self)

    def compile_decoding(self) -> None:
        """Compile the reading of prompts, the step that makes a token and that of masked drawing:
        up to a minute when one prompt, several, one drawing or several are first asked for, and ten
        seconds for each further 128 tokens of one prompt and its reply. On a CPU one prompt at a
        time is about twice as fast then, several by up to a fifth, masked drawing by up to a third.
        Errors: ``ValueError`` on a CPU without a C++ compiler."""
        from multimodal.model.compiled import Compiled

        if self._model.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
            raise ValueError("compiling on a CPU needs a C++ compiler: install g++ or clang++")
        self._model.compiled = Compiled.of(self._model.transformer)

    def caption(
        self,
        images: SequenceOf[ImageSource],
        *,
        examples: SequenceOf[tuple[ImageSource, str]] = (),
        candidates: int = 1,
        batch_size: int = 32,
        max_tokens: int = 64,
        stop: SequenceOf[str] = (),
        **sampling: Unpack[SamplingOptions],
    ) -> list[str]:
        """One caption an image, that ends before the first of the texts in stop.

        examples: images with texts to go by (few-shot); candidates: of so many, the one nearest to
        the image by the model's own embeddings.
        """
        from multimodal.inference.text import caption

        return caption(
            self._model,
            images,
            batch_size=batch_size,
            max_tokens=max_tokens,
            sampling=Sampling(**sampling),
            stop=stop,
            examples=examples,
            candidates=candidates,
        )

    def answer(
        self,
        image: ImageSource,
        question: str,
        *,
        prompt: "str | Prompt" = "question",
        choices: SequenceOf[str] | None = None,
        schema: dict[str, Any] | None = None,
        max_tokens: int | None = None,
        stop: SequenceOf[str] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> str:
        """The answer to a question about an image.

        prompt: one that is kept as a file (inference/prompt_files.py): the words around the
            question, and the other arguments where they are not given; choices: the likeliest of
            these, to its end; schema: JSON that follows this JSON schema.
        """
        from multimodal.inference.prompt_files import Prompt, find_prompt
        from multimodal.inference.text import answer_codes, encode_images, read_images

        words = prompt if isinstance(prompt, Prompt) else find_prompt(prompt)
        codes = encode_images(self._model, read_images(self._model, [image]))
        how = words.sampling(**sampling)
        if choices is None and schema is None:
            choices = words.choices or None
        (said,) = answer_codes(
            self._model,
            codes,
            [question],
            words.max_tokens if max_tokens is None else max_tokens,
            how,
            choices,
            schema,
            words.stop if stop is None and schema is None else stop or (),
            words,
        )
        return said

    def draw(
        self,
        text: str,
        n: int = 1,
        *,
        method: Literal["masked", "causal"] = "causal",
        candidates: int = 1,
        on_preview: "Callable[[SequenceOf[int], list[Image.Image]], object] | None" = None,
        **drawing: "Unpack[DrawingArguments]",
    ) -> "list[Image.Image]":
        """n drawings of a text, each the best of so many candidates; see
        inference/drawing.py for the methods and for guidance. on_preview: is given the numbers of
        drawings, and what there is of them, after each step (which takes two to three times as long
        then, if masked)."""
        from multimodal.inference.drawing import decode_images, divided, draw_codes, preview_images

        if n < 1:
            raise ValueError(f"n={n}: expected at least 1")
        options, sampling = divided(drawing)

        def on_step(numbers: SequenceOf[int], codes: Tensor) -> None:
            if on_preview is not None:
                on_preview(numbers, [to_image(one) for one in preview_images(self._model, codes)])

        codes = draw_codes(self._model, [text] * n, method=method, candidates=candidates,
                           sampling=sampling, on_step=on_step if on_preview else None,
                           **options)  # fmt: skip
        return [to_image(image) for image in decode_images(self._model, codes)]

    def edit(
        self,
        image: ImageSource,
        mask: "ImageSource | tuple[int, int, int, int]",
        text: str,
        **drawing: "Unpack[DrawingArguments]",
    ) -> "Image.Image":
        """Draw a part of the image anew, after a text; mask: white there, or a box x0, y0, x1, y1.

        The result has the size of the image, and is the same outside the mask.
        """
        from multimodal.inference.drawing import divided
        from multimodal.inference.editing import box_mask, edit_image

        whole = open_image(image)
        where = box_mask(whole.size, mask) if isinstance(mask, tuple) else open_image(mask)
        options, sampling = divided(drawing)
        return edit_image(self._model, whole, where, text, sampling=sampling, **options)

    def outpaint(
        self,
        image: ImageSource,
        margins: tuple[int, int, int, int],
        text: str,
        **drawing: "Unpack[DrawingArguments]",
    ) -> "Image.Image":
        """Draw what lies around the image; margins: pixels at left, top, right and bottom."""
        from multimodal.inference.drawing import divided
        from multimodal.inference.editing import outpaint

        options, sampling = divided(drawing)
        return outpaint(self._model, open_image(image), margins, text, sampling=sampling, **options)

    def vary(
        self,
        image: ImageSource,
        share: float = 0.5,
        text: str | None = None,
        **drawing: "Unpack[DrawingArguments]",
    ) -> "Image.Image":
        """Draw a share of the image's codes anew, anywhere; text: what it shows, by default what
        the model says of it."""
        from multimodal.inference.drawing import divided
        from multimodal.inference.editing import vary

        options, sampling = divided(drawing)
        return vary(self._model, open_image(image), share, text, sampling=sampling, **options)

    def embed(
        self,
        images: SequenceOf[ImageSource] | None = None,
        texts: SequenceOf[str] | None = None,
        *,
        batch_size: int = 32,
    ) -> Tensor:
        """float32[N, D] of unit norm, on the CPU: of the images or of the texts.

        The product of an image's row and a text's says how well they fit, in [-1, 1].
        """
        from multimodal.inference.embedding import embed_codes, embed_texts
        from multimodal.inference.text import encode_images, read_images

        if (images is None) == (texts is None):
            raise ValueError("embed: give images or texts, one of the two")
        if isinstance(images if texts is None else texts, str | Path | bytes):
            raise ValueError("embed: give a list, even for one")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1")
        rows: list[Tensor] = [torch.zeros(0, self._model.config.objectives.alignment_dim)]
        if images is not None:
            for start in range(0, len(images), batch_size):
                pixels = read_images(self._model, images[start : start + batch_size])
                rows.append(embed_codes(self._model, encode_images(self._model, pixels)))
        if texts is not None:
            for start in range(0, len(texts), batch_size):
                rows.append(embed_texts(self._model, texts[start : start + batch_size]))
        return torch.cat(rows)

    def generate(
        self,
        parts: SequenceOf[ImageSource],
        *,
        output: Literal["text", "image", "any"] = "text",
        max_tokens: int = 64,
        stop: SequenceOf[str] = (),
        **sampling: Unpack[SamplingOptions],
    ) -> "list[str | Image.Image]":
        """Go on after any mix: here a ``str`` is text, and images are paths (``Path``), bytes or
        Pillow images. output: text, one image, or ``any`` mix of both; stop: texts to end before.
        """
        from multimodal.inference.mixed import generate

        how = Sampling(**sampling)
        return generate(self._model, parts, output=output, max_tokens=max_tokens, sampling=how,
                        stop=stop)  # fmt: skip

    def reply(
        self,
        prompts: SequenceOf[SequenceOf[ImageSource]],
        *,
        output: Literal["text", "image", "any"] = "text",
        max_tokens: int = 64,
        stop: SequenceOf[str] = (),
        batch_size: int = 32,
        **sampling: Unpack[SamplingOptions],
    ) -> "list[Reply | ValueError]":
        """``generate`` for many prompts at once, each with its counts and its log probability; what
        is wrong with one stands in its place, and the others are done."""
        from multimodal.inference.mixed import reply

        how = Sampling(**sampling)
        return reply(self._model, prompts, output=output, max_tokens=max_tokens, sampling=how,
                     stop=stop, batch_size=batch_size)  # fmt: skip

    def stream(
        self,
        parts: SequenceOf[ImageSource],
        *,
        output: Literal["text", "image", "any"] = "text",
        max_tokens: int = 64,
        stop: SequenceOf[str] = (),
        previews: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> "Iterator[str | Image.Image | Preview]":
        """``generate`` piece by piece, as it comes: whole characters, and whole images; previews:
        of an image also what there is after each row of codes, as a ``Preview``."""
        from multimodal.inference.mixed import stream

        how = Sampling(**sampling)
        return stream(self._model, parts, output=output, max_tokens=max_tokens, sampling=how,
                      stop=stop, previews=previews)  # fmt: skip
