"""Preference training: runs that prefer, resume, and what they refuse."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from multimodal.cli import main
from tests.launches import launch, logged
from tests.preferring import preferring, recipe, values

pytestmark = pytest.mark.usefixtures("one_thread")


def denied_is_worse(records: list[dict[str, Any]], number: int) -> dict[str, Any]:
    """The own caption against its opposite, which begins with another word."""
    own = records[number]["captions"][0]
    return {**records[number], "preferences": [{"chosen": own, "rejected": f"no {own}"}]}


def test_what_is_chosen_becomes_likelier(work: Path, tmp_path: Path) -> None:
    data = preferring(work, tmp_path / "data", denied_is_worse)
    config = recipe(work, tmp_path, [data], learning_rate=0.003, lm_weight=0.1)
    fit = ["fit", "--config", str(config), "--trainer.max_steps", "30"]
    fit += ["--trainer.limit_val_batches", "0", "--output", str(tmp_path / "run")]
    assert main([*fit, "--init_from", str(work / "joint/model")]) == 0
    run = tmp_path / "run"
    assert values(run, "train/preference")[0] == pytest.approx(np.log(2), abs=1e-5)
    assert values(run, "train/preference_kl")[0] == pytest.approx(0, abs=1e-6)
    assert np.mean(values(run, "train/preference")[-5:]) < 0.6
    assert np.mean(values(run, "train/rewards/accuracy")[-10:]) > 0.9
    margins, both = values(run, "train/rewards/margin"), ("chosen", "rejected")
    chosen, rejected = (values(run, f"train/rewards/{name}") for name in both)
    assert margins == pytest.approx(np.subtract(chosen, rejected), abs=1e-4)
    assert len(values(run, "train/caption")) == 30


def test_a_killed_run_resumes(work: Path, tmp_path: Path) -> None:
    data = preferring(work, tmp_path / "data", denied_is_worse)
    config, model = recipe(work, tmp_path, [data], dropout=0.1), str(work / "joint/model")
    fit = ["fit", "--config", str(config), "--trainer.max_steps", "6", "--output"]
    uninterrupted, run = str(tmp_path / "whole"), str(tmp_path / "run")
    assert main([*fit, uninterrupted, "--init_from", model]) == 0
    launch([*fit, run, "--init_from", model], dies_at=5)
    assert main([*fit, run, "--ckpt_path", f"{run}/checkpoints/last.ckpt"]) == 0
    for name in ("train/preference", "train/rewards/margin", "train/total", "train/preference_kl"):
        expected = logged(Path(uninterrupted), name)
        assert len(expected) == 6 and logged(Path(run), name) == expected, name
    assert logged(Path(uninterrupted), "val/preference")
