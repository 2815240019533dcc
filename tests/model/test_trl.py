"""The losses of preferences, rewards and distillation against TRL's own code, on the same tensors.

TRL computes its losses inside its trainers. Here they get log-probabilities in place of a model.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from multimodal.model.distillation import Teaching, teacher_losses
from multimodal.model.objectives import PolicyConfig, PolicyTokens
from multimodal.model.preference_loss import (
    CHOSEN,
    MISMATCHED,
    REJECTED,
    PreferenceConfig,
    preference_loss,
)
from multimodal.train.rewards.advantages import advantages_of, scaled

trl = pytest.importorskip("trl")
COUNT, LENGTH, VOCABULARY = 6, 9, 11


def trainer(**settings: Any) -> Any:
    """What the loss of a trainer reads of it."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        gather=lambda tensor: tensor,
        gather_for_metrics=lambda tensor: tensor,
        reduce=lambda tensor, reduction: tensor,
    )
    about = {
        "model": SimpleNamespace(training=True), "accelerator": accelerator, "beta": 0.3,
        "aux_loss_enabled": False, "precompute_ref_logps": True, "_total_train_tokens": 0,
        "_tp_size": 1, "_metrics": defaultdict(lambda: defaultdict(list)),
    }  # fmt: skip
    return SimpleNamespace(**about | settings)


def answers(log_p: Tensor) -> Any:
    """A model that finds the tokens of each row as likely as that."""
    zeros = torch.zeros_like(log_p)
    found = SimpleNamespace(log_probs=log_p, entropy=zeros, mean_logits=zeros, is_top1=zeros > 0)
    return lambda **_: found


