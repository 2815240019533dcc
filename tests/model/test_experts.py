"""Experts: grouped is token by token, the losses are transformers', and copies compute the same."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from multimodal.api import Model, load
from multimodal.export.gguf import export_gguf
from multimodal.inference.text import generate_ids
from multimodal.model.layers.attention import attention_mask
from multimodal.model.layers.experts import (
    ExpertsConfig,
    SparseMLP,
    balance_loss,
    expert_use,
    router_z_loss,
    upcycled,
)
from multimodal.model.layers.transformer import Transformer, TransformerConfig, named_config
from multimodal.model.stock import stock_config, transformer_config
from multimodal.options import TextOptions
from tests.samples import samples_of

EXPERTS = ExpertsConfig(4, 2, 48)
SIZES: dict[str, Any] = dict(
    vocab_size=128, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, intermediate_size=48,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model(noise=0.1, experts=EXPERTS)


def token_by_token(mlp: SparseMLP, x: Tensor) -> Tensor:
    """What the paper says, for one token after the other."""
    outputs = []
    for token in x.reshape(-1, x.shape[-1]):
        probabilities = mlp.gate(token).softmax(-1)
        best = probabilities.argsort(descending=True)[: mlp.config.num_experts_per_tok]
        total = probabilities[best].sum() if mlp.config.norm_topk_prob else 1.0
        parts = [probabilities[n] / total * mlp.experts[int(n)](token) for n in best]
        outputs.append(torch.stack(parts).sum(0))
    return torch.stack(outputs).view_as(x)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (4, 1), (5, 3), (40, 2)])
def test_grouped_by_expert_is_token_by_token(experts: int, k: int, norm: bool) -> None:
    torch.manual_seed(experts)
    mlp = SparseMLP(16, ExpertsConfig(experts, k, 24, norm_topk_prob=norm)).eval()
    x, along = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    expected, outputs = token_by_token(mlp, x), mlp(x)
    torch.testing.assert_close(outputs, expected)
    with torch.inference_mode():  # experts without a token are left out
        torch.testing.assert_close(mlp(x), expected)
        torch.testing.assert_close(mlp.forward_token(x[:, 0]), expected[:, 0])
        assert mlp(x[:0]).shape == (0, 9, 16)
    weights = list(mlp.parameters())
    theirs = torch.autograd.grad((expected * along).sum(), weights, materialize_grads=True)
    (outputs * along).sum().backward()
    for weight, gradient in zip(weights, theirs, strict=True):
        assert weight.grad is not None, "also where no token went: other ranks wait for it"
        torch.testing.assert_close(weight.grad, gradient)


def test_no_rows_have_no_states(model: Model, sentences: tuple[str, ...]) -> None:
    """As in a batch without plain texts, whose words ``KeepWordsModule`` would keep."""
    rows = model.batch_builder(160).build(samples_of([{"captions": [sentences[0]]}])).packed
    tables = [field.name for field in fields(rows) if field.name != "states"]
    none = replace(rows, **{name: getattr(rows, name)[:0] for name in tables})
    with torch.no_grad():
        assert model.network.hidden(none).shape == (0, *model.network.hidden(rows).shape[1:])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_balance_loss_is_that_of_transformers(k: int) -> None:
    torch.manual_seed(k)
    logits = torch.randn(3, 40, 6) * 2
    mask = torch.rand(40) < 0.7
    for counted in (mask, torch.ones(40, dtype=torch.bool)):
        expected = load_balancing_loss_func(tuple(logits), 6, k, counted[None])
        assert balance_loss(logits, k, counted).item() == pytest.approx(float(expected), abs=1e-5)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    balance_loss(ours, k, mask).backward()
    load_balancing_loss_func(tuple(theirs), 6, k, mask[None]).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_balance_loss_is_least_when_all_experts_have_as_many_tokens() -> None:
    counted = torch.ones(40, dtype=torch.bool)
    even = torch.eye(4).repeat(10, 1)[None] * 9
    one = torch.tensor([9.0, 0, 0, 0]).expand(1, 40, 4)
    assert balance_loss(even, 1, counted).item() == pytest.approx(1.0)
    assert balance_loss(one, 1, counted).item() > 3.9


def test_the_balance_loss_is_of_all_layers_together_and_the_log_shows_each() -> None:
    collapsed = torch.eye(4)[:, None].expand(4, 40, 4) * 99  # each layer to an expert of its own
    counted = torch.ones(40, dtype=torch.bool)
    assert balance_loss(collapsed, 1, counted).item() == pytest.approx(1.0)
    assert expert_use(collapsed, 1, {"text": counted})["busiest"].item() == pytest.approx(1.0)


def test_a_router_that_would_learn_nothing_is_refused() -> None:
    x = torch.randn(5, 16, requires_grad=True)
    for experts, k, norm in ((4, 1, False), (4, 2, True), (1, 1, True), (4, 1, True)):
        config = ExpertsConfig(experts, k, 24, norm_topk_prob=norm)
        mlp = SparseMLP(16, config)
        mlp(x).square().sum().backward()
        learns = bool(mlp.gate.weight.grad.abs().max() > 1e-6)
        assert learns == (experts > 1 and (k > 1 or not norm))
        if learns or experts == 1:
            config.check_router()
        else:
            with pytest.raises(ValueError, match="norm_topk_prob: false"):
                config.check_router()


def test_the_z_loss_is_the_mean_square_of_log_z() -> None:
    torch.manual_seed(0)
    logits, counted = torch.randn(2, 7, 5), torch.tensor([1, 1, 0, 1, 0, 1, 1]).bool()
    squares = [
        sum(value.exp() for value in row).log() ** 2
        for layer in logits.double()
        for row, counts in zip(layer, counted, strict=True)
        if counts
    ]
    expected = sum(float(square) for square in squares) / len(squares)
    assert router_z_loss(logits, counted).item() == pytest.approx(expected, rel=1e-6)


def test_the_log_says_which_experts_texts_and_images_use() -> None:
    logits = torch.full((2, 8, 4), -9.0)
    for token, expert in enumerate([0, 1, 0, 1, 2, 2, 2, 2]):
        logits[:, token, expert] = 9.0
    kinds = {"text": torch.arange(8) < 4, "image": torch.arange(8) >= 4}
    use = {name: value.item() for name, value in expert_use(logits, 1, kinds).items()}
    assert use == pytest.approx({"text": 2.0, "image": 1.0, "busiest": 1.0, "shared": 0.0})
    kinds["image"] = torch.arange(8) % 4 > 1  # a half of each: experts 0, 1, 2, 2
    use = {name: value.item() for name, value in expert_use(logits, 1, kinds).items()}
    assert use["shared"] == pytest.approx(0.5) and use["image"] == pytest.approx(2**1.5)
    kinds["image"] = torch.zeros(8, dtype=torch.bool)
    assert expert_use(logits, 1, kinds).keys() == {"text", "busiest"}


def test_losses_of_routers_are_part_of_the_joint_loss_and_padding_is_not(
    tiny_model: Callable[..., Model], sentences: tuple[str, ...]
) -> None:
    free = replace(EXPERTS, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    samples = samples_of([{"captions": [text]} for text in sentences])
    found = {}
    for name, experts, length in (
        ("weighted", EXPERTS, 160), ("padded", EXPERTS, 400), ("free", free, 160),
    ):  # fmt: skip
        model = tiny_model(noise=0.1, experts=experts)
        total, parts = model.network(model.batch_builder(length).build(samples))
        found[name] = {"total": total.item(), **{k: v.item() for k, v in parts.items()}}
    weighted = found["weighted"]
    assert {"experts/text", "experts/image", "experts/shared"} < weighted.keys()
    names = ("total", "router_balance", "router_z", "experts/text", "experts/image")
    for name in names:
        assert found["padded"][name] == pytest.approx(weighted[name], rel=1e-4), name
    terms = 0.01 * weighted["router_balance"] + 0.001 * weighted["router_z"]
    assert weighted["total"] - found["free"]["total"] == pytest.approx(terms, rel=1e-3)


def test_recomputed_layers_give_the_same_gradients(
    tiny_model: Callable[..., Model], sentences: tuple[str, ...]
) -> None:
    model = tiny_model(noise=0.1, experts=EXPERTS)
    batch = model.batch_builder(160).build(samples_of([{"captions": [t]} for t in sentences]))
    gradients = []
    for model.network.transformer.recompute in (0, 2):
        model.network.zero_grad()
        model.network(batch)[0].backward()
        gradients.append({n: w.grad for n, w in model.network.named_parameters()})
    router = "transformer.layers.1.mlp.gate.weight"
    assert gradients[0][router] is not None and gradients[0][router].any()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_one_token_after_the_other_gives_the_full_forward(model: Model) -> None:
    transformer = model.network.transformer
    ids = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(1))
    positions, ones = torch.arange(20).expand(3, 20), torch.ones_like(ids)
    causal = attention_mask(ones, torch.zeros_like(ids))
    with torch.inference_mode():
        expected = transformer(ids, positions, causal)
        cache = transformer.empty_cache(3, 20)
        transformer(ids[:, :8], positions[:, :8], causal[:, :, :8, :8], cache)
        for n in range(8, 20):
            state = transformer.forward_token(
                ids[:, n], positions[:, n : n + 1], causal[:, :, n : n + 1],
                cache.keys, cache.values, torch.tensor([n]),
            )  # fmt: skip
            torch.testing.assert_close(state, expected[:, n], atol=1e-5, rtol=1e-5)
    prompts = [[5, 6, 7], [9] * 12]
    together = generate_ids(model, prompts, TextOptions(max_tokens=12))
    alone = [generate_ids(model, [prompt], TextOptions(max_tokens=12))[0] for prompt in prompts]
    assert together == alone


# --- from a dense model ---------------------------------------------------------------------------


def logits_of(transformer: Transformer, ids: Tensor) -> Tensor:
    ones = torch.ones_like(ids)
    mask = attention_mask(ones, torch.zeros_like(ids))
    with torch.inference_mode():
        return transformer.logits(transformer(ids, ones.cumsum(1) - 1, mask))


@pytest.mark.parametrize("k", [2, 3])
def test_copies_of_an_mlp_compute_what_it_does(k: int) -> None:
    torch.manual_seed(0)
    dense = TransformerConfig(**SIZES)
    experts = ExpertsConfig(4, k, mlp_only_layers=(1,))
    before, after = Transformer(dense), Transformer(replace(dense, experts=experts))
    assert after.config.experts is not None and after.config.experts.moe_intermediate_size == 48
    after.load_state_dict(upcycled(before.state_dict(), after.config.experts))
    ids = torch.randint(128, (2, 30))
    torch.testing.assert_close(logits_of(after, ids), logits_of(before, ids))
    routers = [w for name, w in after.named_parameters() if name.endswith("gate.weight")]
    assert len(routers) == 2 and all(0 < w.std() < 0.03 for w in routers)
    for wrong, message in (
        (replace(experts, moe_intermediate_size=40), "moe_intermediate_size=40.*its width, 48"),
        (replace(experts, norm_topk_prob=False), "norm_topk_prob=true"),
        (replace(experts, num_experts_per_tok=1), "give 2 experts for a token"),
    ):
        with pytest.raises(ValueError, match=message):
            upcycled(before.state_dict(), wrong)


def test_a_network_takes_the_weights_of_a_dense_one(
    tiny_model: Callable[..., Model], tmp_path: Path
) -> None:
    dense, sparse = tiny_model(noise=0.1), tiny_model(experts=ExpertsConfig(4))
    sparse.network.take_weights(dense.network)
    ids = torch.randint(300, (2, 30))
    after = logits_of(sparse.network.transformer, ids)
    torch.testing.assert_close(after, logits_of(dense.network.transformer, ids))
    sparse.save(tmp_path / "sparse")
    again = load(tmp_path / "sparse")
    assert again.config == sparse.config and again.fingerprint == sparse.fingerprint
    assert torch.equal(logits_of(again.network.transformer, ids), after)
    with pytest.raises(ValueError, match="not those of this run"):
        dense.network.take_weights(sparse.network)
    with pytest.raises(ValueError, match="experts are not written as GGUF"):
        export_gguf(tmp_path / "sparse", tmp_path / "model.gguf")


def test_a_language_model_gets_experts(
    tiny_model: Callable[..., Model], tmp_path: Path
) -> None:  # fmt: skip
    tokenizers = tiny_model()
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SIZES | {"vocab_size": 320}, tie_word_embeddings=False)
    ).eval()
    theirs.save_pretrained(tmp_path)

    def new(experts: ExpertsConfig) -> Model:
        return Model.new(
            str(tmp_path), tokenizers.text_tokenizer, tokenizers.image_tokenizer, experts=experts
        ).eval()

    ids = torch.randint(300, (2, 30))
    with torch.inference_mode():
        expected = theirs(ids).logits[..., :300]
    ours = logits_of(new(ExpertsConfig(3)).network.transformer, ids)[..., :300]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    moe = transformers.Qwen3MoeConfig(**SIZES | {"vocab_size": 320}, num_experts=2)
    moe.num_experts_per_tok = 1
    transformers.Qwen3MoeForCausalLM(moe).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has experts of its own"):
        new(ExpertsConfig(3))


# --- configs --------------------------------------------------------------------------------------


def test_a_stock_config_comes_back() -> None:
    experts = ExpertsConfig(6, 3, 20, False, (0,), 0.005)
    config = TransformerConfig(**SIZES, experts=experts)
    stored = json.loads(json.dumps(stock_config(config)))
    assert stored["architectures"] == ["Qwen3MoeForCausalLM"]
    assert transformer_config(stored, "m") == config
    theirs = transformers.Qwen3MoeConfig(**stored)
    assert (theirs.num_experts, theirs.num_experts_per_tok) == (6, 3)
    assert transformer_config(theirs.to_dict(), "m") == config
    every_second = stored | {"decoder_sparse_step": 2, "mlp_only_layers": None}
    found = transformer_config(every_second, "m").experts
    assert found is not None and found.mlp_only_layers == (0, 2)
    absent = {k: v for k, v in stored.items() if k != "norm_topk_prob"}
    assert transformer_config(absent, "m") == config
    for key, value, message in (
        ("num_experts", 2, "num_experts_per_tok=3: there are only num_experts=2"),
        ("num_experts", "many", "num_experts='many'"),
        ("mlp_only_layers", [7], r"mlp_only_layers=\[7\]: expected 0 to 2"),
        ("mlp_only_layers", [0, 1, 2], "in 0 layers"),
        ("mlp_only_layers", 1, "mlp_only_layers=1"),
        ("decoder_sparse_step", 0, "decoder_sparse_step=0"),
        ("num_hidden_layers", 10**9, "num_hidden_layers"),
        ("num_experts", 10**6, "num_experts=1000000"),
    ):
        with pytest.raises(ValueError, match=message):
            transformer_config(stored | {key: value}, "m")


@pytest.mark.parametrize(("dense", "sparse"), [("starter", "starter-moe"), ("base", "base-moe")])
def test_named_sizes_have_the_active_parameters_of_dense_ones(dense: str, sparse: str) -> None:
    with torch.device("meta"):
        one, other = (Transformer(named_config(size, 49152)) for size in (dense, sparse))
    experts = other.config.experts
    assert experts is not None and one.active_parameters == sum(p.numel() for p in one.parameters())
    routers = experts.num_experts * other.config.hidden_size * other.config.num_hidden_layers
    assert other.active_parameters == one.active_parameters + routers
    assert sum(p.numel() for p in other.parameters()) > 1.7 * other.active_parameters
