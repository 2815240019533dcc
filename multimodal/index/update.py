"""What brings an index up to date with a source: by the hash of each file or sample.

An update works in memory, and saves a whole index every minute, between two files. So one that was
interrupted leaves an index that can be used, and the next one goes on from there.
"""

import heapq
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multimodal.index.sources import Item, Source
from multimodal.index.storage import Entry, IndexConfig, Root, read_files, write_index
from multimodal.index.vectors import as_rows
from multimodal.inference.codec import encode_to_read, read_images
from multimodal.inference.embedding import embed_codes, embed_lines
from multimodal.model.checkpoint import ModelParts

SAVE_INTERVAL = 60.0  # seconds of work that an interruption may cost, or a file that takes longer
SAVE_SHARE = 0.05  # of the time, at most, is spent on saving
_Read = tuple[str, Item | ValueError]  # an item by its path, or what is wrong with it


@dataclass
class Changes:
    """What an update changed: numbers of files or samples. problems: those that are left out."""

    added: int = 0
    replaced: int = 0
    removed: int = 0
    unchanged: int = 0
    problems: int = 0


class Update:
    """The rows and entries of an index in memory, and one source that they follow."""

    def __init__(
        self, folder: Path, model: ModelParts, config: IndexConfig, source: Source, batch_size: int
    ) -> None:
        self.folder, self.model, self.source, self.batch_size = folder, model, source, batch_size
        self.vectors, entries = read_files(folder, config, verify=True, writable=True)
        self.entries = list(entries)
        self.free = [number for number, entry in enumerate(self.entries) if entry is None]
        if len(self.entries) - len(self.free) != config.count:
            raise ValueError(f"{folder}: damaged: expected {config.count:,} entries")
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
        for batch in self._batches(progress(self.source.read(), len(self.source))):
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
            if path not in seen and not self._is_hidden(path):
                self._remove(path)
                changes.removed += 1
        return changes

    def _batches(self, items: Iterable[_Read]) -> Iterator[list[_Read]]:
        """Items, as many as have ``batch_size`` images or pieces. One may have more by itself."""
        batch, count = list[_Read](), 0
        for path, item in items:
            batch.append((path, item))
            count += max(1, len(item.pieces)) if isinstance(item, Item) else 1
            if count >= self.batch_size:
                yield batch
                batch, count = [], 0
        if batch:
            yield batch

    def save(self) -> IndexConfig:
        return write_index(self.folder, self.config, self.vectors, self.entries)

    def _sha256(self, path: str) -> str | None:
        """Of an item as it was indexed."""
        numbers = self.numbers.get(path)
        entry = self.entries[numbers[0]] if numbers else None
        return None if entry is None else entry.sha256

    def _is_hidden(self, path: str) -> bool:
        """Whether an item is in a folder that cannot be read now, so that it may still be there."""
        file = self.source.root / path
        return any(file.is_relative_to(folder) for folder in self.source.unreadable)

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
            elif item.image is not None:
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
        self.vectors.add([number], as_rows(row[None]))
        self.changed = True
        self.numbers[entry.path].append(number)
