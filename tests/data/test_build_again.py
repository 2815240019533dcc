"""A build that was stopped or failed can go on. It never deletes files of others."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import multimodal.data.builder.build
import multimodal.data.builder.image_parts
from multimodal.data.builder import image_parts
from multimodal.data.builder.build import build_shards
from multimodal.data.verify import check
from tests.photos import by_caption, hashes, picture


def test_an_interrupted_build_can_go_on(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multimodal.data.builder.build, "PART_SIZE", 4)
    expected = tmp_path / "expected"
    build_shards(photos, expected, shard_size=2)

    def interrupted(items: Any) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == 9:
                raise KeyboardInterrupt
            yield item

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        build_shards(photos, out, shard_size=2, progress=interrupted)
    assert [path.name for path in out.iterdir()] == [".building"]
    assert any("no manifest.json" in problem for problem in check(out))
    parts = list((out / ".building/parts").glob("*.json"))
    opened = Counter[str]()
    make = multimodal.data.builder.image_parts.make_image
    monkeypatch.setattr(
        multimodal.data.builder.image_parts,
        "make_image",
        lambda n, s, w: opened.update([n]) or make(n, s, w),
    )
    (photos / "later.jpg").write_bytes(
        picture(33, "JPEG")
    )  # without text, so the result does not change
    build_shards(photos, out, shard_size=2)
    (photos / "later.jpg").unlink()
    assert len(parts) >= 2 and 0 < opened.total() < 13, "existing parts are not made again"
    tars = {name: value for name, value in hashes(expected).items() if name.endswith(".tar")}
    assert tars.items() <= hashes(out).items() and not (out / ".building").exists()

    # If a build fails while its files are moved, there is no manifest: it does not look complete.
    before = hashes(out)

    def full(self: Path, target: Path) -> None:
        if self.name == "train-0001.tar":
            raise OSError(28, "No space left on device")
        os.replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        build_shards(photos, out, shard_size=2, overwrite=True)
    monkeypatch.undo()
    assert any("no manifest.json" in problem for problem in check(out))
    build_shards(photos, out, shard_size=2)  # the same command again
    tars = {name for name in hashes(out) if name.endswith(".tar")}
    assert {name: hashes(out)[name] for name in tars} == {name: before[name] for name in tars}


def test_a_failed_build_gives_no_right_to_delete_files(photos: Path, tmp_path: Path) -> None:
    """Shards that appear after a failed or interrupted build belong to somebody else."""
    out = tmp_path / "out"
    (photos / "t.csv").write_text("image,caption\na.jpg,one\n")
    with pytest.raises(ValueError, match="no column 'zz'"):
        build_shards(photos / "t.csv", out, image_column="zz")
    assert list(out.iterdir()) == []

    def stop(items: Any) -> Iterator[Any]:
        yield next(iter(items))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_shards(photos, out, progress=stop)
    (out / "train-0000.tar").write_bytes(b"years of work")
    with pytest.raises(ValueError, match="not empty"):
        build_shards(photos, out)
    assert (out / "train-0000.tar").read_bytes() == b"years of work"


def test_a_part_that_lost_data_is_made_again(photos: Path, tmp_path: Path) -> None:
    out, expected = tmp_path / "out", tmp_path / "expected"
    build_shards(photos, expected)

    def stop(items: Any) -> Iterator[Any]:
        yield next(iter(items))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_shards(photos, out, progress=stop)
    (part,) = out.glob(".building/parts/*.bin")
    part.write_bytes(part.read_bytes()[:-500])
    build_shards(photos, out)
    assert hashes(out) == hashes(expected)


def test_an_error_of_the_machine_does_not_reject_an_image(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = image_parts.read_bytes

    def few_files(path: Path) -> bytes:
        if path.name == "a.jpg":
            raise OSError(24, "Too many open files")
        return read(path)

    monkeypatch.setattr(image_parts, "read_bytes", few_files)
    with pytest.raises(OSError, match="Too many open files"):
        build_shards(photos, tmp_path / "out")
    monkeypatch.undo()
    report = build_shards(photos, tmp_path / "out")
    assert report is not None and report.kept == 7


def test_an_image_that_changed_is_made_again(photos: Path, tmp_path: Path) -> None:
    def stop(items: Any) -> Iterator[Any]:
        yield from items
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        build_shards(photos, out, progress=stop)
    new = picture(55, "JPEG")
    (photos / "a.jpg").write_bytes(new)
    build_shards(photos, out)
    assert by_caption(out)["caption of a.jpg"].image == new
