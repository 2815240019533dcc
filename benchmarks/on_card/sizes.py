"""The sizes that are measured, how time is taken, and the floors of a card."""

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from multimodal.devices import choose_device
from multimodal.model.layers.graphs import StepGraphs
from multimodal.model.layers.transformer import named_config
from multimodal.model.network import ModelConfig, MultimodalLM
from multimodal.model.vocabulary import Vocabulary
from multimodal.tokenizers.levels import Layout, Level

SMALL = 100e9  # bytes of a card: with less memory there are fewer rows
# Kernels by what they do, the first pattern that fits. On a CPU the names are those of operations.
# A kernel that inductor has fused names all of its operations, so what it is comes first.
GROUPS = (
    ("fused by the compiler", r"^triton_(poi|red|per)"),
    ("attention", r"flash|fmha|flex|attention|cudnn.*sdp|softmax"),
    ("products", r"gemm|cutlass|xmma|cublas|nvjet|::(mm|bmm|addmm|linear|matmul)$"),
    ("optimizer", r"adam|multi_tensor|foreach|norm_per_tensor"),
    ("copies and casts", r"memcpy|memset|copy|_to_copy|cast|::(to|cat|contiguous)$"),
    ("gather and scatter", r"index|gather|scatter|embedding|sort|scan"),
    ("reductions", r"reduce|norm|sum|argmax|logsumexp"),
    ("pointwise", r"elementwise|pointwise|triton|vectorized|::(mul|add|silu|where|exp)_?$"),
)


@dataclass(frozen=True)
class Figure:
    """One number that was measured; more: what belongs to it."""

    name: str
    value: float
    unit: str
    more: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """As a line of JSON. Numbers have four digits."""
        rounded = {key: _rounded(value) for key, value in self.more.items()}
        value = _rounded(self.value)
        return json.dumps({"figure": self.name, "value": value, "unit": self.unit, **rounded})


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Args:
        device: where.
        models: the size that has the place of a named one.
        text_size: ids of texts.
        codebook: codes of an image tokenizer.
        grid: codes of a side.
        rows: packed rows of a training step, of each model.
        text: tokens of a caption. With the codes of an image they fill a quarter of a row.
        steps: that are timed, after as many that are not.
        batches: rows of a decode step.
        prompt, tokens: of a decode step: those before it, and those that are timed.
        drawings, images: at once.
        product: rows and columns of the products that are the floor.
        compiled: whether layers and tokenizers are compiled too.
    """

    device: str
    models: dict[str, str]
    text_size: int
    codebook: int
    grid: int
    rows: dict[str, int]
    text: int
    steps: int
    batches: tuple[int, ...]
    prompt: int
    tokens: int
    drawings: int
    images: int
    product: int
    compiled: bool

    @property
    def row_length(self) -> int:
        return 4 * (self.grid**2 + self.text + 4)

    @property
    def layout(self) -> Layout:
        return Layout((Level("detail", self.grid, 1, self.codebook),))

    def network(self, name: str, dtype: torch.dtype) -> MultimodalLM:
        """A network of random weights, made where it stays."""
        vocabulary = Vocabulary(self.text_size, self.codebook)
        with torch.device(choose_device(self.device)):
            torch.manual_seed(0)
            transformer = named_config(self.models[name], vocabulary.size)
            config = ModelConfig(transformer, self.text_size, self.layout)
            return MultimodalLM(config).to(dtype)

    def rows_of(self, name: str) -> int:
        """The rows of a training step: three quarters on a card with less than SMALL."""
        whole = self.rows[name]
        if self.device != "cuda" or torch.cuda.get_device_properties().total_memory >= SMALL:
            return whole
        return 3 * whole // 4

    def graphs(self) -> StepGraphs:
        """CUDA graphs. On a CPU the same steps, not recorded."""
        return StepGraphs() if self.device == "cuda" else StepGraphs(lambda run: run)


CARD = Sizes(
    device="cuda",
    models={"large": "large", "1b": "1b"},
    text_size=32768,
    codebook=16384,
    grid=16,
    rows={"large": 48, "1b": 32},
    text=60,
    steps=8,
    batches=(1, 32, 128),
    prompt=300,
    tokens=64,
    drawings=32,
    images=64,
    product=8192,
    compiled=True,
)
TINY = Sizes(
    device="cpu",
    models={"large": "tiny", "1b": "tiny"},
    text_size=320,
    codebook=64,
    grid=4,
    rows={"large": 4, "1b": 4},
    text=12,
    steps=2,
    batches=(1, 3),
    prompt=20,
    tokens=4,
    drawings=2,
    images=2,
    product=64,
    compiled=False,
)


def synchronize() -> None:
    """Wait for the card, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], times: int, warm: int | None = None) -> float:
    """The mean time of a call. The card is not waited for between calls, as in use.

    warm: calls before, which are not timed. By default as many.
    """
    for _ in range(times if warm is None else warm):
        work()
    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        work()
    synchronize()
    return (time.perf_counter() - start) / times


