"""``Index``: many images or texts, embedded once, searched in milliseconds.

index = multimodal.Index.open("photos.index", model, create=True)
index.add("photos/")
index.search("a dog in the snow", k=5)
"""

from __future__ import annotations  # help() shows the names of types as they are written

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Unpack

from torch import Tensor

from multimodal.api.model import Model
from multimodal.files import local_path
from multimodal.index.hits import Hit
from multimodal.index.prompts import (
    Answer,
    codes_of,
    examples_prompt,
    image_room,
    sources_prompt,
)
from multimodal.index.sources import open_source
from multimodal.index.storage import (
    CONFIG,
    IndexConfig,
    locked,
    read_config,
    read_files,
    write_index,
)
from multimodal.index.update import Changes, Update
from multimodal.index.vectors import Vectors, as_rows
from multimodal.index.words import Words
from multimodal.inference import mixed
from multimodal.inference.embedding import embed_codes
from multimodal.inference.prompt_files import Prompt, find_prompt
from multimodal.inference.text import caption_images
from multimodal.inference.values import Images, ImageSource, Results, to_list
from multimodal.options import (
    AnswerOptions,
    CaptionArguments,
    CaptionOptions,
    TextArguments,
    check,
    make_options,
    shows_types,
    takes_options,
)

CANDIDATES = 100  # texts by their words, and as many by their embeddings, which are compared


