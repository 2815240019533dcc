"""What can be indexed: folders of images or of text files, and shard folders."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from multimodal.data.formats.folders import SIDECARS, FolderListing, list_images, list_texts
from multimodal.data.samples import record_of
from multimodal.data.shards import MANIFEST, Shards
from multimodal.files import UnreadableFile, UnreadableText, decode_text, local_path, read_bytes
from multimodal.index.pieces import Piece, cut
from multimodal.inference.shard_jobs import check_codes_fit
from multimodal.model.checkpoint import ModelParts

MAX_TEXT = 1 << 26  # bytes of a text file
AUTO: Literal["auto"] = "auto"


@dataclass(frozen=True)
class Item:
    """A file or a sample of shards.

    Args:
        path: in the source, with /, or the key of a sample.
        sha256: of its bytes and of everything else that decides its entries.
        image: the bytes of an image, or its codes: int64[1, n].
        captions: of the image.
        pieces: of a text.
        number: of the sample in its shards.
    """

    path: str
    sha256: str
    image: bytes | Tensor | None = None
    captions: tuple[str, ...] = ()
    pieces: tuple[Piece, ...] = ()
    number: int | None = None


class Source(Protocol):
    """What ``open_source`` gives.

    Attributes:
        root: the folder.
        split: of shards.
        problems: what is left out, a line each.
        unreadable: folders in it that cannot be read now.
    """

    kind: Literal["images", "texts"]
    root: Path
    split: str | None
    problems: list[str]
    unreadable: list[Path]

    def __len__(self) -> int: ...

    def read(self) -> Iterator[tuple[str, Item | ValueError]]:
        """Each item by its path in order, or what is wrong with it."""


class Files:
    """The images of a folder with the captions beside them, or its text files in pieces."""

    split: str | None = None

    def __init__(
        self,
        root: Path,
        kind: Literal["images", "texts"],
        listing: FolderListing,
        model: ModelParts,
        piece_tokens: int,
    ) -> None:
        self.root, self.kind, self.listing = root, kind, listing
        self.problems = list(listing.complaints())
        self.unreadable = list(listing.unreadable)
        self.tokenizer, self.piece_tokens = model.text_tokenizer, piece_tokens

    def __len__(self) -> int:
        return len(self.listing.files)

    def read(self) -> Iterator[tuple[str, Item | ValueError]]:
        for path in self.listing.files:
            name = path.relative_to(self.root).as_posix()
            try:
                read = self._image if self.kind == "images" else self._text
                yield name, read(path, name)
            except ValueError as error:
                yield name, error

    def _image(self, path: Path, name: str) -> Item:
        data = read_bytes(path)
        texts = {
            suffix: read_bytes(beside)
            for suffix in SIDECARS
            if (beside := path.with_suffix(f".{suffix}")).is_file()
        }
        try:
            captions = tuple(record_of(texts)["captions"])
        except UnreadableText as error:
            raise UnreadableFile(path, f"its text is not readable ({error})") from error
        return Item(name, _sha256(data, *texts.values()), data, captions)

    def _text(self, path: Path, name: str) -> Item:
        data = read_bytes(path, MAX_TEXT)
        try:
            text = decode_text(data)
        except UnreadableText as error:
            raise UnreadableFile(path, str(error)) from error
        if "\0" in text:
            raise UnreadableFile(path, "not a text: it holds NUL")
        size = self.piece_tokens
        pieces = tuple(cut(text, lambda part: len(self.tokenizer.encode(part)), size))
        if not pieces:
            raise UnreadableFile(path, "no text in it")
        return Item(name, _sha256(data, str(size).encode()), pieces=pieces)


class Samples:
    """The images of a shard folder, or their codes, with captions."""

    kind: Literal["images", "texts"] = "images"

    def __init__(self, root: Path, split: str | None, model: ModelParts) -> None:
        self.root, self.split, self.problems = root, split, list[str]()
        self.unreadable = list[Path]()
        self.shards = Shards(root, split)
        check_codes_fit(model, self.shards)

    def __len__(self) -> int:
        return len(self.shards)

    def read(self) -> Iterator[tuple[str, Item | ValueError]]:
        for number, sample in enumerate(self.shards):  # a damaged shard ends the work
            try:
                image: bytes | Tensor
                if self.shards.encoding is None:
                    image = sample.image
                else:
                    image = torch.from_numpy(sample.codes[:1]).flatten(1)
                sha256 = _sha256(*sample.members.values(), str(number).encode())
                captions = tuple(sample.record["captions"])
                yield sample.key, Item(sample.key, sha256, image, captions, number=number)
            except ValueError as error:
                yield sample.key, error


def open_source(
    root: str | Path,
    model: ModelParts,
    *,
    kind: Literal["auto", "images", "texts"] = AUTO,
    split: str | None = None,
    piece_tokens: int = 64,
    outside: Path | None = None,
) -> Source:
    """What is in a folder.

    Args:
        kind: of files. ``auto`` is images if there are any, else texts.
        split: of shards. None: all of them.
        piece_tokens: of a piece of a text, at most.
        outside: a folder inside it to leave out.

    Raises:
        ValueError: if there is nothing to index.
    """
    root = local_path(root)
    if kind not in (AUTO, "images", "texts"):
        raise ValueError(f"kind={kind!r}: expected auto, images or texts")
    longest = model.network.config.transformer.max_position_embeddings - 4  # <bos> and its like
    if not 1 <= piece_tokens <= longest:
        raise ValueError(f"piece_tokens={piece_tokens}: expected 1 to {longest:,}")
    if (root / MANIFEST).is_file():
        if kind == "texts":
            raise ValueError(f"{root}: a shard folder, of which only images are indexed")
        return Samples(root, split, model)
    if split is not None:
        raise ValueError(f"{root}: not a shard folder, so it has no split {split!r}")
    if kind != "texts":
        try:
            return Files(root, "images", list_images(root, outside), model, piece_tokens)
        except ValueError:
            if kind == "images" or not root.is_dir():
                raise
    try:
        return Files(root, "texts", list_texts(root, outside), model, piece_tokens)
    except ValueError as error:
        if kind == "texts":
            raise
        raise ValueError(f"{root}: no images and no texts in it") from error


def _sha256(*parts: bytes) -> str:
    """Of all parts, each with its length before it."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
