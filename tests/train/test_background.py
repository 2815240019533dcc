"""Checkpoints that are written while the training goes on, and their copies at an address."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
import torch
import yaml
from torch.distributed.checkpoint import FileSystemWriter

from multimodal.cli import main
from multimodal.train.run import writing
from multimodal.train.run.best import BestValidation
from multimodal.train.run.checkpoints import AtomicCheckpointIO, RunCheckpoints
from multimodal.train.run.copies import CheckpointCopies
from multimodal.train.run.damage import check_checkpoint
from multimodal.train.run.folder import RunFolder, remove
from multimodal.train.run.resuming import find_checkpoint
from multimodal.train.run.writing import copied
from tests.launches import launch, run_processes, torchrun
from tests.processes import wait_until

if TYPE_CHECKING:
    from s3fs import S3FileSystem

pytestmark = pytest.mark.usefixtures("one_thread")
LAST_STEP = 8
BACKGROUND = ["--checkpoint_in_background", "true", "--trainer.limit_val_batches", "0"]


def fit(config: Path, run: Path, *more: str) -> list[str]:
    every = ["--checkpoint_every", "3", "--trainer.max_steps", str(LAST_STEP)]
    return ["fit", "--config", str(config), "--output", str(run), *every, *more]


def write_late() -> None:
    """From now on a checkpoint is written only when the step after it is done."""
    begun = [0]

    def begin(module: L.LightningModule, *_: Any) -> None:
        begun[0] = module.global_step

    def late(write: Any) -> Any:
        def wait_and_write(*arguments: Any, **named: Any) -> Any:
            after, end = begun[0] + 2, time.monotonic() + 60
            while begun[0] < min(after, LAST_STEP - 1) and time.monotonic() < end:
                time.sleep(0.005)
            return write(*arguments, **named)

        return wait_and_write

    L.LightningModule.on_train_batch_start = begin  # type: ignore[method-assign]
    AtomicCheckpointIO.save_checkpoint = late(AtomicCheckpointIO.save_checkpoint)  # type: ignore[method-assign]
    FileSystemWriter.write_data = late(FileSystemWriter.write_data)  # type: ignore[method-assign]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return loaded


def assert_equal(one: Any, other: Any, name: str = "") -> None:
    """All that two checkpoints hold is the same to the bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), name
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            assert_equal(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), name
        for number, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            assert_equal(mine, theirs, f"{name}.{number}")
    else:
        assert one == other, name


def test_a_copy_shares_what_its_source_shares_and_nothing_with_it() -> None:
    weight = torch.arange(6.0).view(2, 3).t()
    state = {"a": weight, "b": weight.detach(), "c": [1, (weight[0], None)], "d": {"e": {1}}}
    copy = copied(state)
    assert_equal(copy, state)
    assert copy["a"] is copy["b"] and copy["a"].stride() == weight.stride()
    weight.zero_()
    state["d"]["e"].add(2)  # type: ignore[index]
    assert copy["a"].sum() == 15 and copy["c"][1][0].sum() == 3 and copy["d"] == {"e": {1}}


def test_what_is_written_late_is_the_state_of_its_step(work: Path, tmp_path: Path) -> None:
    config, run, late = work / "joint.yaml", tmp_path / "run", tmp_path / "late"
    novalidation = ["--trainer.limit_val_batches", "0", "--keep", "0"]
    assert main(fit(config, run, *novalidation)) == 0
    (end,) = run_processes(fit(config, late, *BACKGROUND, "--keep", "0"), before=write_late)
    assert end.status == 0, end.stderr
    for step in (3, 6, 8):
        one, other = (
            torch.load(folder / f"checkpoints/step={step}.ckpt", weights_only=True)
            for folder in (run, late)
        )
        for checkpoint in (one, other):
            for name in ("ResumedSettings", "EnergyLog"):  # --output, and what was measured
                checkpoint["callbacks"].pop(name, None)
        assert_equal(one, other)
    assert (late / "checkpoints/last.ckpt").resolve().name == "step=8.ckpt"


