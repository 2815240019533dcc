"""The computed operations of a step equal those that torch counts."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from multimodal.api import Model
from multimodal.model.layers.attention import attention_mask
from multimodal.model.layers.experts import ExpertsConfig
from multimodal.model.sequences import NO_LOSS, describe, draw, pack
from multimodal.train.cost import (
    layer_parameters,
    peak_flops,
    peak_memory,
    recomputed_layers,
    training_flops,
)


@pytest.mark.parametrize("experts", [None, ExpertsConfig(5, 3, 48, mlp_only_layers=(0,))])
def test_flops_count_all_products_that_the_mask_allows(
    tiny_model: Callable[..., Model], experts: ExpertsConfig | None
) -> None:
    model = tiny_model(experts=experts)
    config, codes = model.config.transformer, np.arange(16)
    masked = draw(model.vocabulary, [5, 6], codes, codes < 4, codes > 6)
    branched = describe(model.vocabulary, codes, [[7, 8, 9], [10]], [([5], [6])])
    packed = pack([masked, branched], 64, model.vocabulary.pad)
    hidden = model.network.hidden(packed)
    with FlopCounterMode(display=False) as counter:  # the full rows, with padding
        model.network.transformer(packed.ids, packed.positions, None)
    counted = counter.get_total_flops()
    mask = attention_mask(packed.documents, packed.blocks, packed.branches)
    visible = int(mask[:, 0][packed.documents > 0].sum())
    one = [len(masked), 18 + 5]  # the image and a caption; 3 and 4 tokens more see the image too
    assert visible == 13 * 12 / 2 + sum(n * (n + 1) / 2 for n in one) + 3 * 18 + 6 + 4 * 18 + 10
    per_pair = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    length = packed.ids.numel()
    assert counted == 2 * layer_parameters(config) * length + per_pair * length**2
    tokens = len(masked) + len(branched)
    targets = int((packed.objectives != NO_LOSS).sum())
    expected = 3 * (
        2 * layer_parameters(config) * tokens
        + per_pair * visible
        + 2 * config.hidden_size * config.vocab_size * targets
    )
    assert training_flops(config, packed) == expected and hidden.isfinite().all()


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA L400", None),
    ],
)
def test_the_peak_of_a_card_is_that_of_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert peak_flops() == peak


def test_peak_memory_is_in_gigabytes() -> None:
    before = peak_memory()
    assert 0 < before < 200
    if not torch.cuda.is_available():
        array = torch.ones(round((before + 0.4) * 1e9) // 4)  # more than the peak so far
        assert peak_memory() > before + 0.3 and array.sum() > 0


@pytest.mark.parametrize(("given", "count"), [(True, 7), (False, 0), (1, 1), (7, 7), (0, 0)])
def test_all_layers_compute_again_or_so_many(given: bool | int, count: int) -> None:
    assert recomputed_layers(given, 7) == count


@pytest.mark.parametrize("given", [8, -1])
def test_more_layers_than_there_are_cannot_compute_again(given: int) -> None:
    with pytest.raises(ValueError, match=f"recompute={given}: expected true, false, or 0 to 7"):
        recomputed_layers(given, 7)
