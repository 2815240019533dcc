"""Copies of images in shard folders, within a split and between splits or folders."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from multimodal.data.documents import images_in
from multimodal.data.near_duplicates import ImageHash, find_copies, hash_image
from multimodal.data.samples import Sample
from multimodal.data.shards import Shards, splits_of

Located: TypeAlias = tuple[Path, str, Sample]  # folder, split, sample


class Location(NamedTuple):
    """The sample that an image belongs to."""

    folder: str
    split: str
    key: str


@dataclass(frozen=True)
class Duplicate:
    """Two images that are copies. ``kind`` is exact or near, ``similarity`` is in [-1, 1]."""

    kind: str
    similarity: float
    first: Location
    second: Location

    @property
    def is_leak(self) -> bool:
        """Whether the copies are in different splits or folders."""
        return self.first[:2] != self.second[:2]

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "alike": self.similarity,
            "first": self.first._asdict(),
            "second": self.second._asdict(),
        }


@dataclass
class HashedImages:
    """All readable images of some folders: ``hashes[i]`` is of the image at ``locations[i]``."""

    locations: list[Location]
    hashes: list[ImageHash]
    unreadable: int = 0


def hash_folders(
    folders: Sequence[Path],
    *,
    on_problem: Callable[[str], object] = lambda problem: None,
    progress: Callable[[Iterable[Located], int], Iterable[Located]] = lambda samples, _: samples,
) -> HashedImages:
    """Hash every image of some shard folders.

    Args:
        folders: shard folders with images, not codes.
        on_problem: is called with one line for each sample that cannot be read.
        progress: wraps the stream of samples. Its second argument is their number.

    Raises:
        ValueError: if a folder holds codes, or if no image can be read.
    """
    opened = [
        (folder, split, Shards(folder, split)) for folder in folders for split in splits_of(folder)
    ]
    for folder, _, shards in opened:
        if shards.encoding is not None:
            raise ValueError(f"{folder}: holds codes, not images")
    images = HashedImages([], [])
    samples = ((folder, split, sample) for folder, split, shards in opened for sample in shards)
    for folder, split, sample in progress(samples, sum(len(shards) for _, _, shards in opened)):
        try:
            for data in images_in(sample):
                images.hashes.append(hash_image(data, f"sample {sample.key}"))
                images.locations.append(Location(str(folder), split, sample.key))
        except ValueError as error:
            images.unreadable += 1
            on_problem(f"{folder}: {error}")
    if not images.hashes:
        raise ValueError("no image could be read")
    return images


def find_duplicates(
    images: HashedImages, on_image: Callable[[int], object] = lambda count: None
) -> list[Duplicate]:
    """All pairs of copies, in the order of the images. ``on_image`` is called for each image."""
    return [
        Duplicate(
            pair.kind,
            pair.similarity,
            images.locations[pair.first],
            images.locations[pair.second],
        )
        for pair in find_copies(images.hashes, on_image)
    ]
