"""The cost of a training step: floating-point operations and memory."""

import re
import resource
import sys
from collections.abc import Iterator

import torch
from timm.optim.muon import Muon

from multimodal.model.layers.transformer import TransformerConfig
from multimodal.model.sequences import NO_LOSS, Packed

# Dense bf16 TFLOP/s by the name of the device in torch, from the data sheets.
PEAKS = {
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
}


def recomputed_layers(recompute: bool | int, layers: int) -> int:
    """How many of so many layers compute their activations again: all (True), none, or a number.

    Raises:
        ValueError: for a number that they do not have.
    """
    count = layers if recompute is True else int(recompute)
    if not 0 <= count <= layers:
        raise ValueError(f"recompute={recompute}: expected true, false, or 0 to {layers} layers")
    return count


def layer_parameters(config: TransformerConfig) -> int:
    """Number of parameters in the matrices of all layers, of experts those that a token has."""
    heads, experts = config.num_attention_heads + config.num_key_value_heads, config.experts
    layers, width = config.num_hidden_layers, config.hidden_size
    attention = 2 * layers * width * heads * config.head_dim
    if experts is None:
        return attention + layers * 3 * width * config.intermediate_size
    assert experts.moe_intermediate_size is not None
    dense = len(experts.mlp_only_layers)
    sparse = 3 * experts.num_experts_per_tok * experts.moe_intermediate_size + experts.num_experts
    return attention + width * (dense * 3 * config.intermediate_size + (layers - dense) * sparse)


def training_flops(config: TransformerConfig, packed: Packed) -> float:
    """Floating-point operations of a training step: matrix products, backward twice the forward.

    After PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B). Unlike PaLM, attention counts
    only the pairs that the mask allows, the head only positions with a target, and padding nothing.
    """
    tokens, in_branch = packed.documents > 0, packed.branches > 0
    # A token sees itself and the tokens before it in its trunk or branch. A branch sees its trunk
    # too. In a block a token sees all tokens.
    parts = packed.document_numbers * packed.ids.numel() + packed.branches
    sizes = torch.unique_consecutive(parts[tokens], return_counts=True)[1].double()
    trunks = packed.count(tokens & ~in_branch)[packed.document_numbers[in_branch]]
    blocks = packed.count(packed.blocks > 0).double()
    pairs = float(
        (sizes * (sizes + 1) / 2).sum() + trunks.sum() + (blocks * (blocks - 1) / 2).sum()
    )
    attention = 2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * pairs
    layers = layer_parameters(config) * float(tokens.sum())
    targets = float((packed.objectives != NO_LOSS).sum())
    head = config.hidden_size * config.vocab_size * targets
    return 3 * 2 * (layers + attention + head)


def _iterations(optimizer: Muon) -> Iterator[tuple[int, int, int]]:
    """Of each matrix of Muon: the steps of Newton and Schulz, the short and the long side."""
    for group in optimizer.param_groups:
        for matrix in () if group.get("use_fallback") else group["params"]:
            rows, columns = matrix.flatten(1).shape
            yield group["ns_steps"], min(rows, columns), max(rows, columns)


def muon_flops(optimizer: Muon, parts: int = 1) -> float:
    """Floating-point operations of an update by Muon, on each rank.

    A matrix has three products a step: s x l x s, s x s x s and s x s x l.

    Args:
        parts: ranks that have a part of each matrix (FSDP2). They share the products with l.
    """
    return sum(
        steps * 2 * short**2 * (2 * long / parts + short)
        for steps, short, long in _iterations(optimizer)
    )


def muon_bytes(optimizer: Muon, parts: int) -> float:
    """Bytes that each rank sends in an update by Muon of parts of matrices (FSDP2).

    In a step, in bfloat16, an s x s is summed for all ranks, and an s x s and an s x l for the one
    that has the part. So it is for the matrices of ``7b`` from 8 ranks on, in torch 2.15.
    """
    numbers = sum(
        steps * (3 * short**2 + short * long) for steps, short, long in _iterations(optimizer)
    )
    return 2 * numbers * (parts - 1) / parts


def peak_flops() -> float | None:
    """Peak FLOP/s of the GPU in use. None for an unknown GPU, and on a CPU."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next(
        (1e12 * peak for kind, peak in PEAKS.items() if re.search(rf"\b{kind}\b", name)), None
    )


def peak_memory() -> float:
    """Peak memory in GB (1e9 bytes), of the GPU if it was used, else of this process."""
    if torch.cuda.is_available() and (used := torch.cuda.max_memory_allocated()):
        return used / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
