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
from multimodal.data.builder.records import Cell, Found, Slice
from multimodal.data.images import Fit, fit_image, open_image, orientation, read_image_file
from multimodal.data.near_duplicates import KEPT, Fingerprint, fingerprint
from multimodal.data.shards import file_sha256, write_json

_SUFFIX = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class ImageWork:
    """What is done with each image: see ``multimodal.data.builder.build.build``."""

    image_size: int | None
    fit: Fit
    quality: int
    min_side: int = 0
    max_aspect_ratio: float = 0.0
    fingerprints: bool = False


@dataclass(frozen=True)
class Made:
    """An image file as it goes into a shard."""

    suffix: str
    data: bytes
    fingerprint: Fingerprint | None = None


@dataclass(frozen=True)
class Unusable:
    reason: str
    detail: str


@dataclass(frozen=True)
class Part:
    """Samples (their records are not needed) whose images go to ``folder``."""

    folder: Path
    work: ImageWork
    samples: tuple[Found, ...]

    @cached_property
    def name(self) -> str:
        made_from = [asdict(self.work), [_made_from(sample) for sample in self.samples]]
        return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]

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


def _made_from(sample: Found) -> list[Any]:
    made_from: list[Any] = [sample.name]
    for image in sample.images:
        path = image if isinstance(image, Path) else image.path
        made_from.append(os.fsencode(path).hex())
        if isinstance(image, Slice):
            made_from += [image.offset, image.size]
        elif isinstance(image, Cell):
            made_from += [image.group, image.row, image.column]
        try:
            stat = path.stat()
            made_from += [stat.st_size, stat.st_mtime_ns]
        except (OSError, ValueError) as error:  # the latter: a NUL in the name
            made_from.append(str(error))
    return made_from


def make_part(part: Part) -> Part:
    """Make a part, unless it is there and whole (a machine that lost power may have lost data)."""
    if part.done() and _whole(part):
        return part
    part.folder.mkdir(parents=True, exist_ok=True)
    entries: list[list[dict[str, Any]]] = []
    temporary = part.files.with_name(f".{part.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        for sample in part.samples:
            images = [make_image(sample.name, image, part.work) for image in sample.images]
            entries.append([_entry(made) for made in images])
            file.writelines(made.data for made in images if isinstance(made, Made))
    temporary.replace(part.files)
    write_json(part.marker, {"sha256": file_sha256(part.files), "samples": entries})
    return part


def _whole(part: Part) -> bool:
    try:
        wanted = json.loads(part.marker.read_text("utf-8"))["sha256"]
        return bool(file_sha256(part.files) == wanted)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _entry(made: Made | Unusable) -> dict[str, Any]:
    """What the marker says of an image."""
    if isinstance(made, Unusable):
        return asdict(made)
    entry: dict[str, Any] = {"suffix": made.suffix, "size": len(made.data)}
    if (seen := made.fingerprint) is not None:
        small = base64.b64encode(seen.small.tobytes()).decode()
        entry |= {"exact": seen.exact, "views": seen.views.tolist(), "small": small}
    return entry


def read_part(part: Part) -> Iterator[list[Made] | Unusable]:
    """For each sample of a part that was made its images, or what is wrong with one of them."""
    with open(part.files, "rb") as file:
        for entries in json.loads(part.marker.read_text("utf-8"))["samples"]:
            images = [_made(entry, file) for entry in entries]
            made = [image for image in images if isinstance(image, Made)]
            bad = [image for image in images if isinstance(image, Unusable)]
            yield bad[0] if bad else made


def _made(entry: dict[str, Any], file: BinaryIO) -> Made | Unusable:
    if "reason" in entry:
        return Unusable(**entry)
    seen = None
    if "exact" in entry:
        small = np.frombuffer(base64.b64decode(entry["small"]), np.uint8)
        views = np.array(entry["views"], np.uint64)
        seen = Fingerprint(entry["exact"], views, small.reshape(KEPT, KEPT, 3))
    return Made(entry["suffix"], file.read(entry["size"]), seen)


def make_image(name: str, source: Path | Slice | Cell, work: ImageWork) -> Made | Unusable:
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
        return Unusable("unreadable image", str(error).removeprefix(f"{name}: "))
    limits = Cleaning(min_side=work.min_side, max_aspect_ratio=work.max_aspect_ratio)
    if fault := limits.fault_of_size(*image.size):
        return Unusable(*fault)
    if work.image_size is not None or not plain:
        if work.image_size is not None:
            image = fit_image(image, work.image_size, work.fit)
        buffer = io.BytesIO()
        if suffix == "png":
            image.save(buffer, "PNG")
        else:
            suffix = "jpg"
            image.save(buffer, "JPEG", quality=work.quality)
        data = buffer.getvalue()
    return Made(suffix, data, fingerprint(data, name) if work.fingerprints else None)
