"""Collective operations of torch.distributed. Without a process group there is one rank."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from multimodal.torchrun import rank_and_world_size

Objects = TypeVar("Objects", dict[str, Any], list[Any])


@contextmanager
def process_group() -> Iterator[int]:
    """Connect the processes that torchrun started, over gloo, for results on the CPU.

    Yields:
        The rank of this process. 0 without torchrun.
    """
    if rank_and_world_size()[1] == 1:
        yield 0
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def global_sum(value: Tensor) -> Tensor:
    """The sum over all ranks, without a gradient."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def global_counts(counts: Sequence[int], device: torch.device) -> list[int]:
    """The sums over all ranks of numbers that each rank has on the host.

    One rank needs no device for that. Several wait for theirs.
    """
    if world_size() == 1:
        return list(counts)
    return [int(count) for count in global_sum(torch.tensor(counts, device=device)).tolist()]


def mean_over_ranks(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Average logged values over the ranks. The ranks must have equal shares of the batch.

    Args:
        parts: float[] by name. Of a name that starts with ``largest``, the maximum is taken.

    Returns:
        float32[] by name, detached, the same on all ranks.
    """
    values = torch.stack([value.detach().float() for value in parts.values()])
    largest = values.clone()
    if world_size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    means = global_sum(values) / world_size()
    return {
        name: (high if name.startswith("largest") else mean)
        for name, mean, high in zip(parts, means, largest, strict=True)
    }


def gather_objects(objects: Objects) -> Objects:
    """Merge a dictionary or a list of each rank, in the order of the ranks. All ranks get it."""
    if world_size() == 1:
        return objects
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, objects)
    if isinstance(objects, dict):
        return {key: value for part in parts for key, value in part.items()}
    return [item for part in parts for item in part]


def gather_with_gradients(local: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks, in the order of the ranks, with gradients.

    [B, ...] -> [ranks * B, ...]. B must be the same on all ranks.
    """
    if world_size() == 1:
        return local
    return _Gather.apply(local.contiguous())


class _Gather(torch.autograd.Function):
    """torch.distributed.nn has a deprecated one that permutes a transposed gradient on gloo
    (torch 2.15)."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.count = len(local)
        parts = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(parts, local)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # The loss of every rank depends on these rows, so sum over the ranks. A matrix product may
        # return a transposed gradient. Collectives read memory in order, so make it contiguous.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() * ctx.count :][: ctx.count]
