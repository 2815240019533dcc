"""Folders of tars as other tools leave them, and tables of what such tars held."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from multimodal.cli import main
from multimodal.data.builder.build import Report, build_shards
from tests.photos import picture, samples, tar_of


def built(source: Path, out: Path) -> tuple[dict[str, Any], Report]:
    """The captions by key, and the report."""
    report = build_shards(source, out)
    assert report is not None and report.total == report.kept + report.rejected
    return {key: each.record["captions"] for key, each in samples(out).items()}, report


def pair(name: str, text: str) -> dict[str, bytes]:
    return {f"{name}.jpg": picture(len(text)), f"{name}.txt": text.encode()}


def test_tars_in_folders_of_splits_are_read(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "val", "train/more")):
        (tmp_path / "all" / split).mkdir(parents=True)
        tar_of(tmp_path / "all" / split / "00000.tar", pair("a", "x" * (number + 1)))
    (tmp_path / "all/README").write_text("read me")
    captions, report = built(tmp_path / "all", tmp_path / "out")
    assert sorted(captions.values()) == [["x"], ["xx"], ["xxx"]], "one key in three tars"
    assert report.splits == {"train": 2, "val": 1}
    again, _ = built(tmp_path / "out", tmp_path / "again")
    assert again == captions, "our own index files are not named as left out"


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_what_lies_beside_tars_is_named(tmp_path: Path, suffix: str) -> None:
    source, packed = tmp_path / "mixed", suffix.endswith("gz")
    source.mkdir()
    tar_of(source / f"00000{suffix}", pair("a", "one"), "w:gz" if packed else "w")
    (source / "b.jpg").write_bytes(picture(1))
    (source / "b.txt").write_text("two")
    (source / "00000_stats.json").write_text("{}")
    (source / "t.csv").write_text("image,caption\nb.jpg,two\n")
    captions, report = built(source, tmp_path / "out")
    assert list(captions.values()) == [["one"]]
    named = {"files .jpg": 1, "files .txt": 1, "files .json": 1, "files .csv": 1}
    assert report.ignored == named
    (source / "sub").mkdir()
    shutil.move(source / f"00000{suffix}", source / "sub")
    (source / "t.csv").unlink()
    captions, report = built(source, tmp_path / "images")
    assert list(captions.values()) == [["two"]] and report.ignored == {f"files {suffix}": 1}


def test_images_in_a_folder_of_a_split_stay_in_it(tmp_path: Path) -> None:
    source = tmp_path / "photos"
    for name in ("train/a", "test/dogs/b", "val2014/c", "latest/d"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / f"{name}.jpg").write_bytes(picture(len(name)))
        (source / f"{name}.txt").write_text(name)
    splits = {"train": 2, "test": 1, "val": 1}
    assert built(source, tmp_path / "texts")[1].splits == splits
    (tmp_path / "test").mkdir()
    shutil.move(source, tmp_path / "test")
    assert built(tmp_path / "test/photos", tmp_path / "above")[1].splits == splits
    rows = [f"{p.relative_to(tmp_path / 'test/photos')},a text"
            for p in (tmp_path / "test/photos").rglob("*.jpg")]  # fmt: skip
    (tmp_path / "test/photos/metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    captions, report = built(tmp_path / "test/photos", tmp_path / "table")
    assert report.splits == splits and [*captions.values()] == [["a text"]] * 4


def test_annotations_inside_a_folder_of_images_are_named_as_a_source(tmp_path: Path) -> None:
    (tmp_path / "coco/images").mkdir(parents=True)
    (tmp_path / "coco/images/a.jpg").write_bytes(picture(1))
    content = {"images": [{"id": 1, "file_name": "a.jpg"}],
               "annotations": [{"image_id": 1, "caption": "one"}]}  # fmt: skip
    (tmp_path / "coco/captions.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no sample could be used"):
        built(tmp_path / "coco", tmp_path / "out")
    assert "is a SOURCE itself, and has --images" in (tmp_path / "out/rejected.jsonl").read_text()
    line = ["data", "build", str(tmp_path / "coco/captions.json"), str(tmp_path / "out2")]
    assert main([*line, "--images", str(tmp_path / "coco/images")]) == 0


def test_shards_as_a_table_have_the_names_of_members_as_columns(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {"url": ["u", "v"], "status": ["success", "failed_to_download"]}
    for name, image, text in (("of_img2dataset", "jpg", "caption"), ("converted", "png", "txt")):
        table = pa.table({**rows, image: [picture(1), None], text: ["one", "two"]})
        (tmp_path / name).mkdir()
        pq.write_table(table, tmp_path / name / "00000.parquet")
        captions, report = built(tmp_path / name, tmp_path / f"{name}-out")
        assert list(captions.values()) == [["one"]]
        assert report.reasons == {"unreadable image": 1}
