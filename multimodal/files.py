"""Write a file or a folder completely, or leave what was there.

The data first goes to a temporary name on the same disk, and a rename puts it in place. So a crash
or a full disk never leaves half a file under the final name.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def temporary_path(path: Path, shared: bool = False) -> Path:
    """``.NAME.part`` beside ``path``, or ``.NAME.PID.part`` for a file that processes share."""
    return path.with_name(f".{path.name}.{os.getpid()}.part" if shared else f".{path.name}.part")


@contextmanager
def atomic_file(path: Path, *, shared: bool = False, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path, and rename it to ``path`` on success.

    Args:
        path: the file to write. Its folder has to exist.
        shared: two processes may write this file at the same time. The temporary name then has the
            process id. Otherwise a process that was killed leaves one temporary file at most, and
            the next writer replaces it.
        sync: bring the data to the disk (fsync) before the rename. It then survives a loss of
            power.

    Yields:
        The temporary path. On any error it is removed, and ``path`` keeps what it was.
    """
    part = temporary_path(path, shared)
    try:
        yield part
        if sync:
            _sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: object, *, shared: bool = False) -> None:
    """Write a JSON file (UTF-8, indented) by ``atomic_file``."""
    with atomic_file(path, shared=shared) as part:
        part.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", "utf-8")


@contextmanager
def atomic_folder(folder: Path, last: str = "config.json") -> Iterator[Path]:
    """Yield a temporary folder, and move its files into ``folder`` on success.

    On an error during writing, a full disk for instance, ``folder`` keeps what it had. Files of
    other names stay. All data is on the disk before the first file moves. Files move one by one.

    Args:
        folder: is created where it does not exist.
        last: the file that moves last: the one that describes the others.

    Yields:
        An empty folder inside ``folder``, so that both are on one disk.

    Raises:
        OSError: if something could not be written.
    """
    from safetensors import SafetensorError

    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".part"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        _set_default_permissions(temporary)
        files = [path for path in temporary.rglob("*") if path.is_file()]
        for path in files:
            _sync(path)
        for path in sorted(files, key=lambda path: (path == temporary / last, path)):
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    except SafetensorError as error:
        raise OSError(f"{folder}: could not be written ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to ``folder`` on success.

    Args:
        folder: a path that does not exist, or an empty folder.

    Yields:
        An empty folder. On any error it is removed.

    Raises:
        ValueError: if ``folder`` is a file or is not empty.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty; name a new folder")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; name a new folder")
    target = folder.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    # mkdtemp makes a private folder. The one inside it gets the usual permissions.
    private = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=target.parent))
    try:
        temporary = private / "new"
        temporary.mkdir()
        yield temporary
        _set_default_permissions(temporary)
        temporary.rename(target)
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _set_default_permissions(folder: Path) -> None:
    """Give every file the permissions of a new file: safetensors lets only the owner read some."""
    new = folder / ".new"
    new.touch()
    mode = new.stat().st_mode
    new.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
