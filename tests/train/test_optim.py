"""The optimizer: Muon where it fits, AdamW elsewhere."""

import pytest
import torch
from torch import Tensor, nn

from multimodal.train.optim import muon


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 8)
        self.inside = nn.Linear(8, 16)
        self.kernel = nn.Conv2d(16, 4, 3)
        self.head = nn.Sequential(nn.Linear(4, 6))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def steps_of(network: Network, weight_decay: float) -> dict[str, Tensor]:
    """The change of each parameter in one step of rate 0.01, with random gradients of seed 0."""
    torch.manual_seed(0)
    optimizer = muon(network, [network.head], 0.01, weight_decay)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return {name: value.detach() - before[name] for name, value in network.named_parameters()}


def spread(matrix: Tensor) -> float:
    """Largest over smallest singular value. It is near 1 for orthogonal updates only."""
    values = torch.linalg.svdvals(matrix.flatten(1))
    return float(values[0] / values[-1])


def test_matrices_inside_move_orthogonally_and_all_else_as_adamw_does() -> None:
    torch.manual_seed(0)
    steps = steps_of(Network(), 0.0)
    for name in ("inside.weight", "kernel.weight"):
        assert spread(steps[name]) < 1.5, name
    for name in ("words.weight", "head.0.weight"):
        assert spread(steps[name]) > 2, name
        assert steps[name].abs().max() < 0.025  # AdamW moves no number by much more than the rate
    assert not steps["frozen.weight"].any()
    # The scale of Liu et al.: a root mean square of 0.2 times the rate, as AdamW's in practice.
    assert float(steps["inside.weight"].square().mean().sqrt()) == pytest.approx(0.002, rel=0.25)


def test_norms_and_biases_do_not_decay() -> None:
    torch.manual_seed(0)
    network = Network()
    start = {name: value.detach().clone() for name, value in network.named_parameters()}
    with_decay = steps_of(network, 0.5)
    network.load_state_dict(start)
    without = steps_of(network, 0.0)
    for name, value in start.items():
        decayed = with_decay[name] - without[name]
        if name.endswith("bias") or name.startswith("frozen"):
            assert not decayed.any(), name
        else:
            torch.testing.assert_close(decayed, -0.01 * 0.5 * value, rtol=1e-3, atol=1e-6)
