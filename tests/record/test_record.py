"""A record: what is changed in its file shows, whatever it is."""

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from multimodal.cli import main
from multimodal.record import chain
from multimodal.record.chain import Entry, Record, entries, verify
from multimodal.record.report import failures, summary
from multimodal.record.retention import prune, redact


def written(path: Path, count: int, keep_texts: bool = True) -> list[bytes]:
    """A record of so many entries; its lines."""
    record = Record(path, keep_texts)
    for number in range(count):
        texts = {"prompt": f"what is in picture {number}?", "reply": "a ünïcode dog \ud800"}
        record.append({"id": f"chatcmpl-{number}", "status": 200, "seconds": 0.25}, texts)
    record.close()
    return path.read_bytes().splitlines(keepends=True)


def test_a_record_that_nobody_touched_holds(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    assert len(written(path, 100)) == 100
    assert verify(path) == []
    more = Record(path)  # another run of the server goes on
    head = more.append({"status": 200}).hash
    more.close()
    assert verify(path, head) == []
    assert [entry.number for entry in entries(path) if isinstance(entry, Entry)] == [*range(101)]


@pytest.fixture(scope="module")
def ten_thousand(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The lines of a record."""
    return written(tmp_path_factory.mktemp("record") / "record.jsonl", 10_000, keep_texts=False)


@pytest.mark.parametrize("number", [0, 4321, 9_998])
def test_of_ten_thousand_entries_one_is_changed_moved_or_removed(
    tmp_path: Path, ten_thousand: list[bytes], number: int
) -> None:
    path, before, after = tmp_path / "record", ten_thousand[:number], ten_thousand[number + 1 :]
    line = bytearray(ten_thousand[number])
    line[line.index(b"chatcmpl") + 1] ^= 1
    path.write_bytes(b"".join([*before, bytes(line), *after]))
    assert verify(path) == [f"entry {number} was changed"]
    path.write_bytes(b"".join([*before, after[0], ten_thousand[number], *after[1:]]))
    assert verify(path) == [
        f"entry {number} stands after entry {number + 1}: the order was changed"
    ]
    path.write_bytes(b"".join([*before, *after]))
    (problem,) = verify(path)
    assert problem.startswith(f"entry {number} is missing")
    assert ("removed from the beginning" in problem) == (number == 0)


def test_removed_entries_at_the_end_show_against_a_noted_hash(
    tmp_path: Path, ten_thousand: list[bytes]
) -> None:
    path, head = tmp_path / "record.jsonl", json.loads(ten_thousand[-1])["hash"]
    path.write_bytes(b"".join(ten_thousand[:-1]))
    assert verify(path) == []
    assert verify(path, head) == [
        f"no entry has the hash {head}: the end was cut off, or all was replaced"
    ]


def test_removed_entries_at_the_beginning_show_unless_prune_removed_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.jsonl"
    record = Record(path)
    for day in range(1, 9):
        record.append({"time": f"2026-11-0{day}T00:00:00+00:00", "path": "/v1/a"})
    record.close()
    whole = path.read_bytes().splitlines(keepends=True)
    for day in (3, 5):
        assert prune(path, datetime(2026, 11, day, tzinfo=UTC)) == 2
        assert main(["log", "verify", str(path)]) == 0
        assert f" from {day - 1} on, nothing shows" in capsys.readouterr().out
    lines = path.read_bytes().splitlines(keepends=True)
    noted = Entry.parse(lines[-1])
    assert (noted.number, noted.facts["first"], noted.facts["removed"]) == (9, 4, 2)
    assert summary(map(Entry.parse, lines))["requests"] == 4, "what prune notes is no request"
    said = "removed from the beginning, and no entry of prune says so"
    for changed, problem in (
        (lines[1:], f"entry 4 is missing: {said}"),
        (lines[3:], f"entries 4 to 6 are missing: {said}"),
        (whole[1:], f"entry 0 is missing: {said}"),
        ([lines[-1]], f"entries 4 to 8 are missing: {said}"),
        ([*lines[:-1], lines[-1].replace(b'"first":4', b'"first":5')], "entry 9 was changed"),
    ):
        path.write_bytes(b"".join(changed))
        assert verify(path) == [problem]


def test_every_byte_of_an_entry_counts(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    lines = written(path, 3)
    rng = random.Random(0)
    for place in range(len(lines[1]) - 1):
        line = bytearray(lines[1])
        line[place] ^= 1 << rng.randrange(7)
        path.write_bytes(lines[0] + bytes(line) + lines[2])
        assert verify(path), (place, bytes(line))


def test_a_new_chain_shows_against_a_noted_hash(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    lines = written(path, 5)
    head = json.loads(lines[-1])["hash"]
    path.write_bytes(b"".join(lines[:3]))  # the end was cut off
    assert verify(path) == []
    assert "the end was cut off" in verify(path, head)[0]
    changed = Entry.parse(lines[2])
    path.unlink()
    forged = Record(path)
    forged.append({"status": 200})
    forged.close()
    path.write_bytes(path.read_bytes() + lines[1] + lines[2])
    assert "entry 1 does not follow entry 0: one was replaced" in verify(path)
    assert changed.number == 2


def test_texts_can_be_taken_out_and_changed_ones_show(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    lines = written(path, 4)
    path.write_bytes(lines[0] + lines[1].replace(b"picture 1", b"picture 7") + lines[2] + lines[3])
    assert verify(path) == ["entry 1: its text 'prompt' was changed"]
    path.write_bytes(b"".join(lines))
    assert redact(path, datetime.now(UTC) - timedelta(days=1)) == 0
    assert redact(path, datetime.now(UTC) + timedelta(days=1)) == 4
    assert verify(path) == [] and b"picture" not in path.read_bytes()
    assert prune(path, datetime.now(UTC) + timedelta(days=1)) == 3
    assert verify(path) == []
    record = Record(path)
    assert record.append({}).number == 5, "after what prune has noted"
    record.close()
    assert verify(path) == []


def test_a_line_that_was_not_written_to_its_end_is_named_and_then_cut(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    lines = written(path, 3)
    path.write_bytes(b"".join(lines)[:-10])
    assert verify(path) == ["line 3: is incomplete: it was not written to its end"]
    record = Record(path)
    assert record.append({"status": 200}).number == 2
    record.close()
    assert verify(path) == []


@pytest.mark.parametrize(
    "content", [b'{"a": 1}', b"{}", b"a note\nand another", b'{\n "a": 1\n}', b"\xff", b"\n{"]
)
def test_a_file_that_is_no_record_stays_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config.json: .*: name another file"):
        Record(path)
    assert path.read_bytes() == content


def test_a_first_line_that_was_not_written_to_its_end_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    (line,) = written(path, 1)
    for length in range(len(line)):
        path.write_bytes(line[:length])
        record = Record(path)
        assert record.append({"status": 200}).number == 0
        record.close()
        assert verify(path) == []


@pytest.mark.parametrize("change", [redact, prune])
def test_the_file_behind_a_link_is_changed_and_only_its_owner_reads_it(
    tmp_path: Path, change: Callable[[Path, datetime], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, link = tmp_path / "data" / "record.jsonl", tmp_path / "record.jsonl"
    written(path, 3)
    link.symlink_to("data/record.jsonl")
    path.chmod(0o600)
    if os.getuid() == 0:
        os.chown(path, 1234, 5678)
    before, modes = path.stat(), list[int]()

    def read(file: Path, end: int | None = None) -> Iterator[Entry | str]:
        for entry in entries(file, end):
            modes.extend(part.stat().st_mode for part in path.parent.glob(".*.part"))
            yield entry

    monkeypatch.setattr(chain, "entries", read)
    assert change(link, datetime.now(UTC) + timedelta(days=1))
    after = path.stat()
    assert link.is_symlink() and b"picture 0" not in path.read_bytes() and verify(link) == []
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode, before.st_uid, before.st_gid,
    )  # fmt: skip
    assert set(modes) == {before.st_mode}, "nobody else can read it while it is written"
    assert [file.name for file in path.parent.iterdir()] == ["record.jsonl"]


def test_prune_ends_at_the_first_entry_that_is_kept(tmp_path: Path) -> None:
    """After a clock was set back, earlier times follow later ones."""
    path = tmp_path / "record.jsonl"
    record = Record(path)
    for day in (1, 2, 5, 1, 6):
        record.append({"time": f"2026-11-0{day}T00:00:00+00:00"})
    record.close()
    for removed in (2, 0):
        assert prune(path, datetime(2026, 11, 3, tzinfo=UTC)) == removed and verify(path) == []
    assert [entry.number for entry in entries(path) if isinstance(entry, Entry)] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    "line", [b"{}\n", b"[1]\n", b"\xff\xfe\n", b"null\n", b'{"number": 1e999}\n']
)
def test_lines_that_are_no_entries_are_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "record.jsonl"
    first, second = written(path, 2)
    path.write_bytes(first + line + second)
    (problem,) = verify(path)
    assert problem.startswith("line 2: is ")
    with pytest.raises(ValueError, match="line 2"):
        redact(path, datetime.now(UTC))
    assert path.read_bytes() == first + line + second
    path.write_bytes(first + line)
    with pytest.raises(ValueError, match="name another file"):
        Record(path)


@pytest.mark.parametrize("value", [b"NaN", b"1e999", b"[" * 100_000, b'"\\ud800"'])
def test_a_value_that_no_server_writes_is_named(tmp_path: Path, value: bytes) -> None:
    path = tmp_path / "record.jsonl"
    first, second, third = written(path, 3)
    path.write_bytes(first + second.replace(b"0.25", value) + third)
    (problem,) = verify(path)[:1]
    assert problem in ("entry 1 was changed", "line 2: is not JSON"), problem


FACTS = ("time", "status", "seconds", "likelihood", "usage", "images", "filters", "finish_reasons")
VALUES = (3, -1, 2.5, "", "x", [], {}, [None], ["x"], True, [[]], 10**400, {"prompt_tokens": "x"})


@pytest.mark.parametrize("name", [*FACTS, "kind", "path", "model", "id", "fallback", "code"])
def test_facts_that_no_server_writes_are_left_out_and_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever stands in a line: it is counted, or named on stderr and in the exit status."""
    path, good = tmp_path / "record.jsonl", tmp_path / "good.jsonl"
    lines = written(good, 30)
    for value in VALUES:
        content = json.loads(lines[7])
        content["facts"][name] = value
        content["hash"] = Entry(**content).computed
        changed = (json.dumps(content) + "\n").encode()
        path.write_bytes(b"".join([*lines[:7], changed, *lines[8:]]))
        for verb in (["report"], ["failures", "--json"]):
            status = main(["log", verb[0], str(path), *verb[1:]])
            error = capsys.readouterr().err
            assert status == bool(error), error
            assert not error or f"{path}: entry 7: {name}" in error
        main(["drift", str(good), str(path)])
        main(["drift", str(path), str(good)])
        output = capsys.readouterr()
        assert output.err.count("left out") == 2 * bool(error), output.err


def test_lines_that_are_no_entries_are_named_by_whoever_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, good = tmp_path / "record.jsonl", tmp_path / "good.jsonl"
    lines = written(good, 30)
    bad = [b"{\n", b"[" * 20_000 + b"\n", lines[2].replace(b'"what is', b'3, "x": "what is')]
    path.write_bytes(b"".join([*lines[:20], *bad, *lines[20:]])[:-20])
    for argv in (["log", "report", str(path)], ["drift", str(good), str(path)]):
        main(argv)
        error = capsys.readouterr().err
        assert [f"line {n}: " in error for n in (20, 21, 22, 23, 33, 34)] == [
            False, True, True, True, True, False,
        ], error  # fmt: skip
    assert main(["log", "report", str(path)]) == 1 and main(["log", "report", str(good)]) == 0


def test_a_record_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero", "."):
        for use in (Record, lambda path: redact(path, datetime.now(UTC)), lambda p: [*entries(p)]):
            with pytest.raises(ValueError, match=f"{tmp_path / name}: .*(regular file|a folder)"):
                use(tmp_path / name)
    lines = written(tmp_path / "record.jsonl", 2)
    (tmp_path / "record.jsonl").write_bytes(lines[0].replace(b'"time":"2', b'"time":"x'))
    with pytest.raises(ValueError, match=r"record.jsonl: entry 0: 'x.*expected a time"):
        redact(tmp_path / "record.jsonl", datetime.now(UTC))


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    record = Record(tmp_path / "record.jsonl")
    assert record.append({"likelihood": float("nan"), "seconds": 1e999}).facts["seconds"] is None
    record.close()
    assert verify(tmp_path / "record.jsonl") == []


def test_threads_share_a_record_and_processes_do_not(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    record = Record(path)
    threads = [
        threading.Thread(target=lambda: [record.append({"status": 200}) for _ in range(50)])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    prune = ["-m", "multimodal", "log", "prune", str(path), "--before", "2999-01-01"]
    code = f"from multimodal.record.chain import Record; Record({str(path)!r})"
    for argv in (prune, ["-c", code]):
        other = subprocess.run([sys.executable, *argv], capture_output=True, text=True)
        assert f"another process writes this record (process {os.getpid()})" in other.stderr
        assert "stop it first" in other.stderr
    record.close()
    assert verify(path) == [] and len(list(entries(path))) == 400


def test_feedback_is_grouped_wherever_it_stands(tmp_path: Path) -> None:
    """During a stream it comes before the entry of its request. Some is about no request."""
    record = Record(tmp_path / "record.jsonl")
    down = {"kind": "feedback", "rating": "down"}
    made = [
        record.append({**down, "about": "req_1", "reason": "hallucination"}),
        record.append({"path": "/v1/chat/completions", "request": "req_1", "id": "c1"}),
        record.append({**down, "about": "req_9"}),
        record.append({**down, "about": "None", "rating": "up"}),
        record.append({"path": "/v1/embeddings", "status": 200}),
    ]
    record.close()
    assert failures(iter(made)) == {
        "thumbs down": [made[1]], "thumbs down: hallucination": [made[1]],
        "feedback without a request": [made[2], made[3]],
    }  # fmt: skip


def test_report_and_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.jsonl"
    record = Record(path, keep_texts=True)
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    chat = {"path": "/v1/chat/completions", "model": "m"}
    for number in range(4):
        reasons = ["length" if number == 3 else "stop"]
        facts = {**chat, "id": f"c{number}", "status": 200, "seconds": number, "usage": usage}
        record.append({**facts, "finish_reasons": reasons}, {"prompt": "hello"})
    record.append({**chat, "id": "c4", "status": 400, "code": "invalid_json", "seconds": 0.1})
    fallback = [{"choice": n, "why": "unsure", "by": "answer"} for n in range(2)]
    more = {"filters": ["words"], "fallback": fallback}
    record.append({**chat, "id": "c5", "status": 200, "empty": True, **more})
    record.append({"kind": "feedback", "about": "c0", "rating": "down"})
    record.append({"kind": "feedback", "about": "c1", "rating": "up"})
    record.close()
    found = [entry for entry in entries(path) if isinstance(entry, Entry)]
    facts = summary(found)
    assert facts["requests"] == 6 and facts["tokens"] == {"read": 40, "written": 20}
    assert facts["by"]["status"] == {"200": 5, "400": 1}
    assert facts["feedback"] == {"down": 1, "up": 1}
    assert facts["seconds"]["/v1/chat/completions"] == {"p50": 1.0, "p99": 3.0}
    groups = {name: [e.facts["id"] for e in each] for name, each in failures(found).items()}
    assert groups == {
        "over the limit": ["c3"], "error 400 invalid_json": ["c4"], "empty": ["c5"],
        "filtered": ["c5"], "thumbs down": ["c0"], "fallback: unsure": ["c5"],
    }  # fmt: skip
    assert main(["log", "verify", str(path)]) == 0
    assert found[-1].hash in capsys.readouterr().out
    assert main(["log", "report", str(path)]) == 0
    assert "requests: 6" in capsys.readouterr().out
    assert main(["log", "failures", str(path)]) == 0
    assert "thumbs down: 1" in capsys.readouterr().out
    other = Record(tmp_path / "other.jsonl")
    other.append({"kind": "feedback", "about": "c2", "rating": "down"})
    other.close()
    assert main(["log", "failures", str(other.path), str(path)]) == 0
    assert "thumbs down: 2" in capsys.readouterr().out, "feedback is in another worker's file"
    assert main(["log", "failures", str(other.path)]) == 0
    assert "feedback without a request: 1" in capsys.readouterr().out
    assert main(["log", "redact", str(path), "--before", "2999-01-01"]) == 0
    assert "6 entries" not in capsys.readouterr().err
    path.write_bytes(path.read_bytes().replace(b"invalid_json", b"invalid_jsom"))
    assert main(["log", "verify", str(path)]) == 1
    assert "entry 4 was changed" in capsys.readouterr().out
