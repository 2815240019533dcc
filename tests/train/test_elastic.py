"""torchrun starts the ranks of a run again when one dies, and the run goes on by itself."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multimodal.cli import main
from multimodal.train.run import resuming
from tests.launches import launch, logged, run_processes, torchrun

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


def in_folder_of_its_rank(folder: Path) -> None:
    """As if each rank ran on a machine with a disk of its own."""
    os.chdir(folder / os.environ["RANK"])


def test_ranks_that_see_different_checkpoints_do_not_train(work: Path, tmp_path: Path) -> None:
    for rank in "01":
        (tmp_path / rank).mkdir()
    run = tmp_path / "0/run"
    start = ["--trainer.max_steps", "3", "--trainer.limit_val_batches", "0"]
    assert main([*fit(work, run), *start]) == 0
    before = (run / "checkpoints/step=3.ckpt").read_bytes()
    ends = run_processes(
        fit(work, Path("run"), *TWO_RANKS, "--ckpt_path", "auto"),
        environments=torchrun(2),
        before=partial(in_folder_of_its_rank, tmp_path),
    )
    for end in ends:
        assert end.status == 1 and "Traceback" not in end.stderr, end.stderr
        assert "(rank 0: step=3.ckpt; rank 1: none (a new run))" in end.stderr
        assert "--output has to be a folder that all ranks see" in end.stderr
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step=3.ckpt", "last.ckpt"}
    assert (run / "checkpoints/step=3.ckpt").read_bytes() == before


def test_many_ranks_with_different_checkpoints_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is the step that a link leads to, not its name."""
    last = tmp_path / "last.ckpt"
    last.symlink_to("step=8.ckpt")
    for others in ([], ["step=8.ckpt"]):
        monkeypatch.setattr(resuming, "gather_objects", lambda own, rest=others: [*own, *rest])
        resuming.check_same_checkpoint(str(last))
    others = ["step=8.ckpt"] * 9 + ["step=4.ckpt"]
    monkeypatch.setattr(resuming, "gather_objects", lambda own: [*own, *others])
    with pytest.raises(ValueError, match="different checkpoints") as error:
        resuming.check_same_checkpoint(str(last))
    ranks = "(ranks 0, 1, 2, 3, 4, 5, 6, 7, ...: step=8.ckpt; rank 10: step=4.ckpt)"
    assert ranks in str(error.value) and "\n" not in str(error.value)


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
