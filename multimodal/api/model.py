"""What a person does with a model: caption, answer, draw, edit, embed, search, generate.

Images are paths, bytes, open files, Pillow images, numpy arrays or torch tensors (``open_source``
in inference/values.py). One in is one out, several in are several out. Whatever is wrong with an
argument or an image is a ``ValueError``. The keyword arguments of each method, their defaults and
ranges are the fields of an options class in multimodal/options.py: texts take the most likely
tokens by default, drawings are sampled at temperature 0.8.
"""

from __future__ import annotations  # help() shows the names of types as they are written

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Unpack, overload

import torch
from PIL import Image
from torch import Tensor

from multimodal.api.inside import InsideMethods
from multimodal.api.texts import TextMethods
from multimodal.data.formats.folders import list_images
from multimodal.data.images import to_image
from multimodal.devices import DType, choose_device, choose_dtype
from multimodal.hub.push import push
from multimodal.inference import editing
from multimodal.inference.codec import (
    decode_images,
    encode_to_read,
    preview_images,
    read_images,
)
from multimodal.inference.drawing import DRAWINGS_AT_ONCE, draw_codes
from multimodal.inference.embedding import (
    EmbeddingCache,
    embed_codes,
    embed_files,
    embed_lines,
    embed_texts,
)
from multimodal.inference.values import (
    Drawings,
    Images,
    ImageSource,
    Results,
    is_one,
    name_of,
    open_mask,
    open_source,
    to_list,
    to_texts,
)
from multimodal.model.layers.compiled import CompiledForward
from multimodal.options import (
    DrawArguments,
    DrawOptions,
    EditArguments,
    EditOptions,
    check,
    make_options,
    shows_types,
    takes_options,
)
from multimodal.schemas import Between, check_value


class DrawCall(DrawArguments, total=False):
    on_preview: Callable[[Sequence[int], list[Image.Image]], object] | None


