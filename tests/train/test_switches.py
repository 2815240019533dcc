"""The switches of Lightning's Trainer: each works, or one line refuses it.

Each run is in a folder of its own, and writes nothing but into its ``--output``.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from multimodal.cli import main
from multimodal.train.joint import JointModule
from tests.launches import logged

pytestmark = pytest.mark.usefixtures("one_thread")
LIGHTNING = "lightning.pytorch.callbacks"
STOPPING = {"class_path": f"{LIGHTNING}.EarlyStopping"}
OWN = {"class_path": f"{LIGHTNING}.ModelCheckpoint"}
CSV = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "RUN/mine"}}


def args(of: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    return [of | {"init_args": more}]


# A switch, and the reason for which it is refused. None: it works.
SWITCHES: list[tuple[dict[str, Any], str | None]] = [
    ({"logger": False}, None),
    ({"logger": CSV}, None),
    ({"precision": "bf16-mixed"}, None),
    ({"precision": "bf16-true"}, r"trainer.precision=bf16-true: expected 32-true, bf16-mixed"),
    ({"precision": "16-true"}, r"trainer.precision=16-true: expected"),
    ({"precision": "64-true"}, r"trainer.precision=64-true: expected"),
    ({"overfit_batches": 2}, None),
    ({"val_check_interval": 1.0}, None),
    ({"val_check_interval": 0.5, "max_epochs": 1, "max_steps": -1}, None),
    ({"val_check_interval": 9, "check_val_every_n_epoch": 1}, r"must be less than or equal"),
    ({"limit_val_batches": 0}, None),
    ({"limit_val_batches": 1}, None),
    ({"limit_val_batches": 0.5}, r"Please increase the `limit_val_batches`"),
    ({"limit_train_batches": 1}, None),
    ({"accumulate_grad_batches": 2}, None),
    ({"gradient_clip_val": None}, None),
    ({"log_every_n_steps": 0}, None),
    ({"max_steps": 0}, r"trainer.max_steps=0: nothing would be trained"),
    ({"limit_train_batches": 0}, r"trainer.limit_train_batches=0: nothing would be trained"),
    ({"val_check_interval": 0}, r"trainer.val_check_interval=0: expected more than 0"),
    ({"accumulate_grad_batches": 2, "val_check_interval": 3}, r"in the middle of a step"),
    ({"accumulate_grad_batches": 0}, r"trainer.accumulate_grad_batches=0: expected more than 0"),
    ({"gradient_clip_val": -1}, r"trainer.gradient_clip_val=-1: expected 0 \(none\) or more"),
    ({"num_sanity_val_steps": 1}, None),
    ({"enable_checkpointing": False}, None),
    ({"fast_dev_run": True}, None),
    ({"max_time": "00:01:00:00"}, None),
    ({"max_time": "00:01:00:00", "max_steps": -1}, r"max_time alone does not say when"),
    ({"max_steps": -1}, r"the run has no end"),
    ({"default_root_dir": "here"}, r"all files of a run are in --output"),
    ({"barebones": True}, r"barebones"),
    ({"callbacks": args(STOPPING, monitor="val/total", patience=1)}, None),
    ({"callbacks": args(STOPPING, monitor="val/nothing")}, r"conditioned on metric `val/nothing`"),
    ({"callbacks": args(OWN, monitor="val/total", save_top_k=2)}, None),
    ({"callbacks": args(OWN, monitor="val/nothing")}, r"could not find the monitored key"),
]


@pytest.mark.parametrize(
    ("switch", "refusal"), SWITCHES, ids=[yaml.safe_dump(s, width=999)[:60] for s, _ in SWITCHES]
)
def test_a_switch_works_or_is_refused(
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    switch: dict[str, Any],
    refusal: str | None,
) -> None:
    here, run = tmp_path / "here", tmp_path / "run"
    here.mkdir()
    monkeypatch.chdir(here)
    config = yaml.safe_load((work / "joint.yaml").read_text())
    config["data"]["val_limit"] = 2
    config["model"]["init_args"] |= {"captions_in_validation": 1, "answers_in_validation": 1}
    changed = yaml.safe_load(yaml.safe_dump(switch).replace("RUN", str(run)))
    config["trainer"] |= {"max_steps": 2, "val_check_interval": 2} | changed
    recipe = "# my recipe, with notes\n" + yaml.safe_dump(config)
    (here / "config.yaml").write_text(recipe)
    status = main(["fit", "--config", "config.yaml", "--output", str(run)])
    error = capsys.readouterr().err
    assert (here / "config.yaml").read_text() == recipe and len(list(here.iterdir())) == 1
    if refusal:
        last = error.splitlines()[-1]
        assert status == 1 and last.startswith("multimodal fit: error: "), error
        assert re.search(refusal, last), last
        return
    assert status == 0, error
    if "fast_dev_run" in switch:
        assert not run.exists(), "nothing is written"
        return
    assert (run / "model/model.safetensors").is_file() and (run / "logs/config.yaml").is_file()
    assert (run / "logs/samples").exists() == (switch.get("limit_val_batches") != 0)
    assert (run / "checkpoints/last.ckpt").exists() == ("enable_checkpointing" not in switch)


def test_overfitting_sees_the_same_batches_in_every_epoch(work: Path, tmp_path: Path) -> None:
    """With rate 0 the weights stay, so equal batches have equal losses."""
    fit = ["fit", "--config", str(work / "joint.yaml"), "--output", str(tmp_path)]
    fit += ["--trainer.overfit_batches", "2", "--trainer.max_steps", "6"]
    assert main([*fit, "--model.init_args.learning_rate", "0", "--data.val_limit", "2"]) == 0
    losses = list(logged(tmp_path, "train/alignment").values())
    assert losses[0:2] == losses[2:4] == losses[4:6] and losses[0] != losses[1]


def test_data_without_a_validation_split_train(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And with hold_out 0 say that nothing is held out. The model is that of the last step."""
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for name in ("train-0000.tar", "LICENSE"):
        if (work / "scenes" / name).exists():
            shutil.copy(work / "scenes" / name, data)
    assert main(["data", "index", str(data)]) == 0
    fit = ["fit", "--config", str(work / "joint.yaml"), "--output", str(run)]
    fit += ["--trainer.max_steps", "2", "--data.hold_out", "0"]
    assert main([*fit, "--data.folders", f"[{data}]"]) == 0
    error = capsys.readouterr().err
    assert "nothing is held out" in error and f"{run / 'model'}: step 2, the last" in error
    assert not (run / "checkpoints/best.ckpt").exists()
    # A split that was asked for by name has to be there.
    wrong = ["--data.folders", f"[{data}]", "--data.val_split", "vall", "--overwrite"]
    assert main([*fit, *wrong]) == 1 and "no split 'vall'" in capsys.readouterr().err
    # Of several folders those with the split are validated.
    both = ["--data.folders", f"[{data}, {work / 'scenes'}]", "--overwrite"]
    assert main([*fit, *both, "--data.val_limit", "2"]) == 0
    assert torch.tensor([float(v) for v in logged(run, "val/total").values()]).isfinite().all()


def test_flex_attention_without_a_compiler_is_refused(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a GPU, which this module only claims to be on."""
    monkeypatch.setattr(JointModule, "device", torch.device("cuda"))
    monkeypatch.setattr("multimodal.train.joint.has_compiler", lambda: False)
    fit = ["fit", "--config", str(work / "joint.yaml"), "--output", str(tmp_path / "run")]
    assert main([*fit, "--model.init_args.attention", "flex"]) == 1
    assert "flex needs CUDA and a C compiler" in capsys.readouterr().err
