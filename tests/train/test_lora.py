"""A run with LoRA: only the adapter trains, resumes to the bit, and is what peft says it is."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from multimodal.api import load
from multimodal.cli import main
from multimodal.export.hf import export_hf
from multimodal.scenes.dataset import write_scenes
from tests.launches import launch, logged, sharded


def configuration(base: Path, folder: Path, **module: Any) -> dict[str, Any]:
    arguments = {
        "text_tokenizer": str(base), "image_tokenizer": str(base), "size": "tiny",
        "objectives": {"alignment_dim": 32}, "row_length": 192, "warmup_steps": 0,
        "learning_rate": 0.02,
        "captions_in_validation": 0, "answers_in_validation": 0, "drawings_in_validation": 0,
    }  # fmt: skip
    return {
        "checkpoint_every": 1,
        "model": {
            "class_path": "multimodal.train.joint.JointModule",
            "init_args": arguments | module,
        },
        "data": {"folders": [str(folder / "scenes")], "global_batch_size": 8, "workers": 0},
        "trainer": {"max_steps": 3, "accelerator": "cpu", "enable_progress_bar": False,
                    "limit_val_batches": 1, "log_every_n_steps": 1},
    }  # fmt: skip


@pytest.fixture(scope="session")
def adapted(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.yaml, scenes/ and a run with LoRA on the tiny model: whole/. Tests only read it."""
    folder, threads = tmp_path_factory.mktemp("lora"), torch.get_num_threads()
    torch.set_num_threads(1)
    write_scenes(folder / "scenes", 24, 0, 32)
    config = configuration(tiny_model_folder, folder, lora={"r": 4, "dropout": 0.1})
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    run = ["fit", "--config", str(folder / "run.yaml"), "--init_from", str(tiny_model_folder)]
    assert main([*run, "--output", str(folder / "whole")]) == 0
    torch.set_num_threads(threads)
    return folder


def test_an_adapter_says_in_peft_what_it_says_here(
    adapted: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    export_hf(tiny_model_folder, tmp_path / "stock")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    theirs = peft.PeftModel.from_pretrained(stock, adapted / "whole/adapter").eval()
    base, ours = load(tiny_model_folder), load(tiny_model_folder, adapter=adapted / "whole/adapter")
    ids = torch.randint(0, 300, (2, 24))
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        found, before = (logits(model, ids) for model in (ours, base))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected - before).abs().max() > 0.1  # it has learned something


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    transformer, length = model.network.transformer, ids.shape[1]
    positions = torch.arange(length).expand(len(ids), -1)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    return transformer.logits(transformer(ids, positions, mask))


def fit(folder: Path, output: Path, *more: str) -> list[str]:
    return ["fit", "--config", str(folder / "run.yaml"), "--output", str(output), *more]


def test_only_the_adapter_trains_and_the_run_resumes_to_the_bit(
    adapted: Path, tiny_model_folder: Path, tmp_path: Path, one_thread: None
) -> None:
    checkpoints = adapted / "whole/checkpoints"
    stored = torch.load(checkpoints / "last.ckpt", weights_only=True)
    base = load(tiny_model_folder).network.state_dict()
    trained = set()
    for name, weight in stored["state_dict"].items():
        inside = name.removeprefix("network.").replace(".base_layer", "")
        if name.startswith("network.") and ".lora_" not in name:
            assert torch.equal(weight, base[inside]), name
        elif name.startswith("network."):
            trained.add(name)
    states = stored["optimizer_states"][0]["state"]
    assert all("exp_avg_sq" in state for state in states.values())  # AdamW, not Muon
    assert len(states) == len(trained) == 2 * 2 * 7  # A and B, layers, matrices

    first = next(path for path in sorted(checkpoints.iterdir()) if "step=2." in path.name)
    assert main(fit(adapted, tmp_path / "again", "--ckpt_path", str(first))) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors", "base.json"):
        paths = (run / "adapter" / name for run in (adapted / "whole", tmp_path / "again"))
        one, other = (path.read_bytes() for path in paths)
        assert one == other, name
    assert not (adapted / "whole/model").exists()


