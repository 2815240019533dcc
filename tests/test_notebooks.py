"""The notebooks run, shortened, without a network."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

NOTEBOOKS = Path(__file__).resolve().parent.parent / "examples/notebooks"
# What makes a notebook small. Nothing else about it is changed.
SMALLER = {
    "own_data.py": {
        "PICTURES, STEPS, BATCH = 240, 120, 16": "PICTURES, STEPS, BATCH = 24, 4, 4",
        "flags(60, seed=1)": "flags(4, seed=1)",
        '"--trainer.log_every_n_steps", "5"]': '"--trainer.log_every_n_steps", "1"]\n'
        'arguments += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]',
    },
    "inside.py": {"PICTURES = 400": "PICTURES = 40"},
}
matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(scope="module", autouse=True)
def no_window() -> Iterator[None]:
    matplotlib.use("Agg")
    yield
    matplotlib.pyplot.close("all")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of them run: a later one reads what an earlier one left."""
    return tmp_path_factory.mktemp("notebooks")


def run(name: str) -> dict[str, Any]:
    source = (NOTEBOOKS / name).read_text("utf-8")
    for long, short in SMALLER.get(name, {}).items():
        assert source.count(long) == 1, long
        source = source.replace(long, short)
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, name, "exec"), scope)  # code of our own
    return scope


def is_drawn(path: Path) -> bool:
    """Whether a picture is more than an even ground."""
    return float(np.asarray(Image.open(path).convert("L")).std()) > 5


def cells(name: str, kind: str) -> list[str]:
    parts = re.split(r"^(?=# %%)", (NOTEBOOKS / name).read_text("utf-8"), flags=re.MULTILINE)
    assert parts[0] == ""
    return [part for part in parts[1:] if part.startswith("# %% [markdown]") == (kind == "text")]


@pytest.mark.parametrize("name", sorted(path.name for path in NOTEBOOKS.iterdir()))
def test_they_are_in_percent_format(name: str) -> None:
    assert cells(name, "text")[0].splitlines()[1].startswith("# # "), "it begins with a title"
    for text in cells(name, "text"):
        assert all(line.startswith("#") for line in text.splitlines() if line)
    assert all(len(code.splitlines()) > 1 for code in cells(name, "code"))


def test_the_starter_in_ten_cells(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    scope = run("starter.py")
    assert len(cells("starter.py", "code")) == 10
    captions = scope["captions"]
    assert captions[0] == scope["model"].caption("cat.png") and captions[2] is None
    assert list(captions.skipped) == [2]
    for name in ("cat.png", "scene.png", "drawings.png", "edited.png"):
        assert is_drawn(folder / name), name
    before, after = (np.asarray(Image.open(folder / f"{n}.png")) for n in ("scene", "edited"))
    assert (before[128:] == after[128:]).all(), "only the box is drawn anew"


def test_own_data_and_the_curves_of_its_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.chdir(folder)
    scope = run("own_data.py")
    assert scope["report"].kept == 24 and 0 <= scope["after"] <= 1
    assert scope["tuned"].fingerprint != scope["model"].fingerprint
    curves = run("curves.py")
    assert {"caption", "total"} <= set(curves["losses"])
    with (folder / "runs/flags/logs/metrics.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["train/caption"]]
    steps, values = curves["curve"]("train/caption")
    assert steps == [int(line["step"]) for line in lines] and len(steps) >= 3
    assert values == [float(line["train/caption"]) for line in lines]
    assert is_drawn(folder / "losses.png") and is_drawn(folder / "gradients.png")


def test_looking_inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.chdir(folder)
    scope = run("inside.py")
    on_image = scope["on_image"]
    assert "".join(scope["maps"].tokens) and len(on_image) == len(scope["maps"].tokens)
    assert 0 < float(on_image.sum((-2, -1)).max()) <= 1 + 1e-5
    assert set(scope["agreement"]) == {"all dimensions", "PCA", "t-SNE"}
    for name in ("codes", "attention", "heads", "embeddings"):
        assert is_drawn(folder / f"{name}.png"), name
