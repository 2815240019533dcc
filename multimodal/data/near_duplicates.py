"""Copies among images: the same file, or the same picture encoded again, resized, slightly cropped.

A perceptual hash (the signs of the lowest frequencies of a cosine transform, as pHash) finds
candidates, also between an image and crops of another; then the pictures themselves are compared,
in colour, shifted and scaled a little, so that two photos of one kind are not taken for one.

For photos. Of drawings, charts and pages, small pictures of different ones are alike: there, only
exact copies can be trusted.

Shapes: N images, V views of each, S pixels of a side of the small pictures that are compared.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from multimodal.data.images import open_image

THUMBNAIL_SIZE, COMPARED_SIZE = 48, 24  # pixels of a side: of the small picture that is kept, and S
HASHED_SIZE = 32  # pixels of a side from which a hash is made
FREQUENCIES = 8  # frequencies of a side; the mean is left out
MAX_HASH_DISTANCE = 14  # bits of 63 that may differ
# Of 300 copies among 1,500 photos all had 0.97 or more, no other pair of candidates above 0.90.
MIN_SIMILARITY = 0.935
CROP_SHARES = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85)  # sides of a crop, as a share of the whole
CROP_POSITIONS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a crop, from left to right and from top to bottom
Views = NDArray[np.uint64]


@dataclass(frozen=True)
class ImageHash:
    """What is kept of an image: exact, of its pixels; views: uint64[V], hashes of it and of crops;
    small: uint8[THUMBNAIL_SIZE, THUMBNAIL_SIZE, 3], RGB."""

    exact: str
    views: Views
    small: NDArray[np.uint8]


@dataclass(frozen=True)
class CopyPair:
    """Two images that are one: first and second by their numbers, first < second; kind: exact or
    near; similarity: their correlation."""

    first: int
    second: int
    kind: str
    similarity: float


def hash_image(data: bytes, name: str = "image") -> ImageHash:
    """Errors: ``ValueError`` for what is no image."""
    image = open_image(data, name=name)
    exact = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    grey = image.convert("L")
    small = np.asarray(image.resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.LANCZOS))
    size = (HASHED_SIZE, HASHED_SIZE)
    views = [
        perceptual_hash(grey.resize(size, Image.Resampling.LANCZOS, box=box))
        for box in _boxes(*grey.size)
    ]
    return ImageHash(exact, np.array(views, np.uint64), small)


def _boxes(width: int, height: int) -> Iterator[tuple[float, float, float, float]]:
    """The whole, and crops of nine tenths: one in the middle and one in each corner."""
    yield 0, 0, width, height
    for x, y in ((0.5, 0.5), (0, 0), (0, 1), (1, 0), (1, 1)):
        left, top = 0.1 * width * x, 0.1 * height * y
        yield left, top, left + 0.9 * width, top + 0.9 * height


def perceptual_hash(grey: Image.Image) -> int:
    """63 bits: which of the lowest frequencies are above their median."""
    low = (_COSINES @ np.asarray(grey, np.float64) @ _COSINES.T).ravel()[1:]
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


_COSINES = np.cos(
    np.pi / HASHED_SIZE * np.outer(np.arange(FREQUENCIES), np.arange(HASHED_SIZE) + 0.5)
)


def find_copies(
    images: list[ImageHash], on_rows: Callable[[int], object] = lambda count: None
) -> list[CopyPair]:
    """Every pair of copies, in order. Of the same picture many times: each with the first of them.

    Hashes are compared all with all: time grows with the square of the number of images.
    """
    found = {pair: CopyPair(*pair, "exact", 1.0) for pair in _exact(images)}
    repeated = {second for _, second in found}
    for one, others in _candidates(images, on_rows):
        if one in repeated:
            continue
        for other in others:
            pair = (min(one, other), max(one, other))
            if other in repeated or other == one or pair in found:
                continue
            if (similarity := picture_similarity(images[one], images[other])) >= MIN_SIMILARITY:
                found[pair] = CopyPair(*pair, "near", similarity)
    return [found[pair] for pair in sorted(found)]


class CopyIndex:
    """Images met so far, so that a copy of one can be told when it comes."""

    def __init__(self) -> None:
        self._count = 0
        self._exact: dict[str, int] = {}
        self._images: list[ImageHash] = []
        self._numbers: list[int] = []
        self._views = np.zeros((0, 1), np.uint64)  # grows by doubling; rows beyond are not filled

    def add(self, image: ImageHash, near: bool = True) -> CopyPair | None:
        """The earliest image that this is a copy of, by its number in the order of calls.

        None for one that is no copy, and is kept. A copy has a number too, but is not kept.
        near: look for more than exact copies.
        """
        number = self._count
        self._count += 1
        if (earlier := self._exact.get(image.exact)) is not None:
            return CopyPair(earlier, number, "exact", 1.0)
        if not near:
            self._exact[image.exact] = number
            return None
        kept = len(self._images)
        apart = np.minimum(
            np.bitwise_count(self._views[:kept] ^ image.views[0]).min(1, initial=64),
            np.bitwise_count(self._views[:kept, :1] ^ image.views).min(1, initial=64),
        )
        for place in np.flatnonzero(apart <= MAX_HASH_DISTANCE).tolist():
            if (similarity := picture_similarity(image, self._images[place])) >= MIN_SIMILARITY:
                return CopyPair(self._numbers[place], number, "near", similarity)
        self._keep(image, number)
        return None

    def _keep(self, image: ImageHash, number: int) -> None:
        kept = len(self._images)
        if kept == len(self._views):
            views = np.zeros((max(64, 2 * kept), len(image.views)), np.uint64)
            views[:kept] = self._views[:kept]
            self._views = views
        self._views[kept] = image.views
        self._images.append(image)
        self._numbers.append(number)
        self._exact[image.exact] = number


def _exact(images: Iterable[ImageHash]) -> Iterator[tuple[int, int]]:
    """Each image with the first that is the same."""
    first: dict[str, int] = {}
    for number, one in enumerate(images):
        if (earlier := first.setdefault(one.exact, number)) != number:
            yield earlier, number


def _candidates(
    images: list[ImageHash], on_rows: Callable[[int], object]
) -> Iterator[tuple[int, list[int]]]:
    """Each image with those whose hash is near that of a view of it."""
    if not images:
        return
    views = np.stack([one.views for one in images])
    wholes = np.ascontiguousarray(views[:, 0])
    for number, mine in enumerate(views):
        apart = np.bitwise_count(mine[:, None] ^ wholes).min(0)
        yield number, np.flatnonzero(apart <= MAX_HASH_DISTANCE).tolist()
        on_rows(1)


def picture_similarity(one: ImageHash, other: ImageHash) -> float:
    """The largest correlation, in [-1, 1], of either picture with the other or a crop of it."""
    return max(
        float((_crops(one.small) @ _standard(other.small)).max()),
        float((_crops(other.small) @ _standard(one.small)).max()),
    )


def _crops(small: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float32[crops, S * S * 3]: the picture and crops of it, standardised"""
    image, crops = Image.fromarray(small), []
    for share in CROP_SHARES:
        for x, y in [(0.5, 0.5)] if share == 1 else product(CROP_POSITIONS, CROP_POSITIONS):
            left, top = (1 - share) * THUMBNAIL_SIZE * x, (1 - share) * THUMBNAIL_SIZE * y
            box = (left, top, left + share * THUMBNAIL_SIZE, top + share * THUMBNAIL_SIZE)
            view = image.resize((COMPARED_SIZE, COMPARED_SIZE), Image.Resampling.BILINEAR, box=box)
            crops.append(_scaled(np.asarray(view)))
    return np.stack(crops)


def _standard(small: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float32[S * S * 3]: the whole picture, standardised"""
    return _scaled(
        np.asarray(
            Image.fromarray(small).resize((COMPARED_SIZE, COMPARED_SIZE), Image.Resampling.BOX)
        )
    )


def _scaled(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Flat, of mean 0 and length 1; of an even picture all zeros: it is like none.

    One mean for all colours, or a red and a blue thing would be the same.
    """
    flat = picture.astype(np.float32).ravel()
    flat -= flat.mean()
    length = float(np.linalg.norm(flat))
    scaled: NDArray[np.float32] = flat / length if length > 1e-3 else np.zeros_like(flat)
    return scaled
