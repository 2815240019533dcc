"""What a run says: lines, validations, options with their docstrings; and what it logs."""

import csv
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.connectors.logger_connector import result

from multimodal.cli import main
from multimodal.model.layers.transformer import SIZES
from multimodal.train.callbacks import MeasuredOnly
from multimodal.train.run import progress
from multimodal.train.run.progress import Progress, duration, number
from multimodal.train.run.recipes import rounded

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_without_a_terminal_prints_lines(
    work: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    fit = ["fit", "--config", str(work / "joint.yaml"), "--output", str(tmp_path)]
    fit += ["--trainer.max_steps", "4", "--trainer.val_check_interval", "2"]
    assert main([*fit, "--data.val_limit", "2"]) == 0
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("step ")]
    assert len(lines) == 4
    pattern = r"step 3 of 4 \(75%\), loss [\d.]+, [\d,.]+ tokens/s, .* left"
    assert re.match(pattern, lines[2]), lines
    shown = [line for line in error.splitlines() if line.startswith("validation at step ")]
    assert len(shown) == 2 and "(the best so far): " in shown[0] and " total " in shown[0]
    assert "CIDEr" in shown[0] and "grad_norm" not in error
    assert "v_num" not in error and "/-2" not in error


def test_the_time_that_is_left_and_numbers_are_readable() -> None:
    assert [duration(s) for s in (40, 89.6, 95, 3601, 11100)] == [
        "40 s", "90 s", "2 min", "1 h 0 min", "3 h 5 min"
    ]  # fmt: skip
    assert [number(v) for v in (12345.6, 3.14159, 0.00012, 1.0)] == [
        "12,346", "3.142", "0.00012", "1"
    ]  # fmt: skip
    trainer: Any = SimpleNamespace(
        global_step=30,
        estimated_stepping_batches=float("inf"),
        callback_metrics={"loss": 2.0, "train/total": 2.0},
        progress_bar_metrics={"v_num": 3},
    )
    assert Progress(False).line(trainer) == "step 30, loss 2"


@pytest.mark.parametrize(
    ("bar", "seconds", "expected"), [(True, 30.0, 4), (False, 30.0, 0), (False, 2.0, 2)]
)
def test_numbers_are_read_only_when_they_are_printed(
    monkeypatch: pytest.MonkeyPatch, bar: bool, seconds: float, expected: int
) -> None:
    """32 steps in 4 seconds. A bar has numbers in the first step, then each second."""

    class Loss:
        reads = 0

        def __float__(self) -> float:
            self.reads += 1
            return 2.5

    loss, now = Loss(), [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    trainer: Any = SimpleNamespace(
        global_step=0, is_global_zero=True, estimated_stepping_batches=100.0,
        callback_metrics={"loss": loss, "train/total": loss}, progress_bar_metrics={},
    )  # fmt: skip
    callback = Progress(bar, seconds=seconds)
    callback.on_train_start(trainer, L.LightningModule())
    for step in range(1, 33):
        now[0] += 0.125
        trainer.global_step = step
        callback.on_train_batch_end(trainer)
    assert loss.reads == expected
    callback.on_train_end(trainer, L.LightningModule())
    assert loss.reads == expected + bar, "a bar that stays has the last numbers"


def test_a_step_of_a_run_reads_no_number(
    work: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lightning reads each number that is logged for a bar in each step. It has none to read."""
    read, original = list[torch.Tensor](), result.convert_tensors_to_scalars

    def note(value: torch.Tensor) -> Any:
        read.append(value)
        return original(value)

    monkeypatch.setattr(result, "convert_tensors_to_scalars", note)
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    fit = ["fit", "--config", str(work / "joint.yaml"), "--trainer.max_steps", "3"]
    fit += ["--trainer.limit_val_batches", "0", "--output"]
    assert main([*fit, str(tmp_path / "run")]) == 0
    assert not read and "step 3 of 3 (100%), loss " in capsys.readouterr().err
    bar = ["--trainer.callbacks", "lightning.pytorch.callbacks.TQDMProgressBar"]
    bar += ["--trainer.enable_progress_bar", "true"]
    assert main([*fit, str(tmp_path / "bar"), *bar]) == 0
    assert len(read) >= 3 and "loss=" in capsys.readouterr().out, "a bar of Lightning has them"


def test_help_names_the_sizes_and_the_options_of_the_model_and_the_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["fit", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} " in out for name in SIZES) and "mini 3.1 M" in out and "7b 6.2 B" in out
    assert [rounded(n) for n in (74_000, 3_100_000, 83_000_000, 6_200_000_000)] == [
        "74 k", "3.1 M", "83 M", "6.2 B"
    ]  # fmt: skip
    assert main(["fit", "--help-all"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for option, document in (
        ("--data.crop_scale", "the smallest share of the image that a random training crop covers"),
        ("--model.row_length", "tokens in a packed row"),
        ("--model.captions_written", "of each sample in each step"),
        ("--model.teacher_weight", "from 0 (the data alone) to 1"),
        ("--model.discriminator_start", "first step with a discriminator"),
    ):
        assert option in out and document in out, option


def test_a_printed_configuration_says_what_each_option_is_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", "finetune.yaml", "--print_config"])
    out = capsys.readouterr().out
    config = yaml.safe_load(out)
    assert config["model"]["init_args"]["row_length"] == 256
    lines = out.splitlines()
    for option, document in (
        ("    row_length: 256", "tokens in a packed row"),
        ("  crop_scale: 1.0", "the smallest share of the image"),
        ("      alignment_weight: 0.3", "of the contrastive loss"),
    ):
        above = lines[lines.index(option) - 4 : lines.index(option)]
        assert any(line.lstrip().startswith("#") and document in line for line in above), option


def test_a_step_logs_only_what_was_measured_in_it(tmp_path: Path) -> None:
    """Lightning alone repeats the value of the step before."""

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("every", float(batch_idx))
            if batch_idx % 2 == 0:
                self.log("even", float(batch_idx))
            return self.weight * 1.0

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    def table(*callbacks: L.Callback) -> list[tuple[str, str]]:
        folder = tmp_path / str(len(callbacks))
        trainer = L.Trainer(
            max_steps=4, logger=CSVLogger(folder, "", "logs"), callbacks=list(callbacks),
            log_every_n_steps=1, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu",
        )  # fmt: skip
        trainer.fit(Module(), torch.utils.data.DataLoader(range(4)))  # type: ignore[arg-type]
        with open(folder / "logs/metrics.csv", newline="") as file:
            return [(row["every"], row["even"]) for row in csv.DictReader(file)]

    assert table() == [("0.0", "0.0"), ("1.0", "0.0"), ("2.0", "2.0"), ("3.0", "2.0")]
    assert table(MeasuredOnly()) == [("0.0", "0.0"), ("1.0", ""), ("2.0", "2.0"), ("3.0", "")]
