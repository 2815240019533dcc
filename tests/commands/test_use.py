"""The verbs that use a model. An error is one line, and leaves no half-written file."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multimodal.api import load
from multimodal.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(verb, ...) -> (exit status, stdout, stderr), with the tiny model."""

    def run(verb: str, *arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        model = ("--model", str(tiny_model_folder))
        try:
            status = main([verb, *model, *map(str, arguments)])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_answer(run: Run, photo: Path, tiny_model_folder: Path) -> None:
    expected = load(tiny_model_folder).answer(photo, "what is it?")
    status, out, _ = run("answer", photo, "what is it?", "--json")
    assert status == 0
    assert json.loads(out) == {"image": str(photo), "question": "what is it?", "answer": expected}
    assert run("answer", photo, "what is it?")[1] == " ".join(expected.split()) + "\n"
    expected = load(tiny_model_folder).answer(photo, "red?", choices=["yes", "no"]) + "\n"
    for line in (
        (photo, "red?", "--choices", "yes", "no"),
        (photo, "--choices", "yes", "no", "red?"),
        ("--choices", "yes", "no", photo, "red?"),
    ):
        assert run("answer", *line)[1] == expected


def test_draw_one_and_many(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "bus.png"
    assert run("draw", "a red bus", "--out", out, "--seed", 3)[:2] == (0, f"{out}\n")
    alone = np.asarray(Image.open(out))
    status, printed, _ = run("draw", "a red bus", "--out", out, "-n", 5, "--seed", 3)
    files = [tmp_path / f"bus-{i}.png" for i in range(5)]
    assert status == 0 and printed.split() == [*map(str, files), str(out)]
    assert (np.asarray(Image.open(files[0])) == alone).all()
    grid = np.asarray(Image.open(out))
    assert grid.shape == (66, 100, 3)
    assert (grid[34:, 34:66] == np.asarray(Image.open(files[4]))).all()
    assert (grid[34:, 68:] == 255).all(), "the last cell of the grid is empty"
    assert sorted(tmp_path.iterdir()) == sorted([out, *files])
    again = run("draw", "a red bus", "--out", tmp_path / "c.jpg", "--method", "causal")
    assert again[0] == 0 and Image.open(tmp_path / "c.jpg").format == "JPEG"


def test_edit(run: Run, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "edited.png"
    assert run("edit", photo, "--box", "0,0,20,30", "--prompt", "a bus", "--out", out)[0] == 0
    before, after = np.asarray(Image.open(photo)), np.asarray(Image.open(out))
    assert (before[:, 20:] == after[:, 20:]).all() and (before[:, :20] != after[:, :20]).any()
    mask = np.zeros((30, 40), np.uint8)
    mask[:, :20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    masked = ("edit", photo, "--mask", tmp_path / "mask.png", "--prompt", "a bus", "--out", out)
    assert run(*masked)[0] == 0
    assert (np.asarray(Image.open(out)) == after).all()


def test_generate(run: Run, photo: Path, tmp_path: Path, tiny_model_folder: Path) -> None:
    (expected,) = load(tiny_model_folder).generate(["a red", photo, "bus"])
    prompt = ("generate", "--text", "a red", "--image", photo, "--text", "bus")
    status, out, _ = run(*prompt, "--json")
    result = json.loads(out)
    assert status == 0 and result["output"] == [{"text": expected}]
    usage = result["usage"]
    assert usage["prompt_tokens"] > 18 and usage["text_tokens"] <= 64 and not usage["image_tokens"]
    assert usage["log_probability"] < 0 and usage["ended"] in ("end", "length")
    drawn = tmp_path / "drawn.png"
    status, out, _ = run(*prompt, "--output", "image", "--out", drawn, "--json")
    assert status == 0 and json.loads(out)["output"] == [{"image": str(drawn)}]
    assert json.loads(out)["usage"]["image_tokens"] == 16
    assert Image.open(drawn).size == (32, 32)


def test_embed_images_and_texts(
    run: Run, photo: Path, tmp_path: Path, tiny_model_folder: Path
) -> None:
    model = load(tiny_model_folder)
    (tmp_path / "broken.png").write_bytes(b"no image")
    status, _, errors = run("embed", tmp_path, "--out", tmp_path / "rows.npy")
    assert status == 1 and "broken.png" in errors
    rows = np.load(tmp_path / "rows.npy", allow_pickle=False)
    index = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert index == [{"image": str(photo)}] and rows.dtype == np.float32
    assert np.allclose(rows, model.embed(images=[photo]).numpy(), atol=1e-6)
    (tmp_path / "lines.txt").write_text("a red bus\ntwo dogs\n")
    lines = ("--text", tmp_path / "lines.txt", "--out", tmp_path / "texts.npy")
    assert run("embed", *lines)[0] == 0
    rows = np.load(tmp_path / "texts.npy", allow_pickle=False)
    assert np.allclose(rows, model.embed(texts=["a red bus", "two dogs"]).numpy(), atol=1e-6)
    (tmp_path / "lines.txt").write_text("a red bus\n\n" + "long " * 10_000 + "\ntwo dogs\n")
    status, _, errors = run("embed", *lines, "--batch-size", 10**20)
    assert status == 1 and "lines.txt: line 2: the text is empty" in errors
    assert "lines.txt: line 3: a prompt of" in errors
    again = np.load(tmp_path / "texts.npy", allow_pickle=False)
    assert np.allclose(again, rows, atol=1e-6), "the other lines have their rows"
    (tmp_path / "lines.txt").write_bytes("a red\u2028bus\r\ntwo\x0bdogs".encode())
    assert run("embed", *lines)[0] == 0
    assert len(np.load(tmp_path / "texts.npy", allow_pickle=False)) == 2


def test_search(run: Run, photo: Path, tmp_path: Path, tiny_model_folder: Path) -> None:
    rng = np.random.default_rng(1)
    for number in range(4):
        pixels = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    where = ("--images", tmp_path, "--cache", tmp_path / "cache")
    status, out, _ = run("search", photo, *where, "-k", 3, "--json")
    hits = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and len(hits) == 3
    scores = {hit["image"]: hit["score"] for hit in hits}
    assert scores[str(photo)] == pytest.approx(1, abs=1e-5)
    assert [hit["score"] for hit in hits] == sorted((h["score"] for h in hits), reverse=True)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    again = [json.loads(line) for line in run("search", photo, *where, "--json")[1].splitlines()]
    assert {hit["image"]: hit["score"] for hit in again[:3]} == pytest.approx(scores, abs=1e-6)
    (tmp_path / "0.png").write_bytes(b"no image")
    status, out, errors = run("search", "a red bus", *where, "-k", 10**30)
    assert status == 1 and len(out.splitlines()) == 4 and "0.png: " in errors
    found = load(tiny_model_folder).search("a red bus", tmp_path)
    assert out.splitlines() == [f"{score:.3f}\t{path}" for path, score in found]


EDIT = ("edit", "PHOTO", "--prompt", "a bus", "--out", "x.png")
HOSTILE: list[tuple[tuple[str, ...], int, str]] = [
    (("answer", "PHOTO", " "), 1, "the question is empty"),
    (("answer", "missing.png", "what?"), 1, "missing.png"),
    (("answer", "PHOTO", "why " * 10_000), 1, "the model reads at most"),
    (("answer", "PHOTO", "what?", "--temperature", "-1"), 1, "--temperature -1"),
    (("answer", "PHOTO", "what?", "--max-tokens", "0"), 1, "--max-tokens 0: expected at least 1"),
    (("draw", "", "--out", "x.png"), 1, "the text is empty"),
    (("draw", "word " * 10_000, "--out", "x.png"), 1, "the model reads at most"),
    (("answer", "--choices", "yes", "no"), 2, "required: IMAGE, QUESTION"),
    (("answer", "PHOTO", "--choices", "yes", "no"), 2, "required: IMAGE, QUESTION"),
    (("draw", "a bus", "--out", "x.png", "-n", "0"), 1, "-n 0: expected at least 1"),
    (("draw", "a bus", "--out", "x.png", "--steps", "0"), 1, "--steps 0: expected 1 to 10,000"),
    (
        ("draw", "a bus", "--out", "x.png", "--candidates", "0"),
        1,
        "--candidates 0: expected 1 to 10,000",
    ),
    (("draw", "a bus", "--out", "x.png", "--temperature", "-1"), 1, "--temperature -1"),
    (("draw", "a bus", "--out", "x.png", "--seed", "-1"), 1, "--seed -1"),
    (("draw", "a bus", "--out", "x.png", "--guidance-scale", "nan"), 1, "--guidance-scale nan"),
    (("draw", "a bus", "--out", "x.tiff"), 1, "expected a name that ends in .png"),
    (("draw", "a bus", "--out", "nowhere/x.png"), 1, "nowhere: no such folder"),
    (("draw", "a bus", "--out", "x.png", "--method", "magic"), 2, "invalid choice"),
    (
        ("edit", "PHOTO", "--prompt", "a", "--out", "x.png"),
        2,
        "--mask --box --margins --vary is required",
    ),
    (
        ("edit", "PHOTO", "--box", "1,2", "--prompt", "a", "--out", "x.png"),
        2,
        "expected four numbers, pixels",
    ),
    (("edit", "PHOTO", "--box", "9,9,2,2", "--prompt", "a", "--out", "x.png"), 1, "x0 < x1"),
    (("edit", "PHOTO", "--mask", "no.png", "--prompt", "a", "--out", "x.png"), 1, "no.png"),
    (("edit", "PHOTO", "--mask", "SMALL", "--prompt", "a", "--out", "x.png"), 1, "of one size"),
    (("edit", "PHOTO", "--box", "0,0,9,9", "--prompt", " ", "--out", "x.png"), 1, "is empty"),
    ((*EDIT, "--margins", "99999999,0,0,0"), 1, "margins=(99999999, 0, 0, 0): too large"),
    ((*EDIT, "--margins", "9999,0,0,0"), 1, "over 200 times as long as wide"),
    (("generate",), 2, "the prompt is empty"),
    (("generate", "--text", "a", "--output", "image"), 2, "needs --out"),
    (("generate", "--image", "missing.png"), 1, "missing.png"),
    (("generate", "--chat", "--text", "a", "--image", "PHOTO"), 2, "--chat is for texts alone"),
    (("generate", "--chat", "--text", "a"), 1, "this model has no chat template"),
    (("generate", "--chat", "--text", "a", "--text", "b"), 2, "the last --text is the user's"),
    (("embed", "--out", "x.npy"), 2, "one of them"),
    (("embed", "PHOTO", "--out", "x.npz"), 1, "ends in .npy"),
    (("embed", "PHOTO", "--out", "x.npy", "--seed", "1"), 2, "unrecognized arguments: --seed"),
    (("serve", "--private-urls"), 1, "give --urls"),
    (("serve", "--record-texts"), 1, "give --record FILE"),
    (("embed", "missing.png", "--out", "x.npy"), 1, "nothing could be embedded"),
    (("search", "a bus", "--images", "nowhere"), 1, "nowhere: no such folder"),
    (("search", "a bus", "--images", "EMPTY"), 1, "no images in it"),
    (("search", " ", "--images", "."), 1, "the text is empty"),
    (("search", "a bus", "--images", ".", "-k", "0"), 1, "-k 0: expected at least 1"),
    (("draw", "a bus", "--out", "x.png", "--device", "cuda:99"), 1, "cannot be used here"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), HOSTILE)
def test_hostile_input_is_one_line_and_leaves_nothing(
    run: Run,
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    status: int,
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (9, 9), "white").save(tmp_path / "small.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = sorted(tmp_path.rglob("*"))
    names = {"PHOTO": str(photo), "SMALL": "small.png", "EMPTY": "empty"}
    code, out, errors = run(*(names.get(argument, argument) for argument in arguments))
    assert (code, out) == (status, "")
    assert message in errors and "Traceback" not in errors
    last = [line for line in errors.splitlines() if "error:" in line]
    assert len(last) >= 1 and len(last[-1]) < 2000
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_reported_and_the_old_file_stays(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bus.png"
    out.write_bytes(b"what was there")
    (tmp_path / ".bus.png.part").symlink_to("/dev/full")
    status, printed, errors = run("draw", "a red bus", "--out", out)
    assert status == 1 and printed == "" and "No space left on device" in errors
    assert out.read_bytes() == b"what was there"
    assert [path.name for path in tmp_path.iterdir()] == ["bus.png"]
