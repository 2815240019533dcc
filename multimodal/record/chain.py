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

What does not show in the file alone: that its first entries were removed (``prune`` does it, and a
record then begins later), that its last ones were, or that all of it was written anew. Note the
last hash elsewhere from time to time, and give it to ``verify``.
"""

import fcntl
import hashlib
import io
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from multimodal.files import atomic_file, local_path, open_file, parse_json
from multimodal.schemas import construct

START = "0" * 64
MAX_LINE = 16 << 20  # bytes of an entry
MAX_TEXTS = 8 << 20  # bytes of JSON of the texts of an entry that are kept
MAX_FACTS = 1 << 20  # bytes of JSON of the values of its facts
MAX_LENGTH = 2048  # of a string, a list or an object in them: a request has that many inputs
MAX_DEPTH = 16  # of objects in objects in them
NAMES = {"number", "previous", "facts", "texts", "digests", "hash"}
BEGINNING = b'{"digests":{'  # of each line


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
        return parse_time(str(self.facts.get("time")))


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
        self._lock = threading.Lock()
        try:
            _lock(self._file, self.path)
            last = _last_entry(self._file, self.path)
        except BaseException:
            self._file.close()
            raise
        self.number, self.head = (0, START) if last is None else (last.number + 1, last.hash)

    def append(self, facts: Mapping[str, Any], texts: Mapping[str, str] | None = None) -> Entry:
        """Add an entry. It is in the file when this returns.

        Args:
            facts: what can become JSON. ``time`` is added. Numbers that are not finite become null.
                Strings, lists and objects over MAX_LENGTH are cut. The longest facts become null if
                all of them have over MAX_FACTS bytes.
            texts: what may be taken out later. The longest ones are not kept if all of them have
                over MAX_TEXTS bytes. Their digests are.

        Raises:
            OSError: if it cannot be written. The file is then as it was before.
            ValueError: if it is still too long to be read.
        """
        texts = texts or {}
        digests = {name: digest(text) for name, text in texts.items()}
        facts = _cut_facts(facts)
        with self._lock:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            entry = Entry(
                self.number, self.head, {"time": now, **facts},
                _short_texts(texts) if self.keep_texts else {}, digests, "",
            )  # fmt: skip
            entry = replace(entry, hash=entry.computed)
            line = entry.line()
            if len(line) > MAX_LINE:
                raise ValueError(f"an entry of {len(line):,} bytes: at most {MAX_LINE:,} are read")
            self._write(line)
            self.number, self.head = entry.number + 1, entry.hash
        return entry

    def _write(self, line: bytes) -> None:
        """Write all of a line or, if the disk is full for instance, nothing of it."""
        size, left = self._file.seek(0, os.SEEK_END), memoryview(line)
        try:
            while left:  # a call may write a part, and the next one then says why
                left = left[self._file.write(left) :]
        except BaseException:
            self._file.truncate(size)
            raise

    def close(self) -> None:
        with self._lock:
            if not self._file.closed:
                os.fsync(self._file.fileno())
                self._file.close()


def entries(path: str | Path) -> Iterator[Entry | str]:
    """The entries of a file in its order. A line that is none: what is wrong with it."""
    with open_file(path) as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
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

    A record may begin later than with entry 0, as after ``prune``. That its end was cut off shows
    only against a hash that was noted.

    Args:
        head: a hash that was noted before. The record has to have its entry.
    """
    problems: list[str] = []
    hashes: dict[int, str] = {}
    followed: dict[int, str] = {}  # number: the hash that it says it follows
    before: int | None = None
    for entry in entries(path):
        if isinstance(entry, str):
            problems.append(entry)
            continue
        number = entry.number
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
    for start, end in _gaps(sorted(hashes)):
        which = f"entry {start} is" if start == end else f"entries {start} to {end} are"
        problems.append(f"{which} missing")
    for number, previous in followed.items():
        expected = START if number == 0 else hashes.get(number - 1)
        if expected not in (None, previous):
            problems.append(f"entry {number} does not follow entry {number - 1}: one was replaced")
    if head is not None and head not in hashes.values():
        problems.append(
            f"no entry has the hash {head:.80}: the end was cut off, or all was replaced"
        )
    return problems


