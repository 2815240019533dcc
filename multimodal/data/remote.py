"""Shard folders at any address that fsspec reads (``s3://``, ``gs://``, ``https://``, ...).

A remote folder has a mirror: a local folder with its manifest. A shard and its index are downloaded
into the mirror when the shard is first read, and checked like any other. They are not downloaded
again. Mirrors are in ``$MULTIMODAL_CACHE`` or ``~/.cache/multimodal``. Delete them to free space.
"""

import hashlib
import os
import shutil
from pathlib import Path

from multimodal.files import address_of, atomic_file

EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}  # of pyproject.toml
ADDRESS = ".address"  # the file of a mirror that holds its address


def local_folder(folder: str | Path) -> Path:
    """The folder, or the mirror of an address with a fresh copy of its manifest.

    Raises:
        ValueError: if the manifest cannot be read at the address.
    """
    address = (address_of(folder) or "").rstrip("/")
    if not address:
        return Path(folder)
    mirror = _mirrors() / hashlib.sha256(address.encode()).hexdigest()[:16]
    mirror.mkdir(parents=True, exist_ok=True)
    if not (mirror / ADDRESS).is_file():
        with atomic_file(mirror / ADDRESS, shared=True) as part:
            part.write_text(address, "utf-8")
    fetch(mirror, "manifest.json", again=True)
    return mirror


def cache_folder() -> Path:
    """Where this machine keeps what it can download or make again."""
    return Path(os.environ.get("MULTIMODAL_CACHE", "~/.cache/multimodal")).expanduser()


def is_mirror(folder: Path) -> bool:
    return folder.parent == _mirrors() and (folder / ADDRESS).is_file()


def _mirrors() -> Path:
    return cache_folder() / "shards"


def fetch(mirror: Path, name: str, again: bool = False) -> None:
    """Download a file of the remote folder into its mirror.

    Args:
        mirror: a folder that ``local_folder`` made.
        name: the name of the file.
        again: download it even if the mirror has it.

    Raises:
        ValueError: if it cannot be read.
    """
    target = mirror / name
    if target.is_file() and not again:
        return
    import fsspec

    address = f"{(mirror / ADDRESS).read_text('utf-8')}/{name}"
    try:
        with (
            atomic_file(target, shared=True) as part,
            fsspec.open(address, "rb") as source,
            open(part, "wb") as file,
        ):
            shutil.copyfileobj(source, file, 1 << 20)
    except Exception as error:  # each file system of fsspec has its own errors
        reason = str(error) or type(error).__name__
        extra = EXTRAS.get(address.partition(":")[0])
        if extra and isinstance(error, ImportError):
            reason += f"; pip install 'multimodal[{extra}]'"
        raise ValueError(f"{address}: cannot be read ({reason})") from error
