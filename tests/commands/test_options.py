"""The options of the verbs are the fields of the options classes, and reach the model."""

import argparse
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import pytest
from PIL import Image

import multimodal
from multimodal.api import load
from multimodal.cli import main
from multimodal.inference.mixed import Reply
from multimodal.options import (
    AnswerOptions,
    CaptionOptions,
    DrawOptions,
    EditOptions,
    Sampling,
    TextOptions,
)

SHARED = {"adapter", "help", "model", "device", "dtype", "threads", "urls"}
BULK = {"data", "out_dir", "split", "workers", "engine"}
CLASSES: dict[str, type[Sampling]] = {
    "caption": CaptionOptions,
    "answer": AnswerOptions,
    "generate": TextOptions,
    "draw": DrawOptions,
    "edit": EditOptions,
}
# What a verb has beside the fields of its options class.
OTHERS = {
    "caption": {"images", "json", "batch_size", "index", "retrieve", *BULK},
    "answer": {
        "image",
        "question",
        "json",
        "index",
        "retrieve",
        "choices",
        "schema",
        "prompt",
        "prompts",
    },
    "generate": {"parts", "chat", "output", "out", "json"},
    "draw": {"prompt", "out", "n", "sign"},
    "edit": {"image", "mask", "box", "margins", "vary", "prompt", "out", "sign"},
}
POSITIONAL = {
    "caption": ["a.png"],
    "answer": ["a.png", "what?"],
    "generate": ["--text", "a red"],
    "draw": ["a bus", "--out", "x.png"],
    "edit": ["a.png", "--box", "0,0,9,9", "--prompt", "a bus", "--out", "x.png"],
}
# Values that are no defaults and go together.
VALUES: dict[str, Any] = {
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.25,
    "min_p": 0.125,
    "seed": 3,
    "max_tokens": 5,
    "stop": ["x", "y z"],
    "repetition_penalty": 1.5,
    "length_penalty": 0.75,
    "candidates": 2,
    "steps": 4,
    "guidance_scale": 2.5,
    "guidance_schedule": "rising",
    "negative": "a cat",
    "method": "masked",
}
BEAMS = {"beams": 3, "length_penalty": 0.25}  # beam search takes no temperature


class Recorder:
    """Stands for a model: remembers the keyword arguments of its last use."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def caption_each(self, images: Sequence[str], *, batch_size: int, **options: Any) -> list[str]:
        self.given = options
        return [""] * len(images)

    def answer(self, image: str, question: str, **options: Any) -> str:
        apart = ("prompt", "choices", "schema")
        self.given = {name: value for name, value in options.items() if name not in apart}
        return ""

    def reply(self, prompts: Sequence[object], *, output: str, **options: Any) -> list[Reply]:
        self.given = options
        return [Reply([""], 1, 0, 0, 0.0, "end")]

    def draw_each(self, prompt: str, n: int, **options: Any) -> list[Image.Image]:
        self.given = options
        return [Image.new("RGB", (8, 8))] * n

    def edit(self, image: str, mask: object, prompt: str, **options: Any) -> Image.Image:
        self.given = options
        return Image.new("RGB", (8, 8))


def parser_of(verb: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser that a verb makes."""
    parsers: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        parsers.append(parser)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(SystemExit):
            main([verb])
    (parser,) = parsers
    return parser


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recorder:
    model = Recorder()
    monkeypatch.setattr(multimodal, "load", lambda *_, **__: model, raising=False)
    monkeypatch.chdir(tmp_path)
    return model


