"""One bad sample ends no evaluation: scores are those of the folder without it."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from multimodal.api import load
from multimodal.cli import main
from multimodal.data.samples import Sample
from multimodal.data.shards import Shards, index_shard, read_manifest, write_manifest, write_tar
from multimodal.eval.demo import Demo
from multimodal.eval.evaluator import MOST_SHOWN, Subject
from multimodal.inference.codec import read_images
from multimodal.tokenizers.image import ImageTokenizer
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


def test_a_document_is_left_to_the_tasks_that_read_it(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    """Reconstruction and energy are of images: a document ends neither."""
    content = [{"text": "before"}, {"image": "0.png"}]
    document = {"0.png": picture(40), "json": json.dumps({"content": content}).encode()}
    text = {"json": json.dumps({"content": [{"text": "no picture"}]}).encode()}
    samples = [("document", document), ("text", text), ("image", good(0)), ("other", good(1))]
    write_tar(tmp_path / "val-0000.tar", samples)
    write_manifest(tmp_path, [index_shard(tmp_path / "val-0000.tar")])
    out = tmp_path / "report.json"
    line = ["eval", "reconstruction", "energy", "--model", str(tiny_model_folder)]
    assert main([*line, "--data", str(tmp_path), "--output", str(out)]) == 0
    assert [result["n"] for result in json.loads(out.read_text())["results"]] == [2, 2]


def test_a_task_that_fails_leaves_the_others(
    folders: dict[str, Path],
    tmp_path: Path,
    tiny_model_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mine.py").write_text(
        "class Wrong:\n"
        "    name, protocol, examples = 'wrong', 'none', []\n"
        "    def fits(self, sample): return True\n"
        "    def measure(self, subject): raise ValueError('no such measure')\n"
    )
    out, wrong = tmp_path / "report.json", f"{tmp_path}/mine.py:Wrong"
    line = ["--data", str(folders["clean"]), "--model", str(tiny_model_folder)]
    assert main(["eval", wrong, "retrieval", *line, "--output", str(out)]) == 1
    report = json.loads(out.read_text())
    assert [result["task"] for result in report["results"]] == ["retrieval"]
    (failed,) = report["failed"]
    assert (failed["task"], failed["error"]) == (wrong, "no such measure")
    captured = capsys.readouterr()
    assert "no such measure" in captured.err and "text_to_image@1" in captured.out
    assert main(["eval", wrong, *line]) == 1
    assert "no task could be measured: no such measure" in capsys.readouterr().err


def test_a_model_without_a_decoder_is_not_asked_to_draw(
    folders: dict[str, Path],
    tmp_path: Path,
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ImageTokenizer, "can_draw", False)
    out = tmp_path / "report.json"
    line = ["--data", str(folders["clean"]), "--model", str(tiny_model_folder)]
    tasks = ["drawing", "scene_drawings", "reconstruction", "retrieval"]
    assert main(["eval", *tasks, *line, "--output", str(out)]) == 0
    assert [result["task"] for result in json.loads(out.read_text())["results"]] == ["retrieval"]
    assert capsys.readouterr().err.count("the model has no decoder of images") == 3
    assert list(Demo(load(tiny_model_folder)).steps) == ["captions", "answers", "search"]


def test_codes_of_another_tokenizer_are_refused(
    folders: dict[str, Path],
    tmp_path: Path,
    tiny_model_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    codes, tokenizer = tmp_path / "codes", ["--tokenizer", str(tiny_model_folder)]
    assert main(["tokenizer", "encode", *tokenizer, str(folders["clean"]), str(codes)]) == 0
    line = ["eval", "retrieval", "--model", str(tiny_model_folder), "--data", str(codes)]
    assert main(line) == 0
    manifest = read_manifest(codes)
    manifest["image_tokenizer"]["fingerprint"] = "0123456789abcdef"
    (codes / "manifest.json").write_text(json.dumps(manifest))
    assert main(line) == 1
    assert "its codes are of another image tokenizer" in capsys.readouterr().err


def test_large_images_are_not_all_in_memory(tiny_model_folder: Path) -> None:
    large = Image.effect_noise((1300, 700), 90).convert("RGB")
    file = io.BytesIO()
    large.save(file, "PNG")
    model = load(tiny_model_folder)
    subject = Subject(model, [Sample(str(n), {"png": file.getvalue()}) for n in range(3)])
    assert {max(image.size) for image in subject.images} == {MOST_SHOWN}
    assert torch.equal(subject.pixels, read_images(model, [large] * 3))
    assert subject.originals[1].tobytes() == large.tobytes()
    assert [image.size for image in subject.originals[:2]] == [large.size] * 2
