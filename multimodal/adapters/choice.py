"""Several adapters of one model in memory, of which some are in use at a time."""

from collections.abc import Mapping

import torch

from multimodal.adapters.folder import Adapter
from multimodal.model.layers.transformer import Transformer


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

    @torch.no_grad()
    def use(self, *names: str) -> None:
        """Merge these, and no others. What several add is summed. Without a name: the base.

        Raises:
            ValueError: for a name that is none.
        """
        for name in names:
            if name not in self.adapters:
                known = ", ".join(self.adapters)
                raise ValueError(f"adapter {name!r:.80}: there is no such one; there is {known}")
        parameters = dict(self.transformer.named_parameters())
        chosen = [self.adapters[name] for name in dict.fromkeys(names)]
        for layer, base in self._base.items():
            deltas = [adapter.delta(layer) for adapter in chosen if layer in adapter.pairs]
            parameters[f"{layer}.weight"].copy_(sum(deltas, base))
