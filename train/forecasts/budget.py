"""The memory of a training step on graphics cards that are not here, computed in one process.

Weights, gradients and optimizer states are counted from the shapes of a network without storage
(``meta``). What a layer keeps for its gradients is counted by running two real layers on tensors
that have a shape and no memory (``FakeTensorMode``): each storage is entered when an operation
makes it, and struck out when it is freed. So a change of a layer changes the count, too.

Shapes: R rows, L tokens of a row, D width, V vocabulary, N ranks.
"""

import math
import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.optim.muon import Muon
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from multimodal.adapters.lora import adapter_parts
from multimodal.model.head_loss import slice_size
from multimodal.model.layers.attention import Backend
from multimodal.model.layers.transformer import ALL, Layer, TransformerConfig
from multimodal.model.network import MultimodalLM
from multimodal.train.optim import muon

FLOAT, HALF = 4, 2  # bytes of a float32, and of a bfloat16
PACKED = 8  # int64[R, L] of a batch (``Packed``)
UPDATE = 4  # float32 copies of a matrix in a step of Muon, whole ones on each rank
Strategy = Literal["one", "ddp", "fsdp"]


@dataclass(frozen=True)
class Step:
    """What decides the memory of a step, beside the network.

    Args:
        rows: R of one rank, of one forward pass.
        row_length: L.
        ranks: N.
        strategy: ``one`` rank alone, ``ddp`` (all of the model on each), or ``fsdp`` (a part).
        device: ``cuda`` or ``cpu``. They differ in their kernels of attention and norms.
        bfloat16: products in bfloat16 (bf16-mixed).
        recompute: how many layers compute their activations again.
        attention, compiled, dropout: as of ``JointModule``.
        images: bytes of the frozen image tokenizer, which each rank has.
    """

    rows: int
    row_length: int
    ranks: int = 1
    strategy: Strategy = "one"
    device: Literal["cuda", "cpu"] = "cuda"
    bfloat16: bool = True
    recompute: int = 0
    attention: Backend = "sdpa"
    compiled: bool = False
    dropout: float = 0.0
    images: int = 0

    @property
    def parts(self) -> int:
        """How many ranks a weight is divided among."""
        return self.ranks if self.strategy == "fsdp" else 1


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        weights, gradients, optimizer: the part of each that this rank has.
        images: the frozen image tokenizer.
        activations: what all layers keep for the backward pass.
        phases: what each phase of a step needs beside weights, optimizer and images.
        exchanged: what each rank sends in a step.
    """

    weights: int
    gradients: int
    optimizer: int
    images: int
    activations: int
    phases: dict[str, int]
    exchanged: int

    @property
    def peak(self) -> int:
        return self.weights + self.optimizer + self.images + max(self.phases.values())


def optimizer_of(network: MultimodalLM) -> Muon:
    """The optimizer of ``JointModule``: which parameters Muon trains, and which AdamW."""
    return muon(network, adapter_parts(network.transformer), 1e-3, 0.1)


def step_memory(network: MultimodalLM, step: Step) -> Memory:
    """Compute the memory of a step of training with Muon.

    Args:
        network: on ``meta``. Parameters that are not trained do not require gradients.
        step: how it is trained.
    """
    config, parts = network.config.transformer, step.parts
    groups = optimizer_of(network).param_groups
    by_muon = [p for group in groups if not group.get("use_fallback") for p in group["params"]]
    by_adamw = [p for group in groups if group.get("use_fallback") for p in group["params"]]
    layers = [sum(p.numel() for p in layer.parameters()) for layer in network.transformer.layers]
    root, largest = sum(p.numel() for p in network.parameters()) - sum(layers), max(layers)
    gradients = FLOAT * sum(_part(p, parts) for p in by_muon + by_adamw)
    gathered, exchanged = [0, 0, 0], 0
    if step.strategy == "fsdp":
        # Whole weights: the root's, a layer's, and the next one's in its buffer. Going back also
        # the layer's gradients, once more in the buffer that is summed. At the end the root's.
        counts = (root + 2 * largest, root + 4 * largest, 3 * root + 2 * largest)
        gathered = [FLOAT * count for count in counts]
        exchanged = round(FLOAT * (3 * sum(layers) + 2 * root) * (parts - 1) / parts)
    elif step.strategy == "ddp":
        gathered = [gradients] * 3  # the reducer's buckets
        exchanged = round(2 * gradients * (step.ranks - 1) / step.ranks)
    fixed, layer, transient, casts = _activations(config, step)
    # A layer that computes again keeps what enters it. Its turn comes when those above, which do
    # not, have freed what they kept, so only if there are none it counts as a whole one beside.
    entering = FLOAT * step.rows * step.row_length * config.hidden_size
    activations = fixed + (len(layers) - step.recompute) * layer + step.recompute * entering
    transient += layer if step.recompute == len(layers) else 0
    casts *= step.recompute  # autocast keeps what it cast until the end of the forward pass
    kind = HALF if step.bfloat16 else FLOAT
    positions = step.rows * step.row_length
    states = positions * config.hidden_size
    table = config.vocab_size * config.hidden_size
    logits = min(slice_size(step.device), positions * config.vocab_size)
    # Logits, and a copy of them or the product that is added to the gradient of the head.
    sliced = FLOAT * (logits + (logits if step.bfloat16 else max(logits, table)))
    cast = table * HALF if step.bfloat16 else 0
    head = states * (2 * FLOAT + 2 * kind) + table * FLOAT + sliced + cast
    return Memory(
        weights=sum(p.element_size() * _part(p, parts) for p in network.parameters()),
        gradients=gradients,
        optimizer=FLOAT * sum(_part(p, parts) for p in by_muon + 2 * by_adamw),
        images=step.images,
        activations=activations + casts,
        phases={
            "loss": gathered[0] + activations + casts + head,
            # The gradients of the head: kept since the loss, scaled, and as its parameter's.
            "backward": gathered[1]
            + activations
            + states * (FLOAT + kind)
            + 3 * table * FLOAT
            + transient,
            "end of backward": gathered[2] + gradients + transient + table * FLOAT,
            "update": gradients + UPDATE * FLOAT * max((p.numel() for p in by_muon), default=0),
        },
        exchanged=exchanged,
    )


def _part(parameter: Tensor, parts: int) -> int:
    """How many numbers of a parameter the first rank has: FSDP2 divides the first dimension."""
    if parameter.ndim == 0:
        return 1
    return math.ceil(parameter.shape[0] / parts) * parameter[0].numel()


def _activations(config: TransformerConfig, step: Step) -> tuple[int, int, int, int]:
    """Bytes that are kept: before the first layer, by each layer; what a layer needs beside going
    back; and the weights that a layer has cast."""
    card: AbstractContextManager[Any]
    card = GraphicsCard(step.attention) if step.device == "cuda" else nullcontext()
    numbers = range(config.num_hidden_layers)[-2:]
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=step.bfloat16):
        layers = nn.ModuleList(Layer(config, number) for number in numbers).train()
        gradients = FLOAT * sum(p.numel() for p in layers[-1].parameters())
        with Live(layers) as live, card:
            ids = torch.zeros(step.rows, step.row_length, dtype=torch.int64)
            packed = [torch.zeros_like(ids) for _ in range(PACKED)]
            angles = config.rope.angles(ids)
            x = torch.zeros(*ids.shape, config.hidden_size).requires_grad_()
            mask = torch.zeros(step.rows, 1, *[step.row_length] * 2, dtype=torch.bool)
            kept = [live.bytes]
            for layer in layers:
                x, _ = layer(x, angles, mask, None, 0, ALL, step.dropout)
                kept.append(live.kept(step.compiled))
            casts = live.casts_of(layers[-1])
            before = live.peak = live.bytes
            x.sum().backward()  # type: ignore[no-untyped-call]
            del x, packed
    of_layer, transient = kept[-1] - kept[-2], max(0, live.peak - before - gradients)
    return kept[0], of_layer, transient, casts


@dataclass(eq=False)
class _Storage:
    """bytes; how: the operation that made it; source: the storage that it was cast from."""

    bytes: int
    how: str = ""
    source: "_Storage | None" = None


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations made and that are still there.

    Attributes:
        bytes: that are there now.
        peak: the most so far.
    """

    def __init__(self, module: nn.Module) -> None:
        """module: its parameters are not counted, but their casts are."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: dict[int, _Storage] = {}
        self.parameters = {_key(p): _Storage(p.nbytes) for p in module.parameters()}
        self.bytes = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name, source = func._schema.name, None
        if name == "aten::_to_copy":
            source = self._find(args[0])
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and self._find(tensor) is None:
                storage = tensor.untyped_storage()
                made = _Storage(storage.nbytes(), name, source)
                self.storages[_key(tensor)] = made
                self.bytes += made.bytes
                weakref.finalize(storage, self._free, _key(tensor))
        self.peak = max(self.peak, self.bytes)
        return out

    def _find(self, tensor: Tensor) -> _Storage | None:
        key = _key(tensor)
        return self.storages.get(key) or self.parameters.get(key)

    def _free(self, key: int) -> None:
        self.bytes -= self.storages.pop(key).bytes

    def casts_of(self, module: nn.Module) -> int:
        """Bytes of the parameters of a module that are there in another dtype, too."""
        own = [self.parameters[_key(parameter)] for parameter in module.parameters()]
        return sum(made.bytes for made in self.storages.values() if made.source in own)

    def kept(self, compiled: bool) -> int:
        """Bytes that are there now, or that a compiler would keep of them.

        It computes casts and activation functions again: of a tensor and its casts the shorter one
        stays, once for all that read it.
        """
        if not compiled:
            return self.bytes
        stay = [made for made in self.storages.values() if made.how != "aten::silu"]
        sources = {made.source: min(made.bytes, made.source.bytes) for made in stay if made.source}
        return sum(sources.values()) + sum(made.bytes for made in stay if made.source is None)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class GraphicsCard(TorchFunctionMode):
    """The kernels of a graphics card on tensors without memory: what they keep, not what they say.

    Attention is one kernel that keeps no scores, a norm one that keeps its input.

    Args:
        backend: ``flex`` reads shared keys and values as they are, ``sdpa`` repeats them, and has
            the mask once more as numbers.
    """

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.backend = backend

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__self__", None) is Tensor.is_cpu:
            return False
        if func is Tensor.repeat_interleave and self.backend == "flex":
            return args[0]
        if func is F.scaled_dot_product_attention:
            mask = kwargs["attn_mask"].to(args[0].dtype) if self.backend == "sdpa" else None
            return _FusedAttention.apply(*args, mask)
        if func is F.rms_norm:
            return _FusedNorm.apply(args[0], kwargs["weight"] if "weight" in kwargs else args[2])
        return func(*args, **kwargs)


class _FusedAttention(torch.autograd.Function):
    """Keeps what FlashAttention keeps: queries, keys, values, result, and a number of each row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_like(q)
        normalizer = torch.empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, normalizer, mask)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
