"""Every sample of a source is in a shard, or in rejected.jsonl with its name and the reason."""

import csv
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multimodal.commands.data import main
from multimodal.data.builder.build import build_shards
from multimodal.data.builder.writer import is_held_out, make_key
from multimodal.data.shards import index_shard, write_manifest
from tests.photos import by_caption, hashes, picture, rejected, samples


def test_a_folder_of_images(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = build_shards(photos, out)
    assert rejected(out) == {
        "broken.jpg": "unreadable image",
        "empty.png": "unreadable image",
        "silent.jpg": "no text",
        "badjson.jpg": "unreadable text",
        "surrogate.jpg": "unreadable text",
        "animation.gif": "no text",
        "orphan.txt": "no image",
    }
    assert (report.total, report.kept, report.rejected) == (14, 7, 7)
    assert sum(report.reasons.values()) == 7 and report.splits == {"train": 7}
    assert report.ignored == {"files .md": 1, "hidden files": 1}
    built = samples(out)
    assert len(built) == 7 and {"a", "c", "e"} < built.keys()
    for key in built:
        assert not set(key) & set("./ \\") and key.isascii()
    # Good images are stored byte for byte, with any folder and name.
    for name in ("a.jpg", "b.v2.png", "sub.dir/a.jpg", "dög ß.JPG"):
        sample = by_caption(out)[f"caption of {name}"]
        assert sample.image == (photos / name).read_bytes()
    others = {"license": "CC0", "label": 3, "qa": [["q", "a"]]}
    assert built["c"].record == {"captions": ["caption of c.webp"], **others}
    assert built["c"].members["webp"] == picture(2, "WEBP")
    both = [s for s in built.values() if s.record["captions"] == ["caption of e"]]
    assert {s.image for s in both} == {picture(5, "JPEG"), picture(6)}
    # For webdataset the suffix begins at the first dot of the name.
    with tarfile.open(out / "train-0000.tar") as tar:
        assert all(name.count(".") == 1 and "/" not in name for name in tar.getnames())


def test_images_without_text_are_kept_on_demand(photos: Path, tmp_path: Path) -> None:
    report = build_shards(photos, tmp_path / "out", need_text=False)
    assert (report.total, report.kept) == (14, 9)
    assert samples(tmp_path / "out")["silent"].record == {"captions": []}


def test_images_are_resized_and_converted(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    red = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    red.save(folder / "turned.jpg", exif=exif)
    red.convert("CMYK").save(folder / "print.jpg")
    Image.new("RGBA", (40, 20), (255, 0, 0, 0)).save(folder / "clear.png")
    red.save(folder / "moving.webp", save_all=True, append_images=[Image.new("RGB", (40, 20))])
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text(path.name)
    build_shards(folder, tmp_path / "asis")
    built = samples(tmp_path / "asis")

    def decoded(key: str) -> Image.Image:
        image = Image.open(io.BytesIO(built[key].image))
        assert image.mode == "RGB" and not image.getexif()
        return image

    assert decoded("turned").size == (20, 40) and decoded("print").size == (40, 20)
    assert decoded("clear").getpixel((0, 0)) == (255, 255, 255) and "png" in built["clear"].members
    assert "jpg" in built["moving"].members
    for key in ("turned", "print", "moving"):
        assert np.abs(np.asarray(decoded(key), int) - [255, 0, 0]).max() < 4
    for fit in ("squash", "crop", "letterbox"):
        build_shards(folder, tmp_path / fit, image_size=16, fit=fit)
        built = samples(tmp_path / fit)
        assert {decoded(key).size for key in built} == {(16, 16)}
        corner = decoded("print").getpixel((8, 0))
        assert isinstance(corner, tuple) and (abs(corner[0] - 127) < 9) == (fit == "letterbox")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_table(photos: Path, tmp_path: Path, kind: str) -> None:
    cells = [
        ("a.jpg", "one, with a comma", "CC0", "1"),
        ("./sub.dir/../a.jpg", "two\nlines", "CC0", "2"),
        (str(photos / "a.jpg"), "three", "CC0", "3"),
        ("sub.dir/a.jpg", "other"),
        ("broken.jpg", "half"),
        ("missing.jpg", "gone"),
        ("sub.dir", "a folder"),
        ("c.webp", " "),
        ("", "no path"),
    ]
    columns = ("File", "Caption", "license", "n")
    rows = [dict(zip(columns, row, strict=False)) for row in cells]
    table = photos / f"table.{kind}"
    with open(table, "w", encoding="utf-8-sig", newline="") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.write("{broken\n\n[1]\n")
        else:
            writer = csv.DictWriter(file, columns, delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    out = tmp_path / "out"
    report = build_shards(table, out)
    extra = 2 if kind == "jsonl" else 0
    # 3 rows have the same image. 3 images and 2 rows are bad.
    assert (report.total, report.kept) == (2 + 3 + 2 + extra, 2)
    assert report.total == report.kept + report.rejected == 2 + len(rejected(out))
    captions = ["one, with a comma", "two\nlines", "three"]
    assert samples(out)["a"].record == {"captions": captions, "license": "CC0"}
    assert report.ignored == {"columns n (rows of one image differ)": 1}
    assert by_caption(out)["other"].image == picture(3, "JPEG")
    reasons = report.reasons
    assert reasons["unreadable image"] == 3 and reasons["no text"] == reasons["no image"] == 1


def test_columns_of_a_table(photos: Path, tmp_path: Path) -> None:
    table = photos / "t.csv"
    table.write_text("where,what\na.jpg,one\n")
    with pytest.raises(ValueError, match="which column is the image.*where, what.*--image-column"):
        build_shards(table, tmp_path / "out")
    with pytest.raises(ValueError, match="no column 'x'"):
        build_shards(table, tmp_path / "out", image_column="x")
    with pytest.raises(ValueError, match="--text-column"):
        build_shards(table, tmp_path / "out", image_column="where")
    build_shards(table, tmp_path / "out", image_column="where", text_column="what")
    assert samples(tmp_path / "out")["a"].record == {"captions": ["one"]}
    table.write_text("image,question,answer\na.jpg,Who?,Me\na.jpg,Why?,So\n")
    build_shards(table, tmp_path / "vqa")
    assert samples(tmp_path / "vqa")["a"].record["qa"] == [["Who?", "Me"], ["Why?", "So"]]
    table.write_text("image,caption\na.jpg,one, two\nb.v2.png,fine\n")
    assert build_shards(table, tmp_path / "cells").reasons == {"unreadable row": 1}
    table.write_bytes(b"image,caption\na.jpg,\xff\xfe\nb.v2.png,fine\n")
    assert build_shards(table, tmp_path / "bytes").reasons == {"unreadable text": 1}


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_shards_are_salvaged(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    members = [
        member
        for number in range(6)
        for member in ((f"{number}.png", picture(number)), (f"{number}.txt", b"%d" % number))
    ]
    tar_of(source / "x-0.tar", [*members, ("6.png", b"?"), ("6.txt", b"6"), ("7.txt", b"7")])
    tar_of(source / "x-1.tar", [("0.png", picture(9)), ("0.json", b'{"caption": "again"}')])
    tar_of(source / "val-0.tar", [("v.png", picture(8)), ("v.txt", b"v"), ("v.cls", b"4")])
    with tarfile.open(source / "x-0.tar") as tar:
        offsets = {member.name: member.offset for member in tar}
    data = bytearray((source / "x-0.tar").read_bytes())
    # Damage a header. A simple reader would lose sample 2 and all that follow.
    data[offsets["2.txt"] + 5] ^= 1
    data[offsets["4.png"] + 512 + 60] ^= 1  # an image
    (source / "x-0.tar").write_bytes(data)
    out = tmp_path / "out"
    report = build_shards(source, out)
    assert (report.total, report.kept, report.rejected) == (10, 6, 4)
    assert report.reasons == {"no text": 1, "no image": 1, "unreadable image": 2}
    lines = (out / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["sample"].rpartition(": ")[2] for line in lines] == list("2467")
    train = samples(out, "train")
    for key in "0135":  # good keys do not change
        assert train[key].image == picture(int(key)) and train[key].record == {"captions": [key]}
    assert by_caption(out)["again"].image == picture(9), "a key that another shard has is renamed"
    # Held-out samples stay in their split.
    assert samples(out, "val")["v"].record == {"captions": ["v"], "label": "4"}
    assert build_shards(source / "x-1.tar", tmp_path / "one").kept == 1


def test_all_lost_samples_of_a_cut_shard_with_an_index_are_named(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    keys = [f"k{number}" for number in range(8)]
    pairs = [m for k in keys for m in ((f"{k}.png", picture(int(k[1]))), (f"{k}.txt", b"x"))]
    shard = tar_of(source / "train-0.tar", pairs)
    write_manifest(source, [index_shard(shard)])
    data = shard.read_bytes()
    for position in range(2560, len(data) - 10240, 1500):
        shard.write_bytes(data[:position])
        report = build_shards(source, out, overwrite=True)
        names = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
        lost = {line["sample"].rpartition(": ")[2] for line in names}
        assert report.total == 8 and lost | samples(out).keys() == set(keys)
        assert all(s.image == picture(int(s.key[1])) for s in samples(out).values())


def test_the_same_source_gives_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    build_shards(photos, tmp_path / "one", shard_size=3, val_share=0.3)
    for path in photos.rglob("*"):
        os.utime(path, (1, 1))
    build_shards(photos, tmp_path / "two", shard_size=3, val_share=0.3, workers=2)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert {"train-0000.tar", "train-0001.tar", "val-0000.tar"} < hashes(tmp_path / "one").keys()
    # A build from these shards gives the same shards.
    build_shards(tmp_path / "one", tmp_path / "three", shard_size=3)
    tars = {name: h for name, h in hashes(tmp_path / "three").items() if name.endswith(".tar")}
    assert tars.items() <= hashes(tmp_path / "one").items()


def test_new_samples_do_not_change_the_split_of_old_ones(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    splits: list[set[str]] = []
    for count in (40, 80):
        for number in range(count):
            (folder / f"p{number}.png").write_bytes(picture(number, size=(2, 2)))
            (folder / f"p{number}.txt").write_text("x")
        out = tmp_path / f"out{count}"
        report = build_shards(folder, out, val_share=0.25, shard_size=7)
        val, train = samples(out, "val"), samples(out, "train")
        assert len(val) + len(train) == count and not val.keys() & train.keys()
        assert report.splits == {"train": len(train), "val": len(val)}
        splits.append(set(val))
    assert {key for key in splits[1] if int(key[1:]) < 40} == splits[0]
    share = sum(is_held_out(str(n), 0.25) for n in range(4000)) / 4000
    assert 0.22 < share < 0.28
    assert not is_held_out("any", 0.0)


def test_keys_are_valid_and_unique() -> None:
    assert make_key("IMG_0001", "x", set()) == "IMG_0001"
    hints = ["a.b", "a/b", "a b", "a_b", "ä", "", ".", "-a", "..", "a" * 300, "A b"]
    keys = [make_key(hint, hint, set()) for hint in hints]
    assert len(set(keys)) == len(hints)
    assert all(key.isascii() and len(key) < 90 and not set(key) & set("./ ") for key in keys)
    assert make_key("a", "a.png", {"a"}) not in ("a", make_key("a", "a.jpg", {"a"}))


def test_only_files_of_a_build_are_replaced(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_shards(photos, out)
    before = hashes(out)
    with pytest.raises(ValueError, match="not empty.*--overwrite"):
        build_shards(photos, out)
    assert hashes(out) == before
    build_shards(photos, out, overwrite=True, shard_size=2)
    assert (out / "train-0003.tar").exists()
    build_shards(photos, out, overwrite=True)
    assert hashes(out) == before, "nothing of the earlier build is left"
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty, holds thesis.txt"):
        build_shards(photos, out, overwrite=True)
    assert (out / "thesis.txt").exists()
    with pytest.raises(ValueError, match="lies in it"):
        build_shards(photos, photos, overwrite=True)
    with pytest.raises(ValueError, match="lies in it"):
        build_shards(photos, tmp_path, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        build_shards(photos, tmp_path / "file")
    # OUT inside the source is not read as a part of the source.
    assert build_shards(photos, photos / "shards").total == 14
    assert build_shards(photos, photos / "shards", overwrite=True).total == 14


def test_a_build_without_usable_samples_is_an_error_with_reasons(
    photos: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    with pytest.raises(ValueError, match="nothing found"):
        build_shards(source, out)
    for number in range(3):
        (source / f"{number}.jpg").write_bytes(b"?")
        (source / f"{number}.txt").write_text("x")
    build_shards(photos, out)
    before = {k: v for k, v in hashes(out).items() if k != "rejected.jsonl"}
    with pytest.raises(ValueError, match="no sample could be used .3 unreadable image."):
        build_shards(source, out, overwrite=True)
    assert len(rejected(out)) == 3 and before.items() <= hashes(out).items()
    for wrong in (
        {"val_share": 1.0},
        {"shard_size": 0},
        {"fit": "x"},
        {"image_size": 0},
        {"quality": 0},
        {"workers": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            build_shards(photos, tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()
    for wrong_source in (tmp_path / "nowhere", photos / "notes.md"):
        with pytest.raises(ValueError, match=wrong_source.name):
            build_shards(wrong_source, tmp_path / "new")


def test_the_command(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["build", str(photos), str(out), "--image-size", "8", "--val-share", "0.3"]) == 0
    stdout, stderr = capsys.readouterr()
    assert stdout.startswith(f"{out}: kept 7 of 14 samples (train ") and stdout.count("\n") == 1
    assert "rejected 2: unreadable image" in stderr and "rejected.jsonl" in stderr
    assert main(["check", str(out), "--decode"]) == 0
    with pytest.raises(SystemExit, match="2"):
        main(["build", str(photos)])


def test_shards_of_img2dataset(tmp_path: Path) -> None:
    """Their names are digits, their records have many fields, and tables are beside them."""
    source = tmp_path / "laion"
    source.mkdir()
    record = {
        "url": "https://example.org/a.jpg",
        "caption": "a  cat",
        "key": "000000003",
        "status": "success",
        "error_message": None,
        "width": 16,
        "height": 12,
        "exif": "{}",
        "license": "CC0",
    }
    tar_of(
        source / "00000.tar",
        [
            ("000000003.jpg", picture(1, "JPEG")),
            ("000000003.txt", b"a  cat"),
            ("000000003.json", json.dumps(record).encode()),
            ("000000004.jpg", picture(2, "JPEG")),
            ("000000004.txt", b"a dog"),
            ("000000004.json", json.dumps({**record, "caption": None}).encode()),
        ],
    )
    for name in ("00000.parquet", "00000_stats.json"):
        (source / name).write_bytes(b"not a sample")
    report = build_shards(source, tmp_path / "out")
    assert report is not None and (report.kept, report.splits) == (2, {"train": 2})
    built = samples(tmp_path / "out")
    assert built["000000003"].record["captions"] == ["a  cat"]
    assert built["000000003"].record["license"] == "CC0"
    assert built["000000004"].record["captions"] == ["a dog"], (
        "the .txt counts if the json has no caption"
    )
