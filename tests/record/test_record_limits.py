"""No request and no full disk keeps the entries after it from being read."""

import errno
import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from multimodal.cli import main
from multimodal.record import chain, limits
from multimodal.record.chain import Entry, Record, entries, verify
from multimodal.record.report import countable_entries
from multimodal.record.retention import prune, redact

DEEP: dict[str, Any] = {}
for _ in range(900):
    DEEP = {"a": DEEP}
FACTS: dict[str, Any] = {
    "a string": "x" * (20 << 20),
    "a setting": {"settings": {"style": "😀" * (2 << 20), "seed": 3}},
    "a name": {"settings": {"x" * (20 << 20): 1}},
    "a list": {"stop": ("a" * 100,) * (1 << 18)},
    "an object": {"bias": {str(number): number for number in range(1 << 18)}},
    "lists of lists": {"schema": [["x" * 1000] * 2000] * 20},
    "depth": DEEP,
}


def written(path: Path, facts: Any, texts: dict[str, str] | None = None) -> Entry:
    """A record of which the entry in the middle is given. Returns that entry."""
    record = Record(path, keep_texts=True)
    record.append({"status": 200, "path": "/v1/a"}, {"prompt": "before"})
    middle = record.append(facts, texts)
    record.append({"status": 200, "path": "/v1/a"}, {"prompt": "after"})
    record.close()
    return middle


def check_all_is_read(path: Path, count: int = 3) -> None:
    """The record holds, is counted, goes on after a restart, and can be redacted and pruned."""
    later = datetime.now(UTC) + timedelta(days=1)
    assert verify(path) == [] and path.stat().st_size < chain.MAX_LINE
    assert len(countable_entries(path, pytest.fail)) == count
    record = Record(path)
    assert record.append({"status": 200}).number == count
    record.close()
    assert redact(path, later) and verify(path) == []
    assert prune(path, later) == count and verify(path) == []


@pytest.mark.parametrize("name", FACTS)
def test_a_long_fact_is_cut(tmp_path: Path, name: str) -> None:
    path = tmp_path / "record.jsonl"
    facts = {"path": "/v1/a", "status": 200, "asked": FACTS[name], "images": ["f" * 64] * 2048}
    entry = written(path, facts)
    assert len(entry.line()) < 2 * limits.MAX_FACTS
    assert entry.facts["status"] == 200 and entry.facts["images"] == ["f" * 64] * 2048
    if name == "a string":
        digest = hashlib.sha256(FACTS[name].encode()).hexdigest()
        assert entry.facts["asked"].endswith(f"x... (20,971,520 characters, SHA-256 {digest})")
    if name == "a setting":
        assert entry.facts["asked"]["settings"]["seed"] == 3
    check_all_is_read(path)


def test_short_facts_are_kept_as_they_are(tmp_path: Path) -> None:
    facts = {"stop": ["a" * 2048] * 20, "usage": {"prompt_tokens": 3}, "images": [], "seed": None}
    kept = dict(written(tmp_path / "record.jsonl", facts).facts)
    assert kept.pop("time") and kept == facts


@pytest.mark.parametrize(("character", "millions"), [("x", 9), ("\x00", 3), ("😀", 2)])
def test_of_a_text_that_is_too_long_the_digest_is_kept(
    tmp_path: Path, character: str, millions: int
) -> None:
    path = tmp_path / "record.jsonl"
    texts = {"prompt": character * (millions << 20), "reply": "a dog"}
    entry = written(path, {"path": "/v1/a", "status": 200}, texts)
    digest = hashlib.sha256(texts["prompt"].encode()).hexdigest()
    assert entry.texts == {"reply": "a dog"} and entry.digests["prompt"] == digest
    check_all_is_read(path)


def test_a_line_that_is_too_long_is_named_and_the_next_ones_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.jsonl"
    written(path, {"status": 200})
    first, second, third = path.read_bytes().splitlines(keepends=True)
    monkeypatch.setattr(chain, "MAX_LINE", 1000)
    for length in (1000, 1001, 2000, 12345):
        path.write_bytes(first + b"x" * length + b"\n" + second + third)
        assert verify(path) == ["line 2: is longer than 1,000 bytes"]
        assert sum(isinstance(entry, Entry) for entry in entries(path)) == 3
        assert main(["log", "report", str(path)]) == 1
        output = capsys.readouterr()
        assert "requests: 3" in output.out and "line 2: is longer" in output.err
    path.write_bytes(first + b"x" * 5000)
    assert verify(path) == ["line 2: is longer than 1,000 bytes"]
    before = path.read_bytes()
    with pytest.raises(ValueError, match="its last line is too long: name another file"):
        Record(path)
    assert path.read_bytes() == before


class FullDisk:
    """A file on a disk with room for so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        count: int = self.file.write(bytes(data)[: self.room])
        self.room -= count
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 1, 100])
def test_after_a_full_disk_the_chain_goes_on(tmp_path: Path, room: int) -> None:
    path = tmp_path / "record.jsonl"
    record = Record(path)
    record.append({"status": 200})
    before, file = path.read_bytes(), record._file
    record._file = FullDisk(file, room)  # type: ignore[assignment]
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            record.append({"status": 200})
        assert path.read_bytes() == before
    record._file = file
    assert record.append({"status": 200}).number == 1
    record.close()
    assert verify(path) == [] and len(list(entries(path))) == 2
