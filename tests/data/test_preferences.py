"""Preferences in TRL's format: from JSON Lines, Parquet and items to shards."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from multimodal.data.builder.build import build_shards
from multimodal.data.documents import document_of, images_in
from multimodal.data.samples import Sample
from multimodal.data.shards import Shards
from multimodal.model.preferences import check_preferences

COLOURS = ("red", "green", "blue")


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 16), colour).save(file, "PNG")
    return file.getvalue()


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts]}]


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def drawn(**more: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": [{"type": "image", **more}]}]


IMAGE = {"type": "image"}
QUESTION = {"type": "text", "text": "What colour is it?"}
DRAW = {"type": "text", "text": "A blue square"}
# Rows, and what their record prefers.
GOOD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {
            "prompt": user(IMAGE, QUESTION),
            "chosen": said("red"),
            "rejected": said("green"),
            "images": ["img/red.png"],
            "license": "CC0",
        },
        {"prompt": "What colour is it?", "chosen": "red", "rejected": "green"},
    ),
    (
        {"prompt": "<image>What is it?", "chosen": "A square", "rejected": "A dog",
         "images": ["img/green.png"]},
        {"prompt": "What is it?", "chosen": "A square", "rejected": "A dog"},
    ),
    (
        {"question": "Why?", "chosen": "So", "rejected": "No", "image": "img/blue.png"},
        {"prompt": "Why?", "chosen": "So", "rejected": "No"},
    ),
    (
        {
            "chosen": user(IMAGE, QUESTION) + said("red"),
            "rejected": user(IMAGE, QUESTION) + said("blue"),
            "images": ["img/red.png"],
        },
        {"prompt": "What colour is it?", "chosen": "red", "rejected": "blue"},
    ),
    (
        {
            "prompt": [{"role": "system", "content": "Be short."}, *user(IMAGE)],
            "chosen": said("a red square"),
            "rejected": said("a dog"),
            "images": ["img/red.png"],
        },
        {"prompt": "", "chosen": "a red square", "rejected": "a dog"},
    ),
    (
        {
            "prompt": user(DRAW),
            "chosen": drawn(),
            "rejected": drawn(),
            "images": ["img/blue.png", "img/red.png"],
        },
        {"prompt": "A blue square", "chosen": {"image": "0"}, "rejected": {"image": "1"}},
    ),
    (
        {
            "prompt": user(DRAW),
            "chosen": drawn(image="img/blue.png"),
            "rejected": drawn(image="img/green.png"),
        },
        {"prompt": "A blue square", "chosen": {"image": "0"}, "rejected": {"image": "1"}},
    ),
    (
        {"prompt": user(IMAGE, QUESTION), "completion": said("red"), "label": True,
         "images": ["img/red.png"]},
        {"prompt": "What colour is it?", "completion": "red", "label": True},
    ),
    (
        {"question": "Why?", "chosen": "So", "rejected": "No", "image": "img/red.png",
         "content": "a page of a book"},
        {"prompt": "Why?", "chosen": "So", "rejected": "No"},
    ),
    (
        {"question": "Why?", "chosen": "So", "rejected": "No", "image": "img/red.png",
         "content": 5},
        {"prompt": "Why?", "chosen": "So", "rejected": "No"},
    ),
    (
        {"prompt": user(DRAW), "completion": drawn(), "label": False, "images": ["img/red.png"]},
        {"prompt": "A blue square", "completion": {"image": "0"}, "label": False},
    ),
]  # fmt: skip
FIRST = GOOD[0][0]
BAD: list[tuple[dict[str, Any], str]] = [
    ({k: v for k, v in FIRST.items() if k != "rejected"}, "no rejected answer"),
    ({**FIRST, "rejected": said(" ")}, "no rejected answer"),
    ({**FIRST, "chosen": None}, "no chosen answer"),
    ({**FIRST, "rejected": FIRST["chosen"]}, "equal chosen and rejected answers"),
    ({**GOOD[5][0], "images": ["img/red.png"] * 2}, "equal chosen and rejected answers"),
    ({**FIRST, "images": []}, "no image"),
    ({**FIRST, "images": ["img/red.png", "img/blue.png"]}, "no image"),
    ({**FIRST, "images": ["https://a.org/b.png"]}, "no image"),
    ({**FIRST, "images": ["../secret.png"]}, "image outside the folder"),
    ({**FIRST, "images": ["img/missing.png"]}, "unreadable image"),
    ({**FIRST, "images": ["img/broken.png"]}, "unreadable image"),
    ({**FIRST, "prompt": [*FIRST["prompt"], *said("red"), *user(QUESTION)]}, "several turns"),
    ({**FIRST, "chosen": 3}, "unreadable messages"),
    ({**FIRST, "content": [{"text": "a page"}]}, "texts about a document"),
    ({**GOOD[5][0], "prompt": ""}, "no drawings of a text"),
    ({**GOOD[5][0], "rejected": said("a dog")}, "no drawings of a text"),
    ({**GOOD[7][0], "label": "yes"}, "no label"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "img").mkdir()
    for colour in COLOURS:
        (tmp_path / "img" / f"{colour}.png").write_bytes(picture(colour))
    (tmp_path / "img/broken.png").write_bytes(picture("red")[:40])
    return tmp_path


def check(samples: list[Sample], expected: list[dict[str, Any]]) -> None:
    for sample, entry in zip(samples, expected, strict=True):
        assert sample.record["preferences"] == [entry]
        check_preferences(lambda key, record: None, False, sample.key, sample.record)
        drawings = isinstance(entry.get("chosen", entry.get("completion")), dict)
        parts = document_of(sample)
        assert parts == ([entry["prompt"], *[None] * (len(parts) - 1)] if drawings else [])


def test_rows_of_json_lines_become_samples_or_have_a_reason(folder: Path) -> None:
    rows = [row for row, _ in GOOD] + [row for row, _ in BAD]
    lines = [*(json.dumps(row) for row in rows), "{broken"]
    (folder / "trl.jsonl").write_text("\n".join(lines))
    report = build_shards(folder / "trl.jsonl", folder / "out")
    assert report is not None and report.kept == len(GOOD)
    expected = Counter(reason for _, reason in BAD) + Counter(["unreadable row"])
    assert report.reasons == dict(expected)
    rejected = [json.loads(line) for line in open(folder / "out/rejected.jsonl")]
    by_line = {line["lines"][0]: line["reason"] for line in rejected}
    assert by_line == {
        n: r for n, (_, r) in enumerate([*BAD, ({}, "unreadable row")], len(GOOD) + 1)
    }
    samples = list(Shards(folder / "out"))
    check(samples, [entry for _, entry in GOOD])
    assert samples[0].record["license"] == "CC0"
    assert images_in(samples[5]) == [picture("blue"), picture("red")]
    assert any("system" in what for what in report.ignored)


def test_parquet_with_images_in_it(folder: Path) -> None:
    rows = []
    for row, _ in [GOOD[0], GOOD[3], GOOD[4]]:
        images = [{"bytes": picture(Path(p).stem), "path": None} for p in row["images"]]
        rows.append({"prompt": None, **row, "images": images})
    for row in rows:  # as Hugging Face's datasets write it: each part has all fields
        for name in ("prompt", "chosen", "rejected"):
            for message in row[name] or ():
                if isinstance(message["content"], str):
                    message["content"] = [{"type": "text", "text": message["content"]}]
                message["content"] = [{"text": None, **part} for part in message["content"]]
    pq.write_table(pa.Table.from_pylist(rows), folder / "trl.parquet")
    report = build_shards(folder / "trl.parquet", folder / "out")
    assert report is not None and (report.kept, report.rejected) == (3, 0)
    samples = list(Shards(folder / "out"))
    check(samples, [GOOD[n][1] for n in (0, 3, 4)])
    assert samples[0].image == picture("red")


def test_items_of_a_program(folder: Path) -> None:
    items = [
        {**row, "images": [Image.open(folder / path) for path in row["images"]]}
        for row, _ in GOOD
        if "images" in row
    ]
    report = build_shards(
        iter([*items, {**items[0], "rejected": items[0]["chosen"]}]), folder / "out"
    )
    assert report is not None and report.reasons == {"equal chosen and rejected answers": 1}
    check(list(Shards(folder / "out")), [entry for row, entry in GOOD if "images" in row])


def test_a_column_of_images_or_of_texts_that_is_given_is_used(folder: Path) -> None:
    row = {"prompt": "What is it?", "chosen": "A square", "rejected": "A dog"}
    photo, other = {"photo": ["img/green.png"]}, {"images": ["img/red.png"]}
    (folder / "t.jsonl").write_text(json.dumps({**row, **photo, **other}))
    pq.write_table(pa.Table.from_pylist([{**row, **photo, **other}]), folder / "t.parquet")
    items = [{**row, "photo": picture("green"), "images": picture("red")}]
    for number, source in enumerate((folder / "t.jsonl", folder / "t.parquet", items)):
        build_shards(source, folder / f"out-{number}", image_column="photo")
        (sample,) = Shards(folder / f"out-{number}")
        check([sample], [row])
        assert sample.image == picture("green") and sample.record.keys() == {
            "captions",
            "preferences",
        }
    with pytest.raises(ValueError, match="no sample could be used"):
        build_shards(folder / "t.jsonl", folder / "none", image_column="gone")
    assert "no column 'gone'" in (folder / "none/rejected.jsonl").read_text()
    build_shards(folder / "t.jsonl", folder / "texts", text_column="chosen")
    (sample,) = Shards(folder / "texts")
    assert sample.record["captions"] == ["A square"] and sample.image == picture("red")
