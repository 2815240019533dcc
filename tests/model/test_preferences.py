"""Preferences: the losses are those of the papers, as TRL has them, and the right tokens count."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from multimodal.api import Model
from multimodal.inference.likelihoods import choice_likelihoods, text_likelihoods
from multimodal.model.preference_loss import (
    CHOSEN,
    MISMATCHED,
    REJECTED,
    PreferenceConfig,
    preference_loss,
    token_log_probabilities,
)
from multimodal.model.preferences import PreferenceBuilder, check_preferences, preferences_of
from multimodal.model.sequences import draw, pack
from multimodal.model.training_batch import TrainingSample

# --- the losses -----------------------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + np.exp(-x))


def by_the_papers(
    variant: str, beta: float, pairs: list[tuple[Any, Any]], mismatched: list[Any], weights: Any
) -> float:
    """Each completion is (log p, log p of the reference, tokens). Written from the papers, and for
    the two choices that they leave open from trl 1.16: ipo divides by the tokens, kto's kl is of
    the whole batch."""

    def ratio(completion: tuple[float, float, int]) -> float:
        return completion[0] - completion[1]

    losses = []
    kl = max(0.0, float(np.mean([ratio(c) for c in mismatched]))) if mismatched else 0.0
    for chosen, rejected in pairs:
        if variant == "dpo":
            losses.append(-np.log(sigmoid(beta * (ratio(chosen) - ratio(rejected)))))
        elif variant == "ipo":
            margin = ratio(chosen) / chosen[2] - ratio(rejected) / rejected[2]
            losses.append((margin - 1 / (2 * beta)) ** 2)
        else:
            losses.append(weights[0] * (1 - sigmoid(beta * (ratio(chosen) - kl))))
            losses.append(weights[1] * (1 - sigmoid(beta * (kl - ratio(rejected)))))
    return float(np.mean(losses))


@pytest.mark.parametrize("variant", ["dpo", "ipo", "kto"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_losses_are_those_of_the_papers(variant: Any, seed: int) -> None:
    dice = np.random.default_rng(seed)

    def completion() -> tuple[float, float, int]:
        length = int(dice.integers(1, 30))
        logp = -length * dice.uniform(0.5, 4)
        return float(logp), float(logp + dice.normal() * length**0.5), length

    pairs = [(completion(), completion()) for _ in range(5)]
    mismatched = [completion() for _ in range(4)] if variant == "kto" else []
    beta, weights = float(dice.uniform(0.05, 0.6)), (1.0, 1.5)
    # Pairs in their order, as in sequences: c r m c r m ...
    listed = [(c, role) for pair in pairs for c, role in zip(pair, (CHOSEN, REJECTED), strict=True)]
    listed[2:2] = [(c, MISMATCHED) for c in mismatched]
    policy, reference, lengths = torch.tensor([c for c, _ in listed]).T
    roles = torch.tensor([role for _, role in listed])
    config = PreferenceConfig(variant, beta, *weights)
    loss, parts = preference_loss(
        policy, reference, lengths, roles, torch.zeros_like(roles), config
    )
    expected = by_the_papers(variant, beta, pairs, mismatched, weights)
    assert loss.item() == pytest.approx(expected, abs=1e-5, rel=1e-5)
    ratios = (policy - reference) / (lengths if variant == "ipo" else 1)
    rewards = {n: beta * ratios[roles == n].mean() for n in (CHOSEN, REJECTED)}
    assert parts["rewards/chosen"].item() == pytest.approx(rewards[CHOSEN].item(), abs=1e-5)
    margin = (rewards[CHOSEN] - rewards[REJECTED]).item()
    assert parts["rewards/margin"].item() == pytest.approx(margin, abs=1e-5)
    if variant != "kto":
        better = ratios[roles == CHOSEN] > ratios[roles == REJECTED]
        assert parts["rewards/accuracy"].item() == pytest.approx(better.float().mean().item())


def test_kto_learns_from_one_kind_alone_and_without_a_mismatched_one() -> None:
    policy, reference = torch.tensor([-3.0, -5.0]), torch.tensor([-4.0, -4.0])
    kinds, config = torch.zeros(2, dtype=torch.int64), PreferenceConfig("kto")
    for role, sign in ((CHOSEN, 1), (REJECTED, -1)):
        roles = torch.full((2,), role)
        loss, _ = preference_loss(policy, reference, torch.ones(2), roles, kinds, config)
        expected = np.mean([1 - sigmoid(sign * 0.1 * ratio) for ratio in (1.0, -1.0)])
        assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_kto_of_texts_and_drawings_together_is_that_of_each_alone() -> None:
    """The drawings of other prompts, which are long, do not move what is asked of a text."""
    roles, kinds = torch.arange(3).repeat(4), torch.arange(2).repeat_interleave(6)
    reference = -30 * torch.rand(12, generator=torch.Generator().manual_seed(0))
    ratios = torch.tensor([1.0, -2, 3, 4, 0.5, 1, -9, 30, 80, 70, 20, 60])
    config = PreferenceConfig("kto", 0.05)

    def loss_of(some: Tensor) -> tuple[float, float]:
        policy = (reference + ratios)[some]
        lengths = torch.ones_like(policy)
        found = preference_loss(policy, reference[some], lengths, roles[some], kinds[some], config)
        return found[0].item(), found[1]["kto_kl"].item()

    apart = [loss_of(kinds == kind) for kind in range(2)]
    assert [kl for _, kl in apart] == pytest.approx([2, 70], abs=1e-4)
    together = loss_of(kinds >= 0)
    assert together == pytest.approx(tuple(np.mean(apart, axis=0)), abs=1e-4)


def test_log_probabilities_in_slices_have_the_gradient_of_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dice = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(50, 8, generator=dice), torch.randn(30, 8, generator=dice)
    targets = torch.randint(30, (50,), generator=dice)
    weights = torch.randn(50, generator=dice)

    def gradients(of: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        values = of(*leaves)
        return values, *torch.autograd.grad(values @ weights, leaves)

    def whole(hidden: Tensor, head: Tensor) -> Tensor:
        return (hidden @ head.T).log_softmax(-1)[torch.arange(50), targets]

    monkeypatch.setattr("multimodal.model.preference_loss.SLICE", 7 * 30)
    found = gradients(lambda h, w: token_log_probabilities(h, w, targets))
    for ours, expected in zip(found, gradients(whole), strict=True):
        assert torch.allclose(ours, expected, atol=1e-5)


# --- the completions ------------------------------------------------------------------------------


def sample(record: dict[str, Any], images: int = 1, seed: int = 0) -> TrainingSample:
    codes = np.random.default_rng(seed).integers(0, 64, (images, 16))
    return TrainingSample(f"s{seed}", record, codes, seed)


def of_completions(model: Model, values: Tensor, completions: Any) -> list[float]:
    sums = torch.zeros(len(completions.roles)).index_add(0, completions.owners, values)
    return [float(value) for value in sums]


def builder_of(model: Model, variant: Any = "dpo", row_length: int = 96) -> PreferenceBuilder:
    return PreferenceBuilder(model.batch_builder(row_length, 1.0, 1), PreferenceConfig(variant), 1)


CAPTIONS = sample({"preferences": [{"chosen": "a red bus", "rejected": "two dogs run"}]}, seed=1)
QUESTION = sample(
    {"preferences": [{"prompt": "What is it?", "chosen": "a cat", "rejected": "snow"}]}, seed=2
)
DRAWINGS = sample(
    {
        "content": [{"text": "a blue circle"}, {"image": "0"}, {"image": "1"}],
        "preferences": [
            {"prompt": "a blue circle", "chosen": {"image": "1"}, "rejected": {"image": "0"}}
        ],
    },
    images=2,
    seed=3,
)


@torch.no_grad()
def test_completions_are_as_likely_as_inference_says(tiny_model: Callable[..., Model]) -> None:
    """In one batch: captions, answers with the words around a question, and drawings."""
    model = tiny_model(noise=0.1)
    builder = builder_of(model)
    samples = [CAPTIONS, QUESTION, DRAWINGS]
    completions, long = builder.build(samples, [builder.of(each) for each in samples])
    assert not long and completions.roles.tolist() == [CHOSEN, REJECTED] * 3
    found = of_completions(model, model.network.log_probabilities(completions), completions)

    codes = [torch.from_numpy(each.codes) for each in samples]
    captions = text_likelihoods(model, codes[0].expand(2, -1), ["a red bus", "two dogs run"])
    prompt = model.config.templates.ask("What is it?")
    (answers,) = choice_likelihoods(model, codes[1], [prompt], [["a cat", "snow"]])
    drawings = []
    for image in DRAWINGS.codes[[1, 0]]:
        text = model.text_tokenizer.encode("a blue circle")
        sequence = draw(model.vocabulary, text, image)
        packed = pack([sequence], len(sequence), model.vocabulary.pad)
        logits = model.network.transformer.logits(model.network.hidden(packed))[0]
        likely = logits.log_softmax(-1)[torch.arange(len(sequence)), packed.targets[0]]
        drawings.append(float(likely[sequence.state : -1].sum()))
    expected = [*captions.tolist(), *answers.tolist(), *drawings]
    assert found == pytest.approx(expected, abs=1e-3)


@torch.no_grad()
def test_kto_compares_with_completions_of_the_prompt_before(
    tiny_model: Callable[..., Model],
) -> None:
    model = tiny_model(noise=0.1)
    builder = builder_of(model, "kto")
    single = {"prompt": "What is it?", "completion": "a yellow chair", "label": False}
    third = sample({"preferences": [single]}, seed=4)
    samples = [CAPTIONS, third, DRAWINGS]
    with pytest.warns(UserWarning, match="kto: the drawings of a batch have no completion of ano"):
        completions, _ = builder.build(samples, [builder.of(each) for each in samples])
    assert completions.kinds.tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    roles = [CHOSEN, REJECTED, REJECTED, CHOSEN, REJECTED, *[MISMATCHED] * 3]
    assert completions.roles.tolist() == roles, "of drawings there is no other prompt"
    found = of_completions(model, model.network.log_probabilities(completions), completions)
    image = torch.from_numpy(CAPTIONS.codes)
    ((mismatched,),) = choice_likelihoods(model, image, [""], [["a yellow chair"]])
    assert found[5] == pytest.approx(mismatched.item(), abs=1e-3), "the answer before, its image"


def test_joint_losses_learn_what_was_chosen_where_there_is_no_other_text(
    tiny_model: Callable[..., Model],
) -> None:
    builder = builder_of(tiny_model())

    def learned(each: TrainingSample) -> TrainingSample:
        return builder.joint_sample(each, builder.of(each))

    assert learned(CAPTIONS).record["captions"] == ["a red bus"]
    assert learned(QUESTION).record["qa"] == [["What is it?", "a cat"]]
    drawing = learned(replace(DRAWINGS, document=("a blue circle", None, None)))
    assert drawing.record == {"captions": ["a blue circle"]} and not drawing.document
    assert np.array_equal(drawing.codes, DRAWINGS.codes[1:])
    own = {**CAPTIONS.record, "captions": ["a bus in the snow"]}
    assert learned(replace(CAPTIONS, record=own)).record == own
    for entry, parts in (
        ({"completion": "snow", "label": False}, (None,)),
        ({"prompt": "a cat", "completion": {"image": "0"}, "label": False}, ("a cat",)),
    ):
        assert learned(sample({"preferences": [entry]})).document == parts


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"chosen": "a bus"}, "no rejected answer"),
        ({"chosen": "a bus", "rejected": "  "}, "no rejected answer"),
        ({"chosen": "a bus", "rejected": " a bus"}, "are equal"),
        ({"chosen": "a bus", "rejected": {"image": "0"}}, "compared with an image"),
        ({"prompt": "a", "chosen": {"image": "0"}, "rejected": {"image": "7"}}, "has 1 images"),
        ({"completion": "a bus"}, "no label"),
        ({"completion": "a bus", "label": True}, "only kto"),
        ("a bus", "not an object"),
    ],
)
def test_what_compares_nothing_is_refused(entry: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"sample k: .*{message}"):
        check_preferences(lambda key, record: None, True, "k", {"preferences": [entry]})
    good = {"completion": "a bus", "label": True}
    check_preferences(lambda key, record: None, False, "k", {"preferences": [good]})
    drawing = {"prompt": "a bus", "completion": {"image": "0"}, "label": True}
    for content in (5, "a page", ["a page"], [{"type": "text", "text": "a page"}], None):
        record = {"content": content, "preferences": [good]}
        check_preferences(lambda key, record: None, False, "k", record)
        with pytest.raises(ValueError, match="drawings need a content"):
            record = {"content": content, "preferences": [drawing]}
            check_preferences(lambda key, record: None, False, "k", record)
    for part in ({"text": "a page"}, {"image": "0"}):
        with pytest.raises(ValueError, match="texts none"):
            record = {"content": [part], "preferences": [good]}
            check_preferences(lambda key, record: None, False, "k", record)
    assert preferences_of({}, 1) == []


def test_a_preference_that_is_longer_than_a_row_is_named(
    tiny_model: Callable[..., Model],
) -> None:
    builder = builder_of(tiny_model(), row_length=64)
    long = sample({"preferences": [{"chosen": "a red bus " * 30, "rejected": "snow"}]})
    samples = [CAPTIONS, long]
    completions, numbers = builder.build(samples, [builder.of(each) for each in samples])
    assert numbers == [1] and len(completions.roles) == 2
