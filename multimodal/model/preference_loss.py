"""The objective of preferences: of two completions of a prompt, the better one becomes likelier.

A completion is a text about an image, or an image for a text. What counts is how much likelier the
network finds it than the reference does, the weights that the training started from. Of three
variants (Rafailov et al. 2023, arXiv:2305.18290; Azar et al. 2023, arXiv:2310.12036; Ethayarajh et
al. 2024, arXiv:2402.01306) the losses are

    dpo   -log sigmoid(beta * (r_chosen - r_rejected))
    ipo   (r_chosen - r_rejected - 1 / (2 * beta))^2
    kto   1 - sigmoid(beta * (r_chosen - kl)), and 1 - sigmoid(beta * (kl - r_rejected))

where r is the log-probability of a completion minus that of the reference. In ``ipo`` r is a mean
over the tokens, or long completions would decide alone. ``kto`` needs no pairs. Its kl is the mean
r of completions of other prompts, 0 at least, and has no gradient. TRL has the same losses. Texts
and drawings have a kl each: a drawing has many more tokens, and its r would move the texts' kl.

Shapes: C completions, M tokens of all of them, D width, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from multimodal.devices import moved
from multimodal.distributed import global_counts, global_sum, world_size
from multimodal.model.head_loss import SLICE
from multimodal.model.sequences import Packed

Variant = Literal["dpo", "ipo", "kto"]
CHOSEN, REJECTED, MISMATCHED = 0, 1, 2  # the roles of completions
KINDS = ("texts", "drawings")


@dataclass(frozen=True)
class PreferenceConfig:
    """How preferences are learned.

    Args:
        variant: ``dpo``, ``ipo`` or ``kto``.
        beta: how strongly the network is held to the reference. The margin that ``ipo`` aims at,
            per token, is 1 / (2 * beta).
        desirable_weight, undesirable_weight: of chosen and rejected completions in ``kto``. Where
            there are more of one kind, give the other a larger weight.

    Raises:
        ValueError: for another variant, or numbers that are not above 0.
    """

    variant: Variant = "dpo"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise ValueError(f"variant={self.variant!r}: expected dpo, ipo or kto")
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: expected a number above 0")


@dataclass(frozen=True)
class Completions:
    """Completions in rows of their own, as branches behind their prompts.

    In ``dpo`` and ``ipo`` the k-th chosen one and the k-th rejected one have the same prompt.

    Attributes:
        packed: the rows. They have no objective of pretraining.
        positions: int64[M], in the flattened rows, of what predicts each token.
        owners: int64[M], the completion that each token is of.
        roles: int64[C]: CHOSEN, REJECTED, or MISMATCHED, one of another prompt.
        kinds: int64[C], their indices in KINDS.
        config: what is learned of them.
        joint_weight: of all other losses beside.
        reference: float32[M], the log-probability of each token in the reference.
    """

    packed: Packed
    positions: Tensor
    owners: Tensor
    roles: Tensor
    kinds: Tensor
    config: PreferenceConfig
    joint_weight: float
    reference: Tensor | None = None

    @property
    def targets(self) -> Tensor:
        """int64[M], the tokens."""
        return self.packed.targets.flatten()[self.positions]

    def to(self, device: torch.device) -> "Completions":
        names = ("positions", "owners", "roles", "kinds")
        tensors: dict[str, Any] = {name: moved(getattr(self, name), device) for name in names}
        return replace(self, packed=self.packed.to(device), **tensors)

    def loss(self, log_probabilities: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its figures, see ``preference_loss``; log_probabilities: float32[M].

        Without a completion on any rank there are no figures: zeros would count in a mean.
        """
        assert self.reference is not None, "the module that trains computes it"
        tokens = torch.stack([log_probabilities, self.reference, torch.ones_like(self.reference)])
        sums = tokens.new_zeros(3, len(self.roles)).index_add(1, self.owners, tokens)
        policy, reference, lengths = sums.unbind()
        loss, parts = preference_loss(
            policy, reference, lengths, self.roles, self.kinds, self.config
        )
        # Where the reference wrote the completions, it is KL(reference || network) of a token.
        own = self.roles[self.owners] != MISMATCHED
        ratio = (log_probabilities - self.reference).detach()[own]
        parts["preference_kl"] = global_mean(kl_k3(ratio))
        return loss, parts if any(global_counts([len(self.roles)])) else {}


