"""Options that would take hours or all memory are refused, or say what they cost."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from multimodal import load, memory
from multimodal.cli import main
from multimodal.commands import options as shared
from multimodal.data.builder.build import build_shards
from multimodal.devices import choose_device
from multimodal.inference.prompt_files import read_prompt
from multimodal.inference.text import partial_stop_length
from multimodal.options import DrawOptions
from tests.photos import picture as photo

DEEP = "[" * 20_000 + "]" * 20_000


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "red.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return str(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "-1"], "--threads -1: expected 1 to 1,024"),
        (["--threads", "100000"], "--threads 100000: expected 1 to 1,024"),
        (["--device", "banana"], "--device banana: cannot be used here"),
        (["--device", "meta"], "--device meta: cannot be used here"),
        (["--beams", "1000000"], "--beams 1000000: expected 1 to 1,024"),
        (["--beams", "2", "--length-penalty", "1e300"], "--length-penalty 1e+300: expected -100"),
        (["--candidates", "1000000000", "--temperature", "1"], "up to 10,000"),
        (["--max-tokens", "9" * 30], "expected a whole number"),
        (["--max-tokens", "100000"], "the model reads at most 4096"),
        (["--temperature", "nan"], "--temperature nan: expected a number"),
        (["--temperature", "1e-320"], "expected 0 (the most likely token) or a number from 1e-20"),
        (["--top-k", "9" * 30, "--temperature", "1"], "expected a whole number"),
        (["--seed", "9" * 30], "expected a whole number"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    options: list[str],
    message: str,
    picture: str,
    tiny_model_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["caption", picture, "--model", str(tiny_model_folder), *options]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1, said


@pytest.mark.parametrize(
    "device", ["", "x" * 10_000, "cuda:-1", "cpu\n", "xla", "opengl", "mkldnn"]
)
def test_a_device_that_cannot_compute_is_named(device: str) -> None:
    with pytest.raises(ValueError, match=r"^device='.*cannot be used here") as error:
        choose_device(device)
    assert len(str(error.value)) < 400


def test_work_that_does_not_fit_into_memory_says_what_to_lower(
    picture: str, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_model_folder)
    monkeypatch.setattr(memory, "available_memory", lambda: 10**6)
    monkeypatch.setattr(memory, "CHECKED_FROM", 0)
    for arguments in ({"beams": 200}, {"candidates": 200, "temperature": 1.0}):
        with pytest.raises(ValueError, match="needs about .* GB of memory.*: lower .*beams, cand"):
            model.caption([picture], **arguments)
    with pytest.raises(ValueError, match="the number of choices"):
        model.answer(picture, "what?", choices=[f"thing {n}" for n in range(500)])
    assert model.caption([picture], max_tokens=3)
    with pytest.raises(ValueError, match="the pixels of 99 images at once.*lower batch_size"):
        model.embed([picture] * 99, batch_size=1000)
    assert len(model.embed([picture] * 99, batch_size=9)) == 99


def test_the_free_memory_is_known_here() -> None:
    free = memory.available_memory()
    if Path("/proc/meminfo").exists():
        assert free is not None and 2**20 < free < 2**50


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_a_lack_of_memory_is_a_sentence(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr("multimodal.commands.folders.info.main", fail)
    assert main(["info"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("multimodal info: error: not enough memory: lower --batch-size")
    assert ("--device cpu" in said) == ("CUDA" in said)
    monkeypatch.setattr(error, "args", ("a bug",), raising=False)
    if type(error) is RuntimeError:
        with pytest.raises(RuntimeError, match="a bug"):
            main(["info"])


def test_drawings_come_one_by_one_and_are_those_of_draw(tiny_model_folder: Path) -> None:
    model = load(tiny_model_folder)
    whole = model.draw("a bus", 5, candidates=20, seed=3)  # three at a time
    for several in (model.draw_each("a bus", 2, candidates=20, seed=3), whole[:2]):
        assert [image.tobytes() for image in several] == [image.tobytes() for image in whole[:2]]
    with pytest.raises(ValueError, match="n=0: expected a whole number from 1"):
        model.draw("a bus", 0)


def test_more_steps_than_codes_draw_what_the_codes_take(tiny_model_folder: Path) -> None:
    model = load(tiny_model_folder)
    (image,) = model.draw("a bus", method="masked", steps=10_000)
    assert image.size == (32, 32)
    with pytest.raises(ValueError, match="steps=1000000000: expected 1 to 10,000"):
        DrawOptions(steps=10**9)


def test_long_work_says_how_long_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, *(30.0 * n for n in range(1, 2000))])

    class Time:
        monotonic = staticmethod(lambda: next(clock))

    monkeypatch.setattr(shared, "time", Time)
    items: Iterator[int] = shared.with_progress(iter(range(400)), 400, "multimodal draw", "images")
    assert list(items) == list(range(400))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "multimodal draw: 1 of 400 images, about 3 h 20 min to go"
    assert lines[1].startswith("multimodal draw: 4 of 400") and 100 < len(lines) < 140
    assert list(shared.with_progress(iter("ab"), 2, "multimodal draw", "images")) == ["a", "b"]
    assert not capsys.readouterr().err, "nothing is said of short work"


def test_a_stop_text_longer_than_the_text_costs_nothing() -> None:
    assert partial_stop_length("so ab", ["ab" * 10**7, "b"]) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"version: 1\nabout: {DEEP}", "nested too deep"),
        ("version: !!int ''\nabout: x", "not a prompt"),
        ("version: 1\nabout: x\n? [a]\n: b", "not a prompt"),
        ("version: 1\nabout: x\nchoices: [" + "x, " * 30_000 + "]", "over the limit"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nversion: 1\nabout: *b", "unknown"),
    ],
)
def test_hostile_prompt_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(content, "utf-8")
    with pytest.raises(ValueError, match=f"hostile.yaml.*{message}") as error:
        read_prompt(path)
    assert len(str(error.value)) < 1000


def be_a_pipe(path: Path) -> None:
    os.mkfifo(path)


def be_endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [be_a_pipe, be_endless, Path.mkdir])
def test_files_that_are_none_do_not_hang(
    make: Any, tmp_path: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    make(path)
    lines = [
        ["answer", picture, "what?", "--schema", str(path)],
        ["tokenizer", "import", str(path), str(tmp_path / "imported")],
        ["info", str(path)],
        ["caption", picture, "--model", str(path)],
    ]
    if make is not Path.mkdir:
        lines.append(["tokenizer", "text", str(path), "--out", str(tmp_path / "text.json")])
    for line in lines:
        assert main(line) == 1, line
        said = capsys.readouterr().err
        assert str(path) in said and "Traceback" not in said, said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["data", "build", "photos", "out", "--workers", "9" * 9], "workers must be 1 to 1,024"),
        (["data", "build", "photos", "out", "--image-size", "9" * 9], "must be 1 to 10,000"),
        (["data", "scenes", "out", "--count", "1", "--size", "9" * 9], "expected 8 to 2,048"),
        (["caption", "--data", "shards", "--out-dir", "out", "--workers", "9" * 9], "1 to 1,024"),
        (["prefer", "starter", "--candidates", "9" * 9], "expected 2 to 10,000"),
        (["tokenizer", "encode", "shards", "out", "--decoders", "9" * 9], "at most 1,024"),
        (["tokenizer", "encode", "shards", "out", "--encodings", "9" * 9], "1 to 1,000"),
        (
            ["tokenizer", "compare", "starter", "--image-size", "9" * 9],
            "GB of memory.*--image-size",
        ),
    ],
)
def test_numbers_beyond_memory_are_refused_before_the_work(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(2):
        (tmp_path / f"photos/{number}.png").write_bytes(photo(number))
        (tmp_path / f"photos/{number}.txt").write_text("a dog", "utf-8")
    monkeypatch.chdir(tmp_path)
    build_shards("photos", "shards")
    more = {"prefer": ["--data", "shards", "--out", "out"], "encode": ["--tokenizer", "starter"]}
    more["compare"] = ["--data", "shards", "--split", "train"]
    crops = ["--crop-scale", "0.5"] * ("--encodings" in argv)
    assert main([*argv, *more.get(argv[0], more.get(argv[1], [])), *crops]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, said[-1]) and "error: " in said[-1], said
