"""The estimated operations of a step are those that torch counts."""

from collections.abc import Callable

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from multimodal.api import Model
from multimodal.model.sequences import NO_LOSS, describe, draw, pack
from multimodal.train.cost import layer_parameters, peak_memory, training_flops


def test_flops_count_the_products_that_the_mask_allows(
    tiny_model: Callable[..., Model],
) -> None:
    model = tiny_model()
    config, codes = model.config.transformer, np.arange(16)
    masked = draw(model.vocabulary, [5, 6], codes, codes < 4, codes > 6)
    causal = describe(model.vocabulary, codes, [7, 8, 9])
    packed = pack([masked, causal], 64, model.vocabulary.pad)
    hidden = model.network.hidden(packed)
    with FlopCounterMode(display=False) as counter:  # all positions, padding too
        model.network.transformer(packed.ids, packed.positions, None)
    counted = counter.get_total_flops()
    visible = 13 * 12 / 2 + sum(n * (n + 1) / 2 for n in map(len, (masked, causal)))
    per_pair = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    length = packed.ids.numel()
    assert counted == 2 * layer_parameters(config) * length + per_pair * length**2
    tokens = len(masked) + len(causal)
    targets = int((packed.objectives != NO_LOSS).sum())
    expected = 3 * (
        2 * layer_parameters(config) * tokens
        + per_pair * visible
        + 2 * config.hidden_size * config.vocab_size * targets
    )
    assert training_flops(config, packed) == expected and hidden.isfinite().all()


def test_peak_memory_is_the_maximum_in_gigabytes() -> None:
    before = peak_memory()
    assert 0 < before < 200
    if not torch.cuda.is_available():
        held = torch.ones(round((before + 0.4) * 1e9) // 4)  # more than ever
        assert peak_memory() > before + 0.3 and held.sum() > 0
