"""The computed memory of a step: that of steps that were run, here and on a graphics card."""

import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.optim.muon import _COEFFICIENTS, DEFAULT_NS_STEPS, zeropower_via_newtonschulz
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from multimodal.cli import main
from multimodal.model.head_loss import CUDA_SLICE, SLICE, head_losses
from multimodal.model.layers.transformer import TransformerConfig, named_config
from multimodal.model.network import ModelConfig, MultimodalLM
from multimodal.model.objectives import ObjectivesConfig
from multimodal.model.sequences import Packed
from multimodal.model.vocabulary import Vocabulary
from multimodal.tokenizers.levels import Layout, Level
from multimodal.train.cost import muon_bytes, muon_flops
from multimodal.train.forecasts.budget import Live, Memory, Step, step_memory
from multimodal.train.optim import muon
from multimodal.train.sharding import clip_gradients, shard
from tests import launches

COEFFICIENTS = _COEFFICIENTS["polar_express"]
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


@contextmanager
def first_of(ranks: int) -> Iterator[None]:
    """A process group of which this process is the first rank. Its collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("sharded", "recompute", "bfloat16"),
    [(False, 0, True), (True, 0, False), (True, 3, True), (False, 2, False), (False, 2, True)],
)
def test_it_is_within_a_tenth_of_what_a_step_allocates(
    sharded: bool, recompute: int, bfloat16: bool
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
    with first_of(2):
        assert memory.peak == pytest.approx(allocated(sizes, step), rel=0.1)


def test_the_products_of_muon_are_those_that_torch_counts() -> None:
    network = network_of(TransformerConfig(512, 32, 3, 4, 2, 8, 96), 256, "cpu")
    optimizer = muon(network, [], 1e-3, 0.1)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert muon_flops(optimizer) == counter.get_total_flops() > 0


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize(("device", "size"), [("cpu", SLICE), ("cuda", CUDA_SLICE)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_logits_of_one_slice_are_there_at_a_time(
    device: str, size: int, dtype: torch.dtype
) -> None:
    """Counted on tensors without memory, and in bfloat16 with what the product is before a cast."""
    vocabulary = 32_768
    with FakeTensorMode(), Live(nn.Module()) as live, torch.device(device):
        hidden, head = (
            torch.zeros(rows, 8, dtype=dtype, requires_grad=True)
            for rows in (3 * size // vocabulary, vocabulary)
        )
        targets, weights = torch.zeros(len(hidden), dtype=torch.int64), torch.ones(len(hidden))
        head_losses(hidden, head, targets, weights, weights)
    assert 1 <= live.peak / (4 * size) < 1.7


def test_the_larger_slices_of_a_card_are_in_its_forecast() -> None:
    network, of_head = network_of(named_config("large", 49_152), CODES), dict[str, int]()
    for device in ("cpu", "cuda"):
        memory = step_memory(network, Step(48, 1280, device=device))  # type: ignore[arg-type]
        of_head[device] = memory.phases["loss"] - memory.activations
    assert of_head["cuda"] - of_head["cpu"] == 2 * 4 * (CUDA_SLICE - SLICE)


class Sent(TorchDispatchMode):
    """Counts the bytes that are summed over the ranks, for all of them or for one."""

    def __init__(self, ranks: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes, self.others = 0.0, (ranks - 1) / ranks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented
        times = {"all_reduce": 2, "reduce_scatter_tensor": 1}.get(func._opname, 0)
        if times and args[0].ndim == 2:  # not of norms
            self.bytes += times * args[0].nbytes * self.others
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ranks", [8, 32])
def test_muon_of_parts_sends_and_computes_what_torch_does(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shapes of ``7b``, in bfloat16 as on a graphics card."""
    monkeypatch.setattr("multimodal.train.optim.has_slow_bfloat16", lambda device: False)
    with first_of(ranks):
        mesh = init_device_mesh("cpu", (ranks,))
        for rows, columns in ((4096, 4096), (1024, 4096), (12288, 4096), (4096, 12288)):
            optimizer = muon(nn.Linear(columns, rows, False, "meta"), [], 1e-3, 0.1)
            with FakeTensorMode():
                part = torch.empty(rows // ranks, columns)
                update = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
                for _ in range(2):  # the first time torch chooses how, on whole matrices
                    with FlopCounterMode(display=False) as counter, Sent(ranks) as sent:
                        zeropower_via_newtonschulz(update, DEFAULT_NS_STEPS, COEFFICIENTS)
            assert muon_flops(optimizer, ranks) == counter.get_total_flops()
            assert muon_bytes(optimizer, ranks) == pytest.approx(sent.bytes)


def alone_and_measured() -> None:
    """In this process: nothing may be started, and a command says what memory it has taken."""
    subprocess.Popen = None  # type: ignore[assignment,misc]
    run, unit = launches.main, 1 if sys.platform == "darwin" else 1024

    def measured(arguments: list[str]) -> int:
        status = run(arguments)
        print(f"peak: {unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}")
        return status

    launches.main = measured


def test_many_ranks_are_computed_in_one_process(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In less than 4 GB of memory: a seventh of what the weights alone would take."""
    command = ["info", "--config", str(work / "joint.yaml"), "--trainer.accelerator", "gpu"]
    command += ["--model.size", "7b", "--trainer.devices", "8", "--trainer.num_nodes", "8"]
    sharded = "lightning.pytorch.strategies.ModelParallelStrategy"
    (end,) = launches.run_processes(
        [*command, "--trainer.strategy", sharded], before=alone_and_measured
    )
    assert end.status == 0, end.stderr
    lines = dict(line.split(":", 1) for line in end.stdout.splitlines())
    assert 1e8 < int(lines["peak"]) < 4e9
    assert "for 64 ranks on cuda (fsdp); nothing was run" in lines["computed"]
    trained = int(lines["parameters"].split()[0].replace(",", ""))
    assert trained > 6e9
    # A 64th of fp32 weights; all of them are never on one rank.
    assert f"weights {4 * trained / 64 / 1e9:.2f}" in lines["of that"]
    assert float(lines["memory"].split()[0]) < 4 * trained / 1e9
    # Muon is no part of the MFU, and sends more than all of the step before it.
    sent, by_muon = (
        float(re.search(r"sends (\S+) GB", lines[name])[1])  # type: ignore[index]
        for name in ("step", "update")
    )
    assert "TFLOP on each rank" in lines["update"] and by_muon > sent
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