def die_in_the_second_write() -> None:
    """This process is killed when half of its second checkpoint is on the disk."""
    save, count = torch.save, [0]

    def half(value: Any, file: Any) -> None:
        count[0] += 1
        save(value, file)
        if count[0] == 2:
            file.truncate(file.tell() // 2)
            file.flush()
            os.killpg(0, signal.SIGKILL)

    torch.save = half


def test_a_run_killed_in_a_write_goes_on_from_the_checkpoint_before(
    work: Path, tmp_path: Path
) -> None:
    config, run, whole = work / "joint.yaml", tmp_path / "run", tmp_path / "whole"
    assert main(fit(config, whole, "--trainer.limit_val_batches", "0")) == 0
    (end,) = run_processes(fit(config, run, *BACKGROUND), before=die_in_the_second_write)
    assert end.status == -signal.SIGKILL
    assert list((run / "checkpoints").glob(".*.part")), "half a checkpoint, under another name"
    assert (run / "checkpoints/last.ckpt").resolve().name == "step=3.ckpt"
    check_checkpoint(run / "checkpoints/last.ckpt")
    assert main(fit(config, run, *BACKGROUND, "--ckpt_path", "auto")) == 0
    assert not list(run.rglob("*.part"))
    last = "checkpoints/last.ckpt"
    assert_equal(weights(run / last), weights(whole / last))


def test_a_write_that_fails_ends_the_run_and_leaves_what_was_good(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = AtomicCheckpointIO.save_checkpoint

    def full(self: AtomicCheckpointIO, checkpoint: dict[str, Any], path: Path, *_: Any) -> None:
        if checkpoint["global_step"] > 3:
            raise OSError(28, "No space left on device")
        original(self, checkpoint, path)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", full)
    assert main(fit(work / "joint.yaml", tmp_path, *BACKGROUND)) == 1
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "checkpoints/last.ckpt").resolve().name == "step=3.ckpt"
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step=3.ckpt", "last.ckpt"}


# --- sharded ------------------------------------------------------------------------------------


def sharded(work: Path, path: Path) -> Path:
    strategy = {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
    }
    config = yaml.safe_load((work / "joint.yaml").read_text())
    config["trainer"] |= {"devices": 2, "strategy": strategy}
    path.write_text(yaml.safe_dump(config))
    return path


def write_late_and_die_before_a_name() -> None:
    """The first rank is killed when all parts of its second checkpoint are on the disk."""
    write_late()
    complete, count = writing.complete, [0]

    def die(part: Path, path: Path) -> None:
        count[0] += 1
        if count[0] == 2:
            assert wait_until((path.parents[2] / "copies/last.json").exists)
            os.killpg(0, signal.SIGKILL)
        complete(part, path)

    writing.complete = die  # type: ignore[assignment]


def test_parts_of_two_ranks_are_written_late_and_copied(work: Path, tmp_path: Path) -> None:
    """The run on another machine begins with what is at the address, and ends the same."""
    config = sharded(work, tmp_path / "sharded.yaml")
    whole, run, other = (tmp_path / name for name in ("whole", "run", "other"))
    at = f"file://{tmp_path}/copies"
    copy = ["--checkpoint_copy", at]
    launch(fit(config, whole, "--trainer.limit_val_batches", "0"), ranks=2)
    ends = run_processes(
        fit(config, run, *BACKGROUND, *copy),
        environments=torchrun(2),
        before=write_late_and_die_before_a_name,
    )
    assert ends[0].status == -signal.SIGKILL and ends[1].status not in (0, None), ends
    assert (run / "checkpoints/last.ckpt").resolve().name == "step=3.ckpt"
    assert (run / "checkpoints/.step=6.ckpt.part").is_dir()
    shutil.rmtree(run)
    launch(fit(config, other, *BACKGROUND, *copy, "--ckpt_path", f"{at}/last.ckpt"), ranks=2)
    assert_same_model(other, whole)
    for name in ("last", "step=8"):
        check_checkpoint(other / f"checkpoints/{name}.ckpt")
    assert (tmp_path / "copies/step=8.ckpt/.metadata").is_file()


def test_a_folder_that_was_being_replaced_gets_its_name_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run was killed between two renames: step=8.ckpt had been moved away."""
    run = RunFolder(tmp_path)
    names = ("step=4.ckpt", "step=8.ckpt", ".step=8.ckpt.part")
    other, path, part = (run.checkpoints / name for name in names)
    for folder in (other, path, part):
        folder.mkdir(parents=True)
        (folder / "name").write_text(folder.name)
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self == part:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", killed)
        writing.complete(part, path)
    assert not path.exists() and part.exists()
    checkpoints = RunCheckpoints(run, 1, 2, BestValidation("last"))
    trainer: Any = SimpleNamespace(global_step=4, is_global_zero=True)
    checkpoints.on_train_start(trainer, L.LightningModule())
    assert (path / "name").read_text() == "step=8.ckpt"
    assert sorted(run.checkpoints.iterdir()) == [other, path]
    for left in (other, path):
        left.rename(run.checkpoints / f".{left.name}.old")
    checkpoints.on_train_start(trainer, L.LightningModule())
    assert not list(run.checkpoints.iterdir()), "they are of a run that was removed"


def test_a_checkpoint_that_has_lost_its_name_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """last.ckpt leads to step=8.ckpt, which was being replaced. The other is half written."""

    def leave(name: str) -> tuple[RunFolder, Any]:
        run = RunFolder(tmp_path / name)
        for folder in ("step=4.ckpt", ".step=8.ckpt.old", ".step=8.ckpt.part"):
            (run.checkpoints / folder).mkdir(parents=True)
            (run.checkpoints / folder / "name").write_text(folder)
        run.last.symlink_to("step=8.ckpt")
        trainer = SimpleNamespace(fast_dev_run=False)
        return run, SimpleNamespace(
            trainer=trainer, ckpt_path="auto", init_from=None, overwrite=False, checkpoint_copy=None
        )

    def left(run: RunFolder) -> set[str]:
        return {path.name for path in run.checkpoints.glob(".step=*")}

    def assert_resumes(run: RunFolder, config: Any) -> None:
        find_checkpoint(config, run, fit=True)
        assert config.ckpt_path == str(run.last), "it would start a new run"
        assert (run.last / "name").read_text() == ".step=8.ckpt.old" and not left(run)

    run, config = leave("first rank")
    with run.locked(), pytest.raises(ValueError, match="another run is writing"):
        find_checkpoint(config, run, fit=True)
    with pytest.raises(ValueError, match="no weights to use"):
        find_checkpoint(SimpleNamespace(**vars(config) | {"ckpt_path": None}), run, fit=False)
    assert left(run) == {".step=8.ckpt.old", ".step=8.ckpt.part"}, "only a training clears"
    assert_resumes(run, config)
    run, config = leave("another rank")
    monkeypatch.setenv("RANK", "1")
    first_rank = threading.Timer(0.3, writing.clear_unfinished, [run.checkpoints])
    first_rank.start()
    try:
        find_checkpoint(config, run, fit=True)
    finally:
        first_rank.join()
    assert config.ckpt_path == str(run.last)


# --- copies -------------------------------------------------------------------------------------


def test_a_run_goes_on_from_a_bucket_and_not_from_half_a_copy(
    work: Path, tmp_path: Path, s3: "S3FileSystem", capsys: pytest.CaptureFixture[str]
) -> None:
    at, config = "s3://bucket/run", work / "joint.yaml"
    copy = ["--checkpoint_copy", at, "--trainer.val_check_interval", "4"]
    by = ["--best_by", "val/total:max"]  # the first one
    assert main(fit(config, tmp_path / "one", *copy, *by, *BACKGROUND[:2])) == 0
    one = tmp_path / "one/checkpoints"
    assert {p.name for p in one.iterdir()} == {p.name for p in one.glob("*.ckpt")}
    best = (one / "best.ckpt").resolve().name
    kept = {name for name in (best, "step=8.ckpt") for name in (name, name[:-4] + "json")}
    listed = {Path(name).name for name in s3.ls("bucket/run")}
    assert best != "step=8.ckpt" and listed == kept | {"last.json", "best.json"}
    # On another machine: what is there comes with --ckpt_path auto, the best one too.
    again = fit(config, tmp_path / "two", *copy, *by, "--ckpt_path", "auto")
    assert main([*again, "--trainer.max_steps", "9"]) == 0
    assert (tmp_path / "two/checkpoints/best.ckpt").resolve().name == best
    # A run that does not go on from there would replace what is there.
    assert main(fit(config, tmp_path / "new", *copy)) == 1
    assert "s3://bucket/run: has checkpoints of another run" in capsys.readouterr().err
    assert s3.exists("bucket/run/step=9.json")
    s3.rm_file("bucket/run/step=9.json")  # as if the copy had been cut off
    first = fit(config, tmp_path / "three", "--ckpt_path")
    assert main([*first, f"{at}/step=9.ckpt"]) == 1
    assert "no complete checkpoint there" in capsys.readouterr().err
    data = bytearray(s3.cat_file(f"bucket/run/{best}"))
    data[len(data) // 2] ^= 1
    s3.pipe_file(f"bucket/run/{best}", bytes(data))
    assert main([*first, f"{at}/best.ckpt"]) == 1
    assert "the checkpoint is damaged" in capsys.readouterr().err
    assert not list((tmp_path / "three").rglob("*.ckpt"))


def test_a_run_that_went_back_keeps_later_copies(tmp_path: Path) -> None:
    copies = CheckpointCopies(f"file://{tmp_path}/copies")
    run = RunFolder(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    for step in (4, 8):
        (run.checkpoints / f"step={step}.ckpt").write_bytes(b"weights")
        copies.put(run.checkpoints / f"step={step}.ckpt", best=False)
        copies.wait()
    (run.checkpoints / "step=4.ckpt").unlink()
    (run.checkpoints / "step=8.ckpt").unlink()
    (run.checkpoints / "step=6.ckpt").write_bytes(b"weights")
    copies.put(run.checkpoints / "step=6.ckpt", best=False)
    copies.wait()
    assert {p.name for p in (tmp_path / "copies").glob("*.ckpt")} == {"step=6.ckpt", "step=8.ckpt"}


@pytest.mark.parametrize("sharded", [False, True])
def test_a_slow_copy_keeps_nobody_waiting(
    sharded: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Meanwhile the run replaces and removes checkpoints. The best and the last one are copied."""
    copies = CheckpointCopies(f"file://{tmp_path}/copies")
    run, goes_on = RunFolder(tmp_path / "run"), threading.Event()
    put_file, sent = copies.files.put_file, list[str]()

    def late(source: str, target: str) -> None:
        sent.append(target.partition("/copies/")[2])
        assert goes_on.wait(60)
        put_file(source, target)

    monkeypatch.setattr(copies.files, "put_file", late)
    checkpoints = RunCheckpoints(run, 1, 1, BestValidation("last"), copies=copies)
    for step in (1, 2, 3, 4):
        path = run.checkpoints / f"step={step}.ckpt"
        file = path / "weights" if sharded else path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"weights of {step}")
        copies.put(path, best=step == 2)
        assert wait_until(lambda: bool(sent))
        if step < 4:
            remove(path)
    assert len(sent) == 1 and "step=3.ckpt: is not copied" in capsys.readouterr().err
    goes_on.set()
    checkpoints.teardown()
    inside = "/weights" * sharded
    assert sent == [f"step={step}.ckpt{inside}" for step in (1, 2, 4)]
    there = {path.name for path in (tmp_path / "copies").glob("step=*.ckpt")}
    assert there == {"step=2.ckpt", "step=4.ckpt"}
    for name, step in (("best", 2), ("last", 4)):
        fetched = copies.fetch(name, tmp_path / name)
        assert Path(f"{fetched}{inside}").read_text() == f"weights of {step}"
    assert {path.name for path in run.checkpoints.iterdir()} == {"step=4.ckpt"}


def test_a_copy_that_fails_does_not_end_the_training(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    copy = ["--checkpoint_copy", f"file://{tmp_path}/file/run"]
    steps = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]
    run = tmp_path / "run"
    assert main([*fit(work / "joint.yaml", run, *copy), *steps]) == 0
    assert "step=1.ckpt: could not be copied to file://" in capsys.readouterr().err
    check_checkpoint(run / "checkpoints/last.ckpt")
    assert main(fit(work / "joint.yaml", tmp_path / "b", "--checkpoint_copy", "no://a")) == 1
    assert "no://a: cannot be used" in capsys.readouterr().err


def assert_same_model(run: Path, other: Path) -> None:
    from safetensors.torch import load_file

    assert_equal(*(load_file(folder / "model/model.safetensors") for folder in (run, other)))
