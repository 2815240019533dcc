"""What a person does with a model: caption, answer, draw, edit, embed, search, generate.

Images are paths, bytes or Pillow images. Whatever is wrong with an argument or an image is a
``ValueError``. The keyword arguments of each method, their defaults and ranges are the fields of an
options class in multimodal/options.py: texts take the most likely tokens by default, drawings are
sampled at temperature 0.8.
"""

import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Unpack, get_args

import torch
from PIL import Image
from torch import Tensor

from multimodal.data.images import open_image, to_image
from multimodal.inference import editing, mixed
from multimodal.inference.codec import (
    ImageSource,
    decode_images,
    encode_to_read,
    preview_images,
    read_images,
)
from multimodal.inference.drawing import DRAWINGS_AT_ONCE, draw_codes
from multimodal.inference.embedding import EmbeddingCache, embed_codes, embed_files, embed_texts
from multimodal.inference.json_schema import Schema
from multimodal.inference.mixed import Output, OutputKind, Reply
from multimodal.inference.prompt_files import Prompt, find_prompt
from multimodal.inference.text import answer_codes, caption_images
from multimodal.model.checkpoint import ModelParts
from multimodal.model.compiled import CompiledForward
from multimodal.options import (
    AnswerOptions,
    CaptionArguments,
    CaptionOptions,
    DrawArguments,
    DrawOptions,
    EditArguments,
    EditOptions,
    TextArguments,
    TextOptions,
    check,
    make_options,
    takes_options,
)
from multimodal.schemas import Between, check_value


