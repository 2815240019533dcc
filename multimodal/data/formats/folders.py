"""The images in a folder, and what else is in it: nothing is left out in silence."""

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from multimodal.files import local_path

# What multimodal/data/images.py reads. If a sample has several, the first of this list counts.
IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "png", "webp", "jfif", "jpe"),
    *("gif", "bmp", "tif", "tiff", "avif", "heic", "heif"),
)
SIDECARS = ("txt", "json")  # texts beside an image, as `data build` reads them
MAX_NAMED = 10  # skipped files of one suffix that get a line each


@dataclass(frozen=True)
class ImageFolder:
    """What is in a folder and its subfolders. Hidden files are left out.

    Attributes:
        images: files with the suffix of an image, sorted by path.
        skipped: other files, and folders that cannot be read, sorted. A .txt or .json of an image's
            name belongs to the image.
    """

    images: list[Path]
    skipped: list[Path]

    def complaints(self) -> Iterator[str]:
        """A line for each file that is skipped. Many of one suffix are counted."""
        groups: dict[str, list[Path]] = defaultdict(list)
        for path in self.skipped:
            groups[path.suffix.lower()].append(path)
        for suffix, paths in sorted(groups.items()):
            kind = f"a {suffix} file" if suffix else "without a suffix"
            yield from (f"{path}: skipped, not an image ({kind})" for path in paths[:MAX_NAMED])
            if (more := len(paths) - MAX_NAMED) > 0:
                yield f"{more:,} more files skipped, not images ({kind})"


def list_images(folder: str | Path, outside: Path | None = None) -> ImageFolder:
    """The images of a folder and its subfolders. Links are followed, each folder is read once.

    Args:
        outside: a folder inside it to leave out.

    Raises:
        ValueError: if there is no such folder on this machine, or no image in it.
    """
    folder = local_path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    images, others = list[Path](), list[Path]()
    visited = {os.path.realpath(outside)} if outside else set[str]()
    unreadable: list[OSError] = []
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=unreadable.append):
        real = os.path.realpath(parent)
        folders[:] = [] if real in visited else sorted(f for f in folders if not f.startswith("."))
        for name in [] if real in visited else files:
            if not name.startswith("."):
                path = Path(parent, name)
                is_image = path.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES
                (images if is_image else others).append(path)
        visited.add(real)
    if not images:
        raise ValueError(f"{folder}: no images in it ({', '.join(IMAGE_SUFFIXES)})")
    stems = {path.with_suffix("") for path in images}
    skipped = [
        path
        for path in others
        if path.suffix.lower().removeprefix(".") not in SIDECARS
        or path.with_suffix("") not in stems
    ]
    skipped += [Path(str(error.filename)) for error in unreadable]
    return ImageFolder(sorted(images), sorted(skipped))
