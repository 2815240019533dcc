"""The quick path of the README runs, and its other commands and options exist."""

import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from docs.tutorial_pages import FEW
from docs.tutorials import blocks, commands
from multimodal.api import load
from multimodal.cli import VERBS, main
from multimodal.scenes.captions import captions
from multimodal.scenes.rendering import render
from multimodal.scenes.scene import sample_scene

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
SMALLER = {
    "data scenes": "--count 20 --size 32",
    "tokenizer text": "--vocabulary-size 400",
    "fit --config scenes_tokenizer.yaml": f"{FEW} --model.init_args.tokenizer.autoencoder.dim 32",
    "fit --config scenes_joint.yaml": f"{FEW} --model.init_args.size tiny "
    "--model.init_args.drawings_in_validation 1 --model.init_args.row_length 256",
    "predict": f"{FEW} --model.init_args.size tiny",
    "fit --config finetune.yaml": f"{FEW} --model.init_args.drawings_in_validation 1",
}


def after(marker: str) -> str:
    """The shell block that follows a marker."""
    return blocks("sh", README.split(f"<!-- {marker}")[1])[0]


QUICK, USE, OWN = after("quick path"), after("use"), after("own data")
INDEX = after("index")


def run_small(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in commands(block):
        line = " ".join(arguments)
        few = next((more for start, more in SMALLER.items() if line.startswith(start)), "")
        assert main([*arguments, *shlex.split(few)]) == 0, capsys.readouterr().err


def test_the_quick_path_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    run_small(QUICK, capsys)
    for name in ("predictions.jsonl", "logs", "checkpoints/last.ckpt", "model/config.json"):
        assert (tmp_path / "runs/scenes-joint" / name).exists(), name


def test_the_starter_is_used_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "scenes").mkdir()
    rng = random.Random(0)
    for name in ("scene.png", "other.png", "scenes/one.png"):
        render(sample_scene(rng)).save(tmp_path / name)
    scope: dict[str, Any] = {}
    (python, *_) = blocks("python", README)
    exec(python, scope)  # code of our README
    assert Image.open(tmp_path / "drawing.png").size == (64, 64)
    shown = {}
    for arguments in commands(USE):
        capsys.readouterr()
        assert main(arguments) == 0, arguments
        shown[arguments[0]] = capsys.readouterr().out
    assert len(shown) == 7
    assert shown["caption"].splitlines()[0].split("\t")[1] == scope["model"].caption("scene.png")
    assert (tmp_path / "drawing-3.png").exists() and (tmp_path / "rows.jsonl").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "box.md").write_text("# The box\n\nThere is a key in it.\n")
    for arguments in commands(INDEX):
        capsys.readouterr()
        assert main(arguments) == 0, arguments
        shown[arguments[0]] = capsys.readouterr().out
    assert "scenes/one.png" in shown["search"] and "box.md:1-3" in shown["answer"]


def test_own_data_from_a_folder_to_a_tuned_starter(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    rng = random.Random(0)
    for number in range(60):
        scene = sample_scene(rng)
        name = "one" if not number else f"photo-{number}"
        render(scene).save(tmp_path / "photos" / f"{name}.png")
        (tmp_path / "photos" / f"{name}.txt").write_text(captions(scene, rng, 1)[0])
    run_small(OWN, capsys)
    before, after = load("starter"), load("runs/finetune/model")
    assert after.image_tokenizer.fingerprint == before.image_tokenizer.fingerprint
    changed = [
        name
        for name, weight in before.network.transformer.state_dict().items()
        if not torch.equal(weight, after.network.transformer.state_dict()[name])
    ]
    assert changed, "it learned nothing"


def test_every_other_command_of_the_readme_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    others = [block for block in blocks("sh", README) if block not in (QUICK, USE, OWN, INDEX)]
    other_commands = [command for block in others for command in commands(block)]
    assert len(other_commands) > 5
    for command in other_commands:
        if command[0].startswith("-"):
            assert main(command) == 0
            continue
        assert command[0] in VERBS, command
        if command[0] == "fit":  # parsed, with every option it gives
            capsys.readouterr()
            with pytest.raises(SystemExit) as stopped:
                main([*command, "--print_config"])
            assert stopped.value.code in (0, None), command
            assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"]
        elif command[0] != "predict":  # its files do not exist: an error, but not of usage
            monkeypatch.chdir(tmp_path)
            assert main(command) == 1, command


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []
