"""Find copies among images: the same pixels, or a picture encoded again, resized, slightly cropped.

A perceptual hash finds candidates: the signs of the lowest frequencies of a cosine transform, as in
pHash. It compares each image with the others and with crops of them. Then small versions of the
pictures are compared, in colour, shifted and scaled a little. So two photos of the same kind of
thing are not taken for copies.

Near copies are for photos. Different drawings, charts and pages look alike when they are small, so
trust only exact copies there.

Shapes: V views of an image, S = COMPARED_SIZE.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from multimodal.data.images import open_image

THUMBNAIL_SIZE = 48  # pixels of a side, of the small picture in an ImageHash
COMPARED_SIZE = 24  # pixels of a side, of the pictures that are correlated
HASHED_SIZE = 32  # pixels of a side, of the grey picture that is hashed
FREQUENCIES = 8  # of each axis of the cosine transform; the mean is left out
MAX_HASH_DISTANCE = 14  # bits of 63 that may differ
# Among 1,500 photos, 300 copies had 0.97 or more, and no other pair of candidates above 0.90.
MIN_SIMILARITY = 0.935
CROP_SHARES = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85)  # side of a crop / side of the picture
CROP_POSITIONS = (0.0, 0.25, 0.5, 0.75, 1.0)  # 0: left or top, 1: right or bottom
Views = NDArray[np.uint64]


@dataclass(frozen=True)
class ImageHash:
    """What an image looks like.

    Attributes:
        exact: SHA-256 of size and pixels.
        views: uint64[V], perceptual hashes of the image (first) and of crops.
        small: uint8[THUMBNAIL_SIZE, THUMBNAIL_SIZE, 3], RGB.
    """

    exact: str
    views: Views
    small: NDArray[np.uint8]


@dataclass(frozen=True)
class CopyPair:
    """Two images that are copies.

    Attributes:
        first, second: numbers of the images, first < second.
        kind: exact or near.
        similarity: their correlation, in [-1, 1].
    """

    first: int
    second: int
    kind: str
    similarity: float


def hash_image(data: bytes, name: str = "image") -> ImageHash:
    """Hash one image.

    Args:
        data: the bytes of an image file.
        name: what errors call it.

    Raises:
        ValueError: if it is not a readable image.
    """
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
    """Boxes of the full image, and of crops of nine tenths: in the middle and in each corner."""
    yield 0, 0, width, height
    for x, y in ((0.5, 0.5), (0, 0), (0, 1), (1, 0), (1, 1)):
        left, top = 0.1 * width * x, 0.1 * height * y
        yield left, top, left + 0.9 * width, top + 0.9 * height


def perceptual_hash(grey: Image.Image) -> int:
    """63 bits: which of the lowest frequencies are above their median.

    ``grey`` has HASHED_SIZE x HASHED_SIZE pixels.
    """
    low = (_COSINES @ np.asarray(grey, np.float64) @ _COSINES.T).ravel()[1:]
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


_COSINES = np.cos(
    np.pi / HASHED_SIZE * np.outer(np.arange(FREQUENCIES), np.arange(HASHED_SIZE) + 0.5)
)


def find_copies(
    images: list[ImageHash], on_rows: Callable[[int], object] = lambda count: None
) -> list[CopyPair]:
    """Find all pairs of copies.

    If a picture occurs many times, each exact copy forms a pair with the first one. Hashes are
    compared all with all, so time grows with the square of the number of images.

    Args:
        images: hashes of N images.
        on_rows: is called with the number of images that were compared, to show progress.

    Returns:
        The pairs, sorted by the numbers of the images.
    """
    pairs = {pair: CopyPair(*pair, "exact", 1.0) for pair in _exact_pairs(images)}
    repeated = {second for _, second in pairs}
    for first, candidates in _candidates(images, on_rows):
        if first in repeated:
            continue
        for second in candidates:
            pair = (min(first, second), max(first, second))
            if second in repeated or second == first or pair in pairs:
                continue
            similarity = picture_similarity(images[first], images[second])
            if similarity >= MIN_SIMILARITY:
                pairs[pair] = CopyPair(*pair, "near", similarity)
    return [pairs[pair] for pair in sorted(pairs)]


class CopyIndex:
    """Finds copies in a stream of images."""

    def __init__(self) -> None:
        self._count = 0
        self._exact: dict[str, int] = {}
        self._images: list[ImageHash] = []
        self._numbers: list[int] = []
        self._views = np.zeros((0, 1), np.uint64)  # the first len(_images) rows are filled

    def add(self, image: ImageHash, near: bool = True) -> CopyPair | None:
        """Add the next image, and look for the earlier image that it is a copy of.

        Calls are numbered from 0. A copy has a number too, but later images are not compared with
        it.

        Args:
            image: the next image.
            near: whether to look for near copies too.

        Returns:
            The pair of the earlier image and this one, or None if it is not a copy.
        """
        number = self._count
        self._count += 1
        if (earlier := self._exact.get(image.exact)) is not None:
            return CopyPair(earlier, number, "exact", 1.0)
        if not near:
            self._exact[image.exact] = number
            return None
        count = len(self._images)
        distances = np.minimum(
            np.bitwise_count(self._views[:count] ^ image.views[0]).min(1, initial=64),
            np.bitwise_count(self._views[:count, :1] ^ image.views).min(1, initial=64),
        )
        for row in np.flatnonzero(distances <= MAX_HASH_DISTANCE).tolist():
            similarity = picture_similarity(image, self._images[row])
            if similarity >= MIN_SIMILARITY:
                return CopyPair(self._numbers[row], number, "near", similarity)
        self._keep(image, number)
        return None

    def _keep(self, image: ImageHash, number: int) -> None:
        count = len(self._images)
        if count == len(self._views):
            views = np.zeros((max(64, 2 * count), len(image.views)), np.uint64)
            views[:count] = self._views[:count]
            self._views = views
        self._views[count] = image.views
        self._images.append(image)
        self._numbers.append(number)
        self._exact[image.exact] = number


def _exact_pairs(images: Iterable[ImageHash]) -> Iterator[tuple[int, int]]:
    """Each repeated image, after the first image with the same pixels."""
    first: dict[str, int] = {}
    for number, image in enumerate(images):
        if (earlier := first.setdefault(image.exact, number)) != number:
            yield earlier, number


def _candidates(
    images: list[ImageHash], on_rows: Callable[[int], object]
) -> Iterator[tuple[int, list[int]]]:
    """Each image with the images whose hash is near the hash of one of its views."""
    if not images:
        return
    views = np.stack([image.views for image in images])
    full = np.ascontiguousarray(views[:, 0])  # hashes of the images without crops
    for number, row in enumerate(views):
        distances = np.bitwise_count(row[:, None] ^ full).min(0)
        yield number, np.flatnonzero(distances <= MAX_HASH_DISTANCE).tolist()
        on_rows(1)


def picture_similarity(first: ImageHash, second: ImageHash) -> float:
    """The largest correlation, in [-1, 1], of one picture with the other or a crop of it."""
    return max(
        float((_crops(first.small) @ _full(second.small)).max()),
        float((_crops(second.small) @ _full(first.small)).max()),
    )


def _crops(small: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float32[crops, S * S * 3]: the picture and crops of it, standardised."""
    image, crops = Image.fromarray(small), []
    for share in CROP_SHARES:
        for x, y in [(0.5, 0.5)] if share == 1 else product(CROP_POSITIONS, CROP_POSITIONS):
            left, top = (1 - share) * THUMBNAIL_SIZE * x, (1 - share) * THUMBNAIL_SIZE * y
            box = (left, top, left + share * THUMBNAIL_SIZE, top + share * THUMBNAIL_SIZE)
            view = image.resize((COMPARED_SIZE, COMPARED_SIZE), Image.Resampling.BILINEAR, box=box)
            crops.append(_standardise(np.asarray(view)))
    return np.stack(crops)


def _full(small: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float32[S * S * 3]: the picture without a crop, standardised."""
    return _standardise(
        np.asarray(
            Image.fromarray(small).resize((COMPARED_SIZE, COMPARED_SIZE), Image.Resampling.BOX)
        )
    )


def _standardise(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Flatten to mean 0 and length 1.

    A picture of one colour becomes zeros: it is similar to nothing. All channels share one mean,
    otherwise a red thing and a blue thing would be the same.
    """
    flat = picture.astype(np.float32).ravel()
    flat -= flat.mean()
    length = float(np.linalg.norm(flat))
    return flat / length if length > 1e-3 else np.zeros_like(flat)
