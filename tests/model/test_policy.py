"""The policy's objective: that of GRPO, its KL is exact in expectation, and the right tokens count.

Toy networks have so few ids that everything which they could write or draw can be listed.
"""

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from multimodal.inference.drawing import draw_codes
from multimodal.model.batches import BatchBuilder
from multimodal.model.network import MultimodalLM
from multimodal.model.objectives import ObjectivesConfig, PolicyConfig, PolicyTokens
from multimodal.model.preference_loss import kl_k3
from multimodal.model.sequences import describe_prompt, draw_prompt
from multimodal.model.templates import Templates
from multimodal.model.training_batch import TrainingSample, Written
from multimodal.options import DrawOptions
from multimodal.tokenizers.levels import Layout, Level
from multimodal.train.rewards.advantages import advantages_of, scaled

LAYOUT = Layout((Level("meaning", 1, 2, 2), Level("detail", 1, 1, 4)))
CODES = np.array([1, 2, 6])
PROMPT, MAX_TOKENS = (3, 1), 2


def toy(seed: int) -> MultimodalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vectors = [torch.randn(size, 3) for size in (2, 2, 4)]
        network = MultimodalLM.new("tiny", 4, LAYOUT, vectors)
        with torch.no_grad():
            for weight in network.transformer.parameters():
                weight += 0.1 * torch.randn_like(weight)
    return network.eval()


def builder_of(network: MultimodalLM) -> BatchBuilder:
    levels = LAYOUT, ["meaning"], ["meaning", "detail"]
    encode = lambda text: [0]  # noqa: E731
    return BatchBuilder(network.vocabulary, ObjectivesConfig(), Templates(), encode, *levels, 300)


def all_texts(network: MultimodalLM) -> list[list[int]]:
    eos, letters = network.vocabulary.eos, range(network.vocabulary.text_size)
    ended = [[*ids, eos] for n in range(MAX_TOKENS) for ids in itertools.product(letters, repeat=n)]
    return ended + [list(ids) for ids in itertools.product(letters, repeat=MAX_TOKENS)]


def all_drawings(network: MultimodalLM) -> list[list[int]]:
    start = network.vocabulary.image_start
    places = (range(0, 2), range(2, 4), range(4, 8))
    return [[start + code for code in codes] for codes in itertools.product(*places)]


def log_probability(
    network: MultimodalLM, ids: list[int], drawn: bool, temperature: float
) -> Tensor:
    """Of what was made, alone in a row: float32[]. Each token is one of those that could be there.

    Written with the transformer alone.
    """
    v = network.vocabulary
    prompt = [*describe_prompt(v, CODES[:2]), *PROMPT]
    choices = [[*range(v.text_size), v.eos]] * len(ids)
    if drawn:
        prompt = draw_prompt(v, list(PROMPT))
        starts = (v.image_start, v.image_start + 2, v.image_start + 4)
        choices = [
            list(range(a, b)) for a, b in zip(starts, [*starts[1:], starts[2] + 4], strict=True)
        ]
    read = torch.tensor([[*prompt, *ids[:-1]]])
    mask = torch.ones(read.shape[1], read.shape[1], dtype=torch.bool).tril()[None, None]
    states = network.transformer(read, torch.arange(read.shape[1])[None], mask)
    logits = network.transformer.logits(states)[0, len(prompt) - 1 :] / temperature
    return torch.stack(
        [
            logits[n, allowed].log_softmax(-1)[allowed.index(token)]
            for n, (token, allowed) in enumerate(zip(ids, choices, strict=True))
        ]
    ).sum()