def redact(path: str | Path, before: datetime) -> int:
    """Take the texts out of entries of before a time. Their digests stay, and the chain holds.

    Returns:
        How many entries lost texts.
    """
    count = 0

    def without_texts(entry: Entry) -> Entry:
        nonlocal count
        if not entry.texts or entry.time >= before:
            return entry
        count += 1
        return replace(entry, texts={})

    _rewrite(path, without_texts)
    return count


def prune(path: str | Path, before: datetime) -> int:
    """Remove the entries of before a time at the beginning of a record, but never the last one.

    The rest still is a chain. So after the first entry that is kept all are, even one of before the
    time, as there is where a clock was set back.

    Returns:
        How many were removed.
    """
    last = max((e.number for e in entries(path) if isinstance(e, Entry)), default=0)
    count, keeps = 0, False

    def kept(entry: Entry) -> Entry | None:
        nonlocal count, keeps
        keeps = keeps or entry.number == last or entry.time >= before
        count += not keeps
        return entry if keeps else None

    _rewrite(path, kept)
    return count


def digest(text: str) -> str:
    """The SHA-256 of a text, 64 hex digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def parse_time(text: str) -> datetime:
    """A time of ISO 8601, or a day. Without a zone it is UTC. Raises ``ValueError``."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(
            f"{text!r:.80}: expected a time like 2026-11-28 or 2026-11-28T09:30"
        ) from error
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _cut_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as they will be read, cut to the limits."""
    cut = {name: _cut(value) for name, value in facts.items()}
    sizes = {name: len(json.dumps(value)) for name, value in cut.items()}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        if sum(sizes.values()) <= MAX_FACTS:
            break
        cut[name], sizes[name] = None, len("null")
    kept: dict[str, Any] = parse_json(json.dumps(cut))
    return kept


def _cut(value: Any, depth: int = 0) -> Any:
    """A value of JSON without what is too long in it. Of a long string the digest stays."""
    if isinstance(value, str) and len(value) > MAX_LENGTH:
        return f"{value[:MAX_LENGTH]}... ({len(value):,} characters, SHA-256 {digest(value)})"
    if not isinstance(value, list | tuple | Mapping):
        return value
    if depth == MAX_DEPTH:
        return "..."
    if isinstance(value, Mapping):
        items = islice(value.items(), MAX_LENGTH)
        return {_cut(name): _cut(item, depth + 1) for name, item in items}
    return [_cut(item, depth + 1) for item in value[:MAX_LENGTH]]


def _short_texts(texts: Mapping[str, str]) -> dict[str, str]:
    """The texts that are short enough to be kept, the shortest first."""
    kept, left = dict[str, str](), MAX_TEXTS
    for name, text in sorted(texts.items(), key=lambda item: len(item[1])):
        left -= len(json.dumps(text))
        if left < 0:
            break
        kept[name] = text
    return kept


def _lock(file: io.IOBase, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"{path}: another process writes this record") from error


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


def _rewrite(path: str | Path, change: Callable[[Entry], Entry | None]) -> None:
    """Write a record again, each entry as ``change`` gives it, or without it for None.

    A link stays, and the file that it leads to is written. Owner and permissions stay.

    Raises:
        ValueError: for a record with lines that are no entries or that ``change`` refuses, and for
            one that is being written.
    """
    path = local_path(path)
    open_file(path).close()  # a regular file
    with open(path, "r+b") as held:
        _lock(held, path)
        target = path.resolve()
        with atomic_file(target, sync=True) as part, open(part, "wb", opener=_open_private) as file:
            _copy_access(held.fileno(), file.fileno())
            for entry in entries(target):
                if isinstance(entry, str):
                    raise ValueError(f"{path}: {entry}")
                try:
                    changed = change(entry)
                except ValueError as error:  # it has no time
                    raise ValueError(f"{path}: entry {entry.number}: {error}") from error
                if changed is not None:
                    file.write(changed.line())


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _copy_access(source: int, target: int) -> None:
    """Give an open file the owner and the group of another, where that is allowed, and its mode."""
    about = os.fstat(source)
    for owner in ((about.st_uid, -1), (-1, about.st_gid)):
        with suppress(PermissionError):
            os.fchown(target, *owner)
    os.fchmod(target, stat.S_IMODE(about.st_mode))


def _gaps(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """What is missing between the first and the last of sorted numbers: first and last of each."""
    for low, high in zip(numbers, numbers[1:], strict=False):
        if high > low + 1:
            yield low + 1, high - 1
