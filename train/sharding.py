"""A joint model over several GPUs (FSDP2, torch.distributed.fsdp.fully_shard).

Each layer is a group of its own; embedding, final norm, head and the projections of alignment are
one with the model, whose ``forward`` computes the losses: a head in another group would be handed
sharded weights there. The frozen image tokenizer is whole on every rank, and so are the scalars of
alignment, which cannot be sharded: their gradients are averaged here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from multimodal.distributed import global_sum, world_size
from multimodal.model.network import Multimodal


def shard(model: Multimodal, mesh: DeviceMesh) -> None:
    """Give each rank its part of every weight."""
    whole = set(model.image_tokenizer.parameters())
    for scalar in (parameter for parameter in model.parameters() if parameter.ndim == 0):
        whole.add(scalar)
        if scalar.requires_grad:
            scalar.register_post_accumulate_grad_hook(_average)  # type: ignore[no-untyped-call]
    for layer in model.transformer.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=whole)


def _average(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad = global_sum(parameter.grad) / world_size()


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """All weights on every rank meanwhile, for work of which each rank has another amount, such as
    sampling: gathering them layer by layer, ranks would wait for one another for ever."""
    sharded = fsdp_modules(model)
    for group in sharded:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    try:
        yield
    finally:
        for group in sharded:
            group.set_reshard_after_forward(not isinstance(group, Multimodal), recurse=False)
            group.reshard()


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """All weights on the CPU of the first rank, nothing on the others; every rank has to call."""
    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def clip_gradients(parameters: list[nn.Parameter], largest: float) -> Tensor:
    """Scale the gradients to a global norm of at most ``largest``; returns what it was."""
    gradients = [p for p in parameters if p.grad is not None]
    sharded = [p for p in gradients if isinstance(p.grad, DTensor)]
    plain = [p for p in gradients if not isinstance(p.grad, DTensor)]
    kinds = [kind for kind in (sharded, plain) if kind]
    if not kinds:
        return torch.zeros(())
    norms = []
    for kind in kinds:
        norm = nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.stack([norm.float() for norm in norms]).square().sum().sqrt()
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, largest, total)
    return total
