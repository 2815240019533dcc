"""Prepare the images of a build in parts. Any process can make a part, and none is made twice.

A part is a group of samples of a source. Its name is a hash of its inputs: the paths of the images,
their sizes and times, and the settings. So a build that was killed and starts again finds the parts
it has, and a rank finds those of other ranks.
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

from multimodal.data.builder.cleaning import Cleaning
from multimodal.data.builder.records import Blob, Cell, ImagePlace, Slice, SourceSample
from multimodal.data.images import Fit, fit_image, open_header, open_image, orientation
from multimodal.data.near_duplicates import THUMBNAIL_SIZE, ImageHash, hash_image
from multimodal.data.samples import plain
from multimodal.data.shards import file_sha256
from multimodal.files import UnreadableFile, atomic_file, read_bytes, read_json, write_json

# What training reads fastest is stored as it is. Other files without loss become PNG, and others
# with loss (AVIF, HEIC) JPEG.
_STORED = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_LOSSLESS = ("PNG", "GIF", "BMP", "TIFF")


@dataclass(frozen=True)
class ImageSettings:
    """How each image is prepared: see ``multimodal.data.builder.build.build``."""

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
    """An image that cannot be used, and why."""

    reason: str
    detail: str


@dataclass(frozen=True)
class ImagePart:
    """Samples whose images are prepared together, in ``folder``. Their records are not needed."""

    folder: Path
    settings: ImageSettings
    samples: tuple[SourceSample, ...]

    @cached_property
    def name(self) -> str:
        inputs = [asdict(self.settings), [_inputs_of(sample) for sample in self.samples]]
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]

    @property
    def marker(self) -> Path:
        """Describes the images. It exists when the part is complete."""
        return self.folder / f"{self.name}.json"

    @property
    def files(self) -> Path:
        """All image files of the part, joined."""
        return self.folder / f"{self.name}.bin"

    def done(self) -> bool:
        return self.marker.is_file()


def _inputs_of(sample: SourceSample) -> list[Any]:
    """Everything that the prepared images of a sample depend on, apart from the settings."""
    inputs: list[Any] = [sample.name]
    for image in sample.images:
        if isinstance(image, Blob):
            inputs.append(hashlib.sha256(image.data).hexdigest())
            continue
        path = image if isinstance(image, Path) else image.path
        inputs.append(os.fsencode(path).hex())
        if isinstance(image, Slice):
            inputs += [image.offset, image.size]
        elif isinstance(image, Cell):
            inputs += [image.group, image.row, image.column, os.fsencode(image.root).hex()]
        try:
            stat = path.stat()
            inputs += [stat.st_size, stat.st_mtime_ns]
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            inputs.append(str(error))
    return inputs


def make_part(part: ImagePart) -> ImagePart:
    """Make a part, unless it is complete. Its hash is checked: a power loss may have lost data."""
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
        expected = read_json(part.marker)["sha256"]
        return file_sha256(part.files) == expected
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _entry(image: ImageFile | BadImage) -> dict[str, Any]:
    """The entry of an image in the marker."""
    if isinstance(image, BadImage):
        return asdict(image)
    entry: dict[str, Any] = {"suffix": image.suffix, "size": len(image.data)}
    if (hashed := image.image_hash) is not None:
        small = base64.b64encode(hashed.small.tobytes()).decode()
        entry |= {"exact": hashed.exact, "views": hashed.views.tolist(), "small": small}
    return entry


def read_part(part: ImagePart) -> Iterator[list[ImageFile] | BadImage]:
    """For each sample of a finished part: its images, or the first of them that is bad."""
    with open(part.files, "rb") as file:
        for entries in read_json(part.marker)["samples"]:
            images = [_from_entry(entry, file) for entry in entries]
            good = [image for image in images if isinstance(image, ImageFile)]
            bad = [image for image in images if isinstance(image, BadImage)]
            yield bad[0] if bad else good


def _from_entry(entry: dict[str, Any], file: BinaryIO) -> ImageFile | BadImage:
    if "reason" in entry:
        return BadImage(**entry)
    image_hash = None
    if "exact" in entry:
        small = np.frombuffer(base64.b64decode(entry["small"]), np.uint8)
        views = np.array(entry["views"], np.uint64)
        image_hash = ImageHash(
            entry["exact"], views, small.reshape(THUMBNAIL_SIZE, THUMBNAIL_SIZE, 3)
        )
    return ImageFile(entry["suffix"], file.read(entry["size"]), image_hash)


def make_image(name: str, source: ImagePlace, settings: ImageSettings) -> ImageFile | BadImage:
    """The image file for the shard.

    A JPEG, PNG or WebP that is RGB, upright and not animated is not encoded again, unless the
    settings ask for another size. Other formats become PNG if they are without loss, else JPEG.
    """
    try:
        data = read_bytes(source) if isinstance(source, Path) else source.read()
        image = open_image(data, name=name)
        with open_header(data) as original:
            kind = original.format or ""
            suffix = _STORED.get(kind, "png" if kind in _LOSSLESS else "jpg")
            as_it_is = (
                kind in _STORED
                and original.mode == "RGB"
                and not original.has_transparency_data
                and getattr(original, "n_frames", 1) == 1
                and orientation(original) == 1
            )
    except UnreadableFile as error:
        return BadImage("unreadable image", error.reason)
    except ValueError as error:
        detail = str(error).removeprefix(f"{name}: ").removeprefix(f"{source}: ")
        return BadImage("unreadable image", plain(detail))  # it may name a path that is not UTF-8
    limits = Cleaning(min_side=settings.min_side, max_aspect_ratio=settings.max_aspect_ratio)
    if fault := limits.fault_of_size(*image.size):
        return BadImage(*fault)
    if settings.image_size is not None or not as_it_is:
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
