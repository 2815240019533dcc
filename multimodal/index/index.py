"""``Index``: many images or texts, embedded once, searched in milliseconds.

index = multimodal.Index.open("photos.index", model, create=True)
index.add("photos/")
index.search("a dog in the snow", k=5)
"""

from __future__ import annotations  # help() shows the names of types as they are written

import heapq
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from multimodal.api.model import Model
from multimodal.files import local_path
from multimodal.index.hits import Hit
from multimodal.index.sources import Item, Source, open_source
from multimodal.index.storage import (
    CONFIG,
    Entry,
    IndexConfig,
    Root,
    locked,
    read_config,
    read_files,
    write_index,
)
from multimodal.index.vectors import Rows, Vectors
from multimodal.inference.codec import encode_to_read, read_images
from multimodal.inference.embedding import embed_codes, embed_lines
from multimodal.inference.values import ImageSource, Results
from multimodal.options import check, shows_types

SAVE_INTERVAL = 60.0  # seconds of work that an interruption may cost
SAVE_SHARE = 0.05  # of the time, at most, is spent on saving


@dataclass
class Changes:
    """What an update changed: numbers of files or samples. problems: those that are left out."""

    added: int = 0
    replaced: int = 0
    removed: int = 0
    unchanged: int = 0
    problems: int = 0


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
        config = read_config(folder)
        if config.model != fingerprint:
            raise ValueError(
                f"{folder}: an index of another model ({config.model}, this one is {fingerprint}): "
                "give that model, or make a new index"
            )
        return cls(folder, model, config, verify)

    def __len__(self) -> int:
        return self.config.count

    def __repr__(self) -> str:
        return f"Index({str(self.folder)!r}: {len(self):,} {self.config.kind or 'entries'})"

    # --- searching ----------------------------------------------------------------------------

    @shows_types
    def search(self, query: ImageSource, k: int = 10) -> Results:
        """The k entries that fit a text, or an image, best: a ``Hit`` each, the best first.

        Args:
            query: a ``str`` is a text, everything else an image (a path is a ``Path``).
        """
        check(k >= 1, "k", k, "at least 1")
        if isinstance(query, str):
            row = self.model.embed(texts=query)
        else:
            row = self.model.embed(images=query)
        (hits,) = self.search_rows(row[None], k)
        return Results(hits)

    def search_rows(self, rows: Tensor, k: int) -> list[list[Hit]]:
        """As ``search``, for embeddings. rows: float32[B, D] of unit norm."""
        found = self._vectors.search(_numpy(rows), k)
        return [[self._hit(number, score) for number, score in each] for each in found]

    def _hit(self, number: int, score: float) -> Hit:
        entry = self._entries[number] if self._entries is not None else None
        if entry is None or entry.root >= len(self.config.roots):
            raise ValueError(f"{self.folder}: damaged: nothing is known of row {number}")
        root = self.config.roots[entry.root]
        if entry.number is None:
            path = Path(root.path) / entry.path
            return Hit(path, score, entry.captions, text=entry.text, lines=entry.lines)
        return Hit(Path(root.path), score, entry.captions, entry.path, root.split, entry.number)

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
            update = _Update(self.folder, self.model, config, content, batch_size)
            for problem in content.problems:
                on_problem(problem)
            changes = update.run(on_problem, progress)
            self.config = update.save() if update.changed else config
            changes.problems += len(content.problems)
        self._vectors, self._entries = read_files(self.folder, self.config, verify=False)
        return changes


