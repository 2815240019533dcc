"""Distillation: what a larger network says of each token is learned beside what the data say.

    temperature^2 * KL(softmax(teacher / temperature) || softmax(student / temperature))

(Hinton et al. 2015, arXiv:1503.02531.) The factor keeps the gradient as large at any temperature.
Both read the same rows, so ids of texts and of images are learned alike.

Shapes: R rows, L tokens of a row, N positions with a target, D width of the student, T of the
teacher, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from multimodal.model.head_loss import SLICE
from multimodal.model.sequences import OBJECTIVES

MULTIPLE = 64  # to which positions are padded: each new size takes memory that others do not fit


@dataclass(frozen=True)
class Teaching:
    """What a teacher says of the rows of a batch.

    Attributes:
        hidden: float[R * L, T], its last hidden states.
        head: float[V', T], so that ``hidden @ head.T`` are its logits. Ids from V' on
            it never says.
        temperature: at which both distributions are compared.
        weights: of the teacher in each objective, from 0 to 1. The data have the rest.
    """

    hidden: Tensor
    head: Tensor
    temperature: float
    weights: Mapping[str, float]


def losses_of_taught(
    hidden: Tensor,
    head: Tensor,
    teaching: Teaching,
    positions: Tensor,
    objectives: Tensor,
    counts: Mapping[str, int],
) -> Tensor:
    """The losses of ``teacher_losses`` where the teacher has a weight, and 0 elsewhere: float32[N].

    Args:
        hidden, head: see ``teacher_losses``.
        positions: int64[N], of the states in the rows.
        objectives: int64[N], positions in OBJECTIVES.
        counts: how many there are of each.
    """
    names = [name for name in OBJECTIVES if teaching.weights.get(name)]
    if len(names) == len(OBJECTIVES):
        return teacher_losses(hidden, head, teaching, positions)
    is_taught = torch.zeros_like(objectives, dtype=torch.bool)
    for name in names:
        is_taught |= objectives == OBJECTIVES.index(name)
    count = sum(counts[name] for name in names)
    size = -(-count // MULTIPLE) * MULTIPLE
    taught = torch.nonzero_static(is_taught, size=size, fill_value=0)[:, 0]
    losses = teacher_losses(hidden[taught], head, teaching, positions[taught])[:count]
    return losses.new_zeros(len(hidden)).index_copy(0, taught[:count], losses)


def teacher_losses(hidden: Tensor, head: Tensor, teaching: Teaching, of_teacher: Tensor) -> Tensor:
    """The loss at each position: float32[N].

    A slice of the logits is in memory at a time. Backward makes them again.

    Args:
        hidden: float[N, D]; head: float[V, D], of the student.
        of_teacher: int64[N], which of the teacher's states belong to them.
    """
    size = max(1, SLICE // (2 * len(head)))
    losses = []
    for student, index in zip(
        torch.split(hidden, size), torch.split(of_teacher, size), strict=True
    ):
        states = (student, head, teaching.hidden[index], teaching.head)
        losses.append(checkpoint(_divergences, *states, teaching.temperature, use_reentrant=False))
    return torch.cat(losses)


def _divergences(
    student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, temperature: float
) -> Tensor:
    ours, theirs = (
        (F.linear(states, matrix).float() / temperature).log_softmax(-1)
        for states, matrix in ((student, head), (teacher, teacher_head))
    )
    ours = ours[:, : theirs.shape[1]]
    divergences = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    return temperature**2 * divergences