class Index:
    """An index of a model's embeddings: see ``Index.open``."""

    def __init__(self, folder: Path, model: Model, config: IndexConfig, verify: bool) -> None:
        self.folder, self.model, self.config = folder, model, config
        self._vectors, self._entries = read_files(folder, config, verify=verify)

    @classmethod
    @shows_types
    def open(
        cls,
        folder: str | PathLike[str],
        model: Model,
        *,
        create: bool = False,
        verify: bool = True,
    ) -> Index:
        """Open an index. Its files are mapped into memory, and are not changed by searches.

        Args:
            folder: of the index.
            model: whose embeddings are in it.
            create: start an empty index, if there is none in the folder.
            verify: compare the hashes of the files with those in its config.json.

        Raises:
            ValueError: if there is no index, if it is damaged or of another model, or without
                usearch.
        """
        folder, fingerprint = local_path(Path(folder)), model.fingerprint
        if create and not (folder / CONFIG).is_file():
            width = model.config.objectives.alignment_dim
            with locked(folder):
                write_index(folder, {"model": fingerprint, "width": width}, Vectors(width), [])
        while True:
            config = read_config(folder)
            _check_model(folder, config, fingerprint)
            try:
                return cls(folder, model, config, verify)
            except ValueError:
                if read_config(folder) == config:  # no update replaced its files in between
                    raise

    def __len__(self) -> int:
        return self.config.count

    def __repr__(self) -> str:
        return f"Index({str(self.folder)!r}: {len(self):,} {self.config.kind or 'entries'})"

    # --- searching ----------------------------------------------------------------------------

    @shows_types
    def search(self, query: ImageSource, k: int = 10) -> Results:
        """The k entries that fit a text, or an image, best: a ``Hit`` each, the best first.

        Texts are found by their words, too: half of the score of a piece is its BM25, divided by
        that of the piece with the highest, and half is the cosine (a convex combination, as in
        Bruch, Gai and Ingber 2023, arXiv:2210.11934).

        Args:
            query: a ``str`` is a text, everything else an image (a path is a ``Path``).
        """
        check(k >= 1, "k", k, "at least 1")
        if not isinstance(query, str):
            (hits,) = self.search_rows(self.model.embed(images=query)[None], k)
            return Results(hits)
        row = self.model.embed(texts=query)[None]
        if self.config.kind != "texts":
            (hits,) = self.search_rows(row, k)
            return Results(hits)
        words = self._words.search(query, CANDIDATES)
        (nearest,) = self._vectors.search(as_rows(row), max(k, CANDIDATES))
        scores = {number: cosine / 2 for number, cosine in nearest}
        others = [number for number in words if number not in scores]
        cosines = self._vectors.cosines(as_rows(row)[0], others)
        scores |= {number: cosine / 2 for number, cosine in zip(others, cosines, strict=True)}
        for number, share in words.items():
            scores[number] += share / 2
        best = sorted(scores, key=lambda number: (-scores[number], number))[:k]
        return Results([self._hit(number, scores[number]) for number in best])

    @cached_property
    def _words(self) -> Words:
        return Words((n, entry.text) for n, entry in enumerate(self._entries) if entry is not None)

    def search_rows(self, rows: Tensor, k: int) -> list[list[Hit]]:
        """As ``search``, for embeddings. rows: float32[B, D] of unit norm."""
        found = self._vectors.search(as_rows(rows), k)
        return [[self._hit(number, score) for number, score in each] for each in found]

    def _hit(self, number: int, score: float) -> Hit:
        entry = self._entries[number]
        if entry is None or entry.root >= len(self.config.roots):
            raise ValueError(f"{self.folder}: damaged: nothing is known of row {number}")
        root = self.config.roots[entry.root]
        if entry.number is None:
            path = Path(root.path) / entry.path
            return Hit(path, score, entry.captions, text=entry.text, lines=entry.lines)
        return Hit(Path(root.path), score, entry.captions, entry.path, root.split, entry.number)

    # --- texts with what was found ------------------------------------------------------------

    @takes_options(CaptionOptions)
    def caption_each(
        self,
        images: ImageSource | Images,
        *,
        retrieve: int = 4,
        batch_size: int = 32,
        first: int = 0,
        **options: Unpack[CaptionArguments],
    ) -> Iterator[str | ValueError]:
        """Captions of images, each after the images that are most like it, with their captions.

        Args:
            images: one image, or several.
            retrieve: the nearest images of the index that are examples. Those without a caption are
                left out, and what does not fit into the prompt.
            batch_size: images at once.
            first: the number of the first image, where a list is done in parts.
            options: see CaptionOptions.

        Yields:
            The caption of each image in its order, or what was wrong with the image.
        """
        check(retrieve >= 1, "retrieve", retrieve, "at least 1")
        check(batch_size >= 1, "batch_size", batch_size, "at least 1")
        caption_options = make_options(CaptionOptions, options)
        limit = self.model.config.transformer.max_position_embeddings - caption_options.max_tokens
        known: dict[str, Tensor] = {}

        def read(hit: Hit) -> Tensor:
            if hit.source not in known:
                known[hit.source] = codes_of(self.model, hit)
            return known[hit.source]

        def begin_of(codes: Tensor) -> list[list[int]]:
            room = limit - codes.shape[1] - 2
            found = self.search_rows(embed_codes(self.model, codes), retrieve)
            return [examples_prompt(self.model, hits, room, read) for hits in found]

        return caption_images(
            self.model,
            to_list(images),
            caption_options,
            batch_size=batch_size,
            first=first,
            begin_of=begin_of,
        )

    @takes_options(AnswerOptions)
    def answer(
        self,
        question: str,
        image: ImageSource | None = None,
        *,
        retrieve: int = 3,
        prompt: str | Prompt = "question",
        choices: Sequence[str] | None = None,
        schema: dict[str, Any] | None = None,
        **options: Unpack[TextArguments],
    ) -> Answer:
        """The answer to a question, after what the index has about it.

        A language model that has a chat template is asked in it, unless there is an image, or the
        prompt has a template of its own.

        Args:
            question: what is searched, except where an index of images is given an image.
            image: that the question is about, if any.
            retrieve: the nearest entries that go into the prompt, as far as they fit.
            prompt, choices, schema: as for ``Model.answer``. Without an image, no choices and no
                schema.
            options: see AnswerOptions.
        """
        check(retrieve >= 1, "retrieve", retrieve, "at least 1")
        model = self.model
        words = prompt if isinstance(prompt, Prompt) else find_prompt(prompt)
        words.fill(question, model.config.templates)  # an empty question is an error at once
        if image is not None and self.config.kind == "images":
            (hits,) = self.search_rows(model.embed(images=image)[None], retrieve)
        else:
            hits = self.search(question, retrieve)
        answer_options = words.answer_options(**options)
        limit = model.config.transformer.max_position_embeddings - answer_options.max_tokens
        room = limit - image_room(model, image)
        talks = image is None and words.template is None and model.text_tokenizer.chat is not None
        if talks:
            words = replace(words, template="{text}")
            room -= len(mixed.prompt_ids(model, [{"role": "user", "content": ""}]))
        words, used = sources_prompt(model, hits, question, words, room)
        if image is not None:
            text = model.answer(
                image, question, prompt=words, choices=choices, schema=schema, **options
            )
            return Answer(text, Results(used))
        if choices or words.choices or schema:
            raise ValueError("choices and a schema are for questions about an image: give one")
        asked = words.fill(question, model.config.templates)
        parts = [{"role": "user", "content": asked}] if talks else [asked]
        (reply,) = mixed.reply(model, [parts], "text", answer_options, 1)
        if isinstance(reply, ValueError):
            raise reply
        return Answer("".join(map(str, reply.parts)).strip(), Results(used))

    # --- updating -----------------------------------------------------------------------------

    @shows_types
    def add(
        self,
        source: str | PathLike[str],
        *,
        kind: Literal["auto", "images", "texts"] = "auto",
        split: str | None = None,
        piece_tokens: int = 64,
        batch_size: int = 32,
        on_problem: Callable[[str], object] = lambda problem: None,
        progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items,
    ) -> Changes:
        """Bring the index up to date with a folder of images or texts, or with shards.

        What is new is added, what has changed is replaced, what is gone is removed. Entries of
        other folders stay. What was done is saved every minute, so that an update that was
        interrupted goes on where it was saved.

        Args:
            source: a folder, searched with its subfolders, or a shard folder.
            kind: of files. ``auto`` is images if there are any, else texts.
            split: of shards. None: all of them.
            piece_tokens: the longest piece of a text.
            batch_size: images or pieces at once.
            on_problem: is told what is left out, one line each.
            progress: wraps the stream of items, and is told how many there are.

        Raises:
            ValueError: if there is nothing to index, if the index has entries of another kind, or
                if another process writes to it.
        """
        check(batch_size >= 1, "batch_size", batch_size, "at least 1")
        content = open_source(
            Path(source),
            self.model,
            kind=kind,
            split=split,
            piece_tokens=piece_tokens,
            outside=self.folder,
        )
        with locked(self.folder):
            config = read_config(self.folder)  # another process may have written to it
            if config.count and config.kind != content.kind:
                raise ValueError(
                    f"{self.folder}: an index of {config.kind}, and {content.root} has "
                    f"{content.kind}: make another index for them"
                )
            update = Update(self.folder, self.model, config, content, batch_size)
            for problem in content.problems:
                on_problem(problem)
            changes = update.run(on_problem, progress)
            self.config = update.save() if update.changed else config
            changes.problems += len(content.problems)
        self._vectors, self._entries = read_files(self.folder, self.config, verify=False)
        self.__dict__.pop("_words", None)
        return changes


def _check_model(folder: Path, config: IndexConfig, fingerprint: str) -> None:
    if config.model != fingerprint:
        raise ValueError(
            f"{folder}: an index of another model ({config.model}, this one is {fingerprint}): "
            "give that model, or make a new index"
        )
