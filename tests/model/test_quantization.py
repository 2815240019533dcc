"""Matrices of 8 and 4 bits: what is rounded, what is stored, and products with them."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from multimodal.model.layers import quantization
from multimodal.model.layers.quantization import (
    GROUP_SIZES,
    QuantizedLinear,
    dequantized,
    int8_product,
    quantize_rows,
    quantized,
    read_weights,
    stored_weights,
    with_quantized_layers,
)


@pytest.fixture(params=[True, False], ids=["integers", "floats"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways to multiply, whatever the CPU has."""
    monkeypatch.setattr(quantization, "INTEGER_PRODUCTS", request.param)
    return bool(request.param)


def matrix(rows: int, width: int, seed: int = 0) -> Tensor:
    made = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    made[1] = 0
    made[2] *= 1000
    return made


def small_network(tied: bool = True) -> nn.Module:
    torch.manual_seed(0)
    network = nn.ModuleDict(
        {
            "table": nn.Embedding(40, 64),
            "inner": nn.Linear(64, 96),
            "head": nn.Linear(64, 40, False),
        }
    )
    if tied:
        network["head"].weight = network["table"].weight
    return network


def test_eight_bits_are_within_half_a_step_of_each_row() -> None:
    weight = matrix(20, 70)
    integers, scale = quantize_rows(weight, 8)
    assert integers.dtype == torch.int8 and integers.abs().max() <= 127
    error = (integers.float() * scale[:, None] - weight).abs()
    # The largest number of a row may be cut: its scale is rounded to bfloat16.
    assert (error <= scale[:, None] * 0.51 + weight.abs() * 2**-8).all()
    assert torch.equal(scale, scale.bfloat16().float())


@pytest.mark.parametrize("size", GROUP_SIZES)
def test_four_bits_have_the_least_error_of_all_steps_and_offsets(size: int) -> None:
    """Compared with a search by brute force."""
    scaled = matrix(30, size)
    scaled *= 127 / scaled.abs().amax(1, keepdim=True).clamp(min=1)  # -127 or 127 in each group
    packed, about = quantization._pack(scaled)
    assert about.shape == (30, 1)
    found = quantization._unpack(packed, about).float()
    best = torch.full((len(scaled),), torch.inf)
    for step, offset in product(range(1, 17), range(16)):
        n = ((scaled / step).round() + offset).clamp(0, 15)
        error = (((n - offset) * step).clamp(-127, 127) - scaled).square().sum(1)
        best = best.minimum(error)
    error = (found - scaled).square().sum(1)
    assert (error <= 1.001 * best + 1e-6).all()


