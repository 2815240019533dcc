"""The images or texts in a folder, and what else is in it: nothing is left out in silence."""

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from multimodal.files import local_path

# What multimodal/data/images.py reads. If a sample has several, the first of this list counts.
IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "png", "webp", "jfif", "jpe"),
    *("gif", "bmp", "tif", "tiff", "avif", "heic", "heif"),
)
TEXT_SUFFIXES = ("txt", "text", "md", "markdown", "rst")
SIDECARS = ("txt", "json")  # texts beside an image, as `data build` reads them
MAX_NAMED = 10  # skipped files of one suffix that get a line each


@dataclass(frozen=True)
class FolderListing:
    """What is in a folder and its subfolders. Hidden files are left out.

    Attributes:
        files: those with the suffix of an image, or of a text, sorted by path.
        skipped: other files, and folders that cannot be read, sorted. A .txt or .json of an image's
            name belongs to the image.
        kind: what the files are.
        unreadable: the folders of ``skipped`` that cannot be read, and why. What is in them is not
            known: it is not gone.
    """

    files: list[Path]
    skipped: list[Path]
    kind: str = "image"
    unreadable: dict[Path, str] = field(default_factory=dict)

    def complaints(self) -> Iterator[str]:
        """A line for each folder and file that is skipped. Many of one suffix are counted."""
        groups: dict[str, list[Path]] = defaultdict(list)
        for path in self.skipped:
            if path in self.unreadable:
                yield f"{path}: cannot be read ({self.unreadable[path]})"
            else:
                groups[path.suffix.lower()].append(path)
        for suffix, paths in sorted(groups.items()):
            kind = f"a {suffix} file" if suffix else "without a suffix"
            named = paths[:MAX_NAMED]
            article = "an" if self.kind == "image" else "a"
            yield from (f"{path}: skipped, not {article} {self.kind} ({kind})" for path in named)
            if (more := len(paths) - MAX_NAMED) > 0:
                yield f"{more:,} more files skipped, not {self.kind}s ({kind})"


def list_images(folder: str | Path, outside: Path | None = None) -> FolderListing:
    """The images of a folder and its subfolders. Links are followed, each folder is read once.

    Args:
        outside: a folder inside it to leave out.

    Raises:
        ValueError: if there is no such folder on this machine, or no image in it.
    """
    files, unreadable = _walk(folder, outside)
    images = [path for path in files if _suffix(path) in IMAGE_SUFFIXES]
    others = [path for path in files if _suffix(path) not in IMAGE_SUFFIXES]
    if not images:
        raise ValueError(f"{folder}: no images in it ({', '.join(IMAGE_SUFFIXES)})")
    stems = {path.with_suffix("") for path in images}
    skipped = [
        path
        for path in others
        if _suffix(path) not in SIDECARS or path.with_suffix("") not in stems
    ]
    return FolderListing(sorted(images), sorted([*skipped, *unreadable]), "image", unreadable)


def list_texts(folder: str | Path, outside: Path | None = None) -> FolderListing:
    """The text files of a folder and its subfolders, as ``list_images``.

    Raises:
        ValueError: if there is no such folder on this machine, or no text file in it.
    """
    files, unreadable = _walk(folder, outside)
    texts = [path for path in files if _suffix(path) in TEXT_SUFFIXES]
    if not texts:
        raise ValueError(f"{folder}: no texts in it ({', '.join(TEXT_SUFFIXES)})")
    others = [path for path in files if _suffix(path) not in TEXT_SUFFIXES]
    return FolderListing(sorted(texts), sorted([*others, *unreadable]), "text", unreadable)


def _suffix(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def _walk(folder: str | Path, outside: Path | None) -> tuple[list[Path], dict[Path, str]]:
    """The files that are not hidden, and the folders that cannot be read, with the reason."""
    folder = local_path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    found = list[Path]()
    visited = {os.path.realpath(outside)} if outside else set[str]()
    unreadable: list[OSError] = []
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=unreadable.append):
        real = os.path.realpath(parent)
        folders[:] = [] if real in visited else sorted(f for f in folders if not f.startswith("."))
        if real not in visited:
            found += (Path(parent, name) for name in files if not name.startswith("."))
        visited.add(real)
    return found, {Path(error.filename): error.strerror or str(error) for error in unreadable}
