"""Preference training: runs that prefer, resume, and what they refuse."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

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
    one, other = (Path(each) / "model/model.safetensors" for each in (uninterrupted, run))
    assert one.read_bytes() == other.read_bytes()
    assert logged(Path(uninterrupted), "val/preference")


@pytest.mark.parametrize(("variant", "adapter"), [("kto", None), ("ipo", {"r": 4})])
def test_each_variant_resumes_to_the_bit(
    work: Path, tmp_path: Path, variant: str, adapter: dict[str, int] | None
) -> None:
    """A copy of the weights is the reference, or the base of an adapter."""
    data, model = preferring(work, tmp_path / "data", denied_is_worse), str(work / "joint/model")
    config = recipe(work, tmp_path, [data], variant=variant, lora=adapter, learning_rate=0.01)
    fit = [
        "fit",
        "--config",
        str(config),
        "--trainer.max_steps",
        "4",
        "--trainer.val_check_interval",
    ]
    fit += ["3", "--output"]
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert main([*fit, str(whole), "--init_from", model]) == 0
    assert main([*fit, str(again), "--ckpt_path", str(whole / "checkpoints/step=3.ckpt")]) == 0
    name = "model/model.safetensors" if adapter is None else "adapter/adapter_model.safetensors"
    assert (whole / name).read_bytes() == (again / name).read_bytes()
    assert len(values(whole, "train/preference_kl")) == 4


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "none of the first 256 samples of each folder has preferences"),
        ({"chosen": "a"}, "no rejected answer: a preference needs a text or an image"),
        ({"chosen": "a", "rejected": "a"}, "the chosen and the rejected answer are equal"),
        ({"completion": "a", "label": True}, "only kto learns from one alone"),
        ({"chosen": "a", "rejected": "a b " * 300}, "row_length=192: the preferences of 50 of the"),
    ],
)
def test_what_cannot_be_preferred_is_refused_before_the_first_step(
    work: Path, tmp_path: Path, capsys: Any, entry: Any, message: str
) -> None:
    entries = {} if entry is None else {"preferences": [entry]}
    data = preferring(work, tmp_path / "data", lambda records, n: {**records[n], **entries})
    fit = ["fit", "--config", str(recipe(work, tmp_path, [data])), "--output"]
    assert main([*fit, str(tmp_path / "run"), "--init_from", str(work / "joint/model")]) == 1
    assert message in capsys.readouterr().err
    if entry is None:
        assert main([*fit, str(tmp_path / "other")]) == 1
        assert "give a model with --init_from" in capsys.readouterr().err


def test_few_bad_preferences_are_left_out_and_named(work: Path, tmp_path: Path) -> None:
    def some(records: list[dict[str, Any]], number: int) -> dict[str, Any]:
        good = denied_is_worse(records, number)
        return good if number else {**good, "preferences": [{"chosen": "a"}]}

    data, run = preferring(work, tmp_path / "data", some), tmp_path / "run"
    fit = ["fit", "--config", str(recipe(work, tmp_path, [data])), "--trainer.max_steps", "4"]
    fit += ["--trainer.limit_val_batches", "0", "--output", str(run)]
    assert main([*fit, "--init_from", str(work / "joint/model")]) == 0
    assert "no rejected answer" in next(run.rglob("left_out.jsonl")).read_text()
    assert len(values(run, "train/preference")) == 4


def test_data_without_preferences_do_not_thin_the_figures(work: Path, tmp_path: Path) -> None:
    """With a learning rate of nothing, each figure is what it is at the start: log 2 for dpo."""
    data = preferring(work, tmp_path / "data", denied_is_worse)
    config = recipe(work, tmp_path, [data, work / "scenes"], learning_rate=1e-12)
    fit = ["fit", "--config", str(config), "--trainer.max_steps", "2", "--output"]
    fit += [
        str(tmp_path / "run"),
        "--data.weights",
        "[1, 1]",
        "--data.val_limit",
        "0",
        "--data.global_batch_size",
        "4",
    ]
    assert main([*fit, "--init_from", str(work / "joint/model")]) == 0
    validated = values(tmp_path / "run", "val/preference")
    assert validated and validated == pytest.approx([np.log(2)] * len(validated), abs=1e-4)


def test_two_ranks_learn_as_one(work: Path, tmp_path: Path) -> None:
    """With a copy of the weights on each rank, and with a part of them (FSDP2)."""
    data = preferring(work, tmp_path / "data", denied_is_worse)
    config = recipe(work, tmp_path, [data])
    more = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "0"]
    more += ["--init_from", str(work / "joint/model"), "--output"]
    assert main(["fit", "--config", str(config), *more, str(tmp_path / "one")]) == 0
    sharded = yaml.safe_load(config.read_text())
    sharded["trainer"]["strategy"] = {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
    }
    (tmp_path / "sharded.yaml").write_text(yaml.safe_dump(sharded))
    both = ["--trainer.devices", "2"]
    ddp = ["fit", "--config", str(config), *both, "--trainer.strategy", "ddp"]
    fsdp = ["fit", "--config", str(tmp_path / "sharded.yaml"), *both]
    launch([*ddp, *more, str(tmp_path / "ddp")], [*fsdp, *more, str(tmp_path / "fsdp")], ranks=2)
    for name in ("preference", "rewards/margin", "preference_kl", "total", "gradient_norm"):
        one, *two = (values(tmp_path / run, f"train/{name}") for run in ("one", "ddp", "fsdp"))
        for other in two:
            assert other == pytest.approx(one, rel=1e-2, abs=1e-5), name
