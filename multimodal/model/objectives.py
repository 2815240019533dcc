"""The token objectives: caption, answer, text, image and reconstruct; and the policy's.

Each of the first is a cross-entropy over the full vocabulary. All are computed from one forward
pass over the packed rows. Alignment, the contrastive objective, is in model/alignment.py.

The policy's objective is of what the network wrote or drew itself, and of how much better that was
than expected. Its loss is a mean over the M tokens of all ranks,

    - advantage * log p + beta * (q / p - 1 - log (q / p))

where p is the probability of a token and q that in a frozen reference. The second term is an
unbiased estimate of KL(p || q), as in GRPO (Shao et al. 2024, arXiv:2402.03300). Each batch is used
for one step, so GRPO's ratio to the network that wrote it is 1, and there is nothing to clip.

Shapes: D width, V vocabulary, N positions with a target, M tokens that the network made.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.devices import moved
from multimodal.distributed import global_counts, global_sum, world_size
from multimodal.model.head_loss import head_losses
from multimodal.model.preference_loss import global_mean, kl_k3, token_log_probabilities
from multimodal.model.sequences import NO_LOSS, OBJECTIVES, Packed, TokenSequence
from multimodal.schemas import Between, check_fields

TEXTS = ("caption", "answer", "text")  # objectives whose targets are those of texts
UNKNOWN_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # bins of the logged reconstruction curves
WEIGHTS = {"caption": 1.0, "answer": 1.0, "text": 0.2, "image": 0.2, "reconstruct": 0.3}
SHAPE_MULTIPLE = 256  # positions with a target are padded to a multiple of this
Alphabet = tuple[tuple[int, int], ...]  # ranges of ids [start, end) from which a token is sampled


@dataclass(frozen=True)
class ObjectivesConfig:
    """Weights and shares of the objectives.

    Args:
        weights: of the token objectives. An objective that is not named gets its weight from
            WEIGHTS. Each loss is a mean over its tokens, so that the many codes of an image do not
            outweigh a caption. Training fails if the data hold no target for a named objective.
        alignment_weight: of the contrastive loss.
        alignment_form: ``siglip`` or ``clip``.
        alignment_dim: width of its embeddings.
        z_loss_weight: of mean (log Z)^2, which keeps logits from drifting (PaLM,
            arXiv:2204.02311).
        reconstruct_share: share of the draw sequences whose image is masked.
        next_token_share: share of the draw sequences whose image is learned token by token. The
            rest ends at <boi>: its text still trains text and alignment. In a run that neither
            draws nor aligns, captions that train ``caption`` do not train ``text``, too.
        drop_condition: share of the drawn images whose text is <null>, for guidance.

    Raises:
        ValueError: for an unknown objective, a negative weight or share, shares above 1, or if all
            weights are 0.
    """

    weights: dict[str, float] = field(default_factory=dict)
    alignment_weight: float = 0.3
    alignment_form: Literal["siglip", "clip"] = "siglip"
    alignment_dim: Annotated[int, Between(1, 2**16)] = 256
    z_loss_weight: float = 1e-4
    reconstruct_share: float = 0.5
    next_token_share: float = 0.5
    drop_condition: float = 0.1

    def __post_init__(self) -> None:
        check_fields(self)
        if unknown := set(self.weights) - set(OBJECTIVES):
            raise ValueError(f"weights has {sorted(unknown)}: expected some of {OBJECTIVES}")
        weights = [self.alignment_weight, *map(self.weight_of, OBJECTIVES)]
        if min(*weights, self.z_loss_weight) < 0:
            raise ValueError(f"weights {weights}, z-loss {self.z_loss_weight}: expected 0 or more")
        if not any(weights):
            raise ValueError("the weights of all objectives are zero: nothing would be learned")
        shares = (self.reconstruct_share, self.next_token_share, self.drop_condition)
        if min(shares) < 0 or self.reconstruct_share + self.next_token_share > 1:
            raise ValueError(f"shares {shares}: must be >= 0, and the first two at most 1 together")

    def weight_of(self, name: str) -> float:
        """The weight of a token objective."""
        return self.weights.get(name, WEIGHTS[name])

    @property
    def captions_train_text(self) -> bool:
        """Whether a caption that is read without its image trains ``text``."""
        used = self.reconstruct_share + self.next_token_share + self.alignment_weight
        return bool(used) or not self.weight_of("caption")

    def teaches(self, sequence: TokenSequence) -> bool:
        """Whether the sequence has a target of a token objective whose weight is not 0."""
        weighted = [number for number, name in enumerate(OBJECTIVES) if self.weight_of(name)]
        return bool(np.isin(sequence.objectives, weighted).any())


@dataclass(frozen=True)
class Predicted:
    """The positions of packed rows that have a target, found where the batch is made.

    A GPU knows how many there are only after all that it has to do before: the host would wait.

    Attributes:
        positions: int64[N], in the flattened rows. Every new N costs kernels that are compiled and
            kept, so it is padded with 0 to a multiple of SHAPE_MULTIPLE.
        counts: how many of them each mean of ``token_losses`` is over, by its name. ``log_z`` is
            over all that are no padding.
    """

    positions: Tensor
    counts: Mapping[str, int]

    @classmethod
    def of(cls, packed: Packed) -> "Predicted":
        """Of rows on the host."""
        positions = (packed.objectives.flatten() != NO_LOSS).nonzero()[:, 0]
        objectives = packed.objectives.flatten()[positions]
        groups = unknown_groups(objectives, packed.unknown.flatten()[positions])
        counts = {name: int(mask.sum()) for name, mask in means_of(objectives, groups).items()}
        return cls(F.pad(positions, (0, -len(positions) % SHAPE_MULTIPLE)), counts)

    def to(self, device: torch.device) -> "Predicted":
        return replace(self, positions=moved(self.positions, device))


def unknown_groups(objectives: Tensor, unknown: Tensor) -> dict[str, Tensor]:
    """Reconstructed codes by the share of their level that is unknown: bool[N] by name.

    Args:
        objectives: int64[N].
        unknown: float32[N].
    """
    masked = objectives == OBJECTIVES.index("reconstruct")
    return {
        f"reconstruct/{low:.2f}-{high:.2f}": masked & (unknown > low) & (unknown <= high)
        for low, high in pairwise(UNKNOWN_SHARES)
    }


def means_of(objectives: Tensor, groups: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What each mean of ``token_losses`` is over: bool[N] by name; objectives: int64[N]."""
    masks = {name: objectives == number for number, name in enumerate(OBJECTIVES)}
    return {**masks, **groups, "log_z": objectives != NO_LOSS}


