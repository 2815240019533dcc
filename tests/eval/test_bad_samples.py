"""One bad sample ends no evaluation: scores are those of the folder without it."""

import json
from pathlib import Path
from typing import Any

import pytest

from multimodal.cli import main
from multimodal.data.shards import Shards, index_shard, read_manifest, write_manifest, write_tar
from tests.photos import picture

BAD = {
    "broken": {"jpg": picture(20, "JPEG")[:300], "txt": b"half a dog"},
    "zeros": {"png": picture(21)[:100] + bytes(400), "txt": b"a dog in a hole"},
    "no_image": {"json": b'{"captions": ["no image"]}'},
    "no_json": {"png": picture(22), "json": b'{"captions": ["a"'},
    "latin": {"png": picture(23), "txt": "caf\xe9".encode("latin-1")},
    "types": {"png": picture(24), "json": b'{"captions": ["a dog"], "qa": "none"}'},
}

LONG = {
    "caption": {"png": picture(30), "json": json.dumps({"captions": ["a dog " * 9000]}).encode()},
    "question": {"png": picture(31), "json": json.dumps({"qa": [["why " * 9000, "so"]]}).encode()},
    "answer": {"png": picture(32), "json": json.dumps({"qa": [["why?", "so " * 9000]]}).encode()},
}


def good(number: int) -> dict[str, bytes]:
    record = {
        "captions": [f"a dog number {number}", "a cat"],
        "qa": [["is it a dog?", "yes"], ["what is it?", "a dog"]],
        "class": ["dog", "cat"][number % 2],
    }
    return {"png": picture(number), "json": json.dumps(record).encode()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good samples alone, among bad ones, and beside some with a text that no model reads."""
    parent = tmp_path_factory.mktemp("folders")
    for name, bad in (("clean", {}), ("bad", BAD), ("long", LONG)):
        (parent / name).mkdir()
        for split in ("train", "val"):
            samples = [(f"{split}{number}", good(number)) for number in range(4)]
            # Bad ones come first: reading of the others has to go on.
            write_tar(
                parent / name / f"{split}-0000.tar",
                [*((f"{split}_{key}", members) for key, members in bad.items()), *samples],
            )
        shards = sorted((parent / name).glob("*.tar"))
        write_manifest(parent / name, [index_shard(shard) for shard in shards])
    return {name: parent / name for name in ("clean", "bad", "long")}


@pytest.mark.parametrize(
    ("name", "split", "left_out"),
    [("bad", "val", BAD), ("bad", "train", BAD), ("long", "val", LONG)],
)
def test_scores_are_those_without_the_bad_samples(
    folders: dict[str, Path],
    name: str,
    split: str,
    left_out: dict[str, Any],
    tiny_model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where bad ones are in the training split that captions are compared with."""
    scores = []
    tasks = ["captioning", "answers", "retrieval", "classification", "reconstruction"]
    for folder in (folders[name], folders["clean"]):
        out = tmp_path / f"{folder.name}.json"
        line = ["eval", *tasks, "--split", split, "--model", str(tiny_model_folder)]
        line += ["--data", str(folder), "--cache", "", "--output", str(out)]
        assert main(line) == 0
        results = json.loads(out.read_text())["results"]
        # A caption of a damaged picture is one of the training split nevertheless.
        scores.append(
            [
                {score: v for score, v in result["scores"].items() if "constant" not in score}
                for result in results
            ]
        )
        error = capsys.readouterr().err
        for key in left_out:
            assert (f"left out: sample {split}_{key}" in error) == (folder.name == name), error
    assert scores[0] == scores[1] and len(scores[0]) == len(tasks)


def test_tokenizers_are_compared_on_the_others(
    folders: dict[str, Path],
    tiny_model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = []
    for folder in (folders["bad"], folders["clean"]):
        out = tmp_path / f"{folder.name}.json"
        line = ["tokenizer", "compare", str(tiny_model_folder), "--data", str(folder)]
        assert main([*line, "--output", str(out)]) == 0
        assert ("left out: sample val_broken" in capsys.readouterr().err) == (folder.name == "bad")
        (row,) = json.loads(out.read_text())["tokenizers"]
        values.append({name: v for name, v in row.items() if not name.endswith("_per_second")})
    assert values[0] == values[1]


@pytest.mark.parametrize("workers", [1, 2])
def test_codes_are_those_without_the_bad_samples(
    folders: dict[str, Path],
    workers: int,
    tiny_model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is left out is in rejected.jsonl and in the manifest."""
    encode = ["tokenizer", "encode", "--tokenizer", str(tiny_model_folder), "--batch-size", "3"]
    for folder in (folders["bad"], folders["clean"]):
        out = tmp_path / folder.name
        assert main([*encode, "--workers", str(workers), str(folder), str(out)]) == 0
    assert f"rejected {2 * len(BAD)}: unreadable" in capsys.readouterr().err
    bad, clean = tmp_path / "bad", tmp_path / "clean"
    assert list(Shards(bad)) == list(Shards(clean)) and len(Shards(bad)) == 8
    lines = [json.loads(line) for line in (bad / "rejected.jsonl").read_text().splitlines()]
    assert [line["sample"].rpartition(": ")[2] for line in lines] == [
        f"{split}_{key}" for split in ("train", "val") for key in BAD
    ]
    assert all(line["detail"] for line in lines)
    assert read_manifest(bad)["rejected"] == {"unreadable image or text": len(lines)}
    assert not (clean / "rejected.jsonl").exists() and "rejected" not in read_manifest(clean)


def test_a_report_names_what_it_cannot_read(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (folders["bad"], folders["clean"]):
        out, numbers = tmp_path / "report.html", tmp_path / "report.json"
        assert main(["data", "report", str(folder), "--out", str(out), "--json", str(numbers)]) == 0
        said = capsys.readouterr().err
        assert ("cannot be read: train_broken" in said) == (folder.name == "bad")
        (about,) = json.loads(numbers.read_text())["folders"]
        assert len(about["unreadable"]) == (2 * len(BAD) if folder.name == "bad" else 0)
