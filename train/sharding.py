"""A joint model over several GPUs (FSDP2, torch.distributed.fsdp.fully_shard).

Each layer is an FSDP module. Embedding, final norm, head and the projections of alignment belong to
the module of the network itself. Its ``forward`` computes the losses, and needs the unsharded head.
The scalars of alignment cannot be sharded. They are replicated on all ranks, and their gradients
are averaged here. The frozen image tokenizer is no part of the network: every rank has all of it.
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
from multimodal.model.network import MultimodalLM


def shard(model: MultimodalLM, mesh: DeviceMesh) -> None:
    """Shard the weights of a model over the ranks of a mesh, in place."""
    replicated = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for scalar in replicated:
        if scalar.requires_grad:
            scalar.register_post_accumulate_grad_hook(_average)  # type: ignore[no-untyped-call]
    for layer in model.transformer.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=replicated)


def _average(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad = global_sum(parameter.grad) / world_size()


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """The sharded modules. Empty for a model that is not sharded."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Keep all weights on all ranks inside the context.

    For sampling, where ranks do different numbers of forward passes. If each layer gathered its
    weights, the ranks would wait for each other for ever.
    """
    modules = fsdp_modules(model)
    for root in modules[:1]:  # otherwise the first layer that is called becomes a root
        root._get_fsdp_state()._lazy_init()
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(not isinstance(module, MultimodalLM), recurse=False)
            module.reshard()


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """Gather all weights on the CPU of the first rank. All ranks must call it.

    Returns:
        The weights by name on the first rank, an empty dictionary on the others.
    """
    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients to a global norm of at most ``max_norm``, in place.

    Args:
        parameters: sharded or not. Those without a gradient are left out.
        max_norm: infinity leaves the gradients as they are.

    Returns:
        The norm before, float32[].
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    sharded = [p for p in with_gradient if isinstance(p.grad, DTensor)]
    replicated = [p for p in with_gradient if not isinstance(p.grad, DTensor)]
    groups = [group for group in (sharded, replicated) if group]
    if not groups:
        return torch.zeros(())
    norms = []
    for group in groups:
        norm = nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.stack([norm.float() for norm in norms]).square().sum().sqrt()
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total
