"""Folders of tars as other tools leave them, and tables of what such tars held."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from multimodal.cli import main
from multimodal.data.builder.build import Report, build_shards
from multimodal.data.formats.column_files import ParquetTable, open_columns
from multimodal.data.indexing import index_folder
from multimodal.data.shards import (
    MANIFEST,
    Shards,
    file_sha256,
    index_path,
    read_manifest,
    write_manifest,
)
from tests.photos import picture, rejected, samples, tar_of


def built(source: Path, out: Path) -> tuple[dict[str, Any], Report]:
    """The captions by key, and the report."""
    report = build_shards(source, out)
    assert report is not None and report.total == report.kept + report.rejected
    return {key: each.record["captions"] for key, each in samples(out).items()}, report


def parquet(path: Path, **columns: Any) -> Path:
    """A table with row groups of one row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, row_group_size=1)
    return path


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


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("test-00000-of-00001-a09b74b3ef9c3b56", "test"),  # of the Hub, before 2023
        ("validation-00000-of-00002-3cd1ebd4bf1b0d2e", "validation"),
        ("val-0", "val"),
        ("train-00000-of-00001-a09b74b3ef9c3b56", "train"),
        ("val/more/00000", "val"),
        ("test/part-0/00000", "test"),
        ("latest/part-0/00000", "train"),
    ],
)
def test_tables_and_tars_stay_in_the_split_of_their_name_and_folders(
    name: str, split: str, tmp_path: Path
) -> None:
    for kind in ("tars", "tables"):
        (tmp_path / kind / name).parent.mkdir(parents=True, exist_ok=True)
    tar = tar_of(tmp_path / "tars" / f"{name}.tar", pair("a", "text"))
    table = parquet(tmp_path / "tables" / f"{name}.parquet", image=[picture(1)], text=["text"])
    for source in ("tars", "tables"):
        assert built(tmp_path / source, tmp_path / f"{source}-out")[1].splits == {split: 1}
    alone = {split: 1} if "/" not in name else {"train": 1}
    for file in (tar, table):
        assert built(file, tmp_path / f"{file.suffix}-out")[1].splits == alone


def test_a_folder_of_images_is_refused_where_the_source_holds_its_images(tmp_path: Path) -> None:
    source = tmp_path / "photos"
    source.mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(picture(1))
    (source / "metadata.csv").write_text("file_name,text\na.jpg,one\n")
    tar = tar_of(tmp_path / "x.tar", pair("a", "one"))
    for given in (source, tar):
        with pytest.raises(ValueError, match="it holds its images, and --images"):
            build_shards(given, tmp_path / "out", images=tmp_path / "images")
    report = build_shards(source / "metadata.csv", tmp_path / "out", images=tmp_path / "images")
    assert report is not None and report.kept == 1


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
    rows = {"url": ["u", "v"], "status": ["success", "failed_to_download"]}
    for name, image, text in (("of_img2dataset", "jpg", "caption"), ("converted", "png", "txt")):
        (tmp_path / name).mkdir()
        columns = {**rows, image: [picture(1), None], text: ["one", "two"]}
        parquet(tmp_path / name / "00000.parquet", **columns)
        captions, report = built(tmp_path / name, tmp_path / f"{name}-out")
        assert list(captions.values()) == [["one"]]
        assert report.reasons == {"unreadable image": 1}


def test_a_path_in_parquet_that_is_not_utf8_rejects_its_row_alone(tmp_path: Path) -> None:
    import pyarrow as pa

    paths = pa.array([b"\xff.png", b"b.png"]).view(pa.string())
    data = pa.array([picture(0), picture(1)])
    images = pa.StructArray.from_arrays([data, paths], ["bytes", "path"])
    table = parquet(tmp_path / "t.parquet", image=images, text=["one", "two"])
    captions, report = built(table, tmp_path / "out")
    assert captions == {"b": ["two"]} and report.reasons == {"unreadable image": 1}
    assert "row 0" in [*rejected(tmp_path / "out")][0]


def test_a_column_that_arrow_cannot_read_rejects_the_rows_of_its_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa

    column = ParquetTable.column

    def fails(self: ParquetTable, group: int, name: str) -> Any:
        if group == 0:
            raise pa.ArrowNotImplementedError("Nested data conversions not implemented")
        return column(self, group, name)

    table = parquet(tmp_path / "t.parquet", image=[picture(0), picture(1)], text=["one", "two"])
    monkeypatch.setattr(ParquetTable, "column", fails)
    captions, report = built(table, tmp_path / "out")
    assert [*captions.values()] == [["two"]] and report.reasons == {"unreadable image": 1}
    assert "Nested data conversions" in (tmp_path / "out/rejected.jsonl").read_text()


def test_a_column_of_parquet_is_read_whole_in_batches(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": b"%d" % number, "path": None} for number in range(700)]
    pq.write_table(pa.table({"image": images}), tmp_path / "t.parquet")
    read = open_columns(tmp_path / "t.parquet").column(0, "image")
    assert read.to_pylist() == images and read[699].as_py()["bytes"] == b"699"


# --- Indexes ------------------------------------------------------------------------------------


@pytest.fixture
def indexed(tmp_path: Path) -> Path:
    """Three shards, with indexes as older releases wrote them."""
    folder = tmp_path / "indexed"
    for number in range(3):
        tar_of(folder / f"train-{number}.tar", pair(f"k{number}", "text"))
    entries = index_folder(folder)
    for entry in entries:
        path = index_path(folder / entry["name"])
        index = json.loads(path.read_text())
        del index["pieces"]
        path.write_text(json.dumps(index))
        entry["index_sha256"] = file_sha256(path)
    write_manifest(folder, entries)
    return folder


def spoil(folder: Path, damage: str) -> str:
    """Damage a folder of shards. Returns the name of the shard."""
    name = "train-3.tar" if damage == "new and damaged" else "train-1.tar"
    if damage == "gone":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(b"?" * 2048)
    return name


@pytest.mark.parametrize("damage", ["damaged", "gone", "new and damaged"])
def test_an_index_that_is_refused_leaves_the_good_shards_readable(
    indexed: Path, damage: str
) -> None:
    name, problems = spoil(indexed, damage), list[str]()
    with pytest.raises(ValueError, match=r"1 of \d shards are damaged or missing"):
        index_folder(indexed, on_problem=problems.append)
    assert len(problems) == 1 and name in problems[0]
    for good in ("train-0.tar", "train-2.tar"):
        assert [sample.record["captions"] for sample in Shards(indexed, only=good)] == [["text"]]


@pytest.mark.parametrize("damage", ["damaged", "gone"])
def test_damage_of_a_folder_gets_no_new_hash_in_another_one(
    indexed: Path, tmp_path: Path, damage: str
) -> None:
    index_folder(indexed, tmp_path / "before")
    assert len(read_manifest(tmp_path / "before")["shards"]) == 3
    name, problems = spoil(indexed, damage), list[str]()
    with pytest.raises(ValueError, match="1 of 3 shards are damaged or missing"):
        index_folder(indexed, tmp_path / "links", on_problem=problems.append)
    assert name in problems[0] and str(indexed / MANIFEST) in problems[0]
    assert not (tmp_path / "links" / MANIFEST).exists()
