"""The energy of a training is in its logs."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from multimodal.train.callbacks import EnergyLog


def fit(folder: Path, **options: object) -> None:
    trainer = L.Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, max_steps=3,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, callbacks=[EnergyLog(watts_per_core=7, grams_per_kwh=100)],
        **options,
    )  # type: ignore[arg-type]  # fmt: skip
    trainer.fit(BoringModel())


def test_each_start_of_a_run_has_its_energy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter([10.0, 10.5, 20.0, 24.0])  # at the start and at the end, twice
    monkeypatch.setattr("multimodal.energy.cpu_seconds", lambda *_: next(seconds))
    monkeypatch.setattr("multimodal.energy.POWERCAP", tmp_path)
    fit(tmp_path)
    fit(tmp_path)
    logs = tmp_path / "logs"
    first, second = (
        json.loads((logs / name).read_text()) for name in ("energy.1.json", "energy.json")
    )
    assert first["watt_hours"] == pytest.approx(0.5 * 7 / 3600)
    assert second["watt_hours"] == pytest.approx(4 * 7 / 3600)
    assert second["co2_grams"] == pytest.approx(second["watt_hours"] / 10)
    assert (second["from_step"], second["to_step"], second["ranks"]) == (0, 3, 1)
    assert second["how"] == "estimated: CPU seconds x 7 W a core" and second["seconds"] > 0
    assert "energy of this start: 0.00778 Wh" in capsys.readouterr().err


def test_the_first_rank_leaves_out_ranks_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []
    monkeypatch.setattr("multimodal.energy.cpu_seconds", lambda without: counted.append(without))
    monkeypatch.setattr("multimodal.energy.POWERCAP", tmp_path)
    strategy = SimpleNamespace(launcher=SimpleNamespace(procs=[SimpleNamespace(pid=7)]))
    trainer = SimpleNamespace(
        strategy=strategy, global_step=0, local_rank=0, is_global_zero=False, fast_dev_run=False
    )
    log: Any = EnergyLog()
    log.on_train_start(trainer, BoringModel())
    assert counted == [[7]]


def test_trying_a_run_writes_nothing(tmp_path: Path) -> None:
    fit(tmp_path, fast_dev_run=True)
    assert not list(tmp_path.rglob("energy*.json"))


def test_every_training_notes_it(work: Path) -> None:
    record = json.loads((work / "joint/logs/energy.json").read_text())
    assert record["to_step"] == 14 and record["watt_hours"] > 0 and record["how"]
