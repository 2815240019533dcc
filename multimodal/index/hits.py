"""What a search finds: an entry with its source and its score."""

import html
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from multimodal.data.samples import Sample
from multimodal.data.shards import Shards
from multimodal.inference.values import picture_html
from multimodal.terminal import shown


@dataclass(frozen=True)
class Hit:
    """An image, or a piece of a text, that was found.

    Args:
        path: of the file, or of the shard folder.
        score: the cosine with the query, in [-1, 1]. Of a piece of a text see ``Index.search``.
        captions: of the image.
        key, split, number: of the sample in its shards. Empty: a file.
        text: of the piece.
        lines: the first and the last line of the piece in its file, from 1. Empty: an image.
    """

    path: Path
    score: float
    captions: tuple[str, ...] = ()
    key: str = ""
    split: str | None = None
    number: int | None = None
    text: str = ""
    lines: tuple[int, ...] = ()

    @property
    def source(self) -> str:
        """``FILE``, ``FILE:FIRST-LAST`` of a piece, or ``SHARDS:KEY`` of a sample."""
        return f"{self.path}{self._place}"

    @property
    def label(self) -> str:
        """The source without its folder, for prompts: ``NAME:FIRST-LAST``."""
        return shown(self.key or f"{self.path.name}{self._place}")

    @property
    def _place(self) -> str:
        if self.lines:
            return f":{self.lines[0]}-{self.lines[1]}"
        return f":{self.key}" if self.key else ""

    @property
    def words(self) -> str:
        """The text of the piece, or the captions of the image."""
        return self.text or "; ".join(self.captions)

    def to_json(self) -> dict[str, Any]:
        """``path`` and ``score``, and of the other fields those that are not empty."""
        names = ("captions", "key", "text", "lines")
        values = {name: getattr(self, name) for name in names if getattr(self, name)}
        return {"path": str(self.path), "score": round(self.score, 6), **values}

    def sample(self) -> tuple[Sample, bool]:
        """The sample of the shards, and whether it has codes in the place of an image.

        Raises:
            ValueError: if the shards have changed since they were indexed, or have gone.
        """
        assert self.number is not None
        try:
            shards = _shards(self.path, self.split)
            sample = shards[self.number]
        except (OSError, IndexError) as error:
            raise ValueError(f"{self.source}: no longer there: index it again") from error
        if sample.key != self.key:
            raise ValueError(f"{self.source}: no longer there: index it again")
        return sample, shards.encoding is not None

    def image(self) -> Path | bytes:
        """The image, as the methods of a model take it.

        Raises:
            ValueError: for a piece of a text, or a sample that has gone, or has only codes.
        """
        if self.lines:
            raise ValueError(f"{self.source}: a text, not an image")
        return self.path if self.number is None else self.sample()[0].image

    def _repr_html_(self) -> str:
        label = html.escape(shown(f"{self.score:.3f} {self.source} {self.words}"))
        if self.lines:
            return label
        try:
            return f"{picture_html(self.image())} {label}"
        except (ValueError, OSError):  # the file may be gone
            return label


@lru_cache(8)  # the first sample of a shard is read with the whole shard, to compare its hash
def _shards(path: Path, split: str | None) -> Shards:
    return Shards(path, split)