def policy_of(
    network: MultimodalLM, made: list[list[int]], advantages: list[float], config: PolicyConfig
) -> Any:
    """The batch of one sample, with all that was made of it."""
    written = [Written(ids, value, PROMPT) for ids, value in zip(made, advantages, strict=True)]
    sample = TrainingSample("a", {"captions": ["a"]}, CODES[None], 0, written=written)
    return builder_of(network).build([sample], policy=config)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_expected_gradient_of_answers_and_drawings_is_that_of_the_expected_reward(
    drawn: bool, temperature: float
) -> None:
    network = toy(0)
    made = all_drawings(network) if drawn else all_texts(network)
    rewards = torch.rand(len(made), generator=torch.Generator().manual_seed(0))
    chances = torch.stack([log_probability(network, ids, drawn, temperature) for ids in made]).exp()
    assert chances.sum().item() == pytest.approx(1, abs=1e-5) and chances.max() > 1 / len(made)
    weights = list(network.transformer.parameters())
    expected = torch.autograd.grad((chances * rewards).sum(), weights)
    config = PolicyConfig(temperature, joint_weight=0.0, drawings=drawn)
    advantages = (chances.detach() * (rewards - 0.3)).tolist()
    batch = policy_of(network, made, advantages, config)
    total, parts = network(batch)
    assert total == parts["policy"] and parts["grad_norm/policy"] > 0
    ours = torch.autograd.grad(-len(batch.policy.targets) * total, weights)
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max().clamp(min=1e-2)


@torch.no_grad()
def test_drawings_are_made_as_often_as_training_finds_them_likely() -> None:
    network, count = toy(0), 2000
    model: Any = SimpleNamespace(
        network=network, vocabulary=network.vocabulary, config=network.config,
        device=network.device, codes_drawn=3, codes_per_image=3,
        text_tokenizer=SimpleNamespace(encode=lambda text: list(PROMPT)),
    )  # fmt: skip
    options = DrawOptions(temperature=0.7, guidance_scale=1.0)
    drawn = draw_codes(model, ["a"] * count, options) + network.vocabulary.image_start
    found = drawn.tolist()
    made = all_drawings(network)
    counts = np.array([found.count(ids) for ids in made])
    assert counts.sum() == count, "nothing else is drawn"
    chances = torch.stack([log_probability(network, ids, True, 0.7) for ids in made]).exp()
    means = count * chances.numpy()
    often = means >= 5
    chi_squared = ((counts - means) ** 2 / means)[often].sum()
    assert abs(chi_squared - often.sum()) < 4 * np.sqrt(2 * often.sum())


@pytest.mark.parametrize("drawn", [False, True])
@torch.no_grad()
def test_the_kl_is_exact_in_expectation(drawn: bool) -> None:
    """Over all that can be made. Of the whole, the divergence is the sum over its tokens."""
    network, reference, temperature = toy(0), toy(1), 0.8
    made = all_drawings(network) if drawn else all_texts(network)
    p, q = (
        torch.stack([log_probability(each, ids, drawn, temperature) for ids in made])
        for each in (network, reference)
    )
    exact = (p.exp() * (p - q)).sum()
    config = PolicyConfig(temperature, beta=0.5, joint_weight=0.0, drawings=drawn)
    batch = policy_of(network, made, [0.0] * len(made), config)
    logs = []
    for each in (network, reference):
        hidden = each.hidden(batch.packed).flatten(0, 1)
        logs.append(batch.policy.log_probabilities(hidden, each.transformer.head))
    owners = torch.repeat_interleave(torch.tensor([len(ids) for ids in made]))
    sums = torch.zeros(len(made)).index_add(0, owners, logs[0])
    assert torch.allclose(sums, p, atol=1e-4)
    estimates = torch.zeros(len(made)).index_add(0, owners, kl_k3(logs[1] - logs[0]))
    assert exact > 0.1
    assert (p.exp() * estimates).sum().item() == pytest.approx(exact.item(), rel=1e-4)
    # Where all count alike, the logged value is the mean of the estimates.
    policy = replace(batch.policy, reference=logs[1])
    total, parts = network(replace(batch, policy=policy))
    assert parts["kl"].item() == pytest.approx(kl_k3(logs[1] - logs[0]).mean().item(), rel=1e-4)
    assert total.item() == pytest.approx(0.5 * parts["kl"].item(), rel=1e-5)


# --- GRPO -----------------------------------------------------------------------------------------


