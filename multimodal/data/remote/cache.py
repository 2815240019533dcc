"""A cache of bytes on the disk that is never larger than its limit, for any number of processes.

An entry is a file whose name is the SHA-256 of its bytes. So a damaged entry shows, equal pieces
are stored once, and no name from outside becomes a path.

``total`` holds the bytes of all entries, those being written included. It changes under a file
lock, upwards before anything is written and downwards after it was deleted, so it is never too
small. A writer reserves room first, which deletes the entries that were read longest ago. It then
writes ``.SHA256.SIZE.part``, locked until it is renamed. Who wants the same entry waits for this
lock. A part without a lock is of a process that was killed: the next writer takes it over.
"""

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from multimodal.data.remote.pieces import check_digest

DEFAULT_LIMIT = 32 << 30
BLOCK = 4096  # sizes are counted in blocks of the disk
KEPT = 0.9  # making room leaves at most this share of the limit, so that it is seldom needed
POLL_INTERVAL = 0.05  # seconds between two looks whether other writers left room
MAX_VERIFIED = 1 << 16  # entries that a process remembers to have verified
_NAME = re.compile(r"([0-9a-f]{64})|\.[0-9a-f]{64}\.(\d+)\.part")


class Entry:
    """An open entry: its bytes can be read even if another process deletes it meanwhile.

    Attributes:
        path: of the entry, or of the part to write.
        complete: all bytes are there. If not, the holder writes them, and calls ``Cache.publish``.
    """

    def __init__(self, sha256: str, descriptor: int, path: Path, complete: bool) -> None:
        self.sha256, self.descriptor, self.path, self.complete = sha256, descriptor, path, complete

    def read(self, start: int, stop: int) -> bytes:
        return os.pread(self.descriptor, stop - start, start)

    def write(self, data: bytes) -> None:
        """Replace all bytes."""
        with open(self.path, "r+b") as file:
            file.truncate(0)
            file.write(data)


