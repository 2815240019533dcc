"""Averaged weights and early stopping: what is validated, and what is exported."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from multimodal.api import load
from multimodal.cli import main
from tests.launches import launch, logged

pytestmark = pytest.mark.usefixtures("one_thread")
LIGHTNING = "lightning.pytorch.callbacks"
EVALUATOR = """
class Weights:
    name, protocol, from_codes, examples = "weights", "their sum", True, ()

    def fits(self, sample):
        return True

    def measure(self, subject):
        weights = subject.model.network.parameters()
        yield "sum", float(sum(weight.double().sum() for weight in weights))
"""


def recipe(work: Path, tmp_path: Path, **stopping: Any) -> Path:
    """A configuration with all three. The order of the callbacks does not matter."""
    (tmp_path / "mine.py").write_text(EVALUATOR)
    config = yaml.safe_load((work / "joint.yaml").read_text())
    config["trainer"]["callbacks"] = [
        {"class_path": f"{LIGHTNING}.EMAWeightAveraging", "init_args": {"decay": 0.7}},
        {"class_path": f"{LIGHTNING}.EarlyStopping", "init_args": stopping},
        {
            "class_path": "multimodal.train.evaluation.EvaluateModel",
            "init_args": {"tasks": [f"{tmp_path / 'mine.py'}:Weights"], "limit": 2},
        },
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def assert_exports(run: Path, checkpoint: dict[str, Any], state: str, same: bool = True) -> None:
    """That the exported network is, or is not, that of a checkpoint."""
    weights = load_file(run / "model/model.safetensors")
    stored = {
        name: checkpoint[state][name.replace("model.", "network.transformer.", 1)]
        for name in weights
    }
    assert all(torch.equal(weight, stored[name]) for name, weight in weights.items()) == same


def test_the_best_averaged_weights_are_exported_and_validated(work: Path, tmp_path: Path) -> None:
    """Validations at steps 5 and 10. The loss falls, so the first one has the largest."""
    config = recipe(work, tmp_path, monitor="val/total", mode="max", patience=1)
    run = tmp_path / "run"
    fit = ["fit", "--config", str(config), "--output", str(run), "--checkpoint_every", "5"]
    last = run / "checkpoints/last.ckpt"
    launch(fit, dies_at=7)
    at_5 = torch.load(last, weights_only=True)
    assert main([*fit, "--ckpt_path", str(last)]) == 0
    assert list(logged(run)) == list(range(10)), "it stopped at the second validation"
    assert_exports(run, at_5, "state_dict")
    assert_exports(run, at_5, "current_model_state", same=False)
    assert_exports(run, torch.load(last, weights_only=True), "state_dict", same=False)

    # Everything in the validation is of the weights that were exported.
    model = load(run / "model")
    total = float(sum(weight.double().sum() for weight in model.network.parameters()))
    (value, _) = logged(run, "val/Weights/sum").values()
    assert float(value) == pytest.approx(total, abs=1e-3)
    samples = run / "logs/samples"
    lines = [
        line.split("\t")[:2] for line in (samples / "step-000005.txt").read_text().splitlines()
    ]
    predict = ["predict", "--config", str(work / "joint.yaml"), "--output", str(tmp_path)]
    assert main([*predict, "--init_from", str(run / "model"), "--data.val_limit", "8"]) == 0
    predictions = (tmp_path / "predictions.jsonl").read_text().splitlines()
    expected = {r["key"]: r["caption"] for r in map(yaml.safe_load, predictions)}
    assert len(lines) == 2 and all(expected[key] == caption for key, caption in lines)
    (prompt,) = (samples / "prompts.txt").read_text("utf-8").splitlines()
    (drawn,) = model.draw(prompt)
    assert np.array_equal(np.asarray(Image.open(samples / "step-000005.png")), np.asarray(drawn))


def test_the_last_validation_is_exported_if_it_is_the_best(work: Path, tmp_path: Path) -> None:
    config = recipe(work, tmp_path, monitor="val/total", mode="min", patience=1)
    run = tmp_path / "run"
    fit = ["fit", "--config", str(config), "--output", str(run), "--checkpoint_every", "10"]
    assert main(fit) == 0
    assert len(logged(run)) == 14
    at_the_end = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert_exports(run, at_the_end, "state_dict")


def test_early_stopping_on_captions(work: Path, tmp_path: Path) -> None:
    """As in a recipe: a tie is no better score, so the first model of the two stays."""
    config = recipe(work, tmp_path, monitor="val/CIDEr", mode="max", patience=1, min_delta=10.0)
    run = tmp_path / "run"
    assert main(["fit", "--config", str(config), "--output", str(run)]) == 0
    assert len(logged(run)) == 10 and len(logged(run, "val/CIDEr")) == 2
    (value, _) = logged(run, "val/Weights/sum").values()
    weights = load(run / "model").network.parameters()
    assert float(value) == pytest.approx(float(sum(w.double().sum() for w in weights)), abs=1e-3)