def completions(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of tokens, 0 where there is none, of references, and masks."""
    dice = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, LENGTH + 1, (COUNT,), generator=dice)
    mask = torch.arange(LENGTH) < lengths[:, None]
    log_p, reference = (-4 * torch.rand(COUNT, LENGTH, generator=dice) * mask for _ in range(2))
    return log_p, reference.sum(1), mask.long()


def inputs_of(mask: Tensor) -> dict[str, Tensor]:
    """A prompt of one token before each completion."""
    whole = torch.cat([torch.zeros(COUNT, 1, dtype=torch.int64), mask], 1)
    return {"input_ids": whole, "attention_mask": whole, "completion_mask": whole}


def compared(found: Tensor, expected: Tensor, *leaves: Tensor) -> None:
    """Both losses, and their gradients."""
    torch.testing.assert_close(found, expected.to(found), atol=1e-5, rtol=1e-5)
    pairs = zip(*(torch.autograd.grad(loss, leaves) for loss in (found, expected)), strict=True)
    for ours, theirs in pairs:
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs.to(ours), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("variant", ["dpo", "ipo"])
def test_pairs(variant: Any, seed: int) -> None:
    log_p, reference, mask = completions(seed)
    log_p.requires_grad_()
    theirs = trainer(
        loss_types=["sigmoid" if variant == "dpo" else variant], loss_weights=[1.0],
        ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False, label_smoothing=0.0,
    )  # fmt: skip
    chosen, rejected = reference.chunk(2)
    inputs = inputs_of(mask) | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    expected = trl.DPOTrainer._compute_loss(theirs, answers(log_p), inputs, False)
    roles = torch.tensor([CHOSEN, REJECTED]).repeat_interleave(COUNT // 2)
    lengths, kinds = mask.sum(1).float(), torch.zeros_like(roles)
    config = PreferenceConfig(variant, 0.3)
    found, parts = preference_loss(log_p.sum(1), reference, lengths, roles, kinds, config)
    compared(found, expected, log_p)
    if variant == "ipo":  # theirs logs sums over tokens, though the loss is of means
        return
    for name, key in (("margin", "margins"), ("chosen", "chosen"), ("accuracy", "accuracies")):
        (value,) = theirs._metrics["train"][f"rewards/{key}"]
        assert parts[f"rewards/{name}"].item() == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_single_answers_with_a_label(seed: int) -> None:
    log_p, reference, mask = completions(seed)
    other, of_other, _ = completions(seed + 10)
    other = other + 0.3 * (other < 0)  # likelier than in the reference, or there is no kl
    log_p.requires_grad_()
    label = torch.tensor([1, 0, 0, 1, 1, 0])
    theirs = trainer(
        loss_type="kto", calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.5,
        _compute_kl_logps=lambda model, batch: other.sum(1),
    )  # fmt: skip
    inputs = inputs_of(mask) | {"ref_logps": reference, "ref_KL_logps": of_other, "label": label}
    expected = trl.KTOTrainer._compute_loss(theirs, answers(log_p), inputs, False)
    roles = torch.where(label == 1, CHOSEN, REJECTED)
    found, _ = preference_loss(
        torch.cat([log_p.sum(1), other.sum(1)]),
        torch.cat([reference, of_other]),
        torch.ones(2 * COUNT),
        torch.cat([roles, torch.full((COUNT,), MISMATCHED)]),
        torch.zeros(2 * COUNT, dtype=torch.int64),
        PreferenceConfig("kto", 0.3, 1.0, 1.5),
    )
    compared(found, expected, log_p)


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_rewards(beta: float) -> None:
    """Gradients: the value of theirs is 0 at the sampled point, ours is that of REINFORCE."""
    _, _, mask = completions(5)
    dice = torch.Generator().manual_seed(5)
    owners = torch.arange(COUNT).repeat_interleave(mask.sum(1))
    hidden = torch.randn(len(owners), 8, generator=dice).requires_grad_()
    head = torch.randn(VOCABULARY, 8, generator=dice).requires_grad_()
    targets = torch.randint(VOCABULARY, (len(owners),), generator=dice)
    reference = torch.randn(len(owners), generator=dice) - 3
    rewards = torch.randn(2, COUNT // 2, generator=dice)
    advantages = scaled(advantages_of(rewards, "group"), rewards, "group").flatten()

    def in_rows(values: Tensor) -> Tensor:
        return torch.zeros(COUNT, LENGTH).masked_scatter(mask.bool(), values)

    log_p = (hidden @ head.T).log_softmax(-1)[torch.arange(len(targets)), targets]
    args = SimpleNamespace(
        delta=None, use_bias_correction_kl=False, steps_per_generation=1, top_entropy_quantile=1.0
    )
    theirs = trainer(
        beta=beta, args=args, loss_type="bnpo", importance_sampling_level="token",
        epsilon_low=0.2, epsilon_high=0.2, off_policy_mask_threshold=None, use_vllm=False,
        top_entropy_quantile=1.0, current_gradient_accumulation_steps=1, num_iterations=1,
        _entropy_bonus_enabled=False, max_completion_length=LENGTH,
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            in_rows(log_p), torch.zeros(COUNT, LENGTH), None
        ),
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(COUNT, 1, dtype=torch.int64), "completion_ids": mask,
        "prompt_mask": torch.ones(COUNT, 1, dtype=torch.int64), "completion_mask": mask,
        "advantages": advantages, "ref_per_token_logps": in_rows(reference),
        "old_per_token_logps": None,
    }  # fmt: skip
    expected = trl.GRPOTrainer._compute_loss(theirs, None, inputs)
    config = PolicyConfig(temperature=1.0, beta=beta)
    tokens = PolicyTokens(
        torch.arange(len(owners)), targets, advantages[owners], (((0, VOCABULARY),),), config,
        reference,
    )  # fmt: skip
    found, _ = tokens.loss(hidden, head)
    gradients = (torch.autograd.grad(loss, (hidden, head)) for loss in (found, expected))
    for ours, other in zip(*gradients, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation(temperature: float) -> None:
    """TRL has no factor of temperature^2, which keeps gradients at the size of the data's."""
    from trl.experimental.gkd import GKDTrainer

    dice = torch.Generator().manual_seed(0)
    hidden, states = (torch.randn(LENGTH, width, generator=dice) for width in (8, 12))
    head, of_teacher = (torch.randn(VOCABULARY, width, generator=dice) for width in (8, 12))
    hidden.requires_grad_()
    head.requires_grad_()
    expected = GKDTrainer.generalized_jsd_loss(
        (hidden @ head.T)[None], (states @ of_teacher.T)[None], torch.zeros(1, LENGTH), 0.0,
        temperature,
    )  # fmt: skip
    teaching = Teaching(states, of_teacher, temperature, 1.0)
    found = teacher_losses(hidden, head, teaching, torch.arange(LENGTH)).mean() / temperature**2
    compared(found, expected, hidden, head)
