"""The folder of a run: nothing finished is lost, nothing broken is published, damage is noticed."""

import random
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from multimodal.cli import main
from multimodal.train.joint import JointModule
from multimodal.train.run.best import BestValidation, parse_best_by
from multimodal.train.run.checkpoints import AtomicCheckpointIO, load_weights
from multimodal.train.run.damage import check_checkpoint, saved_steps, write_checksums
from multimodal.train.run.folder import RunFolder, archive
from multimodal.train.run.settings import changes, flatten
from tests.launches import logged

pytestmark = pytest.mark.usefixtures("one_thread")
Capture = pytest.CaptureFixture[str]


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def state(checkpoint: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return weights


def assert_model_is(model: Path, checkpoint: Path) -> None:
    weights = state(checkpoint)
    for name, weight in load_file(model / "model.safetensors").items():
        assert torch.equal(weight, weights[name.replace("model.", "network.transformer.", 1)])


@pytest.fixture(scope="module")
def finished(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with validations at 3 and 6, of which the first has the largest loss.

    ``val/total:max`` takes it for the best. Checkpoints come every 4 steps.
    """
    run, threads = tmp_path_factory.mktemp("finished") / "run", torch.get_num_threads()
    torch.set_num_threads(1)
    assert main([*fit(work, run), "--best_by", "val/total:max"]) == 0
    torch.set_num_threads(threads)
    return run


def fit(work: Path, run: Path, steps: int = 8) -> list[str]:
    config = ["fit", "--config", str(work / "joint.yaml"), "--output", str(run)]
    config += ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", "3"]
    return [*config, "--checkpoint_every", "4", "--data.val_limit", "2"]


# --- whose the folder is --------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused(work: Path, tmp_path: Path, capsys: Capture) -> None:
    run = RunFolder(tmp_path / "run")
    with run.locked():
        before = files_of(tmp_path)
        assert main(fit(work, run.path)) == 1
        assert "another run is writing to this folder" in capsys.readouterr().err
        assert files_of(tmp_path) == before
    with run.locked():
        pass  # it is free again


def test_another_run_is_not_replaced_unless_asked(
    work: Path, finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    before = files_of(run)
    assert main(fit(work, run)) == 1
    error = capsys.readouterr().err
    assert "holds a model and checkpoints of another run" in error and "--overwrite" in error
    assert main([*fit(work, run), "--ckpt_path", str(finished / "checkpoints/last.ckpt")]) == 1
    # A mistake that is found before the first step leaves all as it was.
    assert main([*fit(work, run), "--overwrite", "--model.init_args.row_length", "7"]) == 1
    after = files_of(run)
    assert {p: after[p] for p in before if "logs" not in p.parts} == {
        p: data for p, data in before.items() if "logs" not in p.parts
    }
    once = ["--overwrite", "--trainer.limit_val_batches", "0", "--seed_everything", "5"]
    assert main([*fit(work, run, steps=1), *once]) == 0
    assert names(run) == {"step=1.ckpt", "last.ckpt"}
    assert_model_is(run / "model", run / "checkpoints/step=1.ckpt")
    assert "overwrite: false" in (run / "logs/config.yaml").read_text()
    assert (run / "logs/config.1.yaml").is_file(), "the settings of the run before are kept"


def test_one_seed_decides_the_samples_too_unless_they_have_their_own(
    work: Path, tmp_path: Path
) -> None:
    orders = {}
    for name, more in {
        "first": [],
        "other": ["--seed_everything", "5"],
        "own": ["--seed_everything", "5", "--data.seed", "0"],
    }.items():
        assert main([*fit(work, tmp_path / name, 1), *more]) == 0
        last = torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)
        (loader,) = last["loops"]["fit_loop"]["state_dict"]["combined_loader"]
        orders[name] = loader["order_of"]["seed"]
    assert orders == {"first": 0, "other": 5, "own": 0}


def test_no_log_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    for content in ("first", "second"):
        path.write_text(content)
        archive(path)
    assert not path.exists()
    archived = [(tmp_path / f"metrics.{i}.csv").read_text() for i in (1, 2)]
    assert archived == ["first", "second"]


def test_a_run_writes_to_a_local_folder(work: Path, capsys: Capture) -> None:
    for address in ("s3://bucket/run", "memory://run"):
        assert main(fit(work, Path(address))) == 1
        assert "an address, but" in capsys.readouterr().err


# --- what is kept ---------------------------------------------------------------------------------


def test_the_name_of_a_run_that_is_not_utf8_is_shown(work: Path, capsys: Capture) -> None:
    assert main(["fit", "--config", str(work / "joint.yaml"), "--output", "b\udcff"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == r"multimodal fit: error: b\xff: the name of a run has to be UTF-8"


def test_the_best_and_the_newest_checkpoint_are_kept_and_the_model_is_the_best(
    finished: Path,
) -> None:
    assert list(logged(finished, "val/total")) == [2, 5, 7], "a run ends with a validation"
    assert names(finished) == {"step=3.ckpt", "step=8.ckpt", "last.ckpt", "best.ckpt"}
    links = {name: (finished / "checkpoints" / name).resolve().name for name in names(finished)}
    assert links["best.ckpt"] == "step=3.ckpt" and links["last.ckpt"] == "step=8.ckpt"
    assert_model_is(finished / "model", finished / "checkpoints/best.ckpt")


def test_the_best_checkpoint_resumes_bit_for_bit_and_more_can_be_kept(
    work: Path, finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    """It was saved at the end of a validation alone. With keep: 3 nothing is removed."""
    best = str(finished / "checkpoints/best.ckpt")
    more = ["--ckpt_path", best, "--best_by", "last", "--keep", "3"]
    assert main([*fit(work, tmp_path), *more]) == 0
    again, whole = (state(run / "checkpoints/step=8.ckpt") for run in (tmp_path, finished))
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert names(tmp_path) == {
        "step=4.ckpt", "step=6.ckpt", "step=8.ckpt", "last.ckpt", "best.ckpt"
    }  # fmt: skip
    assert_model_is(tmp_path / "model", tmp_path / "checkpoints/last.ckpt")
    assert "from now on" not in capsys.readouterr().err


def test_a_model_can_be_made_of_any_checkpoint(
    work: Path, finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    for name in ("best", "last"):
        source, out = finished / f"checkpoints/{name}.ckpt", tmp_path / name
        assert main(["export", "model", str(source), str(out)]) == 0
        assert_model_is(out, source)
    same = [
        p.name for p in (finished / "model").iterdir()
        if p.is_file() and p.read_bytes() == (tmp_path / "best" / p.name).read_bytes()
    ]  # fmt: skip
    assert {"config.json", "model.safetensors", "heads.safetensors"} <= set(same)
    tokenizer = work / "tokenizer/checkpoints/last.ckpt"
    assert main(["export", "model", str(tokenizer), str(tmp_path / "tokenizer")]) == 0
    small = ["export", "model", str(source), str(tmp_path / "small"), "--dtype", "bfloat16"]
    assert main(small) == 0
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("last", "small")]
    assert sizes[1] < 0.6 * sizes[0]
    shutil.copy(source, tmp_path / "alone.ckpt")
    assert main(["export", "model", str(tmp_path / "alone.ckpt"), str(tmp_path / "x")]) == 1
    assert "give the run's with --config" in capsys.readouterr().err
    given = ["--config", str(finished / "logs/config.yaml")]
    assert main(["export", "model", str(tmp_path / "alone.ckpt"), str(tmp_path / "x"), *given]) == 0


def test_a_finished_run_that_is_resumed_writes_what_is_missing(
    work: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    shutil.rmtree(run / "model")
    assert main([*fit(work, run), "--ckpt_path", "last"]) == 0
    assert_model_is(run / "model", run / "checkpoints/best.ckpt")


def test_what_counts_as_the_best() -> None:
    assert parse_best_by("val/CIDEr:max") == ("val/CIDEr", "max") and parse_best_by("last") is None
    for text in ("val/total", "val/total:least", ":min", ""):
        with pytest.raises(ValueError, match="expected NAME:min, NAME:max or last"):
            parse_best_by(text)
    for best_by, values, expected in (
        ("x:min", [3.0, float("nan"), 2.0, 2.0, 5.0], [True, False, True, False, False]),
        ("x:max", [float("nan"), 3.0, 4.0, 4.5], [False, True, True, False]),
    ):
        best = BestValidation(best_by, min_delta=0.0 if "min" in best_by else 0.6)
        found = []
        for value in values:
            found.append(best._is_better(value))
            best.value = value if found[-1] else best.value
        assert found == expected, best_by


# --- divergence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_a_run_that_diverges_stops_and_keeps_what_was_good(
    work: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The loss of step 5, or a weight after it (a gradient that was not finite)."""
    step = JointModule.training_step

    def broken(self: JointModule, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = step(self, batch, batch_idx)
        if self.global_step != 4:
            return loss
        if what == "loss":
            return loss * float("nan")
        poison = next(p for p in self.parameters() if p.requires_grad)
        return loss + (0 * poison.sum()).sqrt()  # 0, with a gradient of nan

    monkeypatch.setattr(JointModule, "training_step", broken)
    more = ["--checkpoint_every", "1", "--best_by", "last"]
    more += ["--trainer.log_every_n_steps", "1" if what == "loss" else "50"]
    assert main([*fit(work, tmp_path), *more]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    kind = "the loss" if what == "loss" else "a weight"
    assert error.startswith(f"multimodal fit: error: step 5: {kind} is not a finite number")
    assert "checkpoints/last.ckpt" in error and "learning_rate" in error
    last = tmp_path / "checkpoints/last.ckpt"
    assert last.resolve().name == "step=4.ckpt"
    assert all(weight.isfinite().all() for weight in state(last).values())
    assert_model_is(tmp_path / "model", tmp_path / "checkpoints/best.ckpt")


# --- damage ---------------------------------------------------------------------------------------


def test_a_flipped_byte_in_a_checkpoint_is_noticed(finished: Path, tmp_path: Path) -> None:
    """Of 60 checkpoints with one wrong byte each is refused, or holds what the whole one holds."""
    source, rng = finished / "checkpoints/step=8.ckpt", random.Random(0)
    data, expected, refused = source.read_bytes(), state(source), 0
    shutil.copy(finished / "checkpoints/step=3.ckpt", tmp_path)
    path = tmp_path / "step=8.ckpt"
    for _ in range(60):
        place = rng.randrange(len(data))
        wrong = bytes([data[place] ^ (1 << rng.randrange(8))])
        path.write_bytes(data[:place] + wrong + data[place + 1 :])
        try:
            check_checkpoint(path)
        except ValueError as error:
            refused += 1
            assert "step=8.ckpt: the checkpoint is damaged" in str(error)
            assert f"resume from {tmp_path / 'step=3.ckpt'}" in str(error)
        else:
            assert all(torch.equal(w, expected[n]) for n, w in state(path).items())
    assert refused >= 50


@pytest.mark.parametrize("verb", ["fit", "validate", "export model"])
def test_a_damaged_checkpoint_is_one_line_that_names_another(
    work: Path, finished: Path, tmp_path: Path, capsys: Capture, verb: str
) -> None:
    (tmp_path / "checkpoints").mkdir()
    whole = (finished / "checkpoints/step=8.ckpt").read_bytes()
    shutil.copy(finished / "checkpoints/step=3.ckpt", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints/step=8.ckpt"
    command = [*verb.split(), str(path), str(tmp_path / "out")]
    if verb != "export model":
        command = [verb, *fit(work, tmp_path)[1:], "--ckpt_path", str(path)]
        command = [c for c in command if c not in ("--checkpoint_every", "4")]
    for data in (b"", whole[: len(whole) // 2], b"\0" * 500, b"not a checkpoint at all\n" * 9):
        path.write_bytes(data)
        assert main(command) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert "step=8.ckpt: the checkpoint is damaged" in error and "step=3.ckpt" in error


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("state_dict"),
        lambda c: c.pop("loops"),
        lambda c: c.update(loops={"fit_loop": {}}),
        lambda c: c.update(optimizer_states=[{}]),
        lambda c: c["state_dict"].popitem(),
        lambda c: c.update(callbacks={"RandomState": {"python": 3}}),
    ],
)
def test_a_checkpoint_without_its_parts_is_one_line(
    work: Path, finished: Path, tmp_path: Path, capsys: Capture, change: Any
) -> None:
    checkpoint = torch.load(finished / "checkpoints/step=8.ckpt", weights_only=True)
    change(checkpoint)
    path = tmp_path / "checkpoints/step=8.ckpt"
    path.parent.mkdir()
    torch.save(checkpoint, path)
    assert main([*fit(work, tmp_path, steps=9), "--ckpt_path", str(path)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "step=8.ckpt: " in error and "Traceback" not in error


def test_the_files_of_a_sharded_checkpoint_have_checksums(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "step=8.ckpt"
    folder.mkdir()
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        (folder / name).write_bytes(name.encode() * 100)
    check_checkpoint(folder)  # one of an earlier version
    assert "has no checksums.json" in capsys.readouterr().err
    write_checksums(folder)
    check_checkpoint(folder)
    for change in (lambda p: p.write_bytes(b"x" + p.read_bytes()[1:]), Path.unlink):
        change(folder / "__1_0.distcp")
        with pytest.raises(ValueError, match="damaged .__1_0.distcp: missing or changed."):
            check_checkpoint(folder)
    assert saved_steps(tmp_path) == [folder]


def test_a_checkpoint_is_loaded_into_memory_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not onto the GPU that saved it."""
    load, places = torch.load, list[Any]()

    def note(file: Any, map_location: Any = None, **more: Any) -> Any:
        places.append(map_location)
        return load(file, map_location=map_location, **more)

    loops = {"fit_loop": {"epoch_progress": {}}}
    checkpoint = {"state_dict": {}, "loops": loops, "callbacks": {}, "global_step": 1}
    torch.save(checkpoint, path := tmp_path / "step=1.ckpt")
    monkeypatch.setattr(torch, "load", note)
    assert AtomicCheckpointIO().load_checkpoint(path)["global_step"] == 1
    load_weights(L.LightningModule(), path)
    load_weights(L.LightningModule(), path, path)  # of a sharded run: weights, and the rest
    assert places == ["cpu"] * 4


# --- settings -------------------------------------------------------------------------------------


def test_a_resume_says_which_settings_it_changes(
    work: Path, finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    more = ["--ckpt_path", str(finished / "checkpoints/best.ckpt")]
    more += ["--seed_everything", "3", "--data.seed", "0"]  # the order is the checkpoint's
    more += ["--model.init_args.row_length", "256", "--model.init_args.learning_rate", "0.5"]
    more += ["--trainer.accumulate_grad_batches", "2", "--trainer.limit_val_batches", "0"]
    assert main([*fit(work, tmp_path, steps=4), *more]) == 0
    error = capsys.readouterr().err
    for line in (
        "model.init_args.row_length: 192 in the checkpoint, 256 from now on",
        "seed_everything: 0 in the checkpoint, 3 from now on",
        "trainer.accumulate_grad_batches: 1 in the checkpoint, 2 from now on",
        "trainer.max_steps: 8 in the checkpoint, 4 from now on",
        "model.init_args.learning_rate: the checkpoint's 0.001 stays in force, not the 0.5 given",
    ):
        assert line in error, error


def test_settings_are_compared_by_name() -> None:
    before = flatten({"data": {"seed": 0, "folders": ["a"]}, "trainer": {"logger": 1, "x": None}})
    assert before == {"data.seed": "0", "data.folders": "['a']", "trainer.x": "None"}
    assert changes(before, before) == []
    assert changes(before, {**before, "data.new": "1"}) == [
        "data.new: nothing in the checkpoint, 1 from now on"
    ]
