"""A run with experts: from a dense model, with their losses in the log, resumed to the bit."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from multimodal.api import Model, load
from multimodal.cli import main
from multimodal.model.layers.experts import ExpertsConfig
from multimodal.model.objectives import PolicyConfig
from multimodal.model.training_batch import Written
from multimodal.scenes.dataset import write_scenes
from tests.launches import logged
from tests.samples import samples_of

KINDS = ("text", "image", "shared", "busiest")


def test_a_dense_model_gets_experts_and_the_run_resumes_to_the_bit(
    tiny_model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    write_scenes(tmp_path / "scenes", 24, 0, 32)
    module = {
        "text_tokenizer": str(tiny_model_folder), "image_tokenizer": str(tiny_model_folder),
        "size": "tiny", "experts": {"num_experts": 4, "mlp_only_layers": [0]},
        "objectives": {"alignment_dim": 32}, "row_length": 192, "warmup_steps": 0,
        "captions_in_validation": 0, "answers_in_validation": 0, "drawings_in_validation": 0,
    }  # fmt: skip
    config = {
        "checkpoint_every": 1,
        "model": {"class_path": "multimodal.train.joint.JointModule", "init_args": module},
        "data": {"folders": [str(tmp_path / "scenes")], "global_batch_size": 8, "workers": 0},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False,
                    "limit_val_batches": 1, "log_every_n_steps": 1},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    run = ["fit", "--config", str(tmp_path / "run.yaml"), "--init_from", str(tiny_model_folder)]
    assert main([*run, "--output", str(tmp_path / "whole")]) == 0
    routing = ("router_balance", "router_z", *(f"experts/{kind}" for kind in KINDS))
    for name in routing:
        assert logged(tmp_path / "whole", f"train/{name}"), name
    assert 1 <= float(logged(tmp_path / "whole", "train/experts/image")[0]) <= 4

    checkpoints = tmp_path / "whole/checkpoints"
    first = next(path for path in sorted(checkpoints.iterdir()) if "step=1." in path.name)
    again = ["fit", "--config", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "again")]
    assert main([*again, "--ckpt_path", str(first)]) == 0
    one, other = (load(tmp_path / name / "model").network for name in ("whole", "again"))
    weights = other.state_dict()
    for name, weight in one.state_dict().items():
        assert torch.equal(weights[name], weight), name

    capsys.readouterr()
    assert main(["info", str(tmp_path / "whole/model"), "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)["parameters"]
    idle = 2 * 3 * 64 * 128  # two of four experts, in one layer
    assert counted["transformer"] - counted["of which active for a token"] == idle


def test_routers_are_balanced_whatever_the_weight_of_the_joint_losses(
    tiny_model: Callable[..., Model], sentences: tuple[str, ...]
) -> None:
    """Reward training with ``lm_weight: 0``, where no completion is better than another."""
    model = tiny_model(noise=0.1, experts=ExpertsConfig(4))
    written = [Written([5, 6, model.vocabulary.eos], 0.0)]
    samples = [replace(s, written=written) for s in samples_of([{"captions": [*sentences]}] * 3)]
    batch = model.batch_builder(160).build(samples, policy=PolicyConfig(joint_weight=0.0))
    total, parts = model.network(batch)
    expected = 0.01 * parts["router_balance"] + 0.001 * parts["router_z"]
    torch.testing.assert_close(total, expected)
    router = model.network.get_submodule("transformer.layers.1.mlp.gate").weight
    found, alone = (
        torch.autograd.grad(loss, router, retain_graph=True)[0] for loss in (total, expected)
    )
    assert found.abs().max() > 0
    torch.testing.assert_close(found, alone)
