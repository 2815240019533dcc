"""How much better each of a group of texts or drawings is than was expected.

The baseline is the mean of the group as in GRPO (Shao et al. 2024, arXiv:2402.03300), the mean of
the others (Kool et al. 2019, "Buy 4 REINFORCE samples"), or the greedy one (Rennie et al. 2017,
arXiv:1612.00563). The last two do not depend on what they are compared with, so they do not bias
the gradient. The first gives (k - 1) / k of the advantages of the second.

Shapes: S samples, k texts or drawings of each, a group.
"""

from typing import Literal

import torch
from torch import Tensor

from multimodal.distributed import global_sum

Baseline = Literal["others", "group", "greedy"]
ScaleRewards = Literal["batch", "group", "none"]
GROUP_EPSILON = 1e-4  # TRL's


def advantages_of(rewards: Tensor, baseline: Baseline, greedy: Tensor | None = None) -> Tensor:
    """Rewards minus their baselines: float32[S, k] -> float32[S, k].

    Args:
        greedy: float32[S, 1], the rewards of the greedy ones.
    """
    if baseline == "greedy":
        assert greedy is not None, "the module that trains makes them"
        return rewards - greedy
    if baseline == "group":
        return rewards - rewards.mean(1, keepdim=True)
    others = rewards.sum(1, keepdim=True) - rewards
    return rewards - others / (rewards.shape[1] - 1)


def scaled(advantages: Tensor, rewards: Tensor, scale: ScaleRewards) -> Tensor:
    """Advantages over a deviation: both float32[S, k] -> float32[S, k].

    Args:
        scale: ``batch``, their root mean square on all ranks; ``group``, as GRPO, the standard
            deviation of the rewards of each group; or ``none``.
    """
    if scale == "none":
        return advantages
    if scale == "group":
        return advantages / (rewards.std(1, keepdim=True) + GROUP_EPSILON)
    return in_standard_deviations(advantages)


def in_standard_deviations(advantages: Tensor) -> Tensor:
    """Advantages over their root mean square on all ranks, which may be 0: float32[S, k]."""
    count = torch.tensor(float(advantages.numel()), device=advantages.device)
    squares, total = global_sum(torch.stack([advantages.square().sum(), count]))
    return advantages / (squares / total.clamp(min=1)).sqrt().clamp(min=1e-6)