class Model(ModelParts):
    """A network, its text tokenizer and its image tokenizer, and what they can do together."""

    def __repr__(self) -> str:
        sizes = self.config.transformer
        return (
            f"{type(self).__name__}({sizes.num_hidden_layers} layers of {sizes.hidden_size}, "
            f"{self.config.text_size} text ids, {self.config.layout.codebook_size} image codes, "
            f"{self.device})"
        )

    def compile_decoding(self) -> None:
        """Compile the passes that read prompts, make a token, and draw masked codes.

        The first prompt, the first batch, the first drawing and the first batch of drawings each
        take up to a minute, and each further 128 tokens of one prompt and its reply ten seconds.
        After that, on a CPU, one prompt at a time is about twice as fast, several are up to a fifth
        faster, and masked drawing up to a third.

        Raises:
            ValueError: on a CPU without a C++ compiler.
        """
        if self.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
            raise ValueError("compiling on a CPU needs a C++ compiler: install g++ or clang++")
        self.network.compiled = CompiledForward.of(self.network.transformer)

    # --- texts --------------------------------------------------------------------------------

    @takes_options(CaptionOptions)
    def caption(
        self,
        images: Sequence[ImageSource],
        *,
        examples: Sequence[tuple[ImageSource, str]] = (),
        batch_size: int = 32,
        **options: Unpack[CaptionArguments],
    ) -> list[str]:
        """One caption for each image.

        Args:
            images: a list, even for one image.
            examples: images with captions that the prompts begin with (few-shot).
            batch_size: images at once.
            options: see CaptionOptions.
        """
        captions = []
        for caption in self.caption_each(
            images, examples=examples, batch_size=batch_size, **options
        ):
            if isinstance(caption, ValueError):
                raise caption
            captions.append(caption)
        return captions

    @takes_options(CaptionOptions)
    def caption_each(
        self,
        images: Sequence[ImageSource],
        *,
        examples: Sequence[tuple[ImageSource, str]] = (),
        batch_size: int = 32,
        **options: Unpack[CaptionArguments],
    ) -> Iterator[str | ValueError]:
        """As ``caption``, but batch by batch, and an image that cannot be read gives its error."""
        check(batch_size >= 1, "batch_size", batch_size, "at least 1")
        if isinstance(images, str | Path | bytes) or not hasattr(images, "__len__"):
            raise ValueError("images: expected a list of images, even for one")
        caption_options = make_options(CaptionOptions, options)
        return caption_images(self, images, caption_options, examples, batch_size)

    @takes_options(AnswerOptions)
    def answer(
        self,
        image: ImageSource,
        question: str,
        *,
        prompt: str | Prompt = "question",
        choices: Sequence[str] | None = None,
        schema: dict[str, Any] | None = None,
        **options: Unpack[TextArguments],
    ) -> str:
        """The answer to a question about an image.

        Args:
            prompt: a prompt file by its name (inference/prompt_files.py): the words around the
                question, and choices and options where they are not given here.
            choices: the answer is the most likely one of these.
            schema: the answer is JSON that follows this JSON schema.
            options: see AnswerOptions.
        """
        words = prompt if isinstance(prompt, Prompt) else find_prompt(prompt)
        if schema is not None and "stop" not in options:
            options = {**options, "stop": ()}
        answer_options = words.answer_options(**options)
        words.fill(question, self.config.templates)  # an empty question is an error at once
        if choices is None and schema is None:
            choices = words.choices or None
        codes = encode_to_read(self, read_images(self, [image]))
        follow = None if schema is None else Schema(self, schema)
        return answer_codes(self, codes, [question], answer_options, words, choices, follow)[0]

    @takes_options(TextOptions)
    def generate(
        self,
        parts: Sequence[ImageSource],
        *,
        output: OutputKind = "text",
        **options: Unpack[TextArguments],
    ) -> list[str | Image.Image]:
        """Continue any mix of texts and images.

        Args:
            parts: a ``str`` is text. Images are paths (``Path``), bytes or Pillow images.
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
        prompts: Sequence[Sequence[ImageSource]],
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
        parts: Sequence[ImageSource],
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

    # --- images -------------------------------------------------------------------------------

    @takes_options(DrawOptions)
    def draw(
        self,
        text: str,
        n: int = 1,
        *,
        on_preview: Callable[[Sequence[int], list[Image.Image]], object] | None = None,
        **options: Unpack[DrawArguments],
    ) -> list[Image.Image]:
        """Draw n images of a text.

        Args:
            on_preview: is given the numbers of some drawings and what there is of them, after each
                row of codes or each step of masked drawing. A masked step is two to three times
                slower then.
            options: see DrawOptions.
        """
        return list(self.draw_each(text, n, on_preview=on_preview, **options))

    @takes_options(DrawOptions)
    def draw_each(
        self,
        text: str,
        n: int = 1,
        *,
        on_preview: Callable[[Sequence[int], list[Image.Image]], object] | None = None,
        **options: Unpack[DrawArguments],
    ) -> Iterator[Image.Image]:
        """As ``draw``, but yields images as they are done: memory does not depend on n."""
        check_value("n", n, Annotated[int, Between(1, 2**31)])
        draw_options = make_options(DrawOptions, options)

        def on_step(numbers: Sequence[int], codes: Tensor) -> None:
            if on_preview is not None:
                on_preview(numbers, [to_image(image) for image in preview_images(self, codes)])

        size = max(1, DRAWINGS_AT_ONCE // draw_options.candidates)
        for start in range(0, n, size):
            numbers = range(start, min(start + size, n))
            codes = draw_codes(
                self,
                [text] * len(numbers),
                draw_options,
                numbers=numbers,
                on_step=None if on_preview is None else on_step,
            )
            yield from (to_image(image) for image in decode_images(self, codes))

    @takes_options(EditOptions)
    def edit(
        self,
        image: ImageSource,
        mask: ImageSource | tuple[int, int, int, int],
        text: str,
        **options: Unpack[EditArguments],
    ) -> Image.Image:
        """Draw a part of an image anew, after a text.

        Args:
            mask: an image of the same size that is white where to draw, or a box: left, top, right,
                bottom in pixels.
            options: see EditOptions.

        Returns:
            An image of the same size, unchanged outside the mask.
        """
        original = open_image(image)
        if isinstance(mask, tuple):
            white = editing.box_mask(original.size, mask)
        else:
            white = open_image(mask)
        return editing.edit_image(self, original, white, text, make_options(EditOptions, options))

    @takes_options(EditOptions)
    def outpaint(
        self,
        image: ImageSource,
        margins: tuple[int, int, int, int],
        text: str,
        **options: Unpack[EditArguments],
    ) -> Image.Image:
        """Draw what lies around an image. margins: pixels at left, top, right and bottom."""
        edit_options = make_options(EditOptions, options)
        return editing.outpaint_image(self, open_image(image), margins, text, edit_options)

    @takes_options(EditOptions)
    def vary(
        self,
        image: ImageSource,
        share: float = 0.5,
        text: str | None = None,
        **options: Unpack[EditArguments],
    ) -> Image.Image:
        """Draw a share of an image's codes anew, anywhere.

        Args:
            text: what the image shows. By default the model's caption of it.
        """
        edit_options = make_options(EditOptions, options)
        return editing.vary_image(self, open_image(image), share, text, edit_options)

    # --- embeddings ---------------------------------------------------------------------------

    def embed(
        self,
        images: Sequence[ImageSource] | None = None,
        texts: Sequence[str] | None = None,
        *,
        batch_size: int = 32,
    ) -> Tensor:
        """Embeddings of images, or of texts.

        Returns:
            float32[N, D] of unit norm, on the CPU. The product of the rows of an image and a text
            says how well they fit, in [-1, 1].
        """
        if (images is None) == (texts is None):
            raise ValueError("embed: give images or texts, one of the two")
        if isinstance(images if texts is None else texts, str | Path | bytes):
            raise ValueError("embed: give a list, even for one")
        check(batch_size >= 1, "batch_size", batch_size, "at least 1")
        rows: list[Tensor] = [torch.zeros(0, self.config.objectives.alignment_dim)]
        if images is not None:
            for start in range(0, len(images), batch_size):
                pixels = read_images(self, images[start : start + batch_size])
                rows.append(embed_codes(self, encode_to_read(self, pixels)))
        if texts is not None:
            for start in range(0, len(texts), batch_size):
                rows.append(embed_texts(self, texts[start : start + batch_size]))
        return torch.cat(rows)

    def embed_files(
        self, paths: list[Path], *, cache: EmbeddingCache | None = None, batch_size: int = 32
    ) -> Iterator[tuple[Path, Tensor | ValueError]]:
        """(path, float32[D] or what was wrong with the file), in the order of the paths.

        Args:
            cache: embeddings by the content of files. New ones are added to it.
        """
        check(batch_size >= 1, "batch_size", batch_size, "at least 1")
        return embed_files(self, paths, cache, batch_size)


DType = Literal["float32", "bfloat16"]


def check_device(device: str | torch.device) -> None:
    """Raises ``ValueError`` for a device that torch cannot compute on here."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of names that are out of use
            usable = torch.ones(1, device=device).add(1).item() == 2
        reason = "it does not compute"
    except Exception as error:  # each kind of device has errors of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        usable = False
    if not usable:
        raise ValueError(f"device={str(device)!r:.80}: cannot be used here ({reason:.200})")


def load(
    path: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | DType = torch.float32,
    *,
    verify: bool = True,
) -> Model:
    """Load a model folder, or a bundled model by its name, ready for use.

    Args:
        path: a folder, or ``starter``.
        device: where torch computes.
        dtype: of the network. The image tokenizer stays in float32.
        verify: compare the fingerprint of the files with that in config.json. It takes a second
            for each two gigabytes.

    Raises:
        ValueError: for anything that is not a model folder of this release, files that have
            changed since they were written, and a device or a dtype that cannot be used.
    """
    if isinstance(dtype, str):
        check(dtype in get_args(DType), "dtype", dtype, " or ".join(get_args(DType)))
        dtype = getattr(torch, dtype)
    check_device(device)
    return Model.load(path, device, dtype, verify)
