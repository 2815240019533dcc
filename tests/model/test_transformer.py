"""What sees what, and that nothing depends on how it is computed: packed, cached, padded."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from multimodal.api import Model
from multimodal.inference.batch import DecodeBatch
from multimodal.inference.text import generate_ids
from multimodal.model.attention import attend, attention_mask
from multimodal.model.sequences import (
    NO_LOSS,
    Packed,
    describe,
    draw,
    pack,
    plain_text,
)
from multimodal.model.transformer import (
    SIZES,
    Cache,
    Transformer,
    TransformerConfig,
    named_config,
)

CODES = np.arange(16) * 5 % 64
TEXT = list(b"two dogs")
MASKED = np.arange(16) % 3 > 0
NOTHING, SOMETHING = 1e-5, 1e-2  # logits of the noisy tiny model have a standard deviation of 1.3


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model(noise=0.1)


@torch.inference_mode()
def logits_of(model: Model, sequence: Sequence) -> Tensor:
    """float32[L, V] of a sequence alone in its row"""
    packed = pack([sequence], len(sequence), model.vocabulary.pad)
    return model.network.transformer.logits(model.network.hidden(packed)[0])


def changes(model: Model, sequence: Sequence, position: int) -> Tensor:
    """float[L]: how much the logits of each position move with the token at ``position``."""
    ids = sequence.ids.copy()
    ids[position] = ids[position] - 1 if ids[position] else 1
    other = replace(sequence, ids=ids)
    return (logits_of(model, sequence) - logits_of(model, other)).abs().amax(-1)


def followed(sequence: Sequence, token: int) -> Sequence:
    """One more token after a sequence, causal, without a loss."""
    more = {"ids": token, "targets": 0, "objectives": NO_LOSS, "blocks": 0,
            "positions": sequence.positions[-1] + 1}  # fmt: skip
    longer = {name: np.append(getattr(sequence, name), value) for name, value in more.items()}
    return replace(sequence, **longer)


def all_forms(model: Model) -> dict[str, Sequence]:
    vocabulary = model.vocabulary
    return {
        "describe": describe(vocabulary, CODES, TEXT),
        "draw": draw(vocabulary, TEXT, CODES),
        "masked": draw(vocabulary, TEXT, CODES, MASKED),
        "some left out": draw(vocabulary, TEXT, CODES, MASKED, ~MASKED & (CODES % 3 > 0)),
        "dropped": draw(vocabulary, None, CODES, ~MASKED),
        "after a block": followed(draw(vocabulary, TEXT, CODES, MASKED), vocabulary.eoi),
        "text": plain_text(vocabulary, TEXT),
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


def state_of(model: Model, sequence: Sequence) -> Tensor:
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
    for place in range(len(TEXT)):
        text = [*TEXT]
        text[place] += 1
        assert (state_of(model, draw(vocabulary, text)) - base).abs().max() > SOMETHING


def test_the_image_embedding_knows_the_image_and_nothing_else(model: Model) -> None:
    vocabulary = model.vocabulary
    base = state_of(model, describe(vocabulary, CODES, TEXT))
    for text in ([], [5], TEXT[::-1]):
        assert (state_of(model, describe(vocabulary, CODES, text)) - base).abs().max() < NOTHING
    for place in range(len(CODES)):
        codes = CODES.copy()
        codes[place] = 63 - codes[place]
        assert (state_of(model, describe(vocabulary, codes, TEXT)) - base).abs().max() > SOMETHING


def test_order_matters(model: Model) -> None:
    """Without positions, a prompt would be a bag of tokens to its last one."""
    one, other = ([7, 8, 9, 10, 3], [9, 7, 10, 8, 3])
    a, b = (logits_of(model, plain_text(model.vocabulary, text))[-1] for text in (one, other))
    assert (a - b).abs().max() > SOMETHING


# --- packed == separate ---------------------------------------------------------------------------


def summed_loss(model: Model, packed: Packed) -> Tensor:
    logits = model.network.transformer.logits(model.network.hidden(packed))
    log_p = logits.log_softmax(-1).gather(-1, packed.targets[..., None])[..., 0]
    return -(log_p * (packed.objectives != NO_LOSS)).sum()


def test_packed_is_separate_in_values_and_gradients(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model(noise=0.1)
    sequences = [*all_forms(model).values(), plain_text(model.vocabulary, [1])]
    together = pack(sequences, 100, model.vocabulary.pad)
    assert together.ids.shape[0] == 2 and together.documents.max() > 2

    def loss_and_gradients(batches: list[Packed]) -> tuple[float, dict[str, Tensor]]:
        model.network.transformer.zero_grad()
        loss = torch.stack([summed_loss(model, packed) for packed in batches]).sum()
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.network.transformer.named_parameters()}  # type: ignore[union-attr]
        return loss.item(), gradients

    alone = [pack([sequence], len(sequence), 0) for sequence in sequences]
    loss, gradients = loss_and_gradients([together])
    model.network.transformer.recompute = True  # what is not kept is computed again, the same
    layer, calls = model.network.transformer.layers[0], list[int]()
    handle = layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    again, gradients_again = loss_and_gradients([together])
    handle.remove()
    model.network.transformer.recompute = False
    assert len(calls) == 2, "once forwards, once going back"
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


def test_padding_changes_nothing_and_is_finite(model: Model) -> None:
    sequence = plain_text(model.vocabulary, TEXT)
    packed = pack([sequence], 40, model.vocabulary.pad)
    with torch.inference_mode():
        logits = model.network.transformer.logits(model.network.hidden(packed)[0])
    assert logits.isfinite().all()
    assert (logits[: len(sequence)] - logits_of(model, sequence)).abs().max() < NOTHING


# --- cached == uncached ---------------------------------------------------------------------------


@torch.inference_mode()
def test_prefill_and_single_steps_give_the_full_forward(model: Model) -> None:
    ids = torch.tensor(describe(model.vocabulary, CODES, TEXT).ids).repeat(2, 1)
    ids[1, 3:7] += 1
    length = ids.shape[1]
    one = torch.ones_like(ids)
    positions, mask = one.cumsum(1) - 1, attention_mask(one, torch.zeros_like(ids))
    full = model.network.transformer.logits(model.network.transformer(ids, positions, mask))
    for prefill in (1, 9, length - 1):
        cache = Cache.empty(model.config.transformer, 2, length, full)
        read = model.network.transformer(
            ids[:, :prefill], positions[:, :prefill], mask[..., :prefill, :prefill], cache
        )
        parts = [model.network.transformer.logits(read)]
        for i in range(prefill, length):
            read = model.network.transformer(
                ids[:, i : i + 1], positions[:, i : i + 1], None, cache
            )
            parts.append(model.network.transformer.logits(read))
        assert cache.length == length
        assert (torch.cat(parts, dim=1) - full).abs().max() < NOTHING


@torch.inference_mode()
def test_states_that_are_wanted_are_those_of_all(model: Model) -> None:
    """After a cache or without one."""
    ids = torch.tensor(draw(model.vocabulary, TEXT, CODES, MASKED).ids).repeat(2, 1)
    ids[1, 3:7] += 1
    one = torch.ones_like(ids)
    positions, mask = one.cumsum(1) - 1, attention_mask(one, torch.zeros_like(ids))
    full = model.network.transformer(ids, positions, mask)
    for read, wanted in ((0, slice(4)), (0, slice(-1, None)), (5, slice(2, 7)), (5, slice(1))):
        cache = Cache.empty(model.config.transformer, 2, ids.shape[1], full)
        if read:
            model.network.transformer(
                ids[:, :read], positions[:, :read], mask[..., :read, :read], cache
            )
        some = model.network.transformer(
            ids[:, read:], positions[:, read:], mask[:, :, read:], cache, wanted
        )
        assert (some - full[:, read:][:, wanted]).abs().max() < NOTHING


@torch.inference_mode()
def test_a_full_cache_takes_no_more(model: Model) -> None:
    """Not even one token, which torch would broadcast into the empty rest without a word."""
    batch = DecodeBatch(model.network, [[1, 2, 3]], room=1)
    batch.step(torch.tensor([4]))
    with pytest.raises(AssertionError, match="room for 4 tokens"):
        batch.step(torch.tensor([5]))


@torch.inference_mode()
def test_a_ragged_batch_is_each_prompt_alone(model: Model) -> None:
    vocabulary = model.vocabulary
    prompts = [
        describe(vocabulary, CODES, []).ids[:-1].tolist(),
        [vocabulary.bos],
        plain_text(vocabulary, TEXT).ids[:-1].tolist(),
    ]
    steps = torch.randint(vocabulary.text_size, (5, 3), generator=torch.Generator().manual_seed(0))
    many = DecodeBatch(model.network, prompts, room=6)
    alone = [DecodeBatch(model.network, [prompt], room=6) for prompt in prompts]
    texts = [[*prompt] for prompt in prompts]
    for ids in steps:
        for row, single in enumerate(alone):
            assert (many.logits()[row] - single.logits()[0]).abs().max() < NOTHING
            whole = logits_of(model, plain_text(vocabulary, texts[row][1:]))[len(texts[row]) - 1]
            assert (many.logits()[row] - whole).abs().max() < NOTHING
            single.read(ids[row : row + 1])
            texts[row].append(int(ids[row]))
        many.read(ids)
    many.keep(torch.tensor([2, 0]))
    for row, single in ((0, alone[2]), (1, alone[0])):
        assert (many.logits()[row] - single.logits()[0]).abs().max() < NOTHING
        single.read(torch.tensor([3]))
    many.read(torch.tensor([3, 3]))
    for row, single in ((0, alone[2]), (1, alone[0])):
        assert (many.logits()[row] - single.logits()[0]).abs().max() < NOTHING
    assert generate_ids(model, prompts, 8) == [generate_ids(model, [p], 8)[0] for p in prompts]


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


@pytest.mark.filterwarnings("error")  # torch warns where mixed types cost it its fast kernels
@torch.inference_mode()
def test_bf16_is_close_and_its_logits_are_fp32(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model(noise=0.1)
    sequence = describe(model.vocabulary, CODES, TEXT)
    expected = logits_of(model, sequence)
    model.network.transformer.bfloat16()
    logits = logits_of(model, sequence)
    assert logits.dtype == torch.float32
    assert (logits - expected).std() < 0.05 * expected.std()


@pytest.mark.parametrize("masked", [True, False])
def test_attention_in_training_is_that_of_torch(masked: bool) -> None:
    """With gradients a CPU computes it another way: the same values, the same gradients."""
    torch.manual_seed(0)
    shapes = [(2, 6, 9, 8), (2, 3, 9, 8), (2, 3, 9, 8)]
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    documents = torch.tensor([[1] * 5 + [2] * 4, [1] * 7 + [0] * 2])
    mask = attention_mask(documents, torch.zeros_like(documents)) if masked else None
    found = attend(q, k, v, mask)
    twice = (k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1))
    expected = torch.nn.functional.scaled_dot_product_attention(q, *twice, attn_mask=mask)
    assert torch.allclose(found, expected, atol=1e-6)
    gradient = torch.randn_like(found)
    ours = torch.autograd.grad(found, (q, k, v), gradient)
    theirs = torch.autograd.grad(expected, (q, k, v), gradient)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def rows_of_all_kinds(model: Model) -> Packed:
    v = model.vocabulary
    masked = np.arange(16) % 3 == 0
    sequences = [describe(v, CODES, TEXT), draw(v, TEXT, CODES, masked), draw(v, TEXT, CODES),
                 draw(v, None, CODES, ~masked)]  # fmt: skip
    return pack(sequences, 64, v.pad)


def losses_and_gradients(model: Model, packed: Packed) -> tuple[Tensor, list[Tensor]]:
    ids = torch.arange(2, device=packed.ids.device)
    total, _ = model(packed, ids, ids)
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    return total.detach(), list(torch.autograd.grad(total, learned, allow_unused=True))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_backends_of_attention_are_one_rule(
    tiny_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Causal, bidirectional, packed and padded: the same loss and gradients from both."""
    import torch.nn.attention.flex_attention as library

    if device == "cpu":  # its kernel has no backward there, but what it means can be computed
        monkeypatch.setattr(library, "_validate_device", lambda *_: None)
    model = tiny_model(noise=0.1).to(device).train()
    packed = rows_of_all_kinds(model).to(torch.device(device))
    loss, gradients = losses_and_gradients(model, packed)
    model.network.attention_backend = "flex"
    other, others = losses_and_gradients(model, packed)
    assert other.item() == pytest.approx(loss.item(), rel=1e-5)
    for one, another in zip(gradients, others, strict=True):
        if one is not None:
            assert torch.allclose(one, another, atol=1e-4, rtol=1e-3)
    # and the rule is in force: a causal mask alone would give another loss
    packed.blocks = torch.zeros_like(packed.blocks)
    assert abs(losses_and_gradients(model, packed)[0].item() - loss.item()) > 1e-4
