"""What the README says can be typed: its quick path runs, its commands and options exist."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from multimodal.cli import VERBS, main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
# What makes a command of the quick path small. Nothing else about it is changed.
FEW = "--trainer.max_steps 2 --trainer.val_check_interval 2 --trainer.enable_progress_bar false \
--data.global_batch_size 4 --data.val_limit 4 --data.workers 0 --trainer.accelerator cpu \
--trainer.precision 32-true"
SMALLER = {
    "data scenes": "--count 20 --size 32",
    "tokenizer text": "--vocabulary-size 400",
    "fit --config scenes_tokenizer.yaml": f"{FEW} --model.init_args.tokenizer.dim 32",
    "fit --config scenes_joint.yaml": f"{FEW} --model.init_args.size tiny "
    "--model.init_args.drawings_in_validation 1 --model.init_args.row_length 256",
    "predict": f"{FEW} --model.init_args.size tiny",
}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The arguments of each `multimodal ...` line."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(x, comments=True)[1:] for x in lines if x.startswith("multimodal ")]


(QUICK, *_) = blocks("sh", README.split("<!-- quick path")[1])


def test_the_quick_path_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (python, *_) = blocks("python")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for arguments in commands(QUICK):
            line = " ".join(arguments)
            few = next((more for start, more in SMALLER.items() if line.startswith(start)), "")
            assert main([*arguments, *shlex.split(few)]) == 0, capsys.readouterr().err
    finally:
        torch.set_num_threads(threads)
    said = "\n".join(["predictions.jsonl", "logs", "checkpoints/last.ckpt", "model/config.json"])
    for name in said.splitlines():
        assert (tmp_path / "runs/scenes-joint" / name).exists(), name
    from PIL import Image

    (tmp_path / "scenes").mkdir()
    for name in ("scene.png", "other.png", "scenes/one.png"):
        Image.new("RGB", (60, 40), (90, 20, 200)).save(tmp_path / name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    scope: dict[str, object] = {}
    exec(python, scope)  # our own README
    (using,) = (block for block in blocks("sh") if "M=runs/scenes-joint/model" in block)
    shown = {}
    for arguments in commands(using.replace("$M", "runs/scenes-joint/model")):
        capsys.readouterr()
        assert main(arguments) == 0, arguments
        shown[arguments[0]] = capsys.readouterr().out
    assert len(shown) == 7
    first = shown["caption"].splitlines()[0].split("\t")[1]
    assert first.split() == scope["captions"][0].split()  # type: ignore[index]
    assert (tmp_path / "drawing-3.png").exists() and (tmp_path / "rows.jsonl").exists()


def test_every_other_command_of_the_readme_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [command for block in blocks("sh") if block != QUICK for command in commands(block)]
    assert len(found) > 8
    for command in found:
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
        elif command[0] != "predict":  # files that are not there: an error, but not of usage
            monkeypatch.chdir(tmp_path)
            assert main(command) == 1, command


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []
