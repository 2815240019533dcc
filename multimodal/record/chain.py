"""An append-only file of entries, in which a later change shows.

Each line is a JSON object:

    number      0, 1, 2, ...
    previous    the hash of the entry before; of the first, 64 zeros
    facts       what happened, with ``time`` (UTC, ISO 8601)
    texts       texts by name, if they are kept
    digests     the SHA-256 of each text, kept or not
    hash        the SHA-256 of all of the above but ``texts``

So a text can be taken out later, and the chain still holds. What a client sends cannot make an
entry too long to be read: of a text that is too long only the digest is kept, and long facts are
cut.

``prune`` (retention.py) removes the first entries, and adds an entry that says with which number
the record begins since then. So without such an entry it shows that the first ones are missing.

What does not show in the file alone: that its last entries were removed, or that all of it was
written anew. Note the last hash elsewhere from time to time, and give it to ``verify``.
"""

import hashlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from multimodal.files import local_path, open_file, parse_json, temporary_path
from multimodal.record.access import copy_access, lock_file, open_private
from multimodal.record.limits import cut_facts, digest, short_texts
from multimodal.schemas import construct

START = "0" * 64
MAX_LINE = 16 << 20  # bytes of an entry
NAMES = {"number", "previous", "facts", "texts", "digests", "hash"}
BEGINNING = b'{"digests":{'  # of each line
PRUNED = "prune"  # the kind of an entry about entries that were removed
Change: TypeAlias = Callable[[Iterator["Entry"]], Iterator["Entry"]]


@dataclass(frozen=True)
class Entry:
    """One line of a record. See the text of this module."""

    number: int
    previous: str
    facts: Mapping[str, Any]
    texts: Mapping[str, str]
    digests: Mapping[str, str]
    hash: str

    @classmethod
    def parse(cls, line: bytes) -> "Entry":
        """Raises ``ValueError`` for a line that is no entry."""
        try:
            value = parse_json(line)
        except ValueError as error:
            raise ValueError("is not JSON") from error
        try:
            return construct(cls, value)
        except ValueError as error:
            raise ValueError(f"is no entry of a record ({error})") from error

    def line(self) -> bytes:
        return _canonical({name: getattr(self, name) for name in sorted(NAMES)}) + b"\n"

    @property
    def computed(self) -> str:
        """The hash that belongs to what the entry says."""
        kept = {name: getattr(self, name) for name in NAMES - {"texts", "hash"}}
        return hashlib.sha256(_canonical(kept)).hexdigest()

    @property
    def time(self) -> datetime:
        """Raises ``ValueError`` for facts without a time."""
        try:
            return parse_time(str(self.facts.get("time")))
        except ValueError as error:
            raise ValueError(f"entry {self.number}: {error}") from error

    @property
    def begins(self) -> int:
        """The number with which its record begins, as far as this entry says: 0 without a word."""
        first = self.facts.get("first") if self.facts.get("kind") == PRUNED else None
        return first if isinstance(first, int) else 0


class Record:
    """Writes entries. Several threads may; several processes may not.

    Args:
        path: the file. New entries follow those that are there.
        keep_texts: write the texts, not only their digests.

    Raises:
        ValueError: if another process writes it, if it is no file, or if its last line is no entry.
            The file stays as it is.
    """

    def __init__(self, path: str | Path, keep_texts: bool = False) -> None:
        self.path, self.keep_texts = local_path(path), keep_texts
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            open_file(self.path).close()  # a device has no end
        # Unbuffered: what could not be written is not written later, after another entry.
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 (it stays open)
        self._lock, self._rewriting = threading.Lock(), threading.Lock()
        try:
            lock_file(self._file, self.path)
            last = _last_entry(self._file, self.path)
        except BaseException:
            self._file.close()
            raise
        self.number, self.head = (0, START) if last is None else (last.number + 1, last.hash)

    def append(self, facts: Mapping[str, Any], texts: Mapping[str, str] | None = None) -> Entry:
        """Add an entry. It is in the file when this returns.

        Args:
            facts: what can become JSON. ``time`` is added. Numbers that are not finite become null.
                Long strings, lists and objects are cut. The longest facts become null if all of
                them are too long together (record/limits.py).
            texts: what may be taken out later. The longest ones are not kept if all of them are
                too long together. Their digests are.

        Raises:
            OSError: if it cannot be written. The file is then as it was before.
            ValueError: if it is still too long to be read.
        """
        texts = texts or {}
        digests = {name: digest(text) for name, text in texts.items()}
        facts = cut_facts(facts)
        with self._lock:
            kept = short_texts(texts) if self.keep_texts else {}
            entry = _sealed(self.number, self.head, facts, kept, digests)
            line = entry.line()
            if len(line) > MAX_LINE:
                raise ValueError(f"an entry of {len(line):,} bytes: at most {MAX_LINE:,} are read")
            _append(self._file, line)
            self.number, self.head = entry.number + 1, entry.hash
        return entry

    def entries(self) -> Iterator[Entry]:
        """Those that are in the file now. Raises ``ValueError`` at a line that is none."""
        return self._entries(self._size())

    def _size(self) -> int:
        with self._lock:  # no entry is half written
            return os.fstat(self._file.fileno()).st_size

    def _entries(self, end: int) -> Iterator[Entry]:
        for entry in entries(self.path, end):
            if isinstance(entry, str):
                raise ValueError(entry)
            yield entry

    def rewrite(self, change: Change, note: Callable[[], Mapping[str, Any]] | None = None) -> None:
        """Write the file again. Entries may be added meanwhile: they stay, and wait a moment only.

        A link stays, and the file that it leads to is written. Owner and permissions stay.

        Args:
            change: gives the entries of the new file for those of the old.
            note: gives the facts of an entry that says what was done.

        Raises:
            ValueError: for lines that are no entries. The file stays as it is.
            OSError: if the new file cannot be written. The old one stays.
        """
        target = self.path.resolve()
        part = temporary_path(target)
        with self._rewriting:
            other = open(part, "w+b", buffering=0, opener=open_private)  # noqa: SIM115
            try:
                copy_access(self._file.fileno(), other.fileno())
                lock_file(other, self.path)
                end = self._size()
                for entry in change(self._entries(end)):
                    _append(other, entry.line())
                os.fsync(other.fileno())
                with self._lock:
                    with open_file(target) as added:
                        added.seek(end)
                        while data := added.read(MAX_LINE):
                            _append(other, data)
                    number, head = self.number, self.head
                    if note is not None:
                        entry = _sealed(number, head, note(), {}, {})
                        _append(other, entry.line())
                        number, head = entry.number + 1, entry.hash
                    os.fsync(other.fileno())
                    part.replace(target)
                    self.number, self.head = number, head
                    self._file, other = other, self._file
            finally:
                other.close()
                part.unlink(missing_ok=True)

    def close(self) -> None:
        with self._rewriting, self._lock:
            if not self._file.closed:
                os.fsync(self._file.fileno())
                self._file.close()


def _append(file: io.FileIO, line: bytes) -> None:
    """Write all of a line or, if the disk is full for instance, nothing of it."""
    size, left = file.seek(0, os.SEEK_END), memoryview(line)
    try:
        while left:  # a call may write a part, and the next one then says why
            left = left[file.write(left) :]
    except BaseException:
        file.truncate(size)
        raise


def entries(path: str | Path, end: int | None = None) -> Iterator[Entry | str]:
    """The entries of a file in its order. A line that is none: what is wrong with it.

    Args:
        end: bytes that are read, of whole lines. None: all.
    """
    with open_file(path) as file:
        number = 0
        while (end is None or file.tell() < end) and (line := file.readline(MAX_LINE + 1)):
            number += 1
            if len(line) > MAX_LINE:
                yield f"line {number}: is longer than {MAX_LINE:,} bytes"
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE)
                continue
            if not line.endswith(b"\n"):
                yield f"line {number}: is incomplete: it was not written to its end"
                return
            try:
                yield Entry.parse(line)
            except ValueError as error:
                yield f"line {number}: {error}"