def test_a_checkpoint_gives_the_adapter_and_a_resumed_end_writes_it(
    adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(adapted / "whole", run, symlinks=True)
    written = (run / "adapter/adapter_model.safetensors").read_bytes()
    checkpoint = str(run / "checkpoints/best.ckpt")
    assert main(["export", "model", checkpoint, str(tmp_path / "one")]) == 0
    assert (tmp_path / "one/adapter_model.safetensors").read_bytes() == written
    smaller = ["export", "model", checkpoint, str(tmp_path / "two"), "--dtype", "bfloat16"]
    assert main(smaller) == 1 and not (tmp_path / "two").exists()
    reason = "of a run with LoRA, whose adapter takes no --dtype and no --image-tokenizer"
    assert f"{checkpoint}: {reason}: leave them out" in capsys.readouterr().err
    shutil.rmtree(run / "adapter")
    assert main(fit(adapted, run, "--ckpt_path", "last")) == 0
    assert (run / "adapter/adapter_model.safetensors").read_bytes() == written


def test_parts_of_an_adapter_have_rates_of_their_own(
    adapted: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    more = ["--init_from", str(tiny_model_folder), "--trainer.max_steps", "1"]
    rates = ["--model.learning_rates", '{"*.layers.0.*.lora_B.*": 0.0}']
    assert main(fit(adapted, tmp_path / "run", *more, *rates)) == 0
    for name, weight in load_file(tmp_path / "run/adapter/adapter_model.safetensors").items():
        if ".lora_B" in name:  # starts at 0
            assert weight.any() == (".layers.0." not in name), name


def test_the_folder_names_its_base_and_its_data(adapted: Path, tiny_model_folder: Path) -> None:
    folder, fingerprint = adapted / "whole/adapter", load(tiny_model_folder).fingerprint
    about = json.loads((folder / "base.json").read_text())
    assert about["base"] == {"name": str(tiny_model_folder), "fingerprint": fingerprint}
    sources = json.loads((folder / "sources.json").read_text())["sources"]
    assert {source["kind"] for source in sources} == {"model", "data"}
    assert fingerprint in (folder / "README.md").read_text()


def test_an_adapter_for_parts_of_weights_resumes(
    adapted: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """With FSDP2 Lightning reads a checkpoint after ``on_fit_start``."""
    run, start = tmp_path / "run", ["--init_from", str(tiny_model_folder)]
    launch(fit(adapted, run, *start, "--trainer.max_steps", "2", *sharded()))
    launch(fit(adapted, run, "--ckpt_path", "last", *sharded()))
    assert (run / "checkpoints/last.ckpt").resolve().name == "step=3.ckpt"
    about, theirs = (
        json.loads((folder / "adapter/base.json").read_text())
        for folder in (run, adapted / "whole")
    )
    assert about["base"] == theirs["base"]


REFUSED: dict[str, tuple[dict[str, Any], bool, str]] = {
    "nothing to adapt": ({}, False, "an adapter needs a model that it adapts: give --init_from"),
    "no such layer": ({"lora.target": "[q_proj, attn]"}, True, "'attn' is no layer to adapt"),
    "experts": ({"experts.num_experts": "4"}, True, "keeps the sizes, the levels, the experts"),
    "frozen parts": ({"freeze": "[network.transformer.layers.0]"}, True, "lora.target names its"),
    "no such part": ({"learning_rates": '{"*.lora_C.*": 0.1}'}, True, "no part of that name"),
    "a rank of 0": ({"lora.r": "0"}, True, "r=0: expected a whole number from 1 to 1,024"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_adapted_is_refused_before_a_step(
    adapted: Path, tiny_model_folder: Path, tmp_path: Path, kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    settings, starts, reason = REFUSED[kind]
    more = [f"--model.{name}={value}" for name, value in settings.items()]
    more += ["--init_from", str(tiny_model_folder)] if starts else []
    assert main(fit(adapted, tmp_path / "run", *more)) != 0
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "run/checkpoints").exists()
    assert not (tmp_path / "run/adapter").exists()


def test_without_peft_it_says_what_to_install(
    adapted: Path, tiny_model_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "peft", None)
    load(tiny_model_folder, adapter=adapted / "whole/adapter")  # merging needs none
    assert main(fit(adapted, tmp_path / "run", "--init_from", str(tiny_model_folder))) != 0
    assert "pip install multimodal[lora]" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_with_a_part_of_the_weights_write_the_adapter_of_one(
    adapted: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    config = configuration(tiny_model_folder, adapted, lora={"r": 4})
    config["trainer"]["max_steps"] = 2
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(config))
    strategy = "lightning.pytorch.strategies.ModelParallelStrategy"
    arguments = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    config["trainer"] |= {
        "devices": 2,
        "strategy": {"class_path": strategy, "init_args": arguments},
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config))
    start = ["--init_from", str(tiny_model_folder), "--output"]
    one, two = (["fit", "--config", str(tmp_path / f"{name}.yaml")] for name in ("one", "two"))
    assert main([*one, *start, str(tmp_path / "one")]) == 0
    launch([*two, *start, str(tmp_path / "two")], ranks=2)
    for name in ("total", "caption", "gradient_norm"):
        expected, found = (logged(tmp_path / run, f"train/{name}") for run in ("one", "two"))
        assert [float(value) for value in found.values()] == pytest.approx(
            [float(value) for value in expected.values()], rel=1e-3
        ), name
    weights, parts = (
        load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("one", "two")
    )
    for name, weight in weights.items():
        # The first step of AdamW is as long for a gradient of rounding errors as for any other.
        near = (parts[name] - weight).abs() < 1e-3
        assert near.float().mean() > 0.95, (name, near.float().mean())
