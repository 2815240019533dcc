"""README is short, and its commands run. Its Python: test_docs.py. Its numbers: test_numbers.py."""

import random
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

from docs.examples import workplace
from docs.tutorial_pages import FEW
from docs.tutorials import blocks, commands
from multimodal.api import load
from multimodal.cli import main
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


QUICK, OWN = after("quick path"), after("own data")
# The same and one command more.
RUNS = blocks("sh", (ROOT / "docs/training/runs.md").read_text("utf-8"))[0]


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
    assert commands(QUICK) == commands(RUNS)[:4]
    run_small(RUNS, capsys)
    for name in ("predictions.jsonl", "logs", "checkpoints/last.ckpt", "model/config.json"):
        assert (tmp_path / "runs/scenes-joint" / name).exists(), name


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


def test_the_pictures_of_its_python_are_in_the_repository() -> None:
    """A visitor can repeat it: what the examples run on is what lies in docs/images/."""
    named = {*re.findall(r'"([\w/]+\.png)"', README.partition("## Use")[2].partition("## How")[0])}
    assert {"scene.png", "other.png"} <= named and "In `docs/images/`" in README
    with workplace() as folder:
        made = [*folder.glob("photos/*.png"), folder / "scene.png", folder / "other.png"]
        for path in made:
            kept = ROOT / "docs/images" / path.relative_to(folder)
            assert ImageChops.difference(Image.open(path), Image.open(kept)).getbbox() is None, path
    assert len(made) == 14


def test_it_is_read_in_minutes() -> None:
    """Words by spaces, code and table too. Lines of tables and of outputs may be longer."""
    assert len(README.split()) <= 700
    prose = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    assert [line for line in prose.splitlines() if len(line) > 100 and line[0] != "|"] == []


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_the_tests_that_prove_a_row_of_the_comparison_exist() -> None:
    links = re.findall(
        r'\]\(\.\./(\S+)(?: "(\w+)")?\)', (ROOT / "docs/peers.md").read_text("utf-8")
    )
    assert links
    for path, test in links:
        assert (ROOT / path).exists(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text("utf-8"), test
