"""Data sets are read where they lie: folders and tables as other tools write them."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from multimodal.cli import main
from multimodal.data.builder.build import Report, build_shards
from multimodal.data.images import open_image
from tests.photos import by_caption, picture, rejected, samples, tar_of


def built(source: Path, **options: Any) -> tuple[dict[str, Any], Report]:
    """The records by key, and the report."""
    out = source.parent / f"{source.name}-out"
    report = build_shards(source, out, **options)
    assert report is not None and report.total == report.kept + report.rejected
    lines = (out / "rejected.jsonl").read_text().splitlines()
    assert len(lines) == report.rejected and report.kept == len(samples(out))
    return {key: sample.record for key, sample in samples(out).items()}, report


def parquet_of(path: Path, **columns: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(exist_ok=True, parents=True)
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


# --- Folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_an_image_folder_of_hugging_face(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "images"
    for split in ("train", "test"):
        (folder / split / "deep").mkdir(parents=True)
        for name in ("a.png", "deep/b.png", "c.png"):
            (folder / split / name).write_bytes(picture(ord(name[-5])))
        rows = {"file_name": ["a.png", "deep/b.png", "gone.png"], "text": ["one", "two", "three"]}
        table = folder / split / f"metadata.{kind}"
        if kind == "parquet":
            parquet_of(table, **rows)
        elif kind == "csv":
            table.write_text("file_name,text\na.png,one\ndeep/b.png,two\ngone.png,three\n")
        else:
            pairs = zip(*rows.values(), strict=True)
            table.write_text(
                "".join(json.dumps({"file_name": n, "text": t}) + "\n" for n, t in pairs)
            )
    (folder / "train/c.txt").write_text("beside the image")
    records, report = built(folder)
    assert report.splits == {"train": 3, "test": 2}, "what is held out stays held out"
    assert sorted(r["captions"][0] for r in records.values()) == [
        *("beside the image", "one", "one", "two", "two")
    ]
    assert report.reasons == {"unreadable image": 2, "no text": 1}


def test_an_image_in_two_metadata_tables_is_kept_once(tmp_path: Path) -> None:
    (tmp_path / "f/sub").mkdir(parents=True)
    (tmp_path / "f/sub/a.png").write_bytes(picture(0))
    (tmp_path / "f/metadata.csv").write_text("file_name,text\nsub/a.png,one\n")
    (tmp_path / "f/sub/metadata.csv").write_text("file_name,text\na.png,two\n")
    records, report = built(tmp_path / "f")
    assert len(records) == 1 and report.reasons == {"image named twice": 1}


def test_folders_of_parquet_and_of_packed_tars(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        for part in range(2):
            images = [{"bytes": picture(part), "path": None}] * 3
            name = f"{split}-0000{part}-of-00002.parquet"
            parquet_of(tmp_path / "hf/data" / name, image=images, text=list("abc"))
    (tmp_path / "hf/data/train-damaged.parquet").write_bytes(b"PAR1?")
    records, report = built(tmp_path / "hf")
    assert report.splits == {"train": 6, "validation": 6} and len(records) == 12
    assert report.reasons == {"unreadable table": 1}

    for suffix, mode in (
        ("tar.gz", "w:gz"),
        ("tgz", "w:gz"),
        ("tar.bz2", "w:bz2"),
        ("tar.xz", "w:xz"),
    ):
        members = {f"{suffix[-2:]}.png": picture(1), f"{suffix[-2:]}.txt": suffix.encode()}
        tar_of(tmp_path / f"packed/train-0.{suffix}", members, mode)
    tar_of(tmp_path / "packed/val-0.tar.gz", {"v.png": picture(2), "v.txt": b"v"}, "w:gz")
    (tmp_path / "packed/bad.tar.gz").write_bytes(b"?")
    records, report = built(tmp_path / "packed")
    assert len(records) == 5 and report.splits == {"train": 4, "val": 1}
    assert rejected(tmp_path / "packed-out") == {"bad.tar.gz": "damaged shard"}
    with pytest.raises(ValueError, match="data build"):
        from multimodal.data.indexing import index_folder

        index_folder(tmp_path / "packed")


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    (folder / "x.tar").mkdir(parents=True)
    (folder / "a.png").write_bytes(picture(0))
    (folder / "a.txt").write_text("a")
    for name in ("b.txt", "b.png", "metadata.jsonl", "t.csv"):
        os.mkfifo(folder / name)
    (folder / "c.png").write_bytes(picture(0))
    (folder / "c.json").symlink_to("/dev/zero")
    records, report = built(folder)
    assert records == {"a": {"captions": ["a"]}} and report.ignored == {"not regular files": 2}
    assert rejected(tmp_path / "f-out") == dict.fromkeys(("b.png", "c.png"), "unreadable text")
    with pytest.raises(ValueError, match="t.csv: not a regular file"):
        build_shards(folder / "t.csv", tmp_path / "out")


def test_a_packed_tar_that_is_cut_off_gives_what_comes_before(tmp_path: Path) -> None:
    pairs = {}
    for number in range(6):
        pairs |= {f"{number}.png": picture(number), f"{number}.txt": b"%d" % number}
    whole = tar_of(tmp_path / "x/x.tar.gz", pairs, "w:gz").read_bytes()
    for share in (0.4, 0.8):
        (tmp_path / "x/x.tar.gz").write_bytes(whole[: int(len(whole) * share)])
        records, report = built(tmp_path / "x", overwrite=True)
        kept = by_caption(tmp_path / "x-out")
        assert 0 < len(kept) < 6 and report.rejected
        assert all(sample.image == picture(int(key)) for key, sample in kept.items())


def test_what_a_folder_holds_is_said_when_nothing_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f/a.png").write_bytes(picture(0))
    (tmp_path / "f/captions.csv").write_text("image,caption\na.png,x\n")
    assert main(["data", "build", str(tmp_path / "f"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "1 no text; left out: 1 files .csv" in error and error.count("\n") == 1
    assert built(tmp_path / "f/captions.csv")[1].kept == 1


def test_every_line_of_a_txt_is_a_caption_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture(0))
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfa dog\r\n\r\n a brown dog \r\nit runs\r\n")
    assert main(["data", "build", str(folder), str(tmp_path / "out")]) == 0
    assert (
        "read 1: .txt of several lines: each line is a caption (first: " in capsys.readouterr().err
    )
    assert samples(tmp_path / "out")["a"].record["captions"] == ["a dog", "a brown dog", "it runs"]
    assert main(["data", "build", str(folder), str(tmp_path / "whole"), "--whole-text"]) == 0
    assert samples(tmp_path / "whole")["a"].record["captions"] == [
        "a dog\r\n\r\n a brown dog \r\nit runs"
    ]
    assert "read" not in capsys.readouterr().err


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    for name in (b"d\xf6g", b"d\xfcg"):
        (folder / (name + b".png").decode(errors="surrogateescape")).write_bytes(picture(1))
        (folder / (name + b".txt").decode(errors="surrogateescape")).write_text(
            name.decode("latin-1")
        )
    (folder / "t.csv").write_bytes(b"image,caption\nd\xf6g.png,one\nd\xfcg.png,two\nd\xe4g.png,x\n")
    assert built(folder)[1].ignored == {"files .csv": 1}
    assert set(by_caption(tmp_path / "f-out")) == {"dög", "düg"}
    records, report = built(folder / "t.csv")
    assert sorted(r["captions"] for r in records.values()) == [["one"], ["two"]]
    assert report.reasons == {"unreadable image": 1}


def test_texts_and_profiles_of_any_length_in_a_png(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    info = PngInfo()
    info.add_text("workflow", "z" * 2_000_000, zip=True)
    info.add_itxt("notes", "z" * 2_000_000, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (6, 4), "red")
    image.save(folder / "a.png", pnginfo=info, exif=exif, icc_profile=bytes(2_000_000))
    whole = (folder / "a.png").read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(b"zTXt") + 20] ^= 1
    (folder / "b.png").write_bytes(damaged)
    for name in "ab":
        (folder / f"{name}.txt").write_text(name)
    records, report = built(folder, image_size=None)
    assert list(records) == ["a"] and rejected(tmp_path / "f-out") == {"b.png": "unreadable image"}
    assert (
        open_image(samples(tmp_path / "f-out")["a"].image).size == open_image(whole).size == (4, 6)
    )


# --- Tables -------------------------------------------------------------------------------------


def test_images_in_parquet(tmp_path: Path) -> None:
    """Bytes, paths, or both, alone or in lists of one, in every type that Arrow has for them."""
    import pyarrow as pa

    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    data = [picture(number) for number in range(3)]
    names = [f"{number}.png" for number in range(3)]
    both = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    files = [{"bytes": d, "path": f"x/{n}"} for d, n in zip(data, names, strict=True)]
    paths = [{"bytes": None, "path": n} for n in names]
    columns = {
        "string": pa.array(names),
        "large_string": pa.array(names, pa.large_string()),
        "string_view": pa.array(names, pa.string_view()),
        "dictionary": pa.array(names).dictionary_encode(),
        "binary": pa.array(data),
        "large_binary": pa.array(data, pa.large_binary()),
        "binary_view": pa.array(data, pa.binary_view()),
        "files": pa.array(files, both),
        "paths": pa.array(paths, both),
        "mixed": pa.array([files[0], paths[1], files[2]], both),
        "list": pa.array([[file] for file in files], pa.list_(both)),
        "list of paths": pa.array([[name] for name in names]),
        "large list": pa.array([[d] for d in data], pa.large_list(pa.binary())),
    }
    for name, column in columns.items():
        records, report = built(
            parquet_of(tmp_path / f"{name}.parquet", image=column, text=list("abc"))
        )
        assert report.kept == 3, name
        kept = by_caption(tmp_path / f"{name}.parquet-out")
        assert {caption: s.image for caption, s in kept.items()} == dict(
            zip("abc", data, strict=True)
        )
    several = pa.array([[names[0], names[1]], [names[2]], None])
    _, report = built(parquet_of(tmp_path / "several.parquet", image=several, text=list("abc")))
    assert report.kept == 1 and report.reasons == {"no image": 2}
    several = pa.array([files[:2], files[2:], []], pa.list_(both))
    _, report = built(parquet_of(tmp_path / "lists.parquet", image=several, text=list("abc")))
    assert report.kept == 1 and report.reasons == {"unreadable image": 2}
    details = (tmp_path / "lists.parquet-out/rejected.jsonl").read_text()
    assert "the row has 2 images" in details and '"rows": [2]' in details


def test_rows_of_one_path_are_joined_in_parquet(tmp_path: Path) -> None:
    import pyarrow as pa

    (tmp_path / "a.png").write_bytes(picture(0))
    images = [{"bytes": None, "path": "a.png"}] * 3
    both = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for name, column in (("null", pa.array(images)), ("binary", pa.array(images, both))):
        table = parquet_of(tmp_path / f"{name}.parquet", image=column, text=["one", "two", None])
        assert built(table)[0] == {"a": {"captions": ["one", "two"]}}


def test_columns_that_nobody_needs_do_not_decide(tmp_path: Path) -> None:
    import pyarrow as pa

    others = {
        "timestamp": pa.array([0, 10**18 + 1, None], pa.timestamp("ns")),
        "far": pa.array([0, 2**62, 1], pa.timestamp("us")),  # no date of Python
        "duration": pa.array([1, 2, 3], pa.duration("ns")),
        "date": pa.array([0, 1, 2], pa.date32()),
        "decimal": pa.array([None, "1.5", "2.5"]).cast(pa.decimal128(5, 2)),
        "bytes": pa.array([b"\0\xff", b"", None]),
        "nan": pa.array([float("nan"), float("inf"), 0.5]),
        "map": pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int64())),
        "not utf8": pa.array([b"\xff", b"a", b"b"]).view(pa.string()),
    }
    for name, column in others.items():
        images = [picture(number) for number in range(3)]
        records, report = built(
            parquet_of(tmp_path / f"{name}.parquet", image=images, text=list("abc"), extra=column)
        )
        assert report.kept == 3, (name, report)
        assert sorted(r["captions"][0] for r in records.values()) == list("abc")
    texts = pa.array([b"\xff", b"a", b"b"]).view(pa.string())
    _, report = built(parquet_of(tmp_path / "text.parquet", image=images, text=texts))
    assert report.kept == 2 and report.reasons == {"unreadable text": 1}
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture(0))
    deep = "[" * 200 + "]" * 200
    (folder / "a.json").write_text(
        '{"caption": "a dog", "similarity": NaN, "far": 1e999, "name": "\\ud800", '
        f'"deep": {deep}}}'
    )
    records, _ = built(folder)
    assert records["a"]["captions"] == ["a dog"] and records["a"]["similarity"] is None


def test_columns_of_one_name_lose_nothing_in_silence(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    table = tmp_path / "a.csv"
    table.write_text("image,caption,caption,x,x\n0.png,a,b,1,2\n1.png,,only\n2.png,c\n")
    records, _ = built(table)
    texts = {key: record["captions"] for key, record in records.items()}
    assert texts == {"0": ["a", "b"], "1": ["only"], "2": ["c"]}
    table = tmp_path / "b.csv"
    table.write_text("image,image,caption\n0.png,1.png,b\n2.png,,c\n")
    records, report = built(table)
    assert list(records) == ["2"] and report.reasons == {"no image": 1}
    image, text = pa.array([picture(0)]), pa.array(["a"])
    columns = pa.Table.from_arrays([image, text, text, text], names=["image", "text", "x", "x"])
    pq.write_table(columns, tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"c.parquet: two columns are called 'x'"):
        built(tmp_path / "c.parquet", text_column="x")
    assert built(tmp_path / "c.parquet")[1].kept == 1


def test_damaged_row_groups_are_rejected_row_by_row(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    table = parquet_of(
        tmp_path / "t.parquet",
        image=[picture(n) for n in range(6)],
        text=[f"text {n}" for n in range(6)],
    )
    chunk = pq.ParquetFile(table).metadata.row_group(1).column(1)
    data = bytearray(table.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + 8] = b"\xff" * 8
    table.write_bytes(data)
    records, report = built(table)
    assert report.reasons == {"unreadable row": 2} and len(records) == 4
    assert {tuple(r["captions"]) for r in records.values()} == {
        (f"text {n}",) for n in (0, 1, 4, 5)
    }


def test_llava_and_other_conversations(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.png").write_bytes(picture(ord(name)))

    def said(*turns: str) -> list[dict[str, str]]:
        return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)]

    entries = [
        {"id": 1, "image": "a.png", "conversations": said("<image>\nWho?", "Me", "Why?", "So")},
        {"id": 2, "image": "b.png", "conversations": said("<image>", "a cat")},
        {"id": 3, "images": ["c.png"], "image": "c.png", "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A dog"},
        ]},
        {"id": 4, "conversations": said("no image", "none")},
        {"id": 5, "image": "d.png", "conversations": said("", "an answer without a question")},
        7,
    ]  # fmt: skip
    (tmp_path / "llava.json").write_text(json.dumps(entries))
    records, report = built(tmp_path / "llava.json")
    assert {key: (r["captions"], r.get("qa")) for key, r in records.items()} == {
        "a": ([], [["Who?", "Me"], ["Why?", "So"]]),
        "b": (["a cat"], None),
        "c": ([], [["What?", "A dog"]]),
    }
    assert report.reasons == {"no image": 1, "no text": 1, "unreadable row": 1}
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries[:3]))
    assert built(tmp_path / "l.jsonl")[0] == records
    vqa = [{"image": "a.png", "question": "Who?", "answer": ["x", "y", "y"]},
           {"image": "b.png", "question": "How many?", "answer": 2}]  # fmt: skip
    (tmp_path / "vqa.json").write_text(json.dumps(vqa))
    records, _ = built(tmp_path / "vqa.json")
    assert [records[key]["qa"] for key in "ab"] == [[["Who?", "y"]], [["How many?", "2"]]]


def test_karpathy_captions(tmp_path: Path) -> None:
    (tmp_path / "val2014").mkdir()
    images: list[Any] = [3, {"filename": 1}]
    for number, split in enumerate(("train", "restval", "val", "test")):
        folder = {"filepath": "val2014"} if number else {}
        (tmp_path / folder.get("filepath", "") / f"{number}.png").write_bytes(picture(number))
        raw = [{"raw": f"{split} {n}", "tokens": []} for n in range(5)]
        images.append({"filename": f"{number}.png", "split": split, "sentences": raw, **folder})
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    records, report = built(tmp_path / "dataset.json")
    assert report.splits == {"train": 2, "val": 1, "test": 1}
    assert report.reasons == {"unreadable annotation": 2}
    assert {r["captions"][4] for r in records.values()} == {
        "train 4", "restval 4", "val 4", "test 4",
    }  # fmt: skip


def test_gzip_of_a_single_tar_is_a_source(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "x.tar", {"a.png": picture(0), "a.txt": b"a"})
    (tmp_path / "y.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    assert built(tmp_path / "y.tar.gz")[0] == {"a": {"captions": ["a"]}}
