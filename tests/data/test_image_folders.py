"""What a folder holds: images, their texts, and what is skipped and named."""

import errno
import os
from pathlib import Path

import pytest

from multimodal.commands.options import image_paths
from multimodal.data.formats.folders import list_images
from tests.photos import picture


def test_images_are_found_and_everything_else_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sub").mkdir()
    images = ["a.jpg", "b.GIF", "sub/c.avif", "d.tiff", "e.heic", "f.jfif"]
    texts = ["a.txt", "sub/c.json"]
    others = ["g.svg", "h", "notes.txt", "sub/i.mp4", "sub/z.jxl"]
    for name in [*images, *texts, *others, ".DS_Store", "._a.jpg"]:
        (tmp_path / name).write_bytes(picture(0, "JPEG"))
    (tmp_path / "sub" / "again").symlink_to(tmp_path)  # a circle
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "rows.safetensors").write_bytes(b"")
    found = list_images(tmp_path, outside=tmp_path / "cache")
    assert found.files == sorted(tmp_path / name for name in images)
    assert found.skipped == sorted(tmp_path / name for name in others)
    lines = list(found.complaints())
    assert len(lines) == len(others)
    for name in others:
        assert sum(line.startswith(f"{tmp_path / name}: skipped") for line in lines) == 1
    (tmp_path / "sub" / "again").unlink()
    paths, skipped = image_paths("caption", [str(tmp_path / "a.jpg"), str(tmp_path / "sub")])
    assert (paths, skipped) == ([str(tmp_path / n) for n in ("a.jpg", "sub/c.avif")], 2)
    assert "sub/i.mp4: skipped" in capsys.readouterr().err


def test_many_skipped_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    for number in range(300):
        (tmp_path / f"{number}.md").write_bytes(b"")
    lines = list(list_images(tmp_path).complaints())
    assert len(lines) == 11 and lines[-1].startswith("290 more files")


def test_folders_without_images_and_addresses_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="no images in it"):
        list_images(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        list_images(tmp_path / "missing")
    with pytest.raises(ValueError, match="s3://bucket/photos: an address"):
        list_images(Path("s3://bucket/photos"))


@pytest.mark.skipif(os.getuid() == 0, reason="root may read every folder")
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "secret").mkdir(mode=0)
    assert list_images(tmp_path).skipped == [tmp_path / "secret"]


def test_a_folder_that_fails_is_not_called_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "notes", "away/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    real = os.scandir

    def scandir(path: str) -> object:
        if Path(path).name == "away":
            raise OSError(errno.EIO, "Input/output error", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = list_images(tmp_path)
    assert found.files == [tmp_path / "a.png"]
    assert found.skipped == [tmp_path / "away", tmp_path / "notes"]
    assert list(found.complaints()) == [
        f"{tmp_path / 'away'}: cannot be read (Input/output error)",
        f"{tmp_path / 'notes'}: skipped, not an image (without a suffix)",
    ]