class _Update:
    """The rows and entries of an index in memory, and one source that they follow."""

    def __init__(
        self, folder: Path, model: Model, config: IndexConfig, source: Source, batch_size: int
    ) -> None:
        self.folder, self.model, self.source, self.batch_size = folder, model, source, batch_size
        self.vectors, entries = read_files(folder, config, verify=True, writable=True)
        self.entries: list[Entry | None] = [] if entries is None else list(entries)
        self.free = [number for number, entry in enumerate(self.entries) if entry is None]
        root = Root(os.path.abspath(source.root), source.split)
        roots = list(config.roots)
        if root not in roots:
            roots.append(root)
        self.root = roots.index(root)
        self.config = {
            "model": config.model,
            "width": config.width,
            "kind": source.kind,
            "roots": tuple(roots),
        }
        self.changed = False
        self.numbers: dict[str, list[int]] = defaultdict(list)  # of the entries of each item
        for number, entry in enumerate(self.entries):
            if entry is not None and entry.root == self.root:
                self.numbers[entry.path].append(number)

    def run(
        self,
        on_problem: Callable[[str], object],
        progress: Callable[[Iterable[Any], int], Iterable[Any]],
    ) -> Changes:
        changes, seen = Changes(), set[str]()
        saved = time.monotonic()
        cost = 0.0  # seconds that the last save took
        items = iter(progress(self.source.read(), len(self.source)))
        while batch := list(islice(items, self.batch_size)):
            new: list[Item] = []
            for path, item in batch:
                seen.add(path)
                if isinstance(item, ValueError):
                    on_problem(str(item))
                    changes.problems += 1
                    self._remove(path)
                elif self._sha256(path) == item.sha256:
                    changes.unchanged += 1
                else:
                    new.append(item)
            self._embed(new, changes, on_problem)
            now = time.monotonic()
            if now - saved > max(SAVE_INTERVAL, cost / SAVE_SHARE):
                self.save()
                saved = time.monotonic()
                cost = saved - now
        for path in [path for path, numbers in self.numbers.items() if numbers]:
            if path not in seen:
                self._remove(path)
                changes.removed += 1
        return changes

    def save(self) -> IndexConfig:
        return write_index(self.folder, self.config, self.vectors, self.entries)

    def _sha256(self, path: str) -> str | None:
        """Of an item as it was indexed."""
        numbers = self.numbers.get(path)
        entry = self.entries[numbers[0]] if numbers else None
        return None if entry is None else entry.sha256

    def _remove(self, path: str) -> None:
        numbers = self.numbers.pop(path, [])
        self.vectors.remove(numbers)
        self.changed = self.changed or bool(numbers)
        for number in numbers:
            self.entries[number] = None
            heapq.heappush(self.free, number)

    def _embed(
        self, items: list[Item], changes: Changes, on_problem: Callable[[str], object]
    ) -> None:
        entries = [(item, entry) for item in items for entry in self._entries_of(item)]
        good: dict[str, list[tuple[Entry, Tensor]]] = {item.path: [] for item in items}
        bad = set[str]()
        for (item, entry), row in zip(entries, self._rows(entries), strict=True):
            if isinstance(row, ValueError):
                where = [f"{self.source.root / item.path}: line {n}: " for n in entry.lines[:1]]
                on_problem("".join([*where, str(row)]))  # an error of an image names it
                bad.add(item.path)
            else:
                good[item.path].append((entry, row))
        changes.problems += len(bad)
        for item in items:
            before = self.numbers.get(item.path)
            self._remove(item.path)
            for entry, row in good[item.path]:
                self._add(entry, row)
            if good[item.path]:
                changes.replaced += bool(before)
                changes.added += not before

    def _entries_of(self, item: Item) -> list[Entry]:
        if item.image is not None:
            return [Entry(self.root, item.path, item.sha256, item.captions, item.number)]
        return [
            Entry(
                self.root,
                item.path,
                item.sha256,
                text=piece.text,
                lines=(piece.first, piece.last),
            )
            for piece in item.pieces
        ]

    def _rows(self, entries: Sequence[tuple[Item, Entry]]) -> Iterator[Tensor | ValueError]:
        """The embedding of each image or piece, or what is wrong with it."""
        if self.source.kind == "texts":
            texts = [entry.text for _, entry in entries]
            yield from embed_lines(self.model, texts, self.batch_size)
            return
        results: list[ValueError | None] = []
        codes: list[Tensor] = []
        pixels: list[Tensor] = []
        for item, _ in entries:
            result = None
            if isinstance(item.image, Tensor):  # so they are in all items of this source
                codes.append(self.model.read(item.image))
            else:
                name = str(self.source.root / item.path)
                try:
                    pixels.append(read_images(self.model, [item.image], [name]))
                except ValueError as error:
                    result = error
            results.append(result)
        if pixels:
            codes.append(encode_to_read(self.model, torch.cat(pixels)))
        rows = iter(embed_codes(self.model, torch.cat(codes)) if codes else ())
        yield from (next(rows) if result is None else result for result in results)

    def _add(self, entry: Entry, row: Tensor) -> None:
        if self.free:
            number = heapq.heappop(self.free)
            self.entries[number] = entry
        else:
            number = len(self.entries)
            self.entries.append(entry)
        self.vectors.add([number], _numpy(row[None]))
        self.changed = True
        self.numbers[entry.path].append(number)


def _numpy(rows: Tensor) -> Rows:
    return np.ascontiguousarray(rows.numpy(), np.float32)
