"""The loss of the head, a slice of the positions at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

from multimodal.model.head_loss import head_losses


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_in_slices_are_those_of_all_logits(
    precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients of hidden states and of the head, with any weights."""
    # 16 positions at a time, of 61.
    monkeypatch.setattr("multimodal.model.head_loss.SLICE", 50 * 16)
    torch.manual_seed(0)
    hidden = torch.randn(61, 24).requires_grad_()
    head = torch.randn(50, 24).requires_grad_()
    # As small as means over many tokens make them: in fp16 their products would vanish.
    targets, weights = torch.randint(50, (61,)), torch.rand(61) / 20_000
    z_weights = torch.rand(61) / 180_000
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        losses = head_losses(hidden, head, targets, weights, z_weights)
        logits = F.linear(hidden, head).float()
    nll = F.cross_entropy(logits, targets, reduction="none")
    expected = (weights * nll + z_weights * logits.logsumexp(-1).square()).sum()
    # A product in bf16 that is cut into slices is the same; its gradient is rounded elsewhere.
    close = (
        {"rtol": 1e-4, "atol": 1e-5} if precision == torch.float32 else {"rtol": 0.02, "atol": 0.1}
    )
    torch.testing.assert_close(losses.total, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.nll, nll)
    torch.testing.assert_close(losses.largest, logits.amax(-1))
    ours, theirs = (grad(60_000 * total, (hidden, head)) for total in (losses.total, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **close)
    with torch.no_grad():
        assert head_losses(hidden, head, targets, weights, z_weights).total.requires_grad is False


@pytest.mark.parametrize("smoothed_ids", [50, 31])
def test_label_smoothing_is_that_of_torch(
    smoothed_ids: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all ids that of cross_entropy, of some ids a target that is spread over them."""
    monkeypatch.setattr("multimodal.model.head_loss.SLICE", 50 * 16)
    torch.manual_seed(0)
    hidden, head = torch.randn(61, 24).requires_grad_(), torch.randn(50, 24).requires_grad_()
    targets, weights, z_weights = torch.randint(50, (61,)), torch.rand(61), torch.rand(61)
    smoothing = 0.2 * (torch.arange(61) % 3 > 0)
    losses = head_losses(hidden, head, targets, weights, z_weights, smoothing, smoothed_ids)
    logits = F.linear(hidden, head)
    spread = torch.zeros(61, 50)
    spread[:, :smoothed_ids] = smoothing[:, None] / smoothed_ids
    spread += (1 - smoothing)[:, None] * F.one_hot(targets, 50)
    each = F.cross_entropy(logits, spread, reduction="none")
    if smoothed_ids == 50:
        kinds = [
            F.cross_entropy(logits, targets, reduction="none", label_smoothing=s)
            for s in (0.0, 0.2)
        ]
        assert torch.allclose(each, torch.where(smoothing > 0, kinds[1], kinds[0]), atol=1e-5)
    expected = (weights * each + z_weights * logits.logsumexp(-1).square()).sum()
    torch.testing.assert_close(losses.total, expected)
    nll = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses.nll, nll)
    for ours, theirs in zip(
        grad(losses.total, (hidden, head)),
        grad(expected, (hidden, head), retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    (of_hidden,) = grad(expected, hidden)
    torch.testing.assert_close(
        losses.state_grad_norm_sq, of_hidden.square().sum(-1), rtol=1e-3, atol=1e-4
    )


def test_a_frozen_head_gets_no_gradient_and_the_states_get_theirs() -> None:
    """An adapter trains the layers, so a gradient of V x D would be made for nothing."""
    torch.manual_seed(0)
    hidden, head = torch.randn(61, 24).requires_grad_(), torch.randn(50, 24)
    targets, weights = torch.randint(50, (61,)), torch.rand(61)
    losses = head_losses(hidden, head, targets, weights, weights)
    trained = head_losses(hidden, head.clone().requires_grad_(), targets, weights, weights)
    assert torch.equal(losses.total, trained.total)
    kept, kept_trained = (one.total.grad_fn.saved_tensors for one in (losses, trained))
    assert not any(tensor is not None and tensor.shape == head.shape for tensor in kept)
    assert any(tensor.shape == head.shape for tensor in kept_trained)
    ours, theirs = (grad(one.total, hidden)[0] for one in (losses, trained))
    assert torch.equal(ours, theirs)
