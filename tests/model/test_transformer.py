"""What each token sees. Packing, padding and caches change no number."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from multimodal.api import Model
from multimodal.inference.batch import DecodeBatch
from multimodal.inference.text import generate_ids
from multimodal.model.layers.attention import KVCache, attention_mask
from multimodal.model.layers.mlp import add_dropped
from multimodal.model.layers.transformer import (
    SIZES,
    Transformer,
    TransformerConfig,
    named_config,
)
from multimodal.model.sequences import (
    NO_LOSS,
    Packed,
    TokenSequence,
    describe,
    document,
    draw,
    pack,
)
from multimodal.options import TextOptions

CODES = np.arange(16) * 5 % 64
TEXT = list(b"two dogs")
MASKED = np.arange(16) % 3 > 0
# The logits of the tiny model with noise have a standard deviation of 1.3.
NOTHING, SOMETHING = 1e-5, 1e-2


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model(noise=0.1)


@torch.inference_mode()
def logits_of(model: Model, sequence: TokenSequence) -> Tensor:
    """float32[L, V] of a sequence alone in its row"""
    packed = pack([sequence], len(sequence), model.vocabulary.pad)
    return model.network.transformer.logits(model.network.hidden(packed)[0])


def changes(model: Model, sequence: TokenSequence, position: int) -> Tensor:
    """float[L]: how much the logits of each position move with the token at ``position``."""
    ids = sequence.ids.copy()
    ids[position] = ids[position] - 1 if ids[position] else 1
    other = replace(sequence, ids=ids)
    return (logits_of(model, sequence) - logits_of(model, other)).abs().amax(-1)


def append_token(sequence: TokenSequence, token: int) -> TokenSequence:
    """A sequence with one more causal token, without a loss."""
    more = {"ids": token, "targets": 0, "objectives": NO_LOSS, "blocks": 0, "branches": 0,
            "positions": sequence.positions[-1] + 1}  # fmt: skip
    longer = {name: np.append(getattr(sequence, name), value) for name, value in more.items()}
    return replace(sequence, **longer)


def all_forms(model: Model) -> dict[str, TokenSequence]:
    vocabulary = model.vocabulary
    return {
        "describe": describe(vocabulary, CODES, [TEXT]),
        "draw": draw(vocabulary, TEXT, CODES),
        "masked": draw(vocabulary, TEXT, CODES, MASKED),
        "some left out": draw(vocabulary, TEXT, CODES, MASKED, ~MASKED & (CODES % 3 > 0)),
        "dropped": draw(vocabulary, None, CODES, ~MASKED),
        "after a block": append_token(draw(vocabulary, TEXT, CODES, MASKED), vocabulary.eoi),
        "text": document(vocabulary, [TEXT])[0],
    }


# --- what sees what -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["describe", "draw", "masked", "some left out", "after a block", "dropped", "text"]
)
def test_a_token_changes_itself_and_what_follows_and_its_block(model: Model, form: str) -> None:
    sequence = all_forms(model)[form]
    for position in range(len(sequence)):
        change = changes(model, sequence, position)
        sees = np.arange(len(sequence)) >= position
        if sequence.blocks[position]:
            sees |= sequence.blocks > 0
        assert (change[~torch.from_numpy(sees)] < NOTHING).all(), f"{position} leaks"
        assert (change[torch.from_numpy(sees)] > NOTHING).all(), f"{position} is not seen"
        assert change[position] > SOMETHING


def state_of(model: Model, sequence: TokenSequence) -> Tensor:
    with torch.inference_mode():
        packed = pack([sequence], len(sequence), model.vocabulary.pad)
        return model.network.hidden(packed).flatten(0, 1)[packed.states[0]]


def test_the_text_embedding_knows_the_text_and_nothing_else(model: Model) -> None:
    vocabulary = model.vocabulary
    base = state_of(model, draw(vocabulary, TEXT))
    for codes, masked in (
        (CODES, None),
        (CODES, MASKED),
        (63 - CODES, None),
        (63 - CODES, ~MASKED),
    ):
        state = state_of(model, draw(vocabulary, TEXT, codes, masked))
        assert (state - base).abs().max() < NOTHING
    for index in range(len(TEXT)):
        text = [*TEXT]
        text[index] += 1
        assert (state_of(model, draw(vocabulary, text)) - base).abs().max() > SOMETHING


def test_the_image_embedding_knows_the_image_and_nothing_else(model: Model) -> None:
    vocabulary = model.vocabulary
    base = state_of(model, describe(vocabulary, CODES, [TEXT]))
    for text in ([], [5], TEXT[::-1]):
        assert (state_of(model, describe(vocabulary, CODES, [text])) - base).abs().max() < NOTHING
    for index in range(len(CODES)):
        codes = CODES.copy()
        codes[index] = 63 - codes[index]
        assert (state_of(model, describe(vocabulary, codes, [TEXT])) - base).abs().max() > SOMETHING


def test_order_matters(model: Model) -> None:
    """Without positions, the last token would see a bag of tokens."""
    texts = ([7, 8, 9, 10, 3], [9, 7, 10, 8, 3])
    a, b = (logits_of(model, document(model.vocabulary, [text])[0])[-1] for text in texts)
    assert (a - b).abs().max() > SOMETHING


# --- packed == separate ---------------------------------------------------------------------------


def summed_loss(model: Model, packed: Packed) -> Tensor:
    logits = model.network.transformer.logits(model.network.hidden(packed))
    log_p = logits.log_softmax(-1).gather(-1, packed.targets[..., None])[..., 0]
    return -(log_p * (packed.objectives != NO_LOSS)).sum()


def test_packed_is_separate_in_values_and_gradients(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model(noise=0.1)
    transformer = model.network.transformer
    sequences = [*all_forms(model).values(), document(model.vocabulary, [[1]])[0]]
    together = pack(sequences, 100, model.vocabulary.pad)
    assert together.ids.shape[0] == 2 and together.documents.max() > 2

    def loss_and_gradients(batches: list[Packed]) -> tuple[float, dict[str, Tensor]]:
        transformer.zero_grad()
        loss = torch.stack([summed_loss(model, packed) for packed in batches]).sum()
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in transformer.named_parameters()}  # type: ignore[union-attr]
        return loss.item(), gradients

    alone = [pack([sequence], len(sequence), 0) for sequence in sequences]
    loss, gradients = loss_and_gradients([together])
    transformer.recompute = 1  # computes again what is not kept
    calls, mlps = Counter[int](), [layer.mlp for layer in transformer.layers]
    hooks = [m.register_forward_pre_hook(lambda m, _: calls.update([mlps.index(m)])) for m in mlps]
    again, gradients_again = loss_and_gradients([together])
    for hook in hooks:
        hook.remove()
    assert calls == {0: 2, 1: 1}, "twice where it is not kept: going forth, and going back"
    assert again == loss
    assert all(torch.equal(gradients_again[name], g) for name, g in gradients.items())
    expected_loss, expected = loss_and_gradients(alone)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in gradients.items():
        scale = expected[name].abs().max()
        assert scale > 0, name
        assert (gradient - expected[name]).abs().max() <= 1e-5 * scale.clamp(min=1), name
    states = model.network.hidden(together).flatten(0, 1)[together.states]
    for state, sequence in zip(states, sequences, strict=True):
        assert (state - state_of(model, sequence)).abs().max() < NOTHING


def test_dropout_is_unbiased_and_only_in_training(tiny_model: Callable[..., Model]) -> None:
    torch.manual_seed(0)
    x, branch = torch.randn(9, 40), torch.randn(9, 40).requires_grad_()
    sums = torch.stack([add_dropped(x, branch, 0.25) for _ in range(4000)])
    kept = sums != x
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.002)
    assert (kept.float().mean(0) - 0.75).abs().max() < 0.05, "every number alike"
    assert torch.allclose(torch.where(kept, x + branch / 0.75, x), sums, atol=1e-5)
    (gradient,) = torch.autograd.grad(sums[0].sum(), branch)
    assert torch.allclose(gradient, kept[0] / 0.75)

    model = tiny_model(noise=0.1)
    transformer, sequence = model.network.transformer, describe(model.vocabulary, CODES, [TEXT])
    packed, before = pack([sequence], 40, 0), logits_of(model, sequence)
    transformer.dropout = 0.3
    assert torch.equal(logits_of(model, sequence), before)
    transformer.train()
    assert (logits_of(model, sequence) - before).abs().max() > SOMETHING
    gradients = []
    for transformer.recompute in (0, 2):  # the same numbers are dropped again
        torch.manual_seed(1)
        loss = summed_loss(model, packed)
        gradients.append(torch.autograd.grad(loss, list(transformer.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_padding_changes_nothing_and_is_finite(model: Model) -> None:
    sequence = document(model.vocabulary, [TEXT])[0]
    packed = pack([sequence], 40, model.vocabulary.pad)
    with torch.inference_mode():
        logits = model.network.transformer.logits(model.network.hidden(packed)[0])
    assert logits.isfinite().all()
    assert (logits[: len(sequence)] - logits_of(model, sequence)).abs().max() < NOTHING


# --- cached == uncached ---------------------------------------------------------------------------


def empty_cache(model: Model, rows: int, capacity: int) -> KVCache:
    return model.network.transformer.empty_cache(rows, capacity)


@torch.inference_mode()
def test_prefill_and_single_steps_give_the_full_forward(model: Model) -> None:
    transformer = model.network.transformer
    ids = torch.tensor(describe(model.vocabulary, CODES, [TEXT]).ids).repeat(2, 1)
    ids[1, 3:7] += 1
    length = ids.shape[1]
    one = torch.ones_like(ids)
    positions, mask = one.cumsum(1) - 1, attention_mask(one, torch.zeros_like(ids))
    full = transformer.logits(transformer(ids, positions, mask))
    for prefill in (1, 9, length - 1):
        cache = empty_cache(model, 2, length)
        hidden = transformer(
            ids[:, :prefill], positions[:, :prefill], mask[..., :prefill, :prefill], cache
        )
        parts = [transformer.logits(hidden)]
        for i in range(prefill, length):
            hidden = transformer(ids[:, i : i + 1], positions[:, i : i + 1], None, cache)
            parts.append(transformer.logits(hidden))
        assert cache.length == length
        assert (torch.cat(parts, dim=1) - full).abs().max() < NOTHING


@torch.inference_mode()
def test_a_slice_of_the_queries_gives_the_same_states(model: Model) -> None:
    """After tokens in the cache, and without any."""
    transformer = model.network.transformer
    ids = torch.tensor(draw(model.vocabulary, TEXT, CODES, MASKED).ids).repeat(2, 1)
    ids[1, 3:7] += 1
    one = torch.ones_like(ids)
    positions, mask = one.cumsum(1) - 1, attention_mask(one, torch.zeros_like(ids))
    full = transformer(ids, positions, mask)
    for read, queries in ((0, slice(4)), (0, slice(-1, None)), (5, slice(2, 7)), (5, slice(1))):
        cache = empty_cache(model, 2, ids.shape[1])
        if read:
            transformer(ids[:, :read], positions[:, :read], mask[..., :read, :read], cache)
        states = transformer(ids[:, read:], positions[:, read:], mask[:, :, read:], cache, queries)
        assert (states - full[:, read:][:, queries]).abs().max() < NOTHING


@torch.inference_mode()
def test_a_full_cache_takes_no_more(model: Model) -> None:
    """Not even one token. torch would broadcast it into the empty rest without an error."""
    batch = DecodeBatch(model.network, [[1, 2, 3]], 1)
    batch.step(torch.tensor([4]))
    assert batch.cache.length == batch.cache.capacity == 4
    with pytest.raises(AssertionError, match="room for 4 tokens"):
        model.network.transformer(torch.tensor([[5]]), torch.tensor([[4]]), None, batch.cache)


@torch.inference_mode()
def test_the_cache_of_a_batch_grows_when_it_is_full(model: Model) -> None:
    batch = DecodeBatch(model.network, [[1, 2, 3], [7]], 1)
    for token in (4, 5, 6):
        batch.step(torch.tensor([token, token]))
    assert batch.cache.length == 6 <= batch.cache.capacity
    for row, text in enumerate(([1, 2, 3, 4, 5, 6], [7, 4, 5, 6])):
        alone = DecodeBatch(model.network, [text], 0)
        assert (batch.logits()[row] - alone.logits()[0]).abs().max() < NOTHING


@torch.inference_mode()
def test_a_ragged_batch_is_each_prompt_alone(model: Model) -> None:
    vocabulary = model.vocabulary
    prompts = [
        describe(vocabulary, CODES, [[]]).ids[:-1].tolist(),
        [vocabulary.bos],
        document(vocabulary, [TEXT])[0].ids[:-1].tolist(),
    ]
    steps = torch.randint(vocabulary.text_size, (5, 3), generator=torch.Generator().manual_seed(0))
    many = DecodeBatch(model.network, prompts, 6)
    alone = [DecodeBatch(model.network, [prompt], 6) for prompt in prompts]
    texts = [[*prompt] for prompt in prompts]
    for ids in steps:
        for row, single in enumerate(alone):
            assert (many.logits()[row] - single.logits()[0]).abs().max() < NOTHING
            whole = logits_of(model, document(vocabulary, [texts[row][1:]])[0])[len(texts[row]) - 1]
            assert (many.logits()[row] - whole).abs().max() < NOTHING
            single.step(ids[row : row + 1])
            texts[row].append(int(ids[row]))
        many.step(ids)
    many.keep(torch.tensor([2, 0]))
    for row, single in ((0, alone[2]), (1, alone[0])):
        assert (many.logits()[row] - single.logits()[0]).abs().max() < NOTHING
        single.step(torch.tensor([3]))
    many.step(torch.tensor([3, 3]))
    for row, single in ((0, alone[2]), (1, alone[0])):
        assert (many.logits()[row] - single.logits()[0]).abs().max() < NOTHING
    options = TextOptions(max_tokens=8)
    together = generate_ids(model, prompts, options)
    assert together == [generate_ids(model, [prompt], options)[0] for prompt in prompts]


# --- sizes and numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "low", "high"),
    [("base", 90e6, 130e6), ("large", 300e6, 400e6), ("1b", 0.85e9, 1.15e9), ("7b", 6e9, 7.5e9)],
)
def test_named_sizes_have_their_parameters(size: str, low: float, high: float) -> None:
    with torch.device("meta"):
        transformer = Transformer(named_config(size, 49152))
    assert low < sum(weight.numel() for weight in transformer.parameters()) < high


def test_embeddings_are_tied_up_to_1b() -> None:
    assert [size for size in SIZES if not named_config(size, 128).tie_word_embeddings] == ["7b"]
    with pytest.raises(ValueError, match="'huge': expected one of tiny"):
        named_config("huge", 128)


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="num_attention_heads=6"):
        TransformerConfig(128, 32, 1, 6, 4, 16, 64)
    with pytest.raises(ValueError, match="head_dim=15"):
        TransformerConfig(128, 32, 1, 4, 4, 15, 64)


def test_the_residual_stream_keeps_its_scale_with_depth() -> None:
    """At the start, what 2 and what 16 layers add to the embeddings has about the same size."""
    added = []
    for depth in (2, 16):
        torch.manual_seed(0)
        transformer = Transformer(TransformerConfig(512, 128, depth, 4, 2, 32, 384))
        stream: list[Tensor] = []
        transformer.norm.register_forward_pre_hook(lambda _, x, s=stream: s.append(x[0]))
        ids = torch.randint(512, (2, 64))
        positions = torch.arange(64).expand(2, -1)
        mask = attention_mask(torch.ones_like(ids), torch.zeros_like(ids))
        with torch.inference_mode():
            transformer(ids, positions, mask)
            added.append(float((stream[0] - transformer.embed_tokens(ids)).std()))
    assert added[1] == pytest.approx(added[0], rel=0.35)


def test_compiled_layers_read_prompts_without_the_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More layers than torch compiles forms of a function (8)."""
    compiled: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    transformer = Transformer(TransformerConfig(64, 16, 10, 2, 1, 8, 32))
    transformer.compile_layers()
    ids = torch.arange(12).view(2, 6)
    seen = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    with torch.no_grad():
        expected = transformer(ids, ids, seen)
        forms = len(compiled)
        found = transformer.forward_prompt(ids, ids, seen, transformer.empty_cache(2, 6))
    torch.testing.assert_close(found, expected[:, -1])
    assert forms and len(compiled) == forms
    transformer(ids, ids, seen)  # with gradients
    assert len(compiled) > forms
    torch.compiler.reset()


@pytest.mark.filterwarnings("error")  # torch warns where mixed types cost it its fast kernels
@torch.inference_mode()
def test_bf16_is_close_and_its_logits_are_fp32(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model(noise=0.1)
    sequence = describe(model.vocabulary, CODES, [TEXT])
    expected = logits_of(model, sequence)
    model.network.transformer.bfloat16()
    logits = logits_of(model, sequence)
    assert logits.dtype == torch.float32
    assert (logits - expected).std() < 0.05 * expected.std()