class Model(TextMethods, InsideMethods):
    """A network, its text tokenizer and its image tokenizer, and what they can do together."""

    def __repr__(self) -> str:
        sizes, images = self.config.transformer, self.image_tokenizer
        parameters = sum(weight.numel() for weight in self.network.parameters())
        dtype = str(next(self.network.parameters()).dtype).removeprefix("torch.")
        return (
            f"{type(self).__name__}({sizes.num_hidden_layers} layers of {sizes.hidden_size}, "
            f"{parameters / 1e6:.1f} M parameters, {dtype} on {self.device}\n"
            f"  images: {images.image_size} x {images.image_size} pixels ({images.fit}), "
            f"{images.codes_per_image} codes of {images.codebook_size}\n"
            f"  texts: {self.config.text_size} ids, "
            f"sequences of {sizes.max_position_embeddings} tokens)"
        )

    def compile_decoding(self) -> None:
        """Compile the passes that read prompts, make a token, and draw masked codes.

        The first prompt, the first batch, the first drawing and the first batch of drawings each
        take up to a minute, and each further 128 tokens of one prompt and its reply ten seconds.
        After that one prompt at a time is about twice as fast, several are up to a fifth faster,
        and masked drawing up to a third. Where the step that makes a token is a CUDA graph
        (model/layers/graphs.py: on CUDA devices, without experts) nothing is compiled.

        Raises:
            ValueError: on a CPU without a C++ compiler.
        """
        if self.network.graphs is not None:
            return
        if self.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
            raise ValueError("compiling on a CPU needs a C++ compiler: install g++ or clang++")
        self.network.compiled = CompiledForward.of(self.network.transformer)

    # --- images -------------------------------------------------------------------------------

    @overload
    def draw(  # type: ignore[overload-overlap]
        self, text: str, n: int = 1, **options: Unpack[DrawCall]
    ) -> Drawings: ...
    @overload
    def draw(
        self, text: Sequence[str], n: int = 1, **options: Unpack[DrawCall]
    ) -> list[Drawings]: ...
    @takes_options(DrawOptions)
    def draw(
        self,
        text: str | Sequence[str],
        n: int = 1,
        *,
        on_preview: Callable[[Sequence[int], list[Image.Image]], object] | None = None,
        **options: Unpack[DrawArguments],
    ) -> Drawings | list[Drawings]:
        """Draw n images of a text, or of each of several texts. A notebook shows them as a grid.

        Args:
            on_preview: is given the places of some drawings, counted from 0 text by text, and what
                there is of them, after each row of codes or each step of masked drawing. Texts are
                drawn one after the other then, and a masked step is two to three times slower.
            options: see DrawOptions.
        """
        drawn = list(self.draw_each(text, n, on_preview=on_preview, **options))
        results = Results(Drawings(drawn[start : start + n]) for start in range(0, len(drawn), n))
        return results[0] if isinstance(text, str) else results

    @takes_options(DrawOptions)
    def draw_each(
        self,
        text: str | Sequence[str],
        n: int = 1,
        *,
        on_preview: Callable[[Sequence[int], list[Image.Image]], object] | None = None,
        **options: Unpack[DrawArguments],
    ) -> Iterator[Image.Image]:
        """As ``draw``, but yields images as they are done: memory does not depend on n."""
        check_value("n", n, Annotated[int, Between(1, 2**31)])
        draw_options = make_options(DrawOptions, options)
        texts = to_texts(text)

        def on_step(first: int, numbers: Sequence[int], codes: Tensor) -> None:
            if on_preview is not None:
                images = [to_image(image) for image in preview_images(self, codes)]
                on_preview([first + number for number in numbers], images)

        # The number of a drawing decides its random numbers, and is its own within one text only.
        groups = [texts] if on_preview is None else [[each] for each in texts]
        size = max(1, DRAWINGS_AT_ONCE // draw_options.candidates)
        for place, several in enumerate(groups):
            wanted = ((each, number) for each in several for number in range(n))
            while batch := list(islice(wanted, size)):
                codes = draw_codes(
                    self,
                    [each for each, _ in batch],
                    draw_options,
                    numbers=[number for _, number in batch],
                    on_step=None if on_preview is None else partial(on_step, n * place),
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
            mask: an image of the same size that is white where to draw (an array may be of bool),
                or a box: left, top, right, bottom in pixels.
            options: see EditOptions.

        Returns:
            An image of the same size, unchanged outside the mask.
        """
        original = open_source(image, urls=self.urls)
        if isinstance(mask, tuple | list):
            white = editing.box_mask(original.size, tuple(mask))  # type: ignore[arg-type]
        else:
            white = open_mask(mask, self.urls)
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
        return editing.outpaint_image(
            self, open_source(image, urls=self.urls), margins, text, edit_options
        )

    @takes_options(EditOptions)
    def vary(
        self,
        image: ImageSource,
        share: float = 0.5,
        text: str | None = None,
        **options: Unpack[EditArguments],
    ) -> Image.Image:
        """Draw a share of an image anew, anywhere. The rest of its pixels stays as it is.

        Args:
            text: what the image shows. By default the model's caption of it.
        """
        edit_options = make_options(EditOptions, options)
        return editing.vary_image(
            self, open_source(image, urls=self.urls), share, text, edit_options
        )

    # --- the Hub ------------------------------------------------------------------------------

    def push_to_hub(
        self,
        name: str,
        *,
        card: str = "",
        results: str | Path | None = None,
        license: str = "",
        private: bool = False,
        message: str = "",
    ) -> str:
        """Put the model on the Hugging Face Hub, where ``load`` finds it by its name.

        Args:
            name: ``user/name`` or ``user/name@branch``. What does not exist is made.
            card: the text of its README.md.
            results: what ``multimodal eval --output`` wrote about this model, for the card.
            license: its name on the Hub, such as ``apache-2.0``.
            private: of a new repository.
            message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            ValueError: for results of another model, or what the Hub refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder, card)
            return push(folder, name, results, license, private, message)

    # --- embeddings ---------------------------------------------------------------------------

    @shows_types
    def embed(
        self,
        images: ImageSource | Images | None = None,
        texts: str | Sequence[str] | None = None,
        *,
        batch_size: int = 32,
    ) -> Tensor:
        """Embeddings of images, or of texts.

        Returns:
            float32[N, D] of unit norm, on the CPU, or float32[D] of one image or text. The product
            of the rows of an image and a text says how well they fit, in [-1, 1].
        """
        if (images is None) == (texts is None):
            raise ValueError("embed: give images or texts, one of the two")
        check(batch_size >= 1, "batch_size", batch_size, "at least 1")
        rows: list[Tensor] = [torch.zeros(0, self.config.objectives.alignment_dim)]
        pictures = [] if images is None else to_list(images)
        names = [name_of(picture, number) for number, picture in enumerate(pictures)]
        for start in range(0, len(pictures), batch_size):
            part = slice(start, start + batch_size)
            pixels = read_images(self, pictures[part], names[part])
            rows.append(embed_codes(self, encode_to_read(self, pixels)))
        lines = [] if texts is None else to_texts(texts)
        for start in range(0, len(lines), batch_size):
            rows.append(embed_texts(self, lines[start : start + batch_size]))
        alone = isinstance(texts, str) if images is None else is_one(images)
        return torch.cat(rows)[0] if alone else torch.cat(rows)

    @shows_types
    def search(
        self,
        query: ImageSource,
        images: str | PathLike[str] | Sequence[str | PathLike[str]],
        k: int = 10,
        *,
        cache: EmbeddingCache | None = None,
        batch_size: int = 32,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> Results:
        """The k images that fit a text, or another image, best.

        Args:
            query: a ``str`` is a text, everything else an image (a path is a ``Path``).
            images: a folder, searched with its subfolders, or paths.
            cache: embeddings by the content of files. New ones are added to it.
            progress: wraps the stream of images (``tqdm``, for instance).

        Returns:
            (path, score in [-1, 1]), the best first. ``skipped`` has what could not be read, by its
            place among the images.
        """
        check(k >= 1, "k", k, "at least 1")
        row = self.embed(texts=query) if isinstance(query, str) else self.embed(images=query)
        paths = (
            list_images(Path(images)).files
            if isinstance(images, str | PathLike)
            else [Path(path) for path in images]
        )
        results, scores = Results(), dict[Path, float]()
        embedded = self.embed_files(paths, cache=cache, batch_size=batch_size)
        for number, (path, found) in enumerate(progress(embedded)):
            if isinstance(found, ValueError):
                results.skipped[number] = found
            else:
                scores[path] = float(found @ row)
        results += sorted(scores.items(), key=lambda pair: (-pair[1], str(pair[0])))[:k]
        return results

    @shows_types
    def embed_files(
        self, paths: list[Path], *, cache: EmbeddingCache | None = None, batch_size: int = 32
    ) -> Iterator[tuple[Path, Tensor | ValueError]]:
        """(path, float32[D] or what was wrong with the file), in the order of the paths.

        Args:
            cache: embeddings by the content of files. New ones are added to it.
        """
        check(batch_size >= 1, "batch_size", batch_size, "at least 1")
        return embed_files(self, paths, cache, batch_size)

    @shows_types
    def embed_lines(
        self, texts: Sequence[str], *, batch_size: int = 32
    ) -> Iterator[Tensor | ValueError]:
        """float32[D] of each text, or what was wrong with it, in their order."""
        check(batch_size >= 1, "batch_size", batch_size, "at least 1")
        return embed_lines(self, texts, batch_size)


@shows_types
def load(
    path: str | Path = "starter",
    device: str | torch.device = "auto",
    dtype: torch.dtype | DType = "auto",
    *,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    urls: bool = False,
    verify: bool = True,
) -> Model:
    """Load a model, ready for use.

    Args:
        path: a folder, ``starter``, or ``user/name`` of the Hugging Face Hub (``@revision`` for a
            branch, a tag or a commit).
        device: where torch computes. ``auto`` is CUDA, else MPS, else the CPU.
        dtype: of the network, float32 or bfloat16. ``auto`` is bfloat16 on a GPU that has it in
            hardware, else float32. The image tokenizer stays in float32.
        adapter: what a run with ``lora`` has written for this model: its folder, or its name on
            the Hub. It is merged into the weights. Several: ``{name: folder}``; the first one is
            in use until ``use_adapter`` names others.
        urls: images may be http and https addresses, which are fetched.
        verify: compare the fingerprint of the files with that in config.json. It takes a second
            for each two gigabytes.

    Raises:
        ValueError: for anything that is not a model folder of this release, files that have
            changed since they were written, an adapter of another model, or a device or dtype that
            cannot be used.
    """
    place = choose_device(device)
    model = Model.load(path, str(place), choose_dtype(dtype, place), verify, adapter)
    model.urls = urls
    return model
