"""The images of a build, made ready in parts: by any process, and none twice.

A part is some samples of a source. Its name is a hash of what it is made from (where its images
lie, their size and time, what is to be done with them), so a part that is there need not be made
again: not by a build that was killed and starts anew, nor by another rank.
"""

import base64
import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from multimodal.data.builder.cleaning import Cleaning
from multimodal.data.builder.records import Cell, Slice, SourceSample
from multimodal.data.images import Fit, fit_image, open_image, orientation, read_image_file
from multimodal.data.near_duplicates import THUMBNAIL_SIZE, ImageHash, hash_image
from multimodal.data.shards import file_sha256
from multimodal.files import atomic_file, write_json

_SUFFIX = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class ImageSettings:
    """What is done with each image: see ``multimodal.data.builder.build.build``."""

    image_size: int | None
    fit: Fit
    quality: int
    min_side: int = 0
    max_aspect_ratio: float = 0.0
    hash_images: bool = False


@dataclass(frozen=True)
class ImageFile:
    """An image file as it goes into a shard."""

    suffix: str
    data: bytes
    image_hash: ImageHash | None = None


@dataclass(frozen=True)
class BadImage:
    reason: str
    detail: str


@dataclass(frozen=True)
class ImagePart:
    """Samples (their records are not needed) whose images go to ``folder``."""

    folder: Path
    settings: ImageSettings
    samples: tuple[SourceSample, ...]

    @cached_property
    def name(self) -> str:
        inputs = [asdict(self.settings), [_inputs_of(sample) for sample in self.samples]]
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]

    @property
    def marker(self) -> Path:
        """There is one as soon as the part is whole."""
        return self.folder / f"{self.name}.json"

    @property
    def files(self) -> Path:
        """All image files, one after the other."""
        return self.folder / f"{self.name}.bin"

    def done(self) -> bool:
        return self.marker.is_file()


def _inputs_of(sample: SourceSample) -> list[Any]:
    inputs: list[Any] = [sample.name]
    for image in sample.images:
        path = image if isinstance(image, Path) else image.path
        inputs.append(os.fsencode(path).hex())
        if isinstance(image, Slice):
            inputs += [image.offset, image.size]
        elif isinstance(image, Cell):
            inputs += [image.group, image.row, image.column]
        try:
            stat = path.stat()
            inputs += [stat.st_size, stat.st_mtime_ns]
        except (OSError, ValueError) as error:  # the latter: a NUL in the name
            inputs.append(str(error))
    return inputs


def make_part(part: ImagePart) -> ImagePart:
    """Make a part, unless it is there and whole (a machine that lost power may have lost data)."""
    if part.done() and _is_complete(part):
        return part
    part.folder.mkdir(parents=True, exist_ok=True)
    entries: list[list[dict[str, Any]]] = []
    with atomic_file(part.files, shared=True) as temporary, open(temporary, "wb") as file:
        for sample in part.samples:
            images = [make_image(sample.name, image, part.settings) for image in sample.images]
            entries.append([_entry(image) for image in images])
            file.writelines(image.data for image in images if isinstance(image, ImageFile))
    content = {"sha256": file_sha256(part.files), "samples": entries}
    write_json(part.marker, content, shared=True)
    return part


def _is_complete(part: ImagePart) -> bool:
    try:
        expected = json.loads(part.marker.read_text("utf-8"))["sha256"]
        return bool(file_sha256(part.files) == expected)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _entry(image: ImageFile | BadImage) -> dict[str, Any]:
    """What the marker says of an image."""
    if isinstance(image, BadImage):
        return asdict(image)
    entry: dict[str, Any] = {"suffix": image.suffix, "size": len(image.data)}
    if (seen := image.image_hash) is not None:
        small = base64.b64encode(seen.small.tobytes()).decode()
        entry |= {"exact": seen.exact, "views": seen.views.tolist(), "small": small}
    return entry


def read_part(part: ImagePart) -> Iterator[list[ImageFile] | BadImage]:
    """For each sample of a part that was made its images, or what is wrong with one of them."""
    with open(part.files, "rb") as file:
        for entries in json.loads(part.marker.read_text("utf-8"))["samples"]:
            images = [_from_entry(entry, file) for entry in entries]
            good = [image for image in images if isinstance(image, ImageFile)]
            bad = [image for image in images if isinstance(image, BadImage)]
            yield bad[0] if bad else good


def _from_entry(entry: dict[str, Any], file: BinaryIO) -> ImageFile | BadImage:
    if "reason" in entry:
        return BadImage(**entry)
    seen = None
    if "exact" in entry:
        small = np.frombuffer(base64.b64decode(entry["small"]), np.uint8)
        views = np.array(entry["views"], np.uint64)
        seen = ImageHash(entry["exact"], views, small.reshape(THUMBNAIL_SIZE, THUMBNAIL_SIZE, 3))
    return ImageFile(entry["suffix"], file.read(entry["size"]), seen)


def make_image(
    name: str, source: Path | Slice | Cell, settings: ImageSettings
) -> ImageFile | BadImage:
    """The file that goes into the shard; a good one stays as it is, byte for byte."""
    try:
        data = read_image_file(source) if isinstance(source, Path) else source.read()
        image = open_image(data, name=name)
        with Image.open(io.BytesIO(data)) as original:
            suffix = _SUFFIX.get(original.format or "", "jpg")
            plain = (
                original.format in _SUFFIX
                and original.mode == "RGB"
                and not original.has_transparency_data
                and getattr(original, "n_frames", 1) == 1
                and orientation(original) == 1
            )
    except ValueError as error:
        return BadImage("unreadable image", str(error).removeprefix(f"{name}: "))
    limits = Cleaning(min_side=settings.min_side, max_aspect_ratio=settings.max_aspect_ratio)
    if fault := limits.fault_of_size(*image.size):
        return BadImage(*fault)
    if settings.image_size is not None or not plain:
        if settings.image_size is not None:
            image = fit_image(image, settings.image_size, settings.fit)
        buffer = io.BytesIO()
        if suffix == "png":
            image.save(buffer, "PNG")
        else:
            suffix = "jpg"
            image.save(buffer, "JPEG", quality=settings.quality)
        data = buffer.getvalue()
    return ImageFile(suffix, data, hash_image(data, name) if settings.hash_images else None)
