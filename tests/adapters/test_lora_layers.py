"""The layers of LoRA: which ones there are beside experts, and what they keep for the gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from multimodal.adapters.folder import AdapterBase, write_adapter
from multimodal.adapters.lora import LoraConfig, inject
from multimodal.api import Model, load
from multimodal.export.hf import export_hf
from multimodal.model.layers.experts import ExpertsConfig
from multimodal.model.layers.transformer import Transformer
from multimodal.provenance import Provenance

peft = pytest.importorskip("peft")
IDS = torch.arange(48).view(2, 24) * 5


def adapted(model: Model, config: LoraConfig) -> Transformer:
    """The transformer of a model with an adapter that changes something."""
    transformer = model.network.transformer
    inject(transformer, config)
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if ".lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=dice))
    return transformer


def logits(transformer: Transformer) -> Tensor:
    length = IDS.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    return transformer.logits(transformer(IDS, torch.arange(length).expand_as(IDS), mask))


def test_beside_experts_attention_alone_is_adapted_and_peft_reads_it(
    tiny_model: Callable[..., Model], tmp_path: Path
) -> None:
    """Layer 0 has an MLP. peft would take its name for that of experts."""
    transformers = pytest.importorskip("transformers")
    tiny_model(noise=0.1, experts=ExpertsConfig(4, mlp_only_layers=(0,))).save(tmp_path / "model")
    model = load(tmp_path / "model")
    for name in ("up_proj", "layers.0.mlp.down_proj"):
        with pytest.raises(ValueError, match=f"'{name}' is no layer to adapt; there is q_proj, k"):
            LoraConfig(target=("q_proj", name)).names(model.network.transformer)
    with torch.no_grad():
        before = logits(model.network.transformer)
    transformer = adapted(model, LoraConfig(4))
    trained = [name for name, weight in transformer.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * 2 * 4 and all(".self_attn." in name for name in trained)
    base = AdapterBase("tiny", model.fingerprint)
    weights = transformer.state_dict()
    write_adapter(tmp_path / "adapter", transformer, weights, base, Provenance(), "# A card")
    export_hf(tmp_path / "model", tmp_path / "stock")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    theirs = peft.PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    with torch.no_grad():
        found, expected = logits(transformer), theirs(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - before).abs().max() > 0.1


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_results_are_to_the_bit_those_of_inputs_that_peft_casts(
    tiny_model: Callable[..., Model], autocast: bool, one_thread: None
) -> None:
    transformer = adapted(tiny_model(noise=0.1), LoraConfig(4))

    def results(casts: bool) -> dict[str, Tensor]:
        for layer in transformer.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.cast_input_dtype_enabled = casts
        transformer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = logits(transformer)
        found.square().mean().backward()  # type: ignore[no-untyped-call]
        gradients = {name: p.grad for name, p in transformer.named_parameters()}
        return {"logits": found, **{n: g for n, g in gradients.items() if g is not None}}

    ours, theirs = results(casts=False), results(casts=True)
    assert len(ours) == 1 + 2 * 2 * 7
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_layers_keep_their_input_and_no_copies_of_it(tiny_model: Callable[..., Model]) -> None:
    attention: Any = adapted(tiny_model(), LoraConfig(4)).layers[0].self_attn
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        outputs = [layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert all(output.dtype == torch.bfloat16 for output in outputs)
    inputs = [tensor for tensor in kept if tensor.numel() == x.numel()]
    assert len(inputs) == 3
    assert {tensor.data_ptr() for tensor in inputs} == {x.data_ptr()}
