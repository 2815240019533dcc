"""Who may write the file of a record: one process at a time, and nobody new after a rewrite."""

import fcntl
import io
import os
import stat
from contextlib import suppress
from pathlib import Path


def lock_file(file: io.IOBase, path: Path) -> None:
    """Lock an open file until it is closed. Raises ``ValueError`` if another process has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(
            f"{path}: another process writes this record{_holder(file)}. A server does as long as "
            "it runs: stop it first, or name another file"
        ) from error


def _holder(file: io.IOBase) -> str:
    """Which process has locked a file, where the kernel tells it (Linux)."""
    about = os.fstat(file.fileno())
    place = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}:{about.st_ino}"
    with suppress(OSError, ValueError):
        for line in Path("/proc/locks").read_text("utf-8").splitlines():
            _, kind, _, _, process, locked, *_ = line.split()
            if (kind, locked) == ("FLOCK", place):
                return f" (process {process})"
    return ""


def open_private(path: str, flags: int) -> int:
    """An ``opener`` of files that only their owner reads."""
    return os.open(path, flags, 0o600)


def copy_access(source: int, target: int) -> None:
    """Give an open file the owner and the group of another, where that is allowed, and its mode."""
    about = os.fstat(source)
    for owner in ((about.st_uid, -1), (-1, about.st_gid)):
        with suppress(PermissionError):
            os.fchown(target, *owner)
    os.fchmod(target, stat.S_IMODE(about.st_mode))