def kl_k3(log_ratios: Tensor) -> Tensor:
    """The estimator k3 of KL(p || q) at tokens that p has sampled: unbiased, and never below 0.

    See Schulman 2020 (joschu.net/blog/kl-approx.html). log_ratios: log q - log p of each token.
    """
    return log_ratios.exp() - 1 - log_ratios


def token_log_probabilities(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The log-probability of each target: float32[M].

    A slice of the logits is in memory at a time. The gradient computes them again.

    Args:
        hidden: float[M, D]; head: float[V, D]; targets: int64[M].
    """

    def of_slice(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy((hidden @ head.T).float(), targets, reduction="none")

    size = max(1, SLICE // len(head))
    found = [hidden.new_zeros(0, dtype=torch.float32)]
    for start in range(0, len(hidden), size):
        part = hidden[start : start + size], head, targets[start : start + size]
        found.append(checkpoint(of_slice, *part, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(found)


def preference_loss(
    policy: Tensor,
    reference: Tensor,
    lengths: Tensor,
    roles: Tensor,
    kinds: Tensor,
    config: PreferenceConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of completions, a mean over the pairs (``kto``: the completions) of all ranks.

    Args:
        policy, reference: float32[C], log-probabilities of the completions in the network, and in
            what it started from.
        lengths: float32[C], their numbers of tokens.
        roles, kinds: int64[C], see ``Completions``.

    Returns:
        The loss, float32[]. Its gradients are averaged over ranks afterwards, so the local sum is
        multiplied by the number of ranks.
        Figures by name, float32[], whose means over the ranks are those of all completions. A
        reward is beta * r, with the r of the variant. ``rewards/accuracy`` is the share of the
        pairs in which the chosen one has the larger reward; in ``kto``, of the completions whose r
        is on its side of kl.
    """
    ratios = policy - reference
    if config.variant == "ipo":
        ratios = ratios / lengths.clamp(min=1)
    chosen, rejected = ratios[roles == CHOSEN], ratios[roles == REJECTED]
    rewards = {
        "rewards/chosen": global_mean(config.beta * chosen.detach()),
        "rewards/rejected": global_mean(config.beta * rejected.detach()),
    }
    if config.variant == "kto":
        mismatched = roles == MISMATCHED
        values = torch.stack([ratios.detach(), torch.ones_like(ratios)])[:, mismatched]
        sums = values.new_zeros(2, len(KINDS)).index_add(1, kinds[mismatched], values)
        total, count = global_sum(sums)
        kl = (total / count.clamp(min=1)).clamp(min=0)[kinds]
        over, under = chosen - kl[roles == CHOSEN], kl[roles == REJECTED] - rejected
        losses = torch.cat(
            [
                config.desirable_weight * (1 - torch.sigmoid(config.beta * over)),
                config.undesirable_weight * (1 - torch.sigmoid(config.beta * under)),
            ]
        )
        right = torch.cat([over > 0, under > 0])
        rewards["kto_kl"] = global_mean(kl[~mismatched])
        margin = rewards["rewards/chosen"] - rewards["rewards/rejected"]
    else:
        if config.variant == "dpo":
            losses = -F.logsigmoid(config.beta * (chosen - rejected))
        else:
            losses = (chosen - rejected - 1 / (2 * config.beta)) ** 2
        right = chosen > rejected
        margin = global_mean(config.beta * (chosen - rejected).detach())
    loss = global_mean(losses)
    rewards |= {"rewards/margin": margin, "rewards/accuracy": global_mean(right.float())}
    return loss, {"preference": loss, **rewards}


def global_mean(values: Tensor) -> Tensor:
    """A rank's share of the mean over all ranks, float32[]: the mean of the shares is the mean.

    values: float32[any number]. 0 if no rank has any.
    """
    count = global_sum(torch.full((), float(len(values)), device=values.device)).clamp(min=1)
    return values.sum() * (world_size() / count)
