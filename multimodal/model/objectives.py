"""The objectives, all computed from one forward pass over the packed rows.

Token objectives (caption, answer, text, image, reconstruct) are cross-entropies over the whole
vocabulary. Alignment is a contrastive loss between the state at <eoi> of describe and that at
<boi> of draw.

Shapes: R rows, L their length, D width, V vocabulary, N positions with a target, B pairs,
E embedding.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.model.head_loss import head_losses
from multimodal.model.sequences import NO_LOSS, OBJECTIVES, Sequence

Found = TypeVar("Found", dict[str, Any], list[Any])
WEIGHTS = {"caption": 1.0, "answer": 1.0, "text": 0.2, "image": 0.2, "reconstruct": 0.3}


@dataclass(frozen=True)
class ObjectivesConfig:
    """Args:
    weights: of the token objectives, WEIGHTS for those not named; each is a mean over its own
        tokens, so that the many codes of an image do not drown a caption. What is named, training
        wants to find in the data.
    alignment_weight, alignment_form, alignment_dim: of the contrastive loss.
    z_loss_weight: of mean (log Z)^2, which keeps logits from drifting (PaLM, arXiv:2204.02311).
    reconstruct_share, next_token_share: of the draw sequences that go on with the image, masked or
        next-token; the rest end at <boi> (their text still trains text and alignment).
    drop_condition: share of the drawn images whose text is <null>, for guidance.
    """

    weights: dict[str, float] = field(default_factory=dict)
    alignment_weight: float = 0.3
    alignment_form: Literal["siglip", "clip"] = "siglip"
    alignment_dim: int = 256
    z_loss_weight: float = 1e-4
    reconstruct_share: float = 0.5
    next_token_share: float = 0.5
    drop_condition: float = 0.1

    def __post_init__(self) -> None:
        if unknown := set(self.weights) - set(OBJECTIVES):
            raise ValueError(f"weights has {sorted(unknown)}: expected some of {OBJECTIVES}")
        learned = [self.alignment_weight, *map(self.weight_of, OBJECTIVES)]
        if min(*learned, self.z_loss_weight) < 0:
            raise ValueError(f"weights {learned}, z-loss {self.z_loss_weight}: expected 0 or more")
        if not any(learned):
            raise ValueError("the weights of all objectives are zero: nothing would be learned")
        shares = (self.reconstruct_share, self.next_token_share, self.drop_condition)
        if min(shares) < 0 or self.reconstruct_share + self.next_token_share > 1:
            raise ValueError(f"shares {shares}: must be >= 0, and the first two at most 1 together")
        if self.alignment_form not in ("siglip", "clip"):
            raise ValueError(f"alignment_form={self.alignment_form!r}: expected siglip or clip")

    def weight_of(self, name: str) -> float:
        """Of a token objective."""
        return self.weights.get(name, WEIGHTS[name])

    def teaches(self, sequence: Sequence) -> bool:
        """Whether a token objective of any weight has a target in it."""
        taught = [number for number, name in enumerate(OBJECTIVES) if self.weight_of(name)]
        return bool(np.isin(sequence.objectives, taught).any())


def global_sum(value: Tensor) -> Tensor:
    """The sum over all ranks (no gradient)."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def mean_over_ranks(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of every figure, detached, of a ``largest_...`` the maximum: what each rank logs is then of
    the whole batch. The ranks have equal shares of it."""
    values = torch.stack([value.detach().float() for value in parts.values()])
    largest = values.clone()
    if world_size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    means = global_sum(values) / world_size()
    return {
        name: (high if name.startswith("largest") else mean)
        for name, mean, high in zip(parts, means, largest, strict=True)
    }


def gather_objects(found: Found) -> Found:
    """A dictionary or a list of what each rank found, put together in the order of the ranks."""
    if world_size() == 1:
        return found
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, found)
    if isinstance(found, dict):
        return {key: value for part in parts for key, value in part.items()}
    return [item for part in parts for item in part]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def token_losses(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    objectives: Tensor,
    config: ObjectivesConfig,
    groups: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """hidden: float[N, D]; head: float[V, D]; targets, objectives: int64[N] -> weighted sum, parts

    Positions of objective NO_LOSS count nowhere. groups: bool[N] each, of which the mean over their
    tokens is a part by that name, too. ``grad_norm/NAME`` is the norm of the gradient of an
    objective at the last hidden states.
    Each part is a mean over its tokens on all ranks. Gradients are averaged over ranks afterwards,
    so the local sum is multiplied by their number.
    """
    predicted = objectives != NO_LOSS
    chosen = {name: objectives == number for number, name in enumerate(OBJECTIVES)}
    every = {**chosen, **(groups or {}), "log_z": predicted}
    counts = global_sum(torch.stack([one.sum() for one in every.values()])).tolist()
    # What each position has of a mean; no curve where there was nothing to learn.
    shares = {
        name: one.float() * (world_size() / count)
        for (name, one), count in zip(every.items(), counts, strict=True)
        if count
    }
    taught = [name for name in OBJECTIVES if name in shares]
    none = torch.zeros(objectives.shape, dtype=torch.float32, device=objectives.device)
    weights = sum((config.weight_of(name) * shares[name] for name in taught), none)
    z_weights = config.z_loss_weight * shares.get("log_z", none)
    losses = head_losses(hidden, head, targets, weights, z_weights)
    parts = {name: (losses.nll * share).sum() for name, share in shares.items()}
    parts["log_z"] = (losses.log_z * shares.get("log_z", none)).sum()
    if losses.total.requires_grad:
        squares = [losses.state_grad_norm_sq[chosen[name]].sum() for name in taught]
        norms = global_sum(torch.stack(squares or [none.sum()])).sqrt() / world_size()
        parts |= {f"grad_norm/{name}": norm for name, norm in zip(taught, norms, strict=False)}
    largest = losses.largest.masked_fill(~predicted, -torch.inf)
    parts["largest_logit"] = largest.max() if len(largest) else largest.new_zeros(())
    return losses.total, parts


class Alignment(nn.Module):
    """Projections into one space, and the pairwise loss there.

    Sigmoid form: SigLIP (Zhai et al. 2023, arXiv:2303.15343); softmax form: CLIP (Radford et al.
    2021, arXiv:2103.00020). The same image or the same text is never a negative.
    """

    def __init__(self, width: int, dim: int, form: str) -> None:
        super().__init__()
        self.form = form
        self.image_projection = nn.Linear(width, dim, bias=False)
        self.text_projection = nn.Linear(width, dim, bias=False)
        scale, bias = (10.0, -10.0) if form == "siglip" else (1 / 0.07, 0.0)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(bias), requires_grad=form == "siglip")

    def embed_image(self, state: Tensor) -> Tensor:
        """The state at <eoi>, float[B, D] -> float32[B, E] of unit norm"""
        return F.normalize(self.image_projection(state).float(), dim=-1)

    def embed_text(self, state: Tensor) -> Tensor:
        """The state at <boi>, float[B, D] -> float32[B, E] of unit norm"""
        return F.normalize(self.text_projection(state).float(), dim=-1)

    def forward(
        self, images: Tensor, texts: Tensor, image_ids: Tensor, text_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """images, texts: float32[B, E]; ids: int64[B], equal for what is the same, text -1 dropped
        -> the loss, and the share of the images whose own text is the nearest (of the negatives)"""
        images, texts, image_ids, text_ids = map(gather, (images, texts, image_ids, text_ids))
        logits = self.log_scale.clamp(max=math.log(100)).exp() * images @ texts.T + self.bias
        own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        same = image_ids[:, None] == image_ids[None, :]
        same = same | (text_ids[:, None] == text_ids[None, :])
        valid = (text_ids >= 0)[None, :] & (text_ids >= 0)[:, None] & (own | ~same)
        pairs = (text_ids >= 0).sum().clamp(min=1)
        best = logits.masked_fill(~valid, -torch.inf).argmax(-1) == own.int().argmax(-1)
        accuracy = (best & (text_ids >= 0)).sum() / pairs
        if self.form == "siglip":
            signed = torch.where(own, logits, -logits)
            return -(F.logsigmoid(signed) * valid).sum() / pairs, accuracy
        logits = logits.masked_fill(~valid & ~own, -torch.inf)
        rows = -(logits.log_softmax(1).diagonal() * (text_ids >= 0)).sum()
        columns = -(logits.log_softmax(0).diagonal() * (text_ids >= 0)).sum()
        return (rows + columns) / 2 / pairs, accuracy


class _Gather(torch.autograd.Function):
    """All-gather with gradients.

    torch.distributed.nn has one, deprecated, that permutes a transposed gradient on gloo (2.15).
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.count = len(local)
        parts = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(parts, local)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # The loss of every rank depends on these rows: sum over them. A matrix product may hand
        # over a transposed gradient, and collectives look at memory only.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() * ctx.count :][: ctx.count]


def gather(local: Tensor) -> Tensor:
    """[B, ...] of every rank -> [ranks * B, ...], in the order of the ranks, with gradients."""
    if world_size() == 1:
        return local
    together: Tensor = _Gather.apply(local.contiguous())
    return together
