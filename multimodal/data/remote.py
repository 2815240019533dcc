"""Shard folders at any address that fsspec reads (``s3://``, ``gs://``, ``https://``, ...).

A folder far away has a mirror: a local folder with its manifest, into which shards come when they
are first read, each with its index, and checked like any other. A shard that is there is not
fetched again. Mirrors lie in ``$MULTIMODAL_CACHE`` or ``~/.cache/multimodal``; to give back the
room, delete them.
"""

import hashlib
import os
import shutil
from pathlib import Path

from multimodal.files import atomic_file

ADDRESS = ".address"  # in a mirror: of what


def local_folder(folder: str | Path) -> Path:
    """The folder itself, or the mirror of an address, with the manifest as it is there now.

    Errors: ``ValueError`` where nothing can be read at the address.
    """
    address = str(folder).rstrip("/")
    if "://" not in address:
        return Path(folder)
    mirror = _mirrors() / hashlib.sha256(address.encode()).hexdigest()[:16]
    mirror.mkdir(parents=True, exist_ok=True)
    if not (mirror / ADDRESS).is_file():
        with atomic_file(mirror / ADDRESS, shared=True) as part:
            part.write_text(address)
    fetch(mirror, "manifest.json", again=True)
    return mirror


def is_mirror(folder: Path) -> bool:
    return folder.parent == _mirrors() and (folder / ADDRESS).is_file()


def _mirrors() -> Path:
    cache = Path(os.environ.get("MULTIMODAL_CACHE", "~/.cache/multimodal")).expanduser()
    return cache / "shards"


def fetch(mirror: Path, name: str, again: bool = False) -> None:
    """Bring a file of the address into its mirror, whole or not at all, unless it is there."""
    target = mirror / name
    if target.is_file() and not again:
        return
    import fsspec

    address = f"{(mirror / ADDRESS).read_text()}/{name}"
    try:
        with (
            atomic_file(target, shared=True) as part,
            fsspec.open(address, "rb") as source,
            open(part, "wb") as file,
        ):
            shutil.copyfileobj(source, file, 1 << 20)
    except Exception as error:  # of every file system its own
        reason = str(error) or type(error).__name__
        raise ValueError(f"{address}: cannot be read ({reason})") from error
