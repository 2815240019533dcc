"""torchrun starts the ranks of a run again when one dies, and the run goes on by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multimodal.cli import main
from tests.launches import launch, logged

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
# What torchrun runs: a rank of the first start dies before a step.
DIES_ONCE = """
import os, signal, sys
import lightning as L
from multimodal.cli import main

def die(module, *_):
    if module.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    L.LightningModule.on_train_batch_start = die
sys.exit(main(sys.argv[1:]))
"""


def assert_same(run: Path, other: Path) -> None:
    weights, expected = (load_file(r / "model/model.safetensors") for r in (run, other))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert logged(run) == logged(other)


def fit(work: Path, run: Path, *more: str) -> list[str]:
    config = ["fit", "--config", str(work / "joint.yaml"), "--output", str(run)]
    return [*config, "--trainer.max_steps", "8", "--threads", "1", *more]


TWO_RANKS = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_second_start_goes_on_where_the_first_one_saved(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: bool
) -> None:
    """With --init_from, which started it; before the first checkpoint it starts anew."""
    start = ["--init_from", str(work / "joint/model")]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main([*fit(work, whole), *start]) == 0
    launch([*fit(work, run), *start], dies_at=5 if checkpoint else 2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main([*fit(work, run), *start]) == 0
    assert_same(run, whole)


def test_a_second_start_cannot_replace_the_first(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert main([*fit(work, tmp_path), "--overwrite"]) == 1
    assert "a second start would replace" in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_ends_as_if_nothing_had_happened(
    work: Path, tmp_path: Path
) -> None:
    whole, run, script = tmp_path / "whole", tmp_path / "run", tmp_path / "dies_once.py"
    launch(fit(work, whole, *TWO_RANKS), ranks=2)
    script.write_text(DIES_ONCE)
    elastic = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *elastic, "--max-restarts", "1", str(script)]
    done = subprocess.run(
        [*command, *fit(work, run, *TWO_RANKS)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "Signal 9" in done.stderr or "exitcode: -9" in done.stderr, done.stderr
    assert_same(run, whole)
