"""Runs that are killed, stopped, or run out of disk, on one rank and on two. All can resume."""

import os
import random
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop as TrainingEpochLoop
from safetensors.torch import load_file

from multimodal.cli import main
from multimodal.train import callbacks
from multimodal.train.callbacks import RandomState
from multimodal.train.joint import JointModule
from multimodal.train.run.damage import check_checkpoint
from tests.launches import die_before, launch, logged, run_processes, torchrun

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("name", "workers", "step"), [("tokenizer", 0, 7), ("joint", 0, 4), ("joint", 2, 5)]
)
def test_a_killed_run_resumes_bit_for_bit(
    work: Path, tmp_path: Path, name: str, workers: int, step: int
) -> None:
    # 6 batches an epoch, a checkpoint every 3 steps. A kill at step 4 resumes in the middle of the
    # first epoch, a kill at step 7 at its end. Both continue into further epochs.
    run = tmp_path / "run"
    fit = ["fit", "--config", str(work / f"{name}.yaml"), "--output", str(run)]
    fit += ["--data.workers", str(workers)]
    launch(fit, dies_at=step)
    before = logged(run)
    assert main([*fit, "--ckpt_path", str(run / "checkpoints/last.ckpt")]) == 0
    uninterrupted, resumed = logged(work / name), logged(run)
    assert len(uninterrupted) == 14 and uninterrupted == resumed
    assert {s: uninterrupted[s] for s in before} == before, "the log of the killed run is kept"
    assert_same_weights(run, work / name)
    samples = sorted(p.name for p in (run / "logs").rglob("step-*"))
    assert samples == sorted(p.name for p in (work / name / "logs").rglob("step-*"))


def test_the_random_state_of_a_gpu_is_restored_where_there_are_fewer_gpus_or_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A checkpoint has the state of the GPU in use. Older ones have those of all GPUs."""
    callback, restored = RandomState(), list[Any]()
    trainer: Any = SimpleNamespace(global_rank=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    state = callback.state_dict()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: "now")
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    assert callback.state_dict()["cuda"] == ["now"]
    for device, states in ((1, ["a", "b", "c", "d"]), (3, ["a", "b"]), (2, ["now"])):
        monkeypatch.setattr(torch.cuda, "current_device", lambda number=device: number)
        callback.load_state_dict({**state, "cuda": states})
        callback.on_train_start(trainer, L.LightningModule())
    assert restored == ["b", "b", "now"]


def test_each_rank_goes_on_with_its_own_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On as many ranks, on more, and from a checkpoint that has the state of one rank only."""

    def numbers(callback: RandomState, rank: int, step: int) -> list[float]:
        """What a rank draws whose start has set the seed."""
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)
        trainer: Any = SimpleNamespace(global_rank=rank, global_step=step)
        callback.on_train_start(trainer, L.LightningModule())
        states.append(RandomState().state_dict())
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    def resumed(checkpoint: dict[str, Any], rank: int, step: int) -> list[float]:
        callback = RandomState()
        callback.load_state_dict(checkpoint)
        return numbers(callback, rank, step)

    states = list[dict[str, Any]]()
    drawn = [numbers(RandomState(), rank, 0) for rank in range(2)]
    assert not set(drawn[0]) & set(drawn[1]), "they differ before the first step already"
    of_two = list(states)
    with monkeypatch.context() as patched:
        patched.setattr(callbacks, "gather_objects", lambda _: of_two)
        checkpoint = RandomState().state_dict()
    assert [resumed(checkpoint, rank, 9) for rank in range(2)] == drawn
    new = [resumed(checkpoint, 2, 9), resumed(checkpoint, 3, 9), resumed(checkpoint, 2, 8)]
    new.append(resumed(of_two[0], 1, 9))
    assert len({number for each in (*drawn, *new) for number in each}) == 6 * 3
    assert resumed(checkpoint, 2, 9) == new[0]


