"""The computed memory of a step: that of steps that were run, here and on a graphics card."""

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from multimodal.cli import main
from multimodal.model.head_loss import head_losses
from multimodal.model.layers.transformer import TransformerConfig, named_config
from multimodal.model.network import ModelConfig, MultimodalLM
from multimodal.model.objectives import ObjectivesConfig
from multimodal.model.sequences import Packed
from multimodal.model.vocabulary import Vocabulary
from multimodal.tokenizers.levels import Layout, Level
from multimodal.train.forecasts.budget import Memory, Step, step_memory
from multimodal.train.optim import muon
from multimodal.train.sharding import clip_gradients, shard

CODES = 16_384
ROWS, LENGTH = 4, 192


def network_of(config: TransformerConfig, codes: int, device: str = "meta") -> MultimodalLM:
    """A network whose vocabulary has about the size of the config."""
    text = config.vocab_size - codes - 64
    config = replace(config, vocab_size=Vocabulary(text, codes).size)
    layout = Layout((Level("detail", 16, 1, codes),))
    objectives = ObjectivesConfig(alignment_weight=0.0)
    with torch.device(device):
        return MultimodalLM(ModelConfig(config, text, layout, objectives))


def with_adamw(network: MultimodalLM, memory: Memory) -> Memory:
    """Two numbers for each weight."""
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return replace(memory, optimizer=8 * trained)


@pytest.mark.parametrize(
    ("size", "rows", "attention", "compiled", "measured"),
    [
        ("large", 48, "sdpa", False, 94),
        ("large", 48, "flex", False, 88),
        ("large", 48, "flex", True, 62),
        ("1b", 32, "flex", True, 84),
    ],
)
def test_it_is_within_a_tenth_of_what_an_h200_needed(
    size: str, rows: int, attention: Any, compiled: bool, measured: float
) -> None:
    """Measured with AdamW, bf16-mixed, rows of 1,280 tokens, torch 2.11."""
    network = network_of(named_config(size, 49_152), CODES)
    memory = step_memory(network, Step(rows, 1280, attention=attention, compiled=compiled))
    assert with_adamw(network, memory).peak / 1e9 == pytest.approx(measured, rel=0.1)


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """A process group of which this process is the first rank. Its collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("sharded", "recompute", "bfloat16"),
    [(False, False, True), (True, False, False), (True, True, True)],
)
def test_it_is_within_a_tenth_of_what_a_step_allocates(
    two_ranks: None, sharded: bool, recompute: bool, bfloat16: bool
) -> None:
    sizes = TransformerConfig(8192, 256, 3, 4, 2, 64, 768)
    step = Step(
        ROWS,
        LENGTH,
        ranks=2 if sharded else 1,
        strategy="fsdp" if sharded else "one",
        device="cpu",
        bfloat16=bfloat16,
        recompute=recompute,
    )
    memory = step_memory(network_of(sizes, 1024), step)
    assert memory.peak == pytest.approx(allocated(sizes, step), rel=0.1)


def test_many_ranks_are_computed_in_one_process(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)  # nothing may be started
    command = ["info", "--config", str(work / "joint.yaml"), "--trainer.accelerator", "gpu"]
    command += ["--model.size", "7b", "--trainer.devices", "8", "--trainer.num_nodes", "8"]
    sharded = "lightning.pytorch.strategies.ModelParallelStrategy"
    assert main([*command, "--trainer.strategy", sharded]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert "for 64 ranks on cuda (fsdp); nothing was run" in lines["computed"]
    trained = int(lines["parameters"].split()[0].replace(",", ""))
    assert trained > 6e9
    # A 64th of fp32 weights; all of them are never on one rank.
    assert f"weights {4 * trained / 64 / 1e9:.2f}" in lines["of that"]
    assert float(lines["memory"].split()[0]) < 4 * trained / 1e9
    command += ["--trainer.strategy", sharded, "--trainer.strategy.data_parallel_size", "32"]
    assert main(command) == 1  # the run would be refused, too
    assert "data_parallel_size=32: expected 64" in capsys.readouterr().err
    assert main(["info", "--config", str(work / "tokenizer.yaml"), "--trainer.devices", "2"]) == 1
    assert "with --trainer.devices 1 any run is measured" in capsys.readouterr().err


def allocated(sizes: TransformerConfig, step: Step) -> int:
    """The most bytes that torch had given out in two steps."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(sizes, step)
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def train(sizes: TransformerConfig, step: Step) -> None:
    network = network_of(sizes, 1024, "cpu").train()
    network.transformer.recompute = step.recompute
    if step.strategy == "fsdp":
        shard(network, init_device_mesh("cpu", (step.ranks,)))
        register_fsdp_forward_method(network, "hidden")
    optimizer = muon(network, [], 1e-3, 0.1)
    for _ in range(2):
        numbers = [torch.zeros(step.rows, step.row_length, dtype=torch.int64) for _ in range(9)]
        with torch.autocast("cpu", torch.bfloat16, enabled=step.bfloat16):
            hidden = network.hidden(Packed(*numbers)).flatten(0, 1)
            weights = torch.ones(len(hidden))
            head = network.transformer.lm_head.weight
            targets = torch.zeros(len(hidden), dtype=torch.int64)
            loss = head_losses(hidden, head, targets, weights, weights).total
        loss.backward()
        clip_gradients(list(network.parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
