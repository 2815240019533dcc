"""COCO captions, VQA questions and Parquet become shards. Rejected entries are named."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from multimodal.cli import main
from multimodal.data.shards import Shards
from multimodal.data.verify import check


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """val2014/ with four photos, captions.json, questions.json and answers.json."""
    images = tmp_path / "val2014"
    images.mkdir()
    for number in range(1, 5):
        rng, buffer = np.random.default_rng(number), io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "JPEG")
        (images / f"COCO_val2014_{number:012d}.jpg").write_bytes(buffer.getvalue())
    captions = {
        "info": {},
        "licenses": [{"id": 1, "name": "Attribution License"}],
        "images": [
            {"id": n, "file_name": f"COCO_val2014_{n:012d}.jpg", "license": n} for n in (1, 2, 3, 9)
        ]
        + [{"id": 7}],
        "annotations": [
            {"id": 0, "image_id": 1, "caption": " a dog "},
            {"id": 1, "image_id": 2, "caption": "a cat"},
            {"id": 2, "image_id": 1, "caption": "a brown dog"},
            {"id": 3, "image_id": 9, "caption": "its file is not there"},
            {"id": 4, "image_id": 55, "caption": "of no image"},
            {"id": 5, "image_id": 2},
            "rubbish",
        ],
    }
    questions = {
        "data_type": "mscoco",
        "data_subtype": "val2014",
        "questions": [
            {"question_id": 10, "image_id": 1, "question": "Is it a dog?"},
            {"question_id": 11, "image_id": 1, "question": "What colour?"},
            {"question_id": 12, "image_id": 4, "question": "How many?"},
            {"question_id": 13, "image_id": 4, "question": "Nobody knows?"},
            {"question_id": 14, "question": "Of what?"},
            {"question_id": 15, "image_id": 2},
        ],
    }
    answers = {
        "annotations": [
            {"question_id": 10, "multiple_choice_answer": "yes"},
            {"question_id": 11, "answers": [{"answer": a} for a in ("red", "brown", "brown")]},
            {"question_id": 12, "answers": [{"answer": "2"}]},
        ]
    }
    for name, value in (("captions", captions), ("questions", questions), ("answers", answers)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return tmp_path


def build(folder: Path, *arguments: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Records by key, and reasons of rejected entries by name."""
    out = folder / "out"
    command = ["data", "build", *arguments[:1], str(out), "--images", str(folder / "val2014")]
    assert main([*command, *arguments[1:]]) == 0
    assert list(check(out)) == []
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    kept = {sample.key: sample.record for sample in Shards(out)}
    return kept, {Path(line["sample"]).name: line["reason"] for line in lines}


def test_coco_captions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, rejected = build(folder, str(folder / "captions.json"))
    assert kept == {
        "COCO_val2014_000000000001": {
            "captions": ["a dog", "a brown dog"],
            "license": "Attribution License",
        },
        "COCO_val2014_000000000002": {"captions": ["a cat"]},
    }
    assert rejected == {
        "captions.json: images[4]": "unreadable annotation",
        "captions.json: annotations[4]": "unreadable annotation",
        "captions.json: annotations[5]": "unreadable annotation",
        "captions.json: annotations[6]": "unreadable annotation",
        "COCO_val2014_000000000003.jpg": "no text",
        "COCO_val2014_000000000009.jpg": "unreadable image",
    }
    assert "kept 2 of 8 samples" in capsys.readouterr().out


def test_vqa_questions(folder: Path) -> None:
    answers = ["--answers", str(folder / "answers.json")]
    kept, rejected = build(folder, str(folder / "questions.json"), *answers)
    assert kept == {
        "COCO_val2014_000000000001": {
            "captions": [],
            "qa": [["Is it a dog?", "yes"], ["What colour?", "brown"]],
        },
        "COCO_val2014_000000000004": {"captions": [], "qa": [["How many?", "2"]]},
    }
    assert set(rejected) == {f"questions.json: questions[{n}]" for n in (3, 4, 5)}


