"""Several adapters of one model in memory, of which some are in use at a time."""

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from multimodal.adapters.folder import Adapter
from multimodal.model.layers.transformer import Transformer

Network = TypeVar("Network", bound=nn.Module)


class AdapterChoice:
    """Merges adapters by name, and takes them out again without a trace.

    It keeps the adapted weights as they were, in float32 on the CPU: a subtraction would leave
    rounding errors.

    Args:
        transformer: with the weights of the base, in float32.
        adapters: by name.

    Raises:
        ValueError: as ``Adapter.check_layers``.
    """

    def __init__(self, transformer: Transformer, adapters: Mapping[str, Adapter]) -> None:
        for adapter in adapters.values():
            adapter.check_layers(transformer)
        self.transformer, self.adapters = transformer, dict(adapters)
        layers = dict.fromkeys(layer for one in adapters.values() for layer in one.pairs)
        parameters = dict(transformer.named_parameters())
        self._base = {
            layer: parameters[f"{layer}.weight"].detach().float().cpu().clone() for layer in layers
        }

    def use(self, *names: str) -> None:
        """Merge these, and no others. What several add is summed. Without a name: the base.

        Raises:
            ValueError: for a name that is none.
        """
        self._merge(self.transformer, names)

    def beside(self, network: Network, *names: str) -> Network:
        """A copy of a network with these adapters, in which only what an adapter changes is copied.

        All other weights are the same tensors, so it costs the memory of the adapted layers.

        Args:
            network: with the transformer of this choice in it.

        Raises:
            ValueError: for a name that is none.
        """
        changed = {id(layer.weight) for layer in map(self.transformer.get_submodule, self._base)}
        tensors = [*network.parameters(), *network.buffers()]
        kept = {id(tensor): tensor for tensor in tensors if id(tensor) not in changed}
        place = next(n for n, part in network.named_modules() if part is self.transformer)
        copied = copy.deepcopy(network, dict(kept))
        transformer = copied.get_submodule(place)
        assert isinstance(transformer, Transformer)
        self._merge(transformer, names)
        return copied

    @torch.no_grad()
    def _merge(self, transformer: Transformer, names: tuple[str, ...]) -> None:
        for name in names:
            if name not in self.adapters:
                known = ", ".join(self.adapters)
                raise ValueError(f"adapter {name!r:.80}: there is no such one; there is {known}")
        parameters = dict(transformer.named_parameters())
        chosen = [self.adapters[name] for name in dict.fromkeys(names)]
        for layer, base in self._base.items():
            deltas = [adapter.delta(layer) for adapter in chosen if layer in adapter.pairs]
            parameters[f"{layer}.weight"].copy_(sum(deltas, base))
