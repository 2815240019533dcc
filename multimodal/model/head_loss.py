"""The head and the cross-entropy in one, a slice of the positions at a time.

All logits of a batch, N x V in fp32, are often the largest tensor of a training step. Here a slice
of them is made, turned into losses and at once into gradients, and forgotten: what each position
weighs in the loss is known beforehand, so its gradient needs nothing from backward. (Hsu et al.
2024, arXiv:2410.10989, do so on GPUs.)

Label smoothing (Szegedy et al. 2015, arXiv:1512.00567) needs no pass over the logits: the mean of
the logits of some ids is the state times the mean of their rows of the head.

Shapes: N positions, D width, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

SLICE = 1 << 24  # logits in memory at a time: 64 MiB in fp32, and some copies of them
CUDA_SLICE = 1 << 27  # on a graphics card, which would wait for small products and their launches


class HeadLosses(NamedTuple):
    """What ``head_losses`` returns.

    total: float32[], the only field with a gradient.
    nll: float32[N], minus the log-likelihood of each target, without smoothing.
    log_z: float32[N].
    largest: float32[N], the largest logit.
    state_grad_norm_sq: float32[N], the squared norm of the gradient of each hidden state, 0 where
        no gradient is computed.
    """

    total: Tensor
    nll: Tensor
    log_z: Tensor
    largest: Tensor
    state_grad_norm_sq: Tensor


def slice_size(device: str) -> int:
    """How many logits are in memory at a time on a type of device."""
    return CUDA_SLICE if device == "cuda" else SLICE


def head_losses(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    z_weights: Tensor,
    smoothing: Tensor | None = None,
    smoothed_ids: int = 1,
) -> HeadLosses:
    """sum over positions of weights * loss + z_weights * log_z^2, of logits = hidden @ head.T

    The loss is nll, or with smoothing s

        (1 - s) * nll + s * the mean over the first smoothed_ids ids of minus their log-likelihood

    hidden: float[N, D]; head: float[V, D]; targets: int64[N]; weights, z_weights: float32[N];
    smoothing: float32[N] in [0, 1). The product is in autocast's precision where that is on, all
    else in fp32.
    """
    device = hidden.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    learns = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    smoothing = torch.zeros_like(weights) if smoothing is None else smoothing
    found: tuple[Tensor, ...] = _HeadLosses.apply(
        hidden, head, targets, weights, z_weights, smoothing, smoothed_ids, kind, learns
    )
    return HeadLosses(*found)


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        z_weights: Tensor,
        smoothing: Tensor,
        smoothed_ids: int,
        kind: torch.dtype,
        learns: bool,
    ) -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            read, matrix = hidden.to(kind), head.to(kind)
            size = max(1, slice_size(hidden.device.type) // len(head))
            # Weights are like 1 / tokens: in fp16 products with them would vanish, so they are
            # brought to 1 for the products, and back with the factor of the whole loss.
            unit = (
                torch.maximum(weights.abs(), z_weights.abs()).amax().clamp(min=1e-30)
                if len(weights)
                else weights.new_ones(())
            )
            of_hidden = torch.empty_like(read) if learns else None
            of_head = None  # a frozen head needs none
            if learns and ctx.needs_input_grad[1]:
                of_head = torch.zeros_like(matrix, dtype=torch.float32)
            nll, log_z, largest, state_grad_norm_sq = (
                hidden.new_zeros(len(hidden), dtype=torch.float32) for _ in range(4)
            )
            mean_row = matrix[:smoothed_ids].float().mean(0)
            smoothed = weights * smoothing / unit
            for start in range(0, len(hidden), size):
                here = slice(start, start + size)
                logits = (read[here] @ matrix.T).float()
                rows = torch.arange(len(logits), device=logits.device)
                largest[here] = logits.amax(-1)
                log_z[here] = z = logits.logsumexp(-1)
                nll[here] = z - logits[rows, targets[here]]
                if of_hidden is None:
                    continue
                slope = (weights[here] + 2 * z_weights[here] * z) / unit
                gradient = logits.sub_(z[:, None]).exp_().mul_(slope[:, None])
                gradient[rows, targets[here]] -= weights[here] / unit - smoothed[here]
                gradient = gradient.to(kind)
                of_hidden[here] = gradient @ matrix - (smoothed[here, None] * mean_row).to(kind)
                state_grad_norm_sq[here] = (of_hidden[here].float() * unit).square().sum(-1)
                if of_head is not None:
                    of_head += gradient.T @ read[here]
                del logits, gradient  # before there are those of the next slice
            if of_head is not None:
                of_head[:smoothed_ids] -= smoothed @ read.float() / smoothed_ids
            uniform = log_z - read.float() @ mean_row
            losses = nll + smoothing * (uniform - nll)
            total = (weights * losses + z_weights * log_z.square()).sum()
        if of_hidden is not None:
            ctx.save_for_backward(of_hidden, of_head, unit)
            ctx.types = hidden.dtype, head.dtype
        ctx.mark_non_differentiable(nll, log_z, largest, state_grad_norm_sq)
        return total, nll, log_z, largest, state_grad_norm_sq

    @staticmethod
    def backward(ctx: Any, of_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_head, unit = ctx.saved_tensors
        hidden, head = ctx.types
        factor = of_total.float() * unit
        return (
            (factor * of_hidden.float()).to(hidden),
            None if of_head is None else (factor * of_head).to(head),
            *[None] * 7,
        )
