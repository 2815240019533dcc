"""JSON without end, numbers without sense, pipes and devices: one line that names the file."""

import bz2
import gzip
import json
import lzma
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from multimodal.cli import main
from multimodal.data.builder import salvage
from multimodal.data.builder.build import build_shards
from multimodal.data.shards import DamagedShard, Shards, file_sha256
from multimodal.files import UnreadableFile, open_file, read_bytes, read_json, read_text
from tests.photos import picture, tar_of

DEEP = "[" * 20_000 + "]" * 20_000
WIDE = '{"a":' * 20_000 + "1" + "}" * 20_000
HUGE = (1 << 62, 1 << 63, 1 << 64, 10**400, -1, -(1 << 62), 1e300, True, "5", None)


def photos(folder: Path) -> Path:
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.jpg").write_bytes(picture(ord(name), "JPEG"))
        (folder / f"{name}.txt").write_text(f"photo {name}", "utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_shards(photos(tmp_path / "photos"), tmp_path / "shards")
    return tmp_path / "shards"


def refused(folder: Path, name: str) -> None:
    """Reading fails with a line that names the file, and so does the command line."""
    with pytest.raises(ValueError, match=name) as caught:
        list(Shards(folder))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    for argv in (["data", "check"], ["info"], ["data", "report"]):
        assert main([*argv, str(folder)]) == 1 or argv == ["info"]


def test_json_without_end_is_refused_everywhere(folder: Path, tmp_path: Path) -> None:
    for name in ("manifest.json", "train-0000.index.json"):
        good = (folder / name).read_bytes()
        for text in (DEEP, WIDE, "[" * 500_000, "9" * 100_000, "\ufeff{", "\0", '{"samples": ['):
            (folder / name).write_text(text, "utf-8")
            refused(folder, name.replace(".", r"\."))
        (folder / name).write_bytes(good)
    source = tmp_path / "photos"
    (source / "a.txt").rename(source / "a.json")
    (source / "a.json").write_text(DEEP, "utf-8")
    report = build_shards(source, tmp_path / "again")
    assert report is not None and report.reasons == {"unreadable text": 1} and report.kept == 2
    for suffix in (".json", ".jsonl", ".csv"):
        (tmp_path / f"deep{suffix}").write_text(DEEP, "utf-8")
        assert main(["data", "build", str(tmp_path / f"deep{suffix}"), str(tmp_path / "no")]) == 1


def with_fields(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


@pytest.mark.parametrize("number", HUGE, ids=lambda n: str(n)[:12])
def test_numbers_without_sense_are_refused(folder: Path, number: object) -> None:
    manifest, index = folder / "manifest.json", folder / "train-0000.index.json"
    good = manifest.read_bytes()
    for field in ("samples", "bytes"):
        with_fields(manifest, lambda m: m["shards"][0].update({field: number}))  # noqa: B023
        refused(folder, "manifest.json|train-0000.tar")
        manifest.write_bytes(good)
    good_index = index.read_bytes()
    for place in (0, 1):
        with_fields(index, lambda i: i["samples"][1]["members"]["jpg"].__setitem__(place, number))  # noqa: B023
        # An attacker writes the right hash.
        sha256 = file_sha256(index)
        with_fields(manifest, lambda m: m["shards"][0].update(index_sha256=sha256))  # noqa: B023
        refused(folder, "train-0000.index.json")
        index.write_bytes(good_index)
        manifest.write_bytes(good)
    assert len(list(Shards(folder))) == 3


def test_pipes_devices_and_holes_are_refused_before_they_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "random").symlink_to("/dev/urandom")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(1 << 40)
    for name in ("pipe", "zero", "random", "loop", "nowhere", "missing", "hole", "a\0b"):
        for read in (open_file, read_bytes, read_text, read_json):
            with pytest.raises(UnreadableFile, match=name.replace("\0", ".")):
                read(tmp_path / name)
    with pytest.raises(UnreadableFile, match="5 bytes, over the limit of 4"):
        (tmp_path / "a").write_bytes(b"12345")
        read_bytes(tmp_path / "a", 4)


def test_pipes_and_devices_in_a_source_are_rejected_by_name(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos")
    (source / "a.jpg").unlink()
    os.mkfifo(source / "a.jpg")
    (source / "b.txt").unlink()
    os.mkfifo(source / "b.txt")
    (source / "zero.png").symlink_to("/dev/zero")
    (source / "zero.txt").symlink_to("/dev/zero")
    report = build_shards(source, tmp_path / "out")
    assert report is not None and (report.total, report.kept) == (4, 1)
    assert report.reasons == {"unreadable image": 1, "unreadable text": 2}
    for line in (tmp_path / "out" / "rejected.jsonl").read_text("utf-8").splitlines():
        assert "not a regular file" in json.loads(line)["detail"]


@pytest.mark.parametrize(
    "suffix", [".csv", ".jsonl", ".json", ".parquet", ".arrow", ".tar", ".txt", ".pt"]
)
@pytest.mark.parametrize("target", ["pipe", "zero", "hole"])
def test_a_source_that_is_no_file_is_one_line(
    tmp_path: Path, suffix: str, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"source{suffix}"
    if target == "pipe":
        os.mkfifo(path)
    elif target == "zero":
        path.symlink_to("/dev/zero")
    else:
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    verbs = {
        ".txt": ["tokenizer", "text", str(path), "--out", str(tmp_path / "t.json")],
        ".pt": ["tokenizer", "import", str(path), str(tmp_path / "imported")],
    }
    assert main(verbs.get(suffix, ["data", "build", str(path), str(tmp_path / "out")])) == 1
    error = capsys.readouterr().err
    assert str(path) in error and len(error.strip().splitlines()) <= 3


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
def test_a_packed_tar_that_unpacks_without_end_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, pack: Any
) -> None:
    monkeypatch.setattr(salvage, "MAX_FILE", 1 << 18)
    folder, good = tmp_path / "tars", {"a.jpg": picture(0, "JPEG"), "a.txt": b"text " * 9000}
    tar_of(folder / f"good.tar.{suffix}", good, f"w:{suffix}")
    (folder / f"bomb.tar.{suffix}").write_bytes(pack.compress(bytes(1 << 23)))
    report = build_shards(folder, tmp_path / "out")
    assert report is not None and report.kept == 1 and report.reasons == {"damaged shard": 1}
    (line,) = (tmp_path / "out/rejected.jsonl").read_text("utf-8").splitlines()
    assert "bomb" in line and "unpacked it has more than" in line


def test_a_folder_with_a_pipe_for_a_shard_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "train-0000.tar").unlink()
    os.mkfifo(folder / "train-0000.tar")
    with pytest.raises(DamagedShard, match="train-0000.tar"):
        list(Shards(folder))
    (folder / "manifest.json").unlink()
    assert main(["data", "index", str(folder)]) == 1
    assert "train-0000.tar: not a regular file" in capsys.readouterr().err


def test_a_record_without_end_in_a_shard_is_an_error_of_its_sample(tmp_path: Path) -> None:
    from multimodal.data.shards import index_shard, write_manifest, write_tar

    members = {"jpg": picture(0, "JPEG"), "json": DEEP.encode()}
    write_tar(tmp_path / "train-0000.tar", [("a", members)])
    write_manifest(tmp_path, [index_shard(tmp_path / "train-0000.tar")])
    with pytest.raises(ValueError, match="sample a: its text is not readable .*nested too deep"):
        _ = Shards(tmp_path)[0].record
    assert main(["data", "check", str(tmp_path), "--decode"]) == 1
    assert tarfile.is_tarfile(tmp_path / "train-0000.tar")