def note_random_states(folder: Path, dies_at: int | None) -> None:
    """Each rank writes its random state before each step, to the file STEP-RANK."""
    folder.mkdir(exist_ok=True)
    original = JointModule.training_step

    def and_note(self: JointModule, batch: Any, batch_idx: int) -> Any:
        state = torch.get_rng_state().numpy().tobytes()
        (folder / f"{self.global_step}-{self.global_rank}").write_bytes(state)
        return original(self, batch, batch_idx)

    JointModule.training_step = and_note  # type: ignore[method-assign]
    if dies_at is not None:
        die_before(dies_at)


def test_two_ranks_drop_different_units_and_resume_bit_for_bit(work: Path, tmp_path: Path) -> None:
    fit = ["fit", "--config", str(work / "joint.yaml"), "--model.init_args.dropout", "0.2"]
    fit += ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_steps", "6"]
    fit += ["--trainer.limit_val_batches", "0", "--output"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    resume = ["--ckpt_path", str(run / "checkpoints/last.ckpt")]
    for command, dies_at in (([str(whole)], None), ([str(run)], 5), ([str(run), *resume], None)):
        note = partial(note_random_states, tmp_path / f"{Path(command[0]).name}-states", dies_at)
        ends = run_processes([*fit, *command], environments=torchrun(2), before=note)
        assert {end.status for end in ends} == {-signal.SIGKILL if dies_at else 0}, ends
    uninterrupted, resumed = (
        {path.name: path.read_bytes() for path in (tmp_path / f"{name}-states").iterdir()}
        for name in ("whole", "run")
    )
    assert len(uninterrupted) == len(set(uninterrupted.values())) == 12
    assert uninterrupted == resumed
    assert_same_weights(run, whole)


def assert_same_weights(run: Path, other: Path) -> None:
    weights, expected = (load_file(r / "model/model.safetensors") for r in (run, other))
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def signal_at(name: str, hook: str, step: int, number: int) -> None:
    """This process gets the signal at that step, in that batch of it. SIGTERM comes twice."""
    original = getattr(JointModule, hook)

    def and_signal(self: JointModule, batch: Any, batch_idx: int) -> Any:
        if self.global_step == step and batch_idx == number:
            for _ in range(2 if name == "SIGTERM" else 1):
                os.kill(os.getpid(), signal.Signals[name])
        return original(self, batch, batch_idx)

    setattr(JointModule, hook, and_signal)


def fill_disk() -> None:
    """From now on no file of this process can be larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 10**5,) * 2)


@pytest.mark.parametrize(
    ("name", "hook", "step", "batch", "accumulate"),
    [("SIGINT", "training_step", 3, 0, 2), ("SIGTERM", "validation_step", 5, 0, 1)],
)
def test_a_stopped_run_saves_and_resumes_bit_for_bit(
    work: Path, tmp_path: Path, name: str, hook: str, step: int, batch: int, accumulate: int
) -> None:
    run, uninterrupted = tmp_path / "run", work / "joint"
    fit = ["fit", "--config", str(work / "joint.yaml"), "--output", str(run)]
    if accumulate > 1:  # the signal comes in the middle of a step
        fit += ["--trainer.accumulate_grad_batches", str(accumulate), "--trainer.max_steps", "6"]
        fit += ["--trainer.val_check_interval", "6"]
        uninterrupted = tmp_path / "uninterrupted"
        assert main([*fit, "--output", str(uninterrupted)]) == 0
    before = partial(signal_at, name, hook, step, batch)
    (end,) = run_processes([*fit, "--checkpoint_every", "100"], before=before)
    assert end.status == 128 + signal.Signals[name] and "Traceback" not in end.stderr, end.stderr
    assert f"stopped at step {step + 1}; resume with --ckpt_path" in end.stderr
    assert (run / "model/model.safetensors").is_file(), "an interrupted run leaves a model"
    assert main([*fit, "--ckpt_path", str(run / "checkpoints/last.ckpt")]) == 0
    assert logged(run) == logged(uninterrupted)
    assert_same_weights(run, uninterrupted)


def stop_the_second_rank() -> None:
    """As if over NCCL, where what Lightning asks in each step would wait for the GPU."""

    def fail(_: Any) -> None:
        raise AssertionError

    torch.distributed.get_backend = lambda *_: "nccl"
    TrainingEpochLoop._broadcast_sigterm_tensor = fail  # type: ignore[assignment]
    if os.environ["RANK"] == "1":
        signal_at("SIGTERM", "training_step", 1, 1)


def test_a_signal_to_one_rank_stops_all(work: Path, tmp_path: Path) -> None:
    fit = ["fit", "--config", str(work / "joint.yaml"), "--output", str(tmp_path)]
    fit += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    ends = run_processes(fit, environments=torchrun(2), before=stop_the_second_rank)
    assert [end.status for end in ends] == [128 + signal.SIGTERM] * 2, ends
    assert "stopped at step 2; resume with --ckpt_path" in ends[0].stderr


@pytest.mark.parametrize(
    ("validation", "reason"),
    [("0", "checkpoint could not be written"), ("1.0", "model: could not be written")],
)
def test_a_full_disk_leaves_the_files_before(
    work: Path, tmp_path: Path, validation: str, reason: str
) -> None:
    run = tmp_path / "run"
    fit = ["fit", "--config", str(work / "joint.yaml"), "--output", str(run)]
    assert main([*fit, "--trainer.max_steps", "3"]) == 0
    files = [path for path in run.rglob("*") if path.is_file() and "logs" not in path.parts]
    before = {path: path.read_bytes() for path in files}
    resume = ["--ckpt_path", str(run / "checkpoints/last.ckpt")]
    command = [*fit, *resume, "--trainer.limit_val_batches", validation]
    (end,) = run_processes(command, before=fill_disk)
    assert end.status == 1 and "Traceback" not in end.stderr, end.stderr
    assert reason in end.stderr.splitlines()[-1], end.stderr
    assert {path: path.read_bytes() for path in files} == before
    assert not list(run.rglob("*.part*"))
    assert main([*fit, *resume, "--trainer.max_steps", "4"]) == 0


def test_a_checkpoint_cannot_name_a_class(work: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(work / "joint/checkpoints/last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"] = {"_class_path": "antigravity.Flight", "size": "large"}
    torch.save(checkpoint, tmp_path / "named.ckpt")
    command = ["validate", "--config", str(work / "joint.yaml"), "--output", str(tmp_path)]
    assert main([*command, "--ckpt_path", str(tmp_path / "named.ckpt")]) == 0
    assert "antigravity" not in sys.modules


def test_two_ranks_resume_bit_for_bit_and_agree_with_one(work: Path, tmp_path: Path) -> None:
    devices = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    fit = ["fit", "--config", str(work / "joint.yaml"), *devices, "--trainer.max_steps", "8"]
    uninterrupted, run = tmp_path / "uninterrupted", tmp_path / "run"
    launch([*fit, "--output", str(run)], ranks=2, dies_at=5)
    resume = [*fit, "--output", str(run), "--ckpt_path", str(run / "checkpoints/last.ckpt")]
    launch([*fit, "--output", str(uninterrupted)], resume, ranks=2)
    assert_same_weights(run, uninterrupted)
    # The same global batches as on one rank, summed in another order.
    for name in ("train/text", "train/image", "train/total", "val/total"):
        single, double = logged(work / "joint", name), logged(uninterrupted, name)
        assert len(double) == (2 if name.startswith("val") else 8), name
        for step in single.keys() & double.keys():  # Muon amplifies rounding errors
            loss = double[step]
            bound = 1e-5 if step == 0 else 5e-2
            assert abs(float(loss) / float(single[step]) - 1) < bound, (name, step)
    # As many samples as on one rank (2), shared by the ranks.
    for kind in ("", "-answers"):
        lines = (uninterrupted / f"logs/samples/step-000008{kind}.txt").read_text().splitlines()
        assert len(lines) == 2, lines


@pytest.mark.slow
def test_lightning_can_start_the_ranks(work: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "multimodal.cli", "fit", "--config", str(work / "joint.yaml")]
    command += ["--trainer.devices", "2", "--trainer.max_steps", "1", "--data.val_limit", "4"]
    command += ["--trainer.limit_val_batches", "0", "--threads", "1", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stderr and (tmp_path / "model/model.safetensors").is_file()


def test_a_model_over_two_ranks_resumes_and_agrees_with_one(work: Path, tmp_path: Path) -> None:
    """FSDP2: each rank has a part of every weight. Checkpoints are folders of parts."""
    sharded = {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
    }
    config = yaml.safe_load((work / "joint.yaml").read_text())
    config["trainer"] |= {"devices": 2, "strategy": sharded, "max_steps": 8}
    (tmp_path / "sharded.yaml").write_text(yaml.safe_dump(config))
    uninterrupted, run = tmp_path / "uninterrupted", tmp_path / "run"
    fit = ["fit", "--config", str(tmp_path / "sharded.yaml"), "--output"]
    launch([*fit, str(run)], ranks=2, dies_at=5)
    assert (run / "checkpoints/last.ckpt").is_dir()
    resume = [*fit, str(run), "--ckpt_path", str(run / "checkpoints/last.ckpt")]
    predict = ["predict", *fit[1:], str(run), "--data.val_limit", "4"]
    launch([*fit, str(uninterrupted)], resume, predict, ranks=2)
    assert_same_weights(run, uninterrupted)
    assert len(list(run.glob("predictions-*.jsonl"))) == 2
    # Checkpoints at the step of a validation know its score, though they were saved before it.
    rest = torch.load(run / "checkpoints/last.ckpt/meta.pt", weights_only=True)
    (best,) = (state for name, state in rest["callbacks"].items() if "BestValidation" in name)
    assert best["count"] == len(logged(uninterrupted, "val/total")) and best["value"] is not None
    assert_a_folder_is_a_checkpoint(run, resume, tmp_path / "exported")
    for name in ("train/text", "train/image", "train/total", "train/gradient_norm", "val/total"):
        single, double = logged(work / "joint", name), logged(uninterrupted, name)
        assert len(double) == (2 if name.startswith("val") else 8), name
        for step in single.keys() & double.keys():  # Muon amplifies rounding errors
            value = double[step]
            bound = 1e-5 if step == 0 else 0.2 if name.endswith("norm") else 5e-2
            assert abs(float(value) / float(single[step]) - 1) < bound, (name, step)


def assert_a_folder_is_a_checkpoint(run: Path, resume: list[str], out: Path) -> None:
    """It becomes a model, and a byte of it that has changed is noticed before anything is done."""
    checkpoint, best = (
        (run / "checkpoints" / f"{name}.ckpt").resolve() for name in ("last", "best")
    )
    assert main(["export", "model", str(best), str(out)]) == 0
    exported, own = (load_file(f / "model.safetensors") for f in (out, run / "model"))
    assert exported.keys() == own.keys()
    assert all(torch.equal(exported[name], own[name]) for name in own)
    assert {p.name for p in out.iterdir()} == {p.name for p in (run / "model").iterdir()}
    before, *_ = [p for p in checkpoint.parent.glob("step=*.ckpt") if p != checkpoint]
    part = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    for verb in (resume, ["export", "model", str(checkpoint), f"{out}-2"]):
        with pytest.raises(ValueError, match="damaged") as error:
            check_checkpoint(checkpoint)
        assert part.name in str(error.value) and f"resume from {before}" in str(error.value)
        assert main(verb) == 1
    assert not Path(f"{out}-2").exists()


@pytest.mark.parametrize("part", ["decoder", "all"])
def test_a_discriminator_resumes_with_its_decoder(work: Path, tmp_path: Path, part: str) -> None:
    start, run = list[str](), tmp_path / "run"
    fit = ["fit", "--config", str(work / "tokenizer.yaml"), "--trainer.max_steps", "8"]
    fit += ["--model.init_args.perceptual_weight", "0.1"]
    fit += ["--model.init_args.discriminator_weight", "0.5"]
    if part == "decoder":
        start = ["--init_from", str(work / "tokenizer" / "model")]
        fit += ["--model.init_args.decoder_only", "true"]
    else:
        fit += ["--model.init_args.discriminator_start", "2"]
    fit += ["--output"]
    assert main([*fit, str(tmp_path / "uninterrupted"), *start]) == 0
    checkpoints = tmp_path / "uninterrupted/checkpoints"
    best = (checkpoints / "best.ckpt").resolve()
    assert best == (checkpoints / "last.ckpt").resolve(), "not one before the discriminator"
    launch([*fit, str(run), *start], dies_at=5)
    assert main([*fit, str(run), "--ckpt_path", str(run / "checkpoints/last.ckpt")]) == 0
    for name in ("train/tell", "train/fool", "train/perceptual"):
        uninterrupted, resumed = logged(tmp_path / "uninterrupted", name), logged(run, name)
        late = part == "all" and name != "train/perceptual"
        assert list(uninterrupted) == list(range(2 if late else 0, 8))
        assert {s: uninterrupted[s] for s in resumed} == resumed
    weights = [load_file(r / "model/model.safetensors") for r in (tmp_path / "uninterrupted", run)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_averaged_weights_resume_and_are_exported(work: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((work / "tokenizer.yaml").read_text())
    average = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging"}
    config["trainer"] |= {"callbacks": [average | {"init_args": {"decay": 0.9}}], "max_steps": 9}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    fit, run = ["fit", "--config", str(tmp_path / "config.yaml"), "--output"], tmp_path / "run"
    assert main([*fit, str(tmp_path / "uninterrupted")]) == 0
    launch([*fit, str(run)], dies_at=5)
    assert main([*fit, str(run), "--ckpt_path", str(run / "checkpoints/last.ckpt")]) == 0
    uninterrupted, resumed = logged(tmp_path / "uninterrupted"), logged(run)
    assert {s: uninterrupted[s] for s in resumed} == resumed
    # The last checkpoint holds averaged and trained weights. They differ. The average is exported.
    last = torch.load(tmp_path / "uninterrupted/checkpoints/last.ckpt", weights_only=True)
    name = "encoder.stem.0.weight"
    average = last["state_dict"][f"tokenizer.{name}"]
    trained = last["current_model_state"][f"tokenizer.{name}"]
    assert not torch.equal(average, trained)
    for folder in (tmp_path / "uninterrupted", run):
        assert torch.equal(load_file(folder / "model/model.safetensors")[name], average)


def test_an_average_that_has_not_begun_is_the_weights_of_now(work: Path, tmp_path: Path) -> None:
    """And not those that the run began with: they would be validated, compared and exported."""
    config = yaml.safe_load((work / "tokenizer.yaml").read_text())
    config["trainer"] |= {"max_steps": 5, "val_check_interval": 2}
    late = {"decay": 0.9, "update_starting_at_step": 100}
    average = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": late}
    runs = {"plain": [], "averaged": [average]}
    for name, given in runs.items():
        config["trainer"]["callbacks"] = given
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        fit = ["fit", "--config", str(tmp_path / f"{name}.yaml")]
        assert main([*fit, "--output", str(tmp_path / name)]) == 0
    plain, averaged = (tmp_path / name for name in runs)
    assert logged(averaged, "val/total") == logged(plain, "val/total")
    assert_same_weights(averaged, plain)
    last = torch.load(averaged / "checkpoints/last.ckpt", weights_only=True)
    now = last["current_model_state"]
    assert all(torch.equal(value, now[name]) for name, value in last["state_dict"].items())
