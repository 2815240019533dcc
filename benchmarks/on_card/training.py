"""Training steps: tokens a second, MFU, memory, and where the time goes."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.optim.muon import Muon

from multimodal.model.batches import BatchBuilder
from multimodal.model.training_batch import TrainingBatch, TrainingSample
from multimodal.train.cost import muon_flops, peak_flops, peak_memory, training_flops
from multimodal.train.optim import muon
from multimodal.train.sharding import clip_gradients
from on_card.sizes import (
    Figure,
    Sizes,
    kernels,
    milliseconds_of,
    products_per_second,
    seconds_of,
    synchronize,
)


def figures(name: str) -> list[str]:
    return [f"train/{name}", f"train/{name}/kernels", f"train/{name}/eager"]


def train_large(sizes: Sizes) -> Iterator[Figure]:
    yield from _train(sizes, "large")


def train_1b(sizes: Sizes) -> Iterator[Figure]:
    yield from _train(sizes, "1b")


def batch_of(sizes: Sizes, network: Any, rows: int) -> TrainingBatch:
    """Rows of images with their captions, on the host. Every caption has the same length."""
    torch.manual_seed(0)
    codes = torch.randint(0, sizes.codebook, (2 * rows, 1, sizes.grid**2)).numpy()
    ids = torch.randint(0, network.vocabulary.text_size, (2 * rows, sizes.text)).tolist()
    builder = BatchBuilder(
        network.vocabulary,
        network.config.objectives,
        network.config.templates,
        lambda text: ids[int(text)],
        sizes.layout,
        network.config.reads,
        network.config.draws,
        sizes.row_length,
    )
    return builder.build(
        [
            TrainingSample(str(number), {"captions": [str(number)]}, codes[number], number)
            for number in range(2 * rows)
        ]
    )


def phases_of(
    network: Any, optimizer: Muon, batch: TrainingBatch
) -> dict[str, Callable[[], object]]:
    """The phases of a step as ``multimodal fit`` does it, from a batch on the host, by name."""
    weights = [p for p in network.parameters() if p.requires_grad]
    losses: list[torch.Tensor] = []

    def forward() -> None:
        with torch.autocast(network.device.type, torch.bfloat16):
            losses.append(network(batch.to(network.device))[0])

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return {
        "forward": forward,
        "backward": lambda: losses.pop().backward(),
        "clip": lambda: clip_gradients(weights, 1.0),
        "optimizer": update,
    }


def training_step(phases: dict[str, Callable[[], object]]) -> Callable[[], None]:
    """All phases, one after the other."""

    def step() -> None:
        for phase in phases.values():
            phase()

    return step


def _train(sizes: Sizes, name: str) -> Iterator[Figure]:
    """The fastest form and where its time goes, then the plainest form."""
    network = sizes.network(name, torch.float32).train()
    batch = batch_of(sizes, network, sizes.rows_of(name))
    if sizes.compiled:
        network.attention_backend = "flex"
        network.transformer.compile_layers()
    optimizer = muon(network, [], 1e-4, 0.1)
    phases = phases_of(network, optimizer, batch)
    step = training_step(phases)
    yield _measured(f"train/{name}", sizes, network, batch, step)
    flops = training_flops(network.config.transformer, batch.packed) + muon_flops(optimizer)
    floor = flops / products_per_second(sizes)
    more = kernels(step) | {"phases_ms": milliseconds_of(phases, sizes.steps)}
    yield Figure(f"train/{name}/kernels", 1e3 * floor, "ms at the floor", more)
    del network, optimizer, phases, step
    network = sizes.network(name, torch.float32).train()
    step = training_step(phases_of(network, muon(network, [], 1e-4, 0.1), batch))
    yield _measured(f"train/{name}/eager", sizes, network, batch, step)


def _measured(
    label: str, sizes: Sizes, network: Any, batch: TrainingBatch, step: Callable[[], None]
) -> Figure:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step()
    synchronize()
    ready = time.perf_counter() - start
    seconds = seconds_of(step, sizes.steps, 2)
    flops, peak = training_flops(network.config.transformer, batch.packed), peak_flops()
    more = {
        "rows": len(batch.packed.ids),
        "row_length": sizes.row_length,
        "tokens": batch.tokens,
        "attention": network.attention_backend,
        "optimizer": "Muon",
        "tokens_per_second": batch.tokens / seconds,
        "ms": 1e3 * seconds,
        "host_ms": 1e3 * host_seconds(step),
        "ready_s": ready,
        "memory_GB": peak_memory(),
    }
    if peak:
        return Figure(label, 100 * flops / seconds / peak, "% MFU", more)
    return Figure(label, flops / seconds / 1e12, "TFLOP/s", more)


def host_seconds(step: Callable[[], None]) -> float:
    """How long the host takes to hand a step to the card. Close to the step: the card waits."""
    synchronize()
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    synchronize()
    return seconds


def their_train(sizes: Sizes) -> Iterator[Figure]:
    """transformers' Qwen3 of the same size on as many tokens, causal, without a mask, compiled."""
    from transformers import Qwen3ForCausalLM

    network = sizes.network("large", torch.float32)
    batch = batch_of(sizes, network, sizes.rows_of("large"))
    ids = batch.packed.ids.to(sizes.device)
    labels = ids.masked_fill(batch.packed.documents.to(sizes.device) == 0, -100)
    flops = training_flops(network.config.transformer, batch.packed)
    with torch.device(sizes.device):
        theirs: Any = Qwen3ForCausalLM(their_config(network)).train()
    del network
    optimizer = torch.optim.AdamW(theirs.parameters(), 1e-4, fused=sizes.device == "cuda")
    if sizes.compiled:  # as ours: all layers as one would be compiled as one long function
        for layer in theirs.model.layers:
            layer.compile()

    def step() -> None:
        with torch.autocast(sizes.device, torch.bfloat16):
            loss = theirs(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds = seconds_of(step, sizes.steps)
    peak = peak_flops()
    more = {"size": "large", "optimizer": "AdamW", "ms": 1e3 * seconds}
    more["memory_GB"] = peak_memory()
    if peak:
        more["MFU by our count"] = 100 * flops / seconds / peak
    yield Figure("train/transformers", batch.tokens / seconds, "tokens/s", more)


def their_config(network: Any) -> Any:
    """The config of a Qwen3 of the same sizes."""
    from transformers import Qwen3Config

    c = network.config.transformer
    return Qwen3Config(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        head_dim=c.head_dim,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        intermediate_size=c.intermediate_size,
        tie_word_embeddings=c.tie_word_embeddings,
        max_position_embeddings=c.max_position_embeddings,
    )