def grpo(
    rewards: Any, log_p: Tensor, log_q: Tensor, owners: Tensor, beta: float, scale: str
) -> Tensor:
    """As TRL's GRPOTrainer computes it (loss_type="bnpo", num_iterations=1, epsilon=0.2)."""
    grouped = np.asarray(rewards, np.float64)
    advantages = grouped - grouped.mean(1, keepdims=True)
    if scale == "group":
        advantages /= grouped.std(1, ddof=1, keepdims=True) + 1e-4
    of_token = torch.tensor(advantages.flatten())[owners]
    ratio = (log_p - log_p.detach()).exp()
    surrogate = torch.minimum(ratio * of_token, ratio.clamp(0.8, 1.2) * of_token)
    kl = (log_q - log_p).exp() - (log_q - log_p) - 1
    return (-surrogate + beta * kl).mean()


@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
def test_the_gradient_is_that_of_grpo(scale: Any, beta: float) -> None:
    dice = torch.Generator().manual_seed(3)
    groups, k, width, size = 3, 4, 8, 11
    lengths = torch.randint(1, 6, (groups * k,), generator=dice)
    owners, count = torch.repeat_interleave(lengths), int(lengths.sum())
    hidden = torch.randn(count + 5, width, generator=dice).requires_grad_()
    head = torch.randn(size, width, generator=dice).requires_grad_()
    targets = torch.randint(size, (count,), generator=dice)
    positions = torch.randperm(count + 5, generator=dice)[:count]
    rewards = torch.randn(groups, k, generator=dice) * 3 + 10
    reference = torch.randn(count, generator=dice) - 3

    advantages = scaled(advantages_of(rewards, "group"), rewards, scale)
    config = PolicyConfig(temperature=0.7, beta=beta)
    of_token = advantages.flatten()[owners]
    halves = (((0, 5),), ((5, size),))
    whole = (((0, size),),)
    # Two alphabets: each token is sampled from one half of the ids.
    for alphabets in (whole, halves):
        tokens = PolicyTokens(positions, targets, of_token, alphabets, config, reference)
        loss, parts = tokens.loss(hidden, head)
        logits = (hidden[positions] @ head.T / 0.7).double()
        if alphabets == halves:
            low = torch.arange(size) < 5
            logits = logits.masked_fill(low[None] != (targets < 5)[:, None], -torch.inf)
        log_p = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        theirs = grpo(rewards, log_p, reference.double(), owners, beta, scale)
        ours, expected = (torch.autograd.grad(each, (hidden, head)) for each in (loss, theirs))
        for a, b in zip(ours, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
        kl = kl_k3(reference - log_p).mean().item()
        value = -(of_token * log_p).mean().item() + beta * kl
        assert loss.item() == pytest.approx(value, abs=1e-5, rel=1e-5)
        assert ("kl" in parts) == (beta > 0)


def test_advantages_are_in_the_deviations_that_are_named() -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.5, 0.5, 0.5]])
    group, others = advantages_of(rewards, "group"), advantages_of(rewards, "others")
    assert torch.allclose(group, rewards - rewards.mean(1, keepdim=True))
    assert torch.allclose(group, others * 2 / 3), "(k - 1) / k of the others"
    by_group = scaled(group, rewards, "group").numpy()
    expected = (rewards.numpy() - 3) / (np.std([1, 2, 6], ddof=1) + 1e-4)
    assert by_group[0] == pytest.approx(expected[0], abs=1e-5)
    assert by_group[1].tolist() == [0.0, 0.0, 0.0], "equal rewards teach nothing"
    assert scaled(group, rewards, "none") is group
    by_batch = scaled(group, rewards, "batch")
    assert torch.allclose(by_batch, scaled(others, rewards, "batch")), "the factor is gone"
    assert by_batch.square().mean().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"temperature": 0.0}, "temperature=0.0"), ({"beta": -0.1}, "beta=-0.1: expected 0 or more")],
)
def test_wrong_numbers_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyConfig(**arguments)  # type: ignore[arg-type]
