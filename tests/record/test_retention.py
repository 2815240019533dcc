"""Entries and texts are removed when they are old, beside a server that adds others."""

import os
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from multimodal.cli import main
from multimodal.record.chain import Entry, Record, entries, verify
from multimodal.record.retention import keep, prune, redact


def ago(days: float) -> datetime:
    return datetime.now(UTC) - timedelta(days=days)


def aged(path: Path, *days: float) -> Record:
    """An open record with an entry of each age."""
    record = Record(path, keep_texts=True)
    for age in days:
        facts = {"time": ago(age).isoformat(), "path": "/v1/chat/completions", "status": 200}
        record.append(facts, {"prompt": f"secret of {age}"})
    return record


def found(path: Path) -> list[Entry]:
    return [entry for entry in entries(path) if isinstance(entry, Entry)]


def test_a_record_that_is_open_loses_what_is_old_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.jsonl"
    record = aged(path, 100, 40, 20, 5, 1)
    assert keep(record, days=30, text_days=7) == (2, 1)
    assert record.append({"status": 200}, {"prompt": "new"}).number == 6, "after what prune noted"
    record.close()
    assert verify(path) == []
    assert [(entry.number, dict(entry.texts)) for entry in found(path)] == [
        (2, {}), (3, {"prompt": "secret of 5"}), (4, {"prompt": "secret of 1"}), (5, {}),
        (6, {"prompt": "new"}),
    ]  # fmt: skip
    assert found(path)[0].digests, "the digest of a text stays"
    assert main(["log", "verify", str(path)]) == 0
    assert "5 entries from 2 on, nothing shows" in capsys.readouterr().out


def test_nothing_old_is_nothing_written(tmp_path: Path) -> None:
    record = aged(path := tmp_path / "record.jsonl", 5, 1)
    before = path.stat().st_ino
    assert keep(record, days=30, text_days=30) == keep(record, 0, 0) == (0, 0)
    assert path.stat().st_ino == before, "it is the same file"
    record.close()


def test_entries_that_are_added_meanwhile_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    record = aged(path, *(60 + number for number in range(40)))
    stop, added = threading.Event(), list[str]()

    def add() -> None:
        while not stop.is_set():
            added.append(record.append({"status": 200}, {"prompt": "of now"}).hash)

    threads = [threading.Thread(target=add) for _ in range(2)]
    for thread in threads:
        thread.start()
    removed = 0
    for limit in range(95, 60, -5):  # the oldest are removed first
        redact(record, ago(limit))
    # Entries are in the order in which they were written: the first is of 60 days ago.
    removed += prune(record, ago(30))
    stop.set()
    for thread in threads:
        thread.join()
    record.close()
    assert removed == 40 and verify(path) == []
    kept = [entry for entry in found(path) if entry.facts.get("kind") is None]
    assert len(added) > 20 and sorted(entry.hash for entry in kept) == sorted(added)
    assert all(entry.texts == {"prompt": "of now"} for entry in kept)


def test_a_disk_that_is_full_leaves_the_record_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.jsonl"
    record = aged(path, 50, 1)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            prune(record, ago(30))
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]
    assert record.append({"status": 200}).number == 2
    assert prune(record, ago(30)) == 1
    record.close()
    assert verify(path) == []


def test_another_process_still_cannot_write_it(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    record = aged(path, 50, 1)
    assert prune(record, ago(30)) == 1
    with pytest.raises(ValueError, match="another process writes this record"):
        Record(path)
    record.close()
    Record(path).close()


def test_a_record_that_is_not_there_is_not_begun(tmp_path: Path) -> None:
    for change in (redact, prune):
        with pytest.raises(ValueError, match="no such file"):
            change(tmp_path / "record.jsonl", ago(1))
    assert [*tmp_path.iterdir()] == []
