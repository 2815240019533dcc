"""The optimizer: Muon for matrices inside the network, AdamW for the rest."""

from contextlib import nullcontext

import pytest
import torch
from timm.optim import muon as muon_of_timm
from torch import Tensor, nn

from multimodal.model.layers.experts import ExpertsConfig, SparseMLP
from multimodal.model.layers.transformer import Transformer, TransformerConfig
from multimodal.train.optim import can_compile, muon

COEFFICIENTS = muon_of_timm.resolve_ns_coefficients("polar_express", muon_of_timm._COEFFICIENTS)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 8)
        self.inside = nn.Linear(8, 16)
        self.kernel = nn.Conv2d(16, 4, 3)
        self.head = nn.Sequential(nn.Linear(4, 6))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def steps_of(network: Network, weight_decay: float) -> dict[str, Tensor]:
    """The change of each parameter by one step of rate 0.01, with the gradients of seed 0."""
    torch.manual_seed(0)
    optimizer = muon(network, [network.head], 0.01, weight_decay)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return {name: value.detach() - before[name] for name, value in network.named_parameters()}


def condition_number(matrix: Tensor) -> float:
    """Largest over smallest singular value. Near 1 only for an orthogonal matrix."""
    values = torch.linalg.svdvals(matrix.flatten(1))
    return float(values[0] / values[-1])


def test_inner_matrices_get_orthogonal_updates_and_the_rest_those_of_adamw() -> None:
    torch.manual_seed(0)
    steps = steps_of(Network(), 0.0)
    for name in ("inside.weight", "kernel.weight"):
        assert condition_number(steps[name]) < 1.5, name
    for name in ("words.weight", "head.0.weight"):
        assert condition_number(steps[name]) > 2, name
        assert steps[name].abs().max() < 0.025  # AdamW moves no value by much more than the rate
    assert not steps["frozen.weight"].any()
    # The scale of Liu et al.: a root mean square of 0.2 times the rate, as of AdamW in practice.
    assert float(steps["inside.weight"].square().mean().sqrt()) == pytest.approx(0.002, rel=0.25)


def test_a_head_of_its_own_is_trained_as_the_embeddings_are() -> None:
    config = TransformerConfig(40, 16, 1, 2, 1, 8, 24, tie_word_embeddings=False)
    network = Transformer(config)
    groups = muon(network, [], 0.01, 0.0).param_groups
    by_adamw = {id(p) for group in groups if group.get("use_fallback") for p in group["params"]}
    assert {id(network.lm_head.weight), id(network.embed_tokens.weight)} <= by_adamw
    inner = [p for p in network.layers.parameters() if p.ndim == 2]
    assert inner and not {id(p) for p in inner} & by_adamw


def test_each_matrix_of_an_expert_gets_an_orthogonal_update_and_the_router_that_of_adamw() -> None:
    torch.manual_seed(0)
    network = SparseMLP(16, ExpertsConfig(3, 2, 12))
    optimizer = muon(network, [], 0.01, 0.0)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    for name, parameter in network.named_parameters():
        idle = name.startswith("experts.2")  # no token went there
        parameter.grad = torch.zeros_like(parameter) if idle else torch.randn_like(parameter)
    optimizer.step()
    for name, value in network.named_parameters():
        step = value.detach() - before[name]
        if name.startswith("experts.2"):
            assert not step.any(), name
        elif name == "gate.weight":
            assert condition_number(step) > 1.5 and step.abs().max() < 0.025
        else:
            assert condition_number(step) < 1.5, name


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


@pytest.mark.parametrize("slow", [False, True])
def test_the_iteration_is_in_float32_where_bfloat16_is_slow(
    slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multimodal.train.optim.has_slow_bfloat16", lambda device: slow)
    step = steps_of(Network(), 0.0)["inside.weight"]
    assert condition_number(step) < 1.5
    torch.manual_seed(0)
    update = torch.randn(16, 8)
    found = muon_of_timm.zeropower_via_newtonschulz(update, 5, COEFFICIENTS)
    assert found.dtype == (torch.float32 if slow else torch.bfloat16)
    assert condition_number(found.float()) < 1.5


@pytest.mark.parametrize(
    ("on_gpu", "installed", "works"),
    [
        (False, ["g++"], True), (False, ["gcc"], False), (True, ["gcc"], True), (True, [], False),
        (True, ["CC"], True),
    ],
)  # fmt: skip
def test_compiling_needs_a_compiler_for_a_gpu_too(
    on_gpu: bool, installed: list[str], works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr("shutil.which", lambda name: name if name in installed else None)
    monkeypatch.delenv("CC", raising=False)
    if "CC" in installed:
        monkeypatch.setenv("CC", "/opt/bin/cc")
    with nullcontext() if works else pytest.warns(UserWarning, match="needs a C.* compiler"):
        assert can_compile() == works