@pytest.mark.parametrize("verb", CLASSES)
def test_a_parser_has_every_field_with_its_default(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = CLASSES[verb]
    actions = {action.dest: action for action in parser_of(verb, monkeypatch)._actions}
    hints = typing.get_type_hints(options)
    assert set(actions) == {item.name for item in fields(options)} | SHARED | OTHERS[verb]
    for item in fields(options):
        action, kind, default = actions[item.name], hints[item.name], item.default
        assert action.option_strings == [f"--{item.name.replace('_', '-')}"]
        assert action.default is argparse.SUPPRESS, "what is not given has the default of the class"
        assert action.help is not None and not action.required
        assert item.name == "seed" or action.help.startswith(item.metadata["help"])
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        if default in ((), None):
            assert "(default" not in action.help
        else:
            assert action.help.endswith(f"(default {shown})"), item.name
        if typing.get_origin(kind) is Literal:
            assert action.choices == typing.get_args(kind)
        elif typing.get_origin(kind) is tuple:
            assert isinstance(action, argparse._AppendAction) and "several times" in action.help
        else:
            plain = typing.get_args(kind)[0] if isinstance(kind, types.UnionType) else kind
            assert action.type is plain


@pytest.mark.parametrize("verb", CLASSES)
@pytest.mark.parametrize("values", [VALUES, BEAMS, {}], ids=["all", "beams", "none"])
def test_every_option_reaches_the_model(
    verb: str, values: dict[str, Any], recorder: Recorder
) -> None:
    names = {item.name for item in fields(CLASSES[verb])}
    assert names <= {*VALUES, *BEAMS}
    expected = {name: value for name, value in values.items() if name in names}
    arguments: list[str] = []
    for name, value in expected.items():
        for each in value if isinstance(value, list) else [value]:
            arguments += [f"--{name.replace('_', '-')}", str(each)]
    assert main([verb, *POSITIONAL[verb], *arguments]) == 0
    if verb == "caption":  # of a list that ranks may share
        assert recorder.given.pop("first") == 0
    assert recorder.given == expected
    assert CLASSES[verb](**recorder.given) == CLASSES[verb](**expected)


@pytest.mark.parametrize("prompt", ["several", "question", "statement"])
def test_beams_leave_out_the_sampling_of_a_prompt_file(
    prompt: str, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "red.png"
    Image.new("RGB", (32, 32), "red").save(photo)
    line = ["answer", str(photo), "what is it?", "--model", str(tiny_model_folder), "--json"]
    assert main([*line, "--prompt", prompt, "--beams", "5"]) == 0
    shown = json.loads(capsys.readouterr().out)["answer"]
    model = load(tiny_model_folder)
    assert shown == model.answer(photo, "what is it?", prompt=prompt, beams=5)


def test_a_prompt_file_gives_the_seed_too(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "red.png"
    Image.new("RGB", (32, 32), "red").save(photo)
    (tmp_path / "dice.yaml").write_text("version: 1\nabout: x\ntemperature: 1.0\nseed: 5\n")
    line = ["answer", str(photo), "what?", "--model", str(tiny_model_folder), "--json"]
    line += ["--prompt", "dice", "--prompts", str(tmp_path)]
    answers = {}
    for name, more in (("file", []), ("same", ["--seed", "5"]), ("other", ["--seed", "0"])):
        assert main([*line, *more]) == 0
        answers[name] = json.loads(capsys.readouterr().out)["answer"]
    assert answers["file"] == answers["same"] != answers["other"]


def test_the_best_of_several_captions_is_taken_from_shards_too(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from multimodal.data.shards import Shards

    source, out = tmp_path / "scenes", tmp_path / "out"
    assert main(["data", "scenes", str(source), "--count", "5", "--size", "32"]) == 0
    options = ["--candidates", "3", "--temperature", "1", "--max-tokens", "6", "--batch-size", "2"]
    line = ["caption", "--model", str(tiny_model_folder), *options, "--split", "train"]
    assert main([*line, "--data", str(source), "--out-dir", str(out)]) == 0
    (path,) = out.glob("*.jsonl")
    captions = [json.loads(row)["caption"] for row in path.read_text("utf-8").splitlines()]
    images = [sample.image for sample in Shards(source, "train")]
    model = load(tiny_model_folder)
    best = model.caption(images, temperature=1.0, max_tokens=6, candidates=3)
    assert captions == best != model.caption(images, temperature=1.0, max_tokens=6)
