"""Interleaved documents: from a .jsonl to shards and to training."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from multimodal.cli import main
from multimodal.data.builder.build import build_shards
from multimodal.data.builder.cleaning import Cleaning
from multimodal.data.samples import Sample, texts_of
from multimodal.data.shards import Shards
from multimodal.train.examples import ShardDataset


def picture(colour: str, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 16), colour).save(file, kind)
    return file.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "img").mkdir(parents=True)
    for name, colour in (("a.jpg", "red"), ("b.png", "green"), ("c.jpg", "blue")):
        kind = "PNG" if name.endswith("png") else "JPEG"
        (folder / "img" / name).write_bytes(picture(colour, kind))
    (folder / "img/broken.jpg").write_bytes(b"?")
    (folder.parent / "secret.jpg").write_bytes(picture("black"))
    rows: list[Any] = [
        {
            "key": "first",
            "license": "CC0",
            "content": [
                {"text": "Red:"},
                {"image": "img/a.jpg"},
                {"text": "and green, ask me@x.org:"},
                {"image": "img/b.png"},
                {"text": " "},
            ],
        },
        {"images": [None, "img/c.jpg", "img/a.jpg"], "texts": ["Blue and red:", None, None]},
        {"content": [{"image": "img/a.jpg"}]},
        {"content": [{"text": "no picture"}]},
        {"content": [{"text": "half"}, {"image": "img/c.jpg"}, {"image": "img/broken.jpg"}]},
        {"content": [{"text": "theirs"}, {"image": "../secret.jpg"}]},
        {"content": [{"text": "x", "image": "img/a.jpg"}]},
        {"content": "img/a.jpg"},
        {"images": ["img/a.jpg"], "texts": []},
        {"content": [{"text": "gone"}, {"image": "img/missing.jpg"}]},
        {"content": [{"text": "nul"}, {"image": "img/a\0.jpg"}]},
    ]
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "docs.jsonl").write_text("".join([*lines, "{broken\n"]))
    return folder / "docs.jsonl"


def rejected(out: Path) -> dict[int, str]:
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    return {int(line["sample"].rpartition("line ")[2]): line["reason"] for line in lines}


def test_documents_are_complete_and_in_order(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = build_shards(source, out)
    assert report is not None and (report.total, report.kept) == (12, 3)
    assert rejected(out) == {
        3: "no text",
        5: "unreadable image",
        6: "image outside the folder",
        7: "unreadable text",
        8: "unreadable text",
        9: "unreadable text",
        10: "unreadable image",
        11: "unreadable image",
        12: "unreadable row",
    }
    first, second, plain = Shards(out)
    assert plain.record["content"] == [{"text": "no picture"}] and {*plain.members} == {"json"}
    assert first.key == "first" and first.record["license"] == "CC0"
    assert first.record["content"] == [
        {"text": "Red:"},
        {"image": "0"},
        {"text": "and green, ask me@x.org:"},
        {"image": "1"},
    ]
    assert first.members["0.jpg"] == picture("red") and "1.png" in first.members
    assert second.record["content"] == [{"text": "Blue and red:"}, {"image": "0"}, {"image": "1"}]
    assert list(texts_of(first.record)) == ["Red:", "and green, ask me@x.org:"]
    assert main(["data", "check", str(out), "--decode"]) == 0

    # A build from shards of documents does not change them.
    build_shards(out, tmp_path / "again", cleaning=Cleaning(personal_data="mask", copies="exact"))
    again = list(Shards(tmp_path / "again"))
    assert [sample.key for sample in again] == ["first", second.key, plain.key]
    assert again[0].record["content"][2] == {"text": "and green, ask [e-mail]:"}
    assert {k: v for k, v in again[0].members.items() if k != "json"} == {
        k: v for k, v in first.members.items() if k != "json"
    }


def test_several_images_without_an_order_are_rejected(tmp_path: Path) -> None:
    from multimodal.data.shards import write_tar

    two = {"0.jpg": picture("red"), "1.jpg": picture("blue")}
    content = [{"image": "0"}, {"text": "x"}, {"image": "1"}]
    samples = [
        ("unordered", {**two, "json": b'{"caption": "a red and a blue view"}'}),
        (
            "from_one",
            {
                "1.jpg": two["0.jpg"],
                "2.jpg": two["1.jpg"],
                "json": json.dumps({"content": content}).encode(),
            },
        ),
        (
            "twice",
            {
                **two,
                "1.png": picture("green", "PNG"),
                "json": json.dumps({"content": content}).encode(),
            },
        ),
        ("good", {**two, "json": json.dumps({"content": content}).encode()}),
    ]
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in/train-0000.tar", samples)
    report = build_shards(tmp_path / "in", tmp_path / "out")
    assert report is not None and (report.total, report.kept) == (4, 1)
    assert report.reasons == {"unreadable text": 1, "no image": 2}
    assert [sample.key for sample in Shards(tmp_path / "out")] == ["good"]


def test_a_lost_document_is_reported(tmp_path: Path) -> None:
    from multimodal.data.shards import write_tar

    record = json.dumps({"content": [{"image": "0"}, {"text": "x"}]}).encode()
    (tmp_path / "in").mkdir()
    tar = tmp_path / "in/train-0000.tar"
    write_tar(tar, [(f"k{n}", {"0.jpg": picture("red"), "json": record}) for n in range(5)])
    data = bytearray(tar.read_bytes())
    for name in (b"k2.0.jpg", b"k2.json"):
        data[data.index(name) + 150] ^= 1  # both headers
    tar.write_bytes(data)
    report = build_shards(tmp_path / "in", tmp_path / "out")
    assert report is not None and (report.total, report.kept) == (5, 4)
    assert report.reasons == {"damaged shard": 1}


@pytest.mark.parametrize("content", [None, "news", ["some text"], [{"text": 3}], {"a": 1}])
def test_another_field_named_content_does_not_make_a_document(
    tmp_path: Path, content: object
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(picture("red"))
    record = {"caption": "write to me@x.org", "content": content}
    (folder / "a.json").write_text(json.dumps(record))
    cleaning = Cleaning(blocklist=["bad"], personal_data="mask")
    build_shards(folder, tmp_path / "out", cleaning=cleaning)
    (sample,) = Shards(tmp_path / "out")
    assert sample.record == {"captions": ["write to [e-mail]"], "content": content}
    assert sample.image == picture("red")


def test_plain_text_is_a_document_without_images(tmp_path: Path) -> None:
    lines = [{"text": "one", "license": "CC0"}, {"text": " "}, {"text": 3}, {"text": "two"}]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = build_shards(tmp_path / "texts.jsonl", tmp_path / "out")
    assert report is not None and report.reasons == {"no text": 1, "unreadable text": 1}
    first, second = Shards(tmp_path / "out")
    assert first.record == {"captions": [], "license": "CC0", "content": [{"text": "one"}]}
    assert main(["data", "check", str(tmp_path / "out"), "--decode"]) == 0
    report = build_shards(tmp_path / "out", tmp_path / "again")
    assert report is not None and report.kept == 2
    assert list(Shards(tmp_path / "again"))[1].members == second.members


def test_the_column_of_plain_text_can_be_given(tmp_path: Path) -> None:
    rows = [{"text": "short", "body": "long", "content": ["x"]}, {"text": "s", "body": "l"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_shards(tmp_path / "t.jsonl", tmp_path / "out", text_column="body")
    assert [sample.record for sample in Shards(tmp_path / "out")] == [
        {"captions": [], "text": "short", "content": [{"text": "long"}]},
        {"captions": [], "text": "s", "content": [{"text": "l"}]},
    ]
    with pytest.raises(ValueError, match="no column 'gone'; it has text, body"):
        build_shards(tmp_path / "t.jsonl", tmp_path / "none", text_column="gone")


def test_conversations_beside_a_list_of_images_are_no_document(
    source: Path, tmp_path: Path
) -> None:
    row = {"images": ["img/a.jpg"], "texts": [{"user": "What colour?", "assistant": "Red"}]}
    source.with_name("t.jsonl").write_text(json.dumps(row))
    source.with_name("t.json").write_text(json.dumps([row]))
    for name in ("t.jsonl", "t.json"):
        build_shards(source.with_name(name), tmp_path / name)
        (sample,) = Shards(tmp_path / name)
        assert sample.record == {"captions": [], "qa": [["What colour?", "Red"]]}
        assert sample.image == picture("red")


@pytest.mark.parametrize(
    "rows",
    [
        [{"photo": "img/a.jpg", "text": "red"}, {"photo": "img/c.jpg", "text": "blue"}],
        [{"text": "none here"}, {"image": "img/a.jpg", "text": "red"}],
        [{"text": "none here", "url": "https://x.org/1.PNG"}],
    ],
)
def test_a_table_of_images_is_not_read_as_plain_text(
    source: Path, tmp_path: Path, rows: list[dict[str, str]]
) -> None:
    table = source.with_name("table.jsonl")
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if any("image" in row for row in rows):
        report = build_shards(table, tmp_path / "out")
        assert report is not None and report.kept == 1 and report.reasons == {"no image": 1}
        return
    with pytest.raises(ValueError, match="which column is the image"):
        build_shards(table, tmp_path / "out")
    if "photo" in rows[0]:
        report = build_shards(table, tmp_path / "out", image_column="photo")
        assert report is not None and report.kept == 2
        assert all("jpg" in sample.members for sample in Shards(tmp_path / "out"))


def test_a_late_image_among_plain_texts_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multimodal.data.tables.documents.SNIFFED_ROWS", 2)
    lines = [{"text": "one"}, {"text": "two"}, {"text": "red", "image": "a.jpg"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = build_shards(tmp_path / "t.jsonl", tmp_path / "out")
    assert report is not None and report.kept == 2
    assert rejected(tmp_path / "out") == {3: "unreadable text"}


def test_a_text_that_ends_like_a_file_does_not_make_a_table_of_plain_texts(tmp_path: Path) -> None:
    texts = ["one", "two", "of a page:\n\n20170531.jpg", "see photo.png", "five"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "t.jsonl").write_text(lines)
    report = build_shards(tmp_path / "t.jsonl", tmp_path / "out")
    # The fourth may be a path, and is named.
    assert report is not None and report.kept == 4
    assert rejected(tmp_path / "out") == {4: "unreadable text"}


def test_a_damaged_plain_text_is_reported(tmp_path: Path) -> None:
    from multimodal.data.shards import write_tar

    (tmp_path / "in").mkdir()
    tar = tmp_path / "in/train-0000.tar"
    texts = [json.dumps({"content": [{"text": f"text {n}"}]}).encode() for n in range(5)]
    write_tar(tar, [(f"k{n}", {"json": text}) for n, text in enumerate(texts)])
    data = bytearray(tar.read_bytes())
    data[data.index(b"k2.json") + 150] ^= 1
    tar.write_bytes(data)
    report = build_shards(tmp_path / "in", tmp_path / "out")
    assert report is not None and (report.total, report.kept) == (5, 4)
    assert report.reasons == {"damaged shard": 1}


def test_training_reads_documents_in_order(source: Path, tmp_path: Path) -> None:
    build_shards(source, tmp_path / "out")
    data = ShardDataset([Shards(tmp_path / "out")], 16, "squash", 0)
    batch = data.collate([data[0, n] for n in range(3)])
    assert batch.documents == [
        ["Red:", None, "and green, ask me@x.org:", None],
        ["Blue and red:", None, None],
        ["no picture"],
    ]
    assert batch.image_counts == [2, 2, 0] and batch.images.shape == (4, 3, 16, 16)
    strongest = [image.float().mean((1, 2)).argmax().item() for image in batch.images]
    assert strongest == [0, 1, 2, 0]  # red, green, blue, red
    assert data.collate([data[0, 2]]).images.shape == (0, 3, 16, 16)


def test_the_image_of_a_document_is_an_error(source: Path, tmp_path: Path) -> None:
    build_shards(source, tmp_path / "out")
    with pytest.raises(ValueError, match="sample first is a document of 2 images"):
        Shards(tmp_path / "out")[0].image  # noqa: B018


def test_content_that_does_not_match_the_images_is_refused(source: Path, tmp_path: Path) -> None:
    from multimodal.data.shards import index_shard, write_manifest, write_tar

    folder = tmp_path / "shards"
    folder.mkdir()
    for number, content in enumerate(
        ([{"image": "0"}, {"text": "x"}], [{"image": "1"}, {"text": "x"}, {"image": "0"}], 3)
    ):
        record = {"captions": [], "content": content}
        members = {
            "0.jpg": picture("red"),
            "1.jpg": picture("blue"),
            "json": json.dumps(record).encode(),
        }
        shard = folder / f"train-{number:04d}.tar"
        write_tar(shard, [(f"k{number}", members)])
    write_manifest(folder, [index_shard(tar) for tar in sorted(folder.glob("*.tar"))])
    with pytest.raises(ValueError, match="no sample could be used .3 unreadable text."):
        build_shards(folder, tmp_path / "out")
    sample = Sample("k", {"0.jpg": b"", "json": b"{}"})
    with pytest.raises(ValueError, match="document of 1 images"):
        _ = sample.image