def test_questions_with_image_and_answer_need_no_other_file(folder: Path) -> None:
    name = f"COCO_val2014_{3:012d}.jpg"
    content = {"questions": [{"image": name, "question": "What?", "answer": "this"}]}
    (folder / "own.json").write_text(json.dumps(content))
    kept, rejected = build(folder, str(folder / "own.json"))
    assert [record["qa"] for record in kept.values()] == [[["What?", "this"]]] and not rejected


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ('{"a": 1, "b": 2}', [], "its keys are a, b"),
        ("[1]", [], "which column is the image?"),
        ("1", [], "not a JSON object or list"),
        ("{", [], "not readable as JSON"),
        (
            '{"questions": [{"question_id": 1, "image": "x.jpg", "question": "?"}]}',
            [],
            "1 unreadable annotation",
        ),
        ('{"images": [], "annotations": []}', ["--answers", "answers.json"], "have no answers"),
        (
            '{"licenses": null, "images": [{"id": [1], "file_name": "x.jpg"},'
            ' {"file_name": "y.jpg"}, {"id": 1, "file_name": "../x.jpg"},'
            ' {"id": 2, "file_name": "\\ud800.jpg"},'
            ' {"id": 2, "file_name": "z.jpg"}], "annotations": [{"caption": "of what?"}]}',
            [],
            "4 unreadable annotation, 1 image outside the folder, 1 no image",
        ),
        (
            '{"questions": [{"image": "x.jpg", "question": "?", "answer": null}]}',
            ["--answers", "answers.json"],
            "1 unreadable annotation",
        ),
        (
            '{"data_type": "abstract_v002", "data_subtype": "val2015", "questions":'
            ' [{"image_id": 1, "question": "?", "answer": "a"}]}',
            [],
            "1 unreadable annotation",
        ),
        ('{"questions": []}', ["--answers", "captions.json"], "no sample could be used"),
        ('{"questions": []}', ["--answers", "none.json"], "no such file"),
    ],
)
def test_other_files_are_refused_with_one_line(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    Path("x.json").write_text(content)
    assert main(["data", "build", "x.json", "out", *options]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# --- Parquet ----------------------------------------------------------------------------------


def write_parquet(path: Path, columns: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)


def test_parquet_with_paths_is_read_as_a_table(folder: Path) -> None:
    names = [f"COCO_val2014_{n:012d}.jpg" for n in (1, 2, 1, 8)]
    texts = ["a dog", "a cat", "a brown dog", "not there"]
    write_parquet(
        folder / "t.parquet", {"filepath": names, "caption": texts, "label": [1, 2, 1, 3]}
    )
    kept, rejected = build(folder, str(folder / "t.parquet"))
    assert sorted(kept.values(), key=str) == [
        {"captions": ["a cat"], "label": 2},
        {"captions": ["a dog", "a brown dog"], "label": 1},
    ]
    assert rejected == {"COCO_val2014_000000000008.jpg": "unreadable image"}


@pytest.mark.parametrize("wrapped", [False, True])
def test_parquet_with_image_files(folder: Path, wrapped: bool) -> None:
    files = [path.read_bytes() for path in sorted((folder / "val2014").iterdir())]
    cells: list[Any] = [*files[:3], b"", b"not an image"]
    if wrapped:  # as Hugging Face's datasets write them
        cells = [{"bytes": data, "path": f"dir/p{n}.jpg"} for n, data in enumerate(cells)]
    texts = ["one", None, "three", "four", "five"]
    write_parquet(folder / "t.parquet", {"image": cells, "text": texts})
    kept, rejected = build(folder, str(folder / "t.parquet"))
    hint = "p" if wrapped else "t-"
    assert {key: record["captions"] for key, record in kept.items()} == {
        f"{hint}0": ["one"],
        f"{hint}2": ["three"],
    }
    assert rejected == {
        "t.parquet: row 1": "no text",
        "t.parquet: row 3": "unreadable image",
        "t.parquet: row 4": "unreadable image",
    }
    stored = {sample.key: sample.image for sample in Shards(folder / "out")}
    assert stored[f"{hint}0"] == files[0]


def test_damaged_parquet_and_missing_columns_are_errors(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    write_parquet(Path("t.parquet"), {"pixels": [b"x"], "caption": ["a"]})
    for options, message in (
        ([], "which column is the image? It has pixels, caption"),
        (["--image-column", "nope"], "no column 'nope'"),
    ):
        assert main(["data", "build", "t.parquet", "out", *options]) == 1
        assert message in capsys.readouterr().err
    Path("t.parquet").write_bytes(Path("t.parquet").read_bytes()[:-20])
    assert main(["data", "build", "t.parquet", "out"]) == 1
    assert "t.parquet: not readable as Parquet" in capsys.readouterr().err