def milliseconds_of(phases: dict[str, Callable[[], object]], times: int) -> dict[str, float]:
    """The mean time of each phase of a work that is done so many times, by events on the card."""
    marks = []
    for _ in range(times):
        marks.append([_now()])
        for phase in phases.values():
            phase()
            marks[-1].append(_now())
    synchronize()
    taken = dict.fromkeys(phases, 0.0)
    for moments in marks:
        for name, start, end in zip(phases, moments, moments[1:], strict=False):
            taken[name] += _between(start, end) / times
    return taken


def _now() -> Any:
    """This moment on the card, or on the host if there is no card."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    """Milliseconds."""
    return 1e3 * (end - start) if isinstance(start, float) else float(start.elapsed_time(end))


def floors(sizes: Sizes) -> Iterator[Figure]:
    """The fastest products and copies of this device."""
    yield Figure("floors/products", products_per_second(sizes) / 1e12, "TFLOP/s", {"dtype": "bf16"})
    yield Figure("floors/copies", bytes_per_second(sizes) / 1e9, "GB/s")


def products_per_second(sizes: Sizes) -> float:
    """FLOP/s of a square product in bf16."""
    n = sizes.product
    a, b = (torch.randn(n, n, device=sizes.device).bfloat16() for _ in range(2))
    return 2 * n**3 / seconds_of(lambda: a @ b, 10)


def bytes_per_second(sizes: Sizes) -> float:
    """Bytes that a copy reads and writes."""
    source = torch.zeros(4 * sizes.product**2, device=sizes.device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), 10)


def group_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    return next((g for g, pattern in GROUPS if re.search(pattern, kernel, re.I)), "other")


def kernels(work: Callable[[], object], times: int = 2) -> dict[str, Any]:
    """Where the time of a call goes, by groups of kernels, in ms.

    Returns:
        ``groups``: ms by group, the largest first. ``busy_ms``: their sum. ``wall_ms``: of a call
        while it is profiled. ``launches``: kernels. ``top``: the longest ones by name.
    """
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    work()
    synchronize()
    with profile(activities=activities) as profiled:
        start = time.perf_counter()
        for _ in range(times):
            work()
        synchronize()
        wall = time.perf_counter() - start
    found: dict[str, tuple[float, int]] = {}
    for event in profiled.key_averages():
        on_card = torch.cuda.is_available()
        if on_card and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        if event.is_user_annotation:  # it lasts as long as the kernels in it
            continue
        taken = event.self_device_time_total if on_card else event.self_cpu_time_total
        if taken:
            found[event.key] = (taken / 1e3 / times, event.count // times)
    groups: dict[str, float] = {}
    for name, (taken, _) in found.items():
        group = group_of(name)
        groups[group] = groups.get(group, 0.0) + taken
    top = sorted(found.items(), key=lambda item: -item[1][0])[:8]
    return {
        "groups": dict(sorted(groups.items(), key=lambda item: -item[1])),
        "busy_ms": sum(groups.values()),
        "wall_ms": 1e3 * wall / times,
        "launches": sum(count for _, count in found.values()),
        "top": {name[:90]: taken for name, (taken, _) in top},
    }