class Cache:
    """Entries by their SHA-256.

    Args:
        folder: on a disk of this machine, where file locks work.
        limit: bytes that all entries together never exceed. None: half of what is free or used by
            this cache, and at most DEFAULT_LIMIT.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder = folder
        self.limit = DEFAULT_LIMIT if limit is None else limit
        self._verified: dict[str, tuple[int, int, int]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if limit is None:
            with self._total() as total:
                available = total.bytes + shutil.disk_usage(folder).free
            self.limit = min(DEFAULT_LIMIT, available // 2)

    def has(self, sha256: str) -> bool:
        """Whether there is such an entry, perhaps a damaged one."""
        return self._path(sha256).exists()

    def find(self, sha256: str) -> Entry | None:
        """An entry, which the caller closes (``os.close``). A damaged one is deleted."""
        path = self._path(sha256)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        about = os.fstat(descriptor)
        if self._verified.get(sha256) != _signature(about):
            with open(descriptor, "rb", closefd=False) as file:
                valid = hashlib.file_digest(file, "sha256").hexdigest() == sha256
            if not valid:
                self._delete(path, about)
                os.close(descriptor)
                return None
            self._remember(sha256, about)
        # The time of access is that of the last use, however the disk is mounted.
        os.utime(descriptor, ns=(time.time_ns(), about.st_mtime_ns))
        return Entry(sha256, descriptor, path, True)

    @contextmanager
    def open(self, sha256: str, size: int) -> Iterator[Entry]:
        """An entry to read, or to write if it is not there. Waits for another writer of it.

        Args:
            size: its bytes.

        Yields:
            The entry. If it is not complete afterwards, its room is given back.

        Raises:
            ValueError: if it is larger than the limit.
        """
        while (entry := self.find(sha256) or self._claim(sha256, size)) is None:
            pass
        try:
            yield entry
        finally:
            if not entry.complete:
                with self._total() as total:
                    entry.path.unlink(missing_ok=True)
                    total.bytes -= _blocks(size)
            os.close(entry.descriptor)

    def publish(self, entry: Entry) -> None:
        """Make an entry visible that was written completely. The caller has verified its bytes."""
        path = self._path(entry.sha256)
        with self._total():  # no count of all entries may miss it on its way
            os.replace(entry.path, path)
        entry.path, entry.complete = path, True
        self._remember(entry.sha256, os.fstat(entry.descriptor))

    def _claim(self, sha256: str, size: int) -> Entry | None:
        """The right to write an entry.

        Returns:
            None after waiting for another writer or for room: look for the entry again.
        """
        room = _blocks(size)
        if room > self.limit:
            raise ValueError(
                f"{self.folder}: {size:,} bytes do not fit into a cache of {self.limit:,}; give "
                "MULTIMODAL_CACHE_BYTES a larger number"
            )
        path = self._path(sha256)
        part = path.with_name(f".{sha256}.{size}.part")
        with self._total() as total:
            if path.exists():
                return None
            if not part.exists():
                if total.bytes + room > self.limit:
                    self._make_room(total, room)
                fits = total.bytes + room <= self.limit
                if fits:
                    total.add(room)
                    part.parent.mkdir(exist_ok=True)
                    part.touch()
            else:
                fits = True
            if fits:
                descriptor = os.open(part, os.O_RDWR | os.O_NOFOLLOW)
                if _lock(descriptor, wait=False):
                    return Entry(sha256, descriptor, part, False)
        if not fits:
            time.sleep(POLL_INTERVAL)  # the rest of the room belongs to writers
            return None
        _lock(descriptor, wait=True)
        os.close(descriptor)
        return None

    def _make_room(self, total: "_Total", room: int) -> None:
        """Count all entries, and delete the oldest until ``room`` fits."""
        entries, used = [], 0
        for folder in os.scandir(self.folder):
            for file in os.scandir(folder) if folder.is_dir(follow_symlinks=False) else ():
                if (name := _NAME.fullmatch(file.name)) is None:
                    continue
                about = file.stat(follow_symlinks=False)
                if name[1]:
                    entries.append((about.st_atime_ns, _blocks(about.st_size), file.path))
                    used += _blocks(about.st_size)
                elif _is_locked(file.path):
                    used += _blocks(int(name[2]))
                else:
                    os.unlink(file.path)
        for _, size, path in sorted(entries):
            if used + room <= max(KEPT * self.limit, room):
                break
            os.unlink(path)
            used -= size
        total.bytes = used

    def _delete(self, path: Path, about: os.stat_result) -> None:
        """Delete an entry, if it is still the file that ``about`` tells of."""
        with self._total() as total:
            if path.exists() and path.stat().st_ino == about.st_ino:
                path.unlink()
                total.bytes -= _blocks(about.st_size)

    def _path(self, sha256: str) -> Path:
        check_digest(sha256)
        return self.folder / sha256[:2] / sha256

    def _remember(self, sha256: str, about: os.stat_result) -> None:
        if len(self._verified) >= MAX_VERIFIED:
            self._verified.clear()
        self._verified[sha256] = _signature(about)

    @contextmanager
    def _total(self) -> Iterator["_Total"]:
        """The number in ``total``, for this process and thread alone. It is written at the end."""
        path = self.folder / "total"
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                _lock(descriptor, wait=True)
                if os.fstat(descriptor).st_nlink == 0:  # deleted while we waited
                    continue
                total = _Total(descriptor)
                if not total.valid:
                    self._make_room(total, 0)
                    total.add(0)
                try:
                    yield total
                finally:
                    total.add(0)
                return
            finally:
                os.close(descriptor)


class _Total:
    """The bytes of all entries, in a locked file."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        text = os.pread(descriptor, 64, 0).strip()
        self.valid = text.isdigit()
        self.bytes = int(text) if self.valid else 0

    def add(self, count: int) -> None:
        """Add to the number, and write it at once."""
        self.bytes = max(0, self.bytes + count)
        os.pwrite(self._descriptor, b"%-24d" % self.bytes, 0)


def _blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _signature(about: os.stat_result) -> tuple[int, int, int]:
    return about.st_ino, about.st_size, about.st_mtime_ns


def _lock(descriptor: int, wait: bool) -> bool:
    """Lock a file until it is closed. False: another holder has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _is_locked(path: str) -> bool:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        return not _lock(descriptor, wait=False)
    finally:
        os.close(descriptor)
