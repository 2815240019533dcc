"""Weights of 8 or 4 bits: how they are rounded, how they are stored, and layers that read them.

A matrix is int8 numbers and a scale for each row. A product with it rounds each row of its input
to int8, too, and is then a product of integers (LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339,
has the same two scales). So a row gives the same numbers alone and among others. A table of
embeddings, and the head, have a scale for each column, too: few columns are much larger than the
others (as in SmoothQuant, Xiao et al. 2022, arXiv:2211.10438, but of weights). Their input is
rounded twice.

With 4 bits, groups of 64 numbers of a row (of 32 where 64 does not divide it) share a step and an
offset, both small integers: a weight is (n - offset) * step, with n from 0 to 15, cut to int8. So
it is an int8 number exactly (QServe's progressive groups, Lin et al. 2024, arXiv:2405.04532), and 4
bits are a way to store 8: half the file, and in memory the same layers with the same speed. Tables
and the projections of embeddings keep 8 bits. If it is known what a matrix reads, its columns are
rounded one after the other, and those that are left make up for what the product has lost (GPTQ,
Frantar et al. 2023, arXiv:2210.17323).

Shapes: B rows of an input, K its width, N width of the output, V vocabulary.
"""

from collections.abc import Collection, Mapping
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from multimodal.model.layers.experts import Router
from multimodal.model.layers.mlp import MAX_STATIC_ROWS

GROUP_SIZES = (64, 32)  # numbers of a row with one step and one offset: the first that fits
LEVELS = 16  # of 4 bits
MAX_INT8 = 127
REST = 2 * MAX_INT8  # brings what rounding leaves, -1/2 to 1/2, to int8
# Without these instructions a product of integers is slower than one of floats, and may overflow.
INTEGER_PRODUCTS = bool(getattr(torch.cpu, "_is_vnni_supported", bool)())
# The tensors of a quantized matrix: its integers; float[N] and, of a table, float[K]; and on disk,
# with 4 bits, a step and an offset for each group, uint8[N, groups].
WEIGHT, SCALE, COLUMNS, GROUPS = ".weight", ".scale", ".columns", ".groups"
DAMPING = 0.01  # of the mean of the moments' diagonal, added to it, as in GPTQ
BLOCK = 64  # columns that are rounded before the rest makes up for them