def verify(path: str | Path, head: str | None = None) -> list[str]:
    """What is wrong with a record, one sentence each. Empty: nothing shows.

    A record begins with entry 0, or with the one that an entry of ``prune`` names. That its end was
    cut off shows only against a hash that was noted.

    Args:
        head: a hash that was noted before. The record has to have its entry.
    """
    problems: list[str] = []
    hashes: dict[int, str] = {}
    followed: dict[int, str] = {}  # number: the hash that it says it follows
    before: int | None = None
    begins = 0
    for entry in entries(path):
        if isinstance(entry, str):
            problems.append(entry)
            continue
        number, begins = entry.number, max(begins, entry.begins)
        if number in hashes:
            problems.append(f"entry {number} is there twice")
        elif before is not None and number < before:
            problems.append(f"entry {number} stands after entry {before}: the order was changed")
        if entry.computed != entry.hash:
            problems.append(f"entry {number} was changed")
        for name, text in entry.texts.items():
            if entry.digests.get(name) != digest(text):
                problems.append(f"entry {number}: its text {name!r:.80} was changed")
        hashes[number], followed[number], before = entry.hash, entry.previous, number
    first = min(hashes, default=begins)
    if first > begins:
        which = _missing(begins, first - 1)
        problems.append(f"{which}: removed from the beginning, and no entry of prune says so")
    for start, end in _gaps(sorted(hashes)):
        problems.append(_missing(start, end))
    for number, previous in followed.items():
        expected = START if number == 0 else hashes.get(number - 1)
        if expected not in (None, previous):
            problems.append(f"entry {number} does not follow entry {number - 1}: one was replaced")
    if head is not None and head not in hashes.values():
        problems.append(
            f"no entry has the hash {head:.80}: the end was cut off, or all was replaced"
        )
    return problems


def parse_time(text: str) -> datetime:
    """A time of ISO 8601, or a day. Without a zone it is UTC. Raises ``ValueError``."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(
            f"{text!r:.80}: expected a time like 2026-11-28 or 2026-11-28T09:30"
        ) from error
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _sealed(
    number: int,
    previous: str,
    facts: Mapping[str, Any],
    texts: Mapping[str, str],
    digests: Mapping[str, str],
) -> Entry:
    """An entry of now, with its hash."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    entry = Entry(number, previous, {"time": now, **facts}, texts, digests, "")
    return replace(entry, hash=entry.computed)


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _last_entry(file: io.FileIO, path: Path) -> Entry | None:
    """The last entry. A line after it that was not written to its end is cut off.

    Raises:
        ValueError: for a file that is no record. It stays as it is.
    """
    size = file.seek(0, os.SEEK_END)
    start = max(0, size - 2 * MAX_LINE)
    file.seek(start)
    complete, newline, cut = file.read().rpartition(b"\n")
    last = None
    if newline:
        try:
            last = Entry.parse(complete.rpartition(b"\n")[2])
        except ValueError as error:
            raise ValueError(f"{path}: its last line {error}: name another file") from error
    elif start:
        raise ValueError(f"{path}: its last line is too long: name another file")
    elif cut[: len(BEGINNING)] != BEGINNING[: len(cut)]:
        raise ValueError(f"{path}: is no record: name another file")
    if cut:
        file.truncate(size - len(cut))
    return last


def _missing(start: int, end: int) -> str:
    return f"entry {start} is missing" if start == end else f"entries {start} to {end} are missing"


def _gaps(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """What is missing between the first and the last of sorted numbers: first and last of each."""
    for low, high in zip(numbers, numbers[1:], strict=False):
        if high > low + 1:
            yield low + 1, high - 1
