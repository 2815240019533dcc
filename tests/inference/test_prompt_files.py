"""Prompt files: their words and options are used, and options that are given come first."""

import json
from pathlib import Path

import pytest
from PIL import Image

from multimodal import load
from multimodal.cli import main
from multimodal.inference.codec import encode_images, read_images
from multimodal.inference.prompt_files import LIBRARY, find_prompt, prompt_files, read_prompt
from multimodal.inference.text import answer_codes
from multimodal.options import AnswerOptions


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "red.png"
    Image.new("RGB", (32, 32), "red").save(path)
    return str(path)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def test_every_file_of_the_library_is_a_prompt() -> None:
    assert {path.stem for path in LIBRARY.iterdir()} == set(prompt_files())
    for name, path in prompt_files().items():
        prompt = read_prompt(path)
        assert prompt.name == name and prompt.about.endswith(".")
        assert find_prompt(str(prompt)) == prompt


def test_a_prompt_gives_its_words_and_its_options(
    picture: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    model = load(tiny_model_folder)
    content = "version: 3\nabout: Mine.\ntemplate: 'a red {text} in'\n"
    write(tmp_path, "mine", f"{content}temperature: 1.0\nmax_tokens: 9\nstop: ['e']\n")
    mine = find_prompt("mine", tmp_path)
    codes = encode_images(model, read_images(model, [picture]))
    hot = AnswerOptions(temperature=1.0, seed=7, max_tokens=9)
    (whole,) = answer_codes(model, codes, ["bus"], hot, prompt=mine)
    answer = model.answer(picture, "bus", prompt=mine, seed=7)
    assert answer == whole.partition("e")[0].strip()
    assert model.answer(picture, "bus", prompt=mine, seed=7, stop=[]) == whole
    # Options that are given come before those of the file.
    greedy = model.answer(picture, "bus", prompt=mine, temperature=0.0, stop=[], max_tokens=5)
    short = AnswerOptions(max_tokens=5)
    (expected,) = answer_codes(model, codes, ["bus"], short, prompt=mine)
    assert greedy == expected
    assert expected != answer_codes(model, codes, ["bus"], short)[0], "other words, other answer"
    assert model.answer(picture, "bus?", prompt="yes_or_no") in ("yes", "no")
    choices = ["red", "bus"]
    assert model.answer(picture, "a bus", prompt="statement", choices=choices) in choices


def test_the_commands_take_prompt_files(
    picture: str, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "short", "version: 2\nabout: Instead.\nmax_tokens: 4\n")
    line = ["answer", picture, "bus", "--model", str(tiny_model_folder), "--prompts", str(tmp_path)]
    assert main([*line, "--prompt", "short@2"]) == 0
    short = capsys.readouterr().out.strip()
    model = load(tiny_model_folder)
    assert short == " ".join(model.answer(picture, "bus", max_tokens=4).split())
    assert main([*line, "--prompt", "short", "--max-tokens", "8", "--stop", "never"]) == 0
    assert len(capsys.readouterr().out.strip()) > len(short)
    assert main(["prompts", "--prompts", str(tmp_path)]) == 0
    listed = dict(row.split("\t") for row in capsys.readouterr().out.splitlines())
    assert listed["short@2"] == "Instead." and "yes_or_no@1" in listed and "short@1" not in listed
    assert main(["prompts", "--json"]) == 0
    rows = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert {"name": "yes_or_no", "choices": ["yes", "no"]}.items() <= next(
        row for row in rows if row["name"] == "yes_or_no"
    ).items()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("version: 1\n", "about missing"),
        ("version: 0\nabout: x\n", "at least 1"),
        ("version: 1\nabout: x\ntemplate: no place\n", "{text}"),
        ("version: 1\nabout: x\ntemprature: 1\n", "unknown ['temprature']"),
        ("version: 1\nabout: x\nchoices: yes\n", "choices is True"),
        ("version: 1\nabout: x\nchoices: [one]\n", "choices none or two"),
        ("- a list\n", "not a mapping"),
        ("a: [\n", "not a prompt"),
        ("!!python/object/apply:os.system ['true']\n", "not a prompt"),
    ],
)
def test_a_file_that_is_no_prompt_is_an_error(
    text: str, reason: str, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "bad", text)
    assert main(["answer", picture, "q", "--prompts", str(tmp_path), "--prompt", "bad"]) == 1
    error = capsys.readouterr().err
    assert reason in error and str(path) in error and error.count("\n") == 1


def test_a_missing_prompt_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no prompt 'nope'; there are question, several"):
        find_prompt("nope")
    with pytest.raises(ValueError, match="is version 1, not 9"):
        find_prompt("short@9")
    with pytest.raises(ValueError, match="no such folder of prompts"):
        find_prompt("short", tmp_path / "none")


def test_a_prompt_can_be_a_key() -> None:
    assert {find_prompt("several"): 1}[find_prompt("several")] == 1