@dataclass(frozen=True)
class PolicyConfig:
    """How a network learns from what it made itself.

    Args:
        temperature: at which it samples.
        beta: how strongly it is held to the reference.
        joint_weight: of all other losses beside, but those of routers.
        drawings: it made images for texts. If not, texts about images.

    Raises:
        ValueError: for numbers out of range.
    """

    temperature: float = 1.0
    beta: float = 0.0
    joint_weight: float = 0.2
    drawings: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: expected more than 0")
        for name in ("beta", "joint_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 or more")


@dataclass(frozen=True)
class PolicyTokens:
    """The M tokens of all texts, or of all drawings, that the network made.

    Attributes:
        positions: int64[M], in the flattened rows, of what predicts each token.
        targets: int64[M], the ids.
        advantages: float32[M], of the text or the drawing.
        alphabets: what a token may be. Each id is in one of them.
        config: what is learned of them.
        reference: float32[M], the log-probability of each in the reference, if ``beta`` is not 0.
    """

    positions: Tensor
    targets: Tensor
    advantages: Tensor
    alphabets: tuple[Alphabet, ...]
    config: PolicyConfig
    reference: Tensor | None = None

    def to(self, device: torch.device) -> "PolicyTokens":
        names = ("positions", "targets", "advantages")
        tensors: dict[str, Any] = {name: moved(getattr(self, name), device) for name in names}
        return replace(self, **tensors)

    def loss(self, hidden: Tensor, head: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, float32[], and its parts by name.

        ``policy`` is its first term, and ``grad_norm/policy`` the norm of the gradient of that at
        the states. ``kl`` is the second one, without beta.

        Args:
            hidden: float[positions, D], of all rows.
            head: float[V, D].
        """
        losses, norms = list[Tensor](), list[Tensor]()
        for tokens, rows, targets in self._by_alphabet(head):
            padding = (0, -len(tokens) % SHAPE_MULTIPLE)
            loss, norm = policy_loss(
                hidden[F.pad(self.positions[tokens], padding)] / self.config.temperature,
                rows,
                F.pad(targets, padding),
                F.pad(self.advantages[tokens], padding),
                len(self.targets),
            )
            losses.append(loss)
            norms.append(norm)
        policy = torch.stack(losses).sum()
        parts = {"policy": policy, "grad_norm/policy": torch.stack(norms).square().sum().sqrt()}
        if not self.config.beta:
            return policy, parts
        assert self.reference is not None, "the module that trains computes it"
        kl = global_mean(kl_k3(self.reference - self.log_probabilities(hidden, head)))
        return policy + self.config.beta * kl, {**parts, "kl": kl}

    def log_probabilities(self, hidden: Tensor, head: Tensor) -> Tensor:
        """Of each token among those that it was sampled from, at their temperature: float32[M].

        Arguments as for ``loss``.
        """
        found = torch.zeros_like(self.advantages)
        for tokens, rows, targets in self._by_alphabet(head):
            states = hidden[self.positions[tokens]] / self.config.temperature
            likely = token_log_probabilities(states, rows, targets)
            found = found.index_put((tokens,), likely)
        return found

    def _by_alphabet(self, head: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each alphabet its tokens, int64[m], its rows of the head, and the targets in them."""
        for alphabet in self.alphabets:
            targets = torch.full_like(self.targets, -1)
            size = 0
            for start, end in alphabet:
                inside = (self.targets >= start) & (self.targets < end)
                targets = torch.where(inside, self.targets - start + size, targets)
                size += end - start
            tokens = (targets >= 0).nonzero()[:, 0]
            yield tokens, torch.cat([head[start:end] for start, end in alphabet]), targets[tokens]


def policy_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, advantages: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    """Make what was sampled more likely, as much as it was better than expected.

    REINFORCE (Williams 1992): minus advantage * log-likelihood. In expectation its gradient is that
    of the reward, times the samples over the tokens.

    Args:
        hidden: float[M, D], the states that predict the tokens.
        head: float[A, D], of the ids that the tokens were sampled from.
        targets: int64[M], rows of ``head``.
        advantages: float32[M], the reward of each sample minus what was expected. 0 for padding.
        tokens: those of this rank that are no padding.

    Returns:
        The loss, float32[], a mean over the tokens of all ranks; and the norm of its gradient at
        the states.
    """
    count = global_sum(torch.full((), tokens, device=hidden.device)).clamp(min=1)
    weights = advantages * (world_size() / count)
    losses = head_losses(hidden, head, targets, weights, torch.zeros_like(weights))
    norm = global_sum(losses.state_grad_norm_sq.sum()).sqrt() / world_size()
    return losses.total, norm


def token_losses(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    objectives: Tensor,
    config: ObjectivesConfig,
    groups: Mapping[str, Tensor] | None = None,
    label_smoothing: float = 0.0,
    smoothed_ids: int = 1,
    teacher: tuple[Tensor, Mapping[str, float]] | None = None,
    counts: Mapping[str, int] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of all token losses, and its parts for the log.

    Args:
        hidden: float[N, D], the last hidden states.
        head: float[V, D].
        targets: int64[N].
        objectives: int64[N], positions in OBJECTIVES. NO_LOSS is left out of every mean.
        config: the weights.
        groups: bool[N] by name. The mean loss over each is logged too.
        label_smoothing: the share of each target of a text that is spread over the first
            ``smoothed_ids`` ids: those that a text may have. The parts are without it.
        teacher: float32[N], a teacher's loss at each position, and its weight in each objective,
            from 0 to 1. The data have the rest.
        counts: those of ``Predicted``. Without them the host waits for a GPU to count.

    Returns:
        The loss to minimise, float32[]. Its gradients are averaged over ranks afterwards, so the
        local sum is multiplied by the number of ranks.
        The parts by name, float32[]. Each is a mean over its tokens on all ranks. An objective
        without a token has no part. ``log_z`` is the mean of log Z, ``largest_logit`` the largest
        logit of this rank. ``grad_norm/NAME`` is the norm of the gradient of an objective at the
        last hidden states. ``teacher/NAME`` is the teacher's loss.
    """
    means = means_of(objectives, groups or {})
    if counts is None:
        counted = torch.stack([mask.sum() for mask in means.values()]).tolist()
        counts = dict(zip(means, counted, strict=True))
    totals = global_counts([counts[name] for name in means])
    # What each position contributes to a mean.
    shares = {
        name: mask.float() * (world_size() / total)
        for (name, mask), total in zip(means.items(), totals, strict=True)
        if total
    }
    present = [name for name in OBJECTIVES if name in shares]
    zeros = torch.zeros(objectives.shape, dtype=torch.float32, device=objectives.device)
    weights = sum((config.weight_of(name) * shares[name] for name in present), zeros)
    z_weights = config.z_loss_weight * shares.get("log_z", zeros)
    smoothing = label_smoothing * sum((means[name] for name in TEXTS), zeros)
    of_teacher = zeros
    if teacher is not None:
        taught = [name for name in present if teacher[1].get(name)]
        for name in taught:
            of_teacher = of_teacher + teacher[1][name] * config.weight_of(name) * shares[name]
    of_data = weights - of_teacher
    losses = head_losses(hidden, head, targets, of_data, z_weights, smoothing, smoothed_ids)
    parts = {name: (losses.nll * share).sum() for name, share in shares.items()}
    parts["log_z"] = (losses.log_z * shares.get("log_z", zeros)).sum()
    if losses.total.requires_grad:
        # NO_LOSS comes first, then each objective: none has to be searched for.
        order = objectives.argsort(stable=True)[len(objectives) - counts["log_z"] :]
        sizes = [counts[name] for name in OBJECTIVES]
        by_name = torch.split(losses.state_grad_norm_sq[order], sizes)
        squares = [by_name[OBJECTIVES.index(name)].sum() for name in present]
        # The gradient is a mean over ranks.
        norms = global_sum(torch.stack(squares or [zeros.sum()])).sqrt() / world_size()
        parts |= {f"grad_norm/{name}": norm for name, norm in zip(present, norms, strict=False)}
    largest = losses.largest.masked_fill(objectives == NO_LOSS, -torch.inf)
    parts["largest_logit"] = largest.max() if len(largest) else largest.new_zeros(())
    if teacher is None:
        return losses.total, parts
    for name in taught:
        parts[f"teacher/{name}"] = (teacher[0].detach() * shares[name]).sum()
    return losses.total + (of_teacher * teacher[0]).sum(), parts