def quantize_rows(
    weight: Tensor, bits: int, moments: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round a matrix.

    Args:
        weight: float[N, K].
        bits: 8 or 4. For 4, K is a multiple of 32.
        moments: float[K, K], the mean (or sum) of x x^T of what the matrix reads. With 4 bits the
            error of the products with such x is made small, and not that of the weights.

    Returns:
        int8[N, K] in [-127, 127], and the scale of each row, float32[N], a number of bfloat16: it
        stays the same in a network of bfloat16.
    """
    scale = (weight.float().abs().amax(1) / MAX_INT8).clamp(min=1e-30).bfloat16().float()
    scaled = (weight.float() / scale[:, None]).clamp(-MAX_INT8, MAX_INT8)
    if bits == 4:
        packed, groups = _pack(scaled)
        if moments is None or not moments.any():
            return _unpack(packed, groups), scale
        return _with_feedback(scaled, groups, moments), scale
    return scaled.round().to(torch.int8), scale


def _pack(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to 4 bits: each group takes the step with the least squared error, and of the two
    offsets that put its numbers in the middle the better one.

    Numbers that were packed before come back exactly: their own step has no error.

    Args:
        scaled: [N, K], float or int8, in [-127, 127].

    Returns:
        The numbers n, two in a byte, uint8[N, K / 2]; and of each group 16 * (step - 1) + offset,
        uint8[N, groups].
    """
    width = scaled.shape[1]
    size = next((size for size in GROUP_SIZES if width % size == 0), None)
    if size is None:
        raise ValueError(
            f"a matrix is {width} numbers wide: 4 bits need a multiple of {GROUP_SIZES[-1]}"
        )
    if scaled.is_meta:  # shapes alone; the search below takes seconds to find them
        return scaled[:, ::2].to(torch.uint8), scaled[:, ::size].to(torch.uint8)
    groups = rearrange(scaled.float(), "n (g k) -> n g k", k=size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    best = torch.full_like(low, torch.inf)
    numbers, about = torch.zeros_like(groups), torch.zeros_like(low)
    for step, shift in product(range(1, LEVELS + 1), (0, 1)):
        ends = (low / step).round() + (high / step).round()
        offset = ((LEVELS - 1 - ends) / 2 + shift).floor().clamp(0, LEVELS - 1)
        n = ((groups / step).round() + offset).clamp(0, LEVELS - 1)
        unpacked = ((n - offset) * step).clamp(-MAX_INT8, MAX_INT8)
        error = (unpacked - groups).square().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        numbers = torch.where(better, n, numbers)
        about = torch.where(better, LEVELS * (step - 1) + offset, about)
    pairs = rearrange(numbers.to(torch.uint8), "n g (k two) -> n (g k) two", two=2)
    return pairs[..., 0] + LEVELS * pairs[..., 1], about[..., 0].to(torch.uint8)


def _with_feedback(scaled: Tensor, groups: Tensor, moments: Tensor) -> Tensor:
    """Round columns in the order of what they read, largest first: the rest make up for each.

    Args:
        scaled: float[N, K] in [-127, 127].
        groups: uint8[N, groups], of ``_pack``: the steps and offsets are fixed.
        moments: float[K, K], not all zero.

    Returns:
        int8[N, K], numbers that ``_pack`` gives back exactly.
    """
    width = scaled.shape[1]
    each = groups.repeat_interleave(width // groups.shape[1], 1)
    step, offset = (each // LEVELS + 1).float(), (each % LEVELS).float()
    curvature = moments.double()
    diagonal = curvature.diagonal()
    curvature = curvature + DAMPING * diagonal.mean() * torch.eye(width, device=moments.device)
    order = diagonal.argsort(descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(curvature[order][:, order]))
    feedback = torch.linalg.cholesky(inverse, upper=True).float()
    left, rounded = scaled[:, order], torch.empty_like(scaled)
    for start in range(0, width, BLOCK):
        block = range(start, min(start + BLOCK, width))
        errors = torch.zeros(len(scaled), len(block), device=scaled.device)
        for place, column in enumerate(block):
            own, wanted = order[column], left[:, column]
            n = (wanted.clamp(-MAX_INT8, MAX_INT8) / step[:, own]).round() + offset[:, own]
            number = (n.clamp(0, LEVELS - 1) - offset[:, own]) * step[:, own]
            rounded[:, own] = number.clamp(-MAX_INT8, MAX_INT8)
            error = (wanted - rounded[:, own]) / feedback[column, column]
            later = slice(column + 1, block.stop)
            left[:, later] -= error[:, None] * feedback[column, later]
            errors[:, place] = error
        left[:, block.stop :] -= errors @ feedback[block.start : block.stop, block.stop :]
    return rounded.to(torch.int8)


def _unpack(packed: Tensor, about: Tensor) -> Tensor:
    """The reverse of ``_pack``: int8[N, K]."""
    numbers = torch.stack([packed % LEVELS, packed // LEVELS], -1).to(torch.int16)
    numbers = rearrange(numbers, "n (g k) two -> n g (k two)", g=about.shape[1])
    step, offset = (about // LEVELS + 1).to(torch.int16), (about % LEVELS).to(torch.int16)
    weights = (numbers - offset[..., None]) * step[..., None]
    return rearrange(weights, "n g k -> n (g k)").clamp(-MAX_INT8, MAX_INT8).to(torch.int8)


def stored_weights(state: Mapping[str, Tensor], bits: int | None) -> dict[str, Tensor]:
    """Weights by name as a file has them: int8 matrices are packed if there are 4 bits.

    Raises:
        ValueError: for 4 bits, if the width of a matrix is no multiple of 32.
    """
    stored = dict(state)
    for name in _packed(state, bits):
        stored[name + WEIGHT], stored[name + GROUPS] = _pack(state[name + WEIGHT])
    return stored


def read_weights(stored: Mapping[str, Tensor], bits: int | None) -> dict[str, Tensor]:
    """The reverse of ``stored_weights``."""
    state = dict(stored)
    for name in _packed(stored, bits):
        packed, groups = (state.pop(name + part).to(torch.uint8) for part in (WEIGHT, GROUPS))
        state[name + WEIGHT] = _unpack(packed, groups)
    return state


def dequantized(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by name with float32 matrices for those of integers, and without scales."""
    floats = dict(state)
    for name in quantized_names(state):
        scale, columns = floats.pop(name + SCALE), floats.pop(name + COLUMNS, None)
        floats[name + WEIGHT] = _matrix(floats[name + WEIGHT], scale, columns)
    return floats


def _matrix(weight: Tensor, scale: Tensor, columns: Tensor | None) -> Tensor:
    """The matrix that integers and scales stand for: float32[N, K]."""
    matrix = weight.float().mul_(scale.float()[:, None])
    return matrix if columns is None else matrix.mul_(columns.float())


def quantized(
    state: Mapping[str, Tensor], like: Mapping[str, Tensor], bits: int
) -> dict[str, Tensor]:
    """The reverse of ``dequantized``.

    Args:
        state: weights by name, floats.
        like: those of the same module with quantized layers.
        bits: 8 or 4.
    """
    smaller = dict(state)
    packed = _packed(like, bits)
    for name in quantized_names(like):
        weight = state[name + WEIGHT].float()
        if name + COLUMNS in like:
            columns = weight.abs().amax(0).clamp(min=1e-30).bfloat16().float()
            smaller[name + COLUMNS], weight = columns, weight / columns
        integers, scale = quantize_rows(weight, 4 if name in packed else 8)
        smaller[name + WEIGHT], smaller[name + SCALE] = integers, scale
    return smaller


def quantized_names(state: Mapping[str, Tensor]) -> list[str]:
    """The names of quantized layers."""
    return [name.removesuffix(SCALE) for name in state if name.endswith(SCALE)]


def _packed(state: Mapping[str, Tensor], bits: int | None) -> list[str]:
    """The names of the layers that have 4 bits: all but tables, if there are any."""
    names = quantized_names(state) if bits == 4 else []
    return [name for name in names if name + COLUMNS not in state]


class _FloatProduct(torch.autograd.Function):
    """x W^T, float[B, K] -> float[B, N], of integers that are floats only while it computes.

    Autograd would keep the floats of all layers until the backward pass, four times the integers.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None


def int8_product(
    x: Tensor, weight: Tensor, scale: Tensor, finely: bool = False, rounds: bool = True
) -> Tensor:
    """x times a quantized matrix, float[B, K] -> float32[B, N].

    On a CPU with instructions for it (VNNI), rows of x are rounded to int8: products of integers
    are exact, and two to three times as fast as in bfloat16. Elsewhere, and where a gradient is
    needed, the weights become floats.

    Args:
        x: float[B, K].
        weight: int8[N, K].
        scale: float[N].
        finely: round x to int8, and what is left of it again. The last states have few columns
            much larger than the others, and rounded once they are most of the loss of int8.
        rounds: False: x is never rounded.
    """
    if torch.compiler.is_compiling() and not x.is_cuda and len(x) <= MAX_STATIC_ROWS:
        return (x[:, None].float() * weight.float()).sum(-1) * scale.float()
    learns = x.requires_grad and torch.is_grad_enabled()
    if learns or not rounds or not x.is_cpu or not INTEGER_PRODUCTS:
        product: Tensor = _FloatProduct.apply(x, weight)
        return product.float() * scale.float()
    rows = x.float()
    # torch's norm over a dimension takes longer than the product.
    steps = MAX_INT8 / rows.abs().amax(-1, keepdim=True).clamp_(min=1e-30)
    scaled = rows * steps
    rounded = scaled.round()
    if finely:
        rounded = torch.cat([rounded, ((scaled - rounded) * REST).round_()])
    products = torch._int_mm(rounded.to(torch.int8), weight.t())
    if finely:
        coarse, rest = products.float().chunk(2)
        products = coarse.add_(rest, alpha=1 / REST)
    return (products * scale.float()).div_(steps)


class QuantizedLinear(nn.Module):
    """``nn.Linear`` with int8 weights: float[..., K] -> float[..., N].

    Args:
        columns: with a scale for each column, too.

    Attributes:
        rounds: whether its input may be rounded. In training it is not, see ``round_no_inputs``.
    """

    rounds = True

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, columns: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = _frozen(torch.zeros(out_features, in_features, dtype=torch.int8))
        self.scale = _frozen(torch.ones(out_features))
        self.bias = _frozen(torch.zeros(out_features)) if bias else None
        self.columns = _frozen(torch.ones(in_features)) if columns else None

    def forward(self, x: Tensor, ids: slice = slice(None)) -> Tensor:
        """The outputs of some rows of the matrix, all by default."""
        rows = x.flatten(0, -2)
        if self.columns is not None:
            rows = rows * self.columns
        table = self.columns is not None
        product = int8_product(rows, self.weight[ids], self.scale[ids], table, self.rounds)
        if self.bias is not None:
            product = product + self.bias[ids].float()
        return product.to(x.dtype).view(*x.shape[:-1], product.shape[-1])

    def matrix(self) -> Tensor:
        """The weights as floats, made anew: float[N, K], in the dtype of the scales."""
        return _matrix(self.weight, self.scale, self.columns).to(self.scale.dtype)


class QuantizedEmbedding(nn.Module):
    """``nn.Embedding`` with int8 weights: int64[...] -> float[..., K], in the dtype of its scales.

    A tied head has the same tensors.
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = _frozen(torch.zeros(rows, width, dtype=torch.int8))
        self.scale = _frozen(torch.ones(rows))
        self.columns = _frozen(torch.ones(width))

    def forward(self, ids: Tensor) -> Tensor:
        scale = self.scale[ids][..., None]
        return self.weight[ids].to(scale.dtype) * scale * self.columns


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def round_no_inputs(module: nn.Module) -> None:
    """Have the quantized layers of a module compute the same with and without gradients.

    An adapter is trained on what they compute, and its reference is computed without gradients.
    """
    for layer in module.modules():
        if isinstance(layer, QuantizedLinear):
            layer.rounds = False


def with_quantized_layers(module: nn.Module, tables: Collection[str] = ()) -> None:
    """Put quantized layers, all zeros, in the place of all linear layers and embeddings.

    Routers stay: they are small, and a rounded one would choose other experts.

    Layers that shared a weight share it again.

    Args:
        tables: names of the linear layers that have a scale for each column, too.
    """
    made: dict[int, QuantizedLinear | QuantizedEmbedding] = {}
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear | nn.Embedding) or isinstance(child, Router):
                continue
            rows, width = child.weight.shape
            new: QuantizedLinear | QuantizedEmbedding
            if isinstance(child, nn.Linear):
                new = QuantizedLinear(width, rows, child.bias is not None, name in tables)
            else:
                new = QuantizedEmbedding(rows, width)
            if (first := made.setdefault(id(child.weight), new)) is not new:
                new.weight, new.scale, new.columns = first.weight, first.scale, first.columns
            setattr(parent, name, new)
