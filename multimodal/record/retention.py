"""How long entries and their texts are kept. It works beside a server that adds entries, too."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from multimodal.files import open_file
from multimodal.record.chain import PRUNED, Entry, Record


def redact(record: Record | str | Path, before: datetime) -> int:
    """Take the texts out of entries of before a time. Their digests stay, and the chain holds.

    Args:
        record: one that is open, or a file that no other process writes.

    Returns:
        How many entries lost texts. Of 0 the file was not written again.

    Raises:
        ValueError: for a file with lines that are no entries, or with texts without a time. It
            stays as it is.
    """

    def redacts(entry: Entry) -> bool:
        return bool(entry.texts) and entry.time < before

    count = 0

    def without_texts(entries: Iterator[Entry]) -> Iterator[Entry]:
        nonlocal count
        for entry in entries:
            count += redacts(entry)
            yield replace(entry, texts={}) if redacts(entry) else entry

    with _opened(record) as held:
        if any(map(redacts, held.entries())):
            held.rewrite(without_texts)
    return count


def prune(record: Record | str | Path, before: datetime) -> int:
    """Remove the entries of before a time at the beginning of a record, but never the last one.

    The rest still is a chain. So after the first entry that is kept all are, even one of before the
    time, as there is where a clock was set back. An entry at the end says what was removed.

    Args:
        record: one that is open, or a file that no other process writes.

    Returns:
        How many were removed. Of 0 the file was not written again.

    Raises:
        ValueError: for a file with lines that are no entries, or without a time. It stays as it is.
    """
    count, first = 0, 0

    with _opened(record) as held:
        last = held.number - 1

        def kept(entries: Iterator[Entry]) -> Iterator[Entry]:
            nonlocal count, first
            for entry in entries:
                if entry.number != last and entry.time < before:
                    count += 1
                    continue
                first = entry.number
                yield entry
                break
            yield from entries

        def note() -> dict[str, object]:
            return {"kind": PRUNED, "first": first, "removed": count}

        oldest = next(held.entries(), None)
        if oldest is not None and oldest.number != last and oldest.time < before:
            held.rewrite(kept, note)
    return count


def keep(record: Record, days: int, text_days: int) -> tuple[int, int]:
    """Remove what is older than so many days: entries, and texts of entries. 0: nothing.

    Returns:
        How many entries were removed, and how many others lost their texts.
    """

    def older(change: Callable[[Record, datetime], int], than: int) -> int:
        return change(record, datetime.now(UTC) - timedelta(days=than)) if than else 0

    return older(prune, days), older(redact, text_days)


@contextmanager
def _opened(record: Record | str | Path) -> Iterator[Record]:
    """The record, opened if it is not. Errors about its entries name the file."""
    if not isinstance(record, Record):
        open_file(record).close()  # a record that is not there is not begun
        with closing(Record(record)) as opened, _opened(opened) as held:
            yield held
        return
    try:
        yield record
    except ValueError as error:
        raise ValueError(f"{record.path}: {error}") from error
