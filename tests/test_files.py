"""A file or a folder is written completely, or what was there stays."""

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from multimodal.files import (
    atomic_file,
    atomic_folder,
    lines_of,
    new_folder,
    temporary_path,
    write_json,
)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("sync", [False, True])
def test_a_file_appears_when_it_is_complete(tmp_path: Path, shared: bool, sync: bool) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_file(path, shared=shared, sync=sync) as part:
        part.write_text("new")
        assert part.parent == tmp_path and (shared or part == temporary_path(path))
        assert path.read_text() == "old"
    assert tree(tmp_path) == {"a.txt": b"new"}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, shared: bool, error: BaseException
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_file(path, shared=shared) as part:
        part.write_text("half")
        raise error
    assert tree(tmp_path) == {"a.txt": b"old"}


def test_a_writer_that_wrote_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "a.txt"):
        pass
    assert tree(tmp_path) == {}


def test_two_processes_that_write_one_file_do_not_mix(tmp_path: Path) -> None:
    """Each writes its own letter many times; a reader only ever sees a file of one letter."""
    code = (
        "import sys; from pathlib import Path; from multimodal.files import atomic_file\n"
        "for _ in range(200):\n"
        "    with atomic_file(Path(sys.argv[1]), shared=True) as part:\n"
        "        part.write_text(sys.argv[2] * 10000)\n"
    )
    path = tmp_path / "a.txt"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), x]) for x in "ab"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            seen.add(path.read_text())
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert seen | {path.read_text()} <= {"a" * 10000, "b" * 10000}
    assert list(tree(tmp_path)) == ["a.txt"]


def test_two_writers_of_one_process_do_not_mix(tmp_path: Path) -> None:
    """Two threads, or two containers that both have the process id 1."""
    path = tmp_path / "a.txt"
    with atomic_file(path, shared=True) as one, atomic_file(path, shared=True) as other:
        one.write_text("one")
        other.write_text("other")
        assert one.read_text() == "one" and one.match(".a.txt.*.part")
    assert tree(tmp_path) == {"a.txt": b"one"}, "the outer one ends last"
    assert temporary_path(path).name == ".a.txt.part"


def test_a_json_file_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"name": "Bücher", "list": [1, 2.5, None]}
    write_json(path, value)
    assert json.loads(path.read_text("utf-8")) == value
    assert path.read_text("utf-8").endswith("\n") and "Bücher" in path.read_text("utf-8")
    with pytest.raises(TypeError):
        write_json(path, {"no JSON": object()})
    assert json.loads(path.read_text("utf-8")) == value and list(tree(tmp_path)) == ["a.json"]


def test_files_of_a_folder_move_in_one_by_one_and_the_last_is_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    (folder / "notes.txt").write_text("mine")
    (folder / ".part").mkdir()
    (folder / ".part" / "stale").write_text("of a process that was killed")
    moved: list[str] = []
    rename = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda old, new: (moved.append(old.name), rename(old, new))[1]
    )
    with atomic_folder(folder) as part:
        for name in ("weights", "config.json", "a"):
            (part / name).write_text(name)
        (part / "inner").mkdir()
        (part / "inner" / "config.json").write_text("inner")
        assert tree(folder)["config.json"] == b"old"
    assert moved == ["a", "config.json", "weights", "config.json"], "that of the folder is last"
    assert tree(folder) == {
        "a": b"a",
        "config.json": b"config.json",
        "inner/config.json": b"inner",
        "notes.txt": b"mine",
        "weights": b"weights",
    }
    with atomic_folder(folder, last="a") as part:
        for name in ("a", "b"):
            (part / name).write_text("again")
    assert moved[-2:] == ["b", "a"]


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    with (
        pytest.raises(OSError, match=r"model: could not be written \(full\)"),
        atomic_folder(folder) as part,
    ):
        (part / "config.json").write_text("half")
        raise SafetensorError("full")
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder) as part:
        (part / "config.json").write_text("half")
        raise KeyboardInterrupt
    assert tree(tmp_path) == {"model/config.json": b"old"} and not (folder / ".part").exists()


def test_files_of_a_folder_have_the_permissions_of_new_files(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    with atomic_folder(tmp_path / "one") as first, new_folder(tmp_path / "two") as second:
        for part in (first, second):
            (part / "private").touch(mode=0o600)
    for name in ("one", "two"):
        assert stat.S_IMODE((tmp_path / name / "private").stat().st_mode) == usual


def test_a_new_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "new"
    with pytest.raises(KeyboardInterrupt), new_folder(folder) as part:
        (part / "a").write_text("half")
        raise KeyboardInterrupt
    assert tree(tmp_path) == {} and list(folder.parent.iterdir()) == []
    with new_folder(folder) as part:
        (part / "a").write_text("a")
        assert not folder.exists()
    assert tree(tmp_path) == {"deep/new/a": b"a"}
    with pytest.raises(ValueError, match="is not empty"), new_folder(folder):
        pass
    with pytest.raises(ValueError, match="is a file"), new_folder(folder / "a"):
        pass
    assert tree(tmp_path) == {"deep/new/a": b"a"}


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, multimodal.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_lines_end_where_those_of_a_file_do(tmp_path: Path) -> None:
    text = "a\u2028b\x85c\x0cd\n\r\nlast\rone"
    (tmp_path / "a.txt").write_bytes(text.encode())
    with (tmp_path / "a.txt").open(encoding="utf-8") as file:
        assert (
            lines_of(text) == file.read().split("\n") == ["a\u2028b\x85c\x0cd", "", "last", "one"]
        )
    assert lines_of("a\n") == ["a"] and lines_of("") == []