@pytest.mark.parametrize("size", GROUP_SIZES)
def test_four_bits_come_back_exactly_however_often_they_are_stored(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):  # grids that a file may have, those with large steps cut to int8
        numbers = torch.randint(0, 256, (8, 3 * size // 2), generator=generator).to(torch.uint8)
        about = torch.randint(0, 256, (8, 3), generator=generator).to(torch.uint8)
        kept = quantization._unpack(*quantization._pack(quantization._unpack(numbers, about)))
        again = quantization._unpack(*quantization._pack(kept))
        assert torch.equal(again, kept)
    integers, _ = quantize_rows(matrix(20, 128), 4)
    state = {"a.weight": integers, "a.scale": torch.ones(20)}
    stored = stored_weights(state, 4)
    assert stored["a.weight"].numel() * 2 == integers.numel()
    assert torch.equal(read_weights(stored, 4)["a.weight"], integers)


def test_columns_that_are_left_make_up_for_what_a_product_lost() -> None:
    weight, dice = matrix(20, 128), torch.Generator().manual_seed(1)
    few = torch.randn(500, 12, generator=dice)  # what most of an input is made of
    x = few @ torch.randn(12, 128, generator=dice) + torch.randn(500, 128, generator=dice) / 4

    def lost(moments: Tensor | None) -> float:
        integers, scale = quantize_rows(weight, 4, moments)
        assert torch.equal(scale, quantize_rows(weight, 4)[1])
        stored = stored_weights({"a.weight": integers, "a.scale": scale}, 4)
        assert torch.equal(read_weights(stored, 4)["a.weight"], integers)
        products = x @ (integers.float() * scale[:, None] - weight).T
        return float(products[:, 3:].norm() + products[:, 0].norm())

    assert lost(x.T @ x) < 0.4 * lost(None)
    assert lost(x.T @ x / 500) == pytest.approx(lost(x.T @ x), rel=0.02)  # the scale is nothing


@pytest.mark.parametrize("moments", [torch.zeros(64, 64), torch.eye(64), 5 * torch.eye(64)])
def test_where_nothing_can_be_made_up_for_weights_are_rounded_alone(moments: Tensor) -> None:
    weight = matrix(20, 64)
    assert torch.equal(quantize_rows(weight, 4, moments)[0], quantize_rows(weight, 4)[0])
    one_column = torch.zeros(64, 64)
    one_column[5, 5] = 1  # all others are never read
    assert quantize_rows(weight, 4, one_column)[0].abs().max() <= 127


def test_four_bits_need_a_width_of_whole_groups() -> None:
    with pytest.raises(ValueError, match="33 numbers wide: 4 bits need a multiple of 32"):
        quantize_rows(matrix(4, 33), 4)


@pytest.mark.parametrize("finely", [False, True])
def test_a_product_is_that_of_the_rounded_numbers(
    products: bool, finely: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, (weight, scale) = matrix(5, 64, seed=1), quantize_rows(matrix(48, 64), 8)
    exact = x.double() @ (weight.double() * scale.double()[:, None]).T
    ours = int8_product(x, weight, scale, finely)
    if products:
        steps = 127 / x.abs().amax(1, keepdim=True).clamp(min=1e-30)
        rounded = (x * steps).round().double()
        if finely:
            rounded += ((x * steps - rounded.float()) * 254).round().double() / 254
        exact_rounded = rounded @ weight.double().T * scale.double() / steps.double()
        torch.testing.assert_close(ours.double(), exact_rounded, rtol=1e-6, atol=1e-9)
    tolerance = (1e-5 if not products else 1e-3 if finely else 0.03) * float(exact.abs().max())
    assert (ours - exact).abs().max() < tolerance


def test_a_row_gives_the_same_numbers_alone_and_among_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantization, "INTEGER_PRODUCTS", True)
    x, (weight, scale) = matrix(40, 256, seed=1), quantize_rows(matrix(96, 256), 8)
    for finely in (False, True):
        together = int8_product(x, weight, scale, finely)
        alone = torch.cat([int8_product(row[None], weight, scale, finely) for row in x])
        assert torch.equal(together, alone)


def test_a_compiled_step_has_nearly_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    x, (weight, scale) = matrix(4, 64, seed=1)[:2], quantize_rows(matrix(48, 64), 8)
    exact = int8_product(x.requires_grad_(), weight, scale)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(int8_product(x, weight, scale), exact, rtol=1e-4, atol=1e-5)


def test_a_gradient_goes_through_the_weights_as_floats() -> None:
    layer = QuantizedLinear(64, 48)
    integers, scale = quantize_rows(matrix(48, 64), 8)
    layer.load_state_dict({"weight": integers, "scale": scale})
    x = matrix(6, 64, seed=1).view(2, 3, 64).requires_grad_()
    layer(x).square().sum().backward()
    y = x.detach().clone().requires_grad_()
    (y @ (integers.float() * scale[:, None]).T).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("columns", [False, True])
def test_no_rows_give_no_rows(products: bool, columns: bool) -> None:
    """As of an expert without a token."""
    layer = QuantizedLinear(64, 48, columns=columns)
    for x in (torch.zeros(0, 64), torch.zeros(3, 0, 64, requires_grad=True)):
        assert layer(x).shape == (*x.shape[:-1], 48)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_the_layers_of_a_module_give_what_its_floats_give(
    products: bool, tied: bool, bits: int
) -> None:
    network = small_network(tied)
    network["table"].weight.data[:, 5] *= 20  # a column like those that real tables have
    state = network.state_dict()
    with_quantized_layers(network, ("head",))
    smaller = quantized(state, network.state_dict(), bits)
    network.load_state_dict(smaller)
    assert (network["head"].weight is network["table"].weight) is tied
    floats = dequantized(smaller)
    assert floats.keys() == state.keys()
    for name, weight in floats.items():
        error = (weight - state[name]).norm() / state[name].norm()
        assert error < (0.01 if bits == 8 or "inner" not in name else 0.1)
    ids, x = torch.tensor([3, 0, 39]), matrix(6, 64, seed=1)[:3]
    torch.testing.assert_close(network["table"](ids), floats["table.weight"][ids])
    expected = x @ floats["head.weight"].T
    assert (network["head"](x) - expected).abs().max() < 1e-3 * expected.abs().max()
    part = slice(8, 20)
    torch.testing.assert_close(network["head"](x, part), network["head"](x)[:, part])
    expected = x @ floats["inner.weight"].T + floats["inner.bias"]
    assert (network["inner"](x) - expected).norm() < 0.03 * expected.norm()
