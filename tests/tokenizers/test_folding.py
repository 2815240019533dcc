"""Batch norms of encoders inside their convolutions: the same features, in less time."""

import threading
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from multimodal.tokenizers.encoder import Encoder
from multimodal.tokenizers.folding import fold_batch_norms


def trained(name: str, seed: int = 0) -> Encoder:
    """An encoder whose norms have seen something: random statistics, weights, and biases."""
    torch.manual_seed(seed)
    made = Encoder(f"timm:{name}", pretrained=False)
    for norm in norms(made.network):
        for values in (norm.running_mean, norm.bias):
            nn.init.normal_(values)
        for values in (norm.running_var, norm.weight):
            nn.init.uniform_(values, 0.5, 2)
    return made


def norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def images(encoder: Encoder) -> Tensor:
    return torch.rand(2, 3, encoder.image_size, encoder.image_size) * 2 - 1


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_nfnet", "test_vit"])
def test_features_without_gradients_are_those_with(name: str) -> None:
    made = trained(name)
    pictures, weights = images(made), dict(made.state_dict())
    expected = made(pictures)
    with torch.no_grad():
        found = made(pictures)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert made.state_dict().keys() == weights.keys(), "what is saved is what it was"
    assert all(torch.equal(made.state_dict()[key], weight) for key, weight in weights.items())
    if name in ("test_efficientnet", "test_resnet"):
        assert norms(made.network) and not norms(made._without_norms())


def test_new_weights_are_folded_again() -> None:
    made, other = trained("test_efficientnet"), trained("test_efficientnet", seed=1)
    pictures = images(made)
    with torch.inference_mode():
        before = made(pictures)
        made.load_state_dict(other.state_dict())
        assert torch.equal(made(pictures), other(pictures))
        assert not torch.allclose(before, made(pictures))
        # Features are float32 in any dtype.
        double = made.double()(pictures.double())
        torch.testing.assert_close(double, other(pictures), rtol=1e-3, atol=1e-3)


class Both(nn.Module):
    """The norm is not all that reads the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        nn.init.uniform_(self.norm.weight, 2, 3)

    def forward(self, images: Tensor) -> list[Tensor]:
        found = self.convolution(images)
        return [found + self.norm(found)]


def test_a_network_that_would_change_is_left_as_it_is() -> None:
    network = Both().eval()
    assert fold_batch_norms(network, torch.rand(1, 3, 4, 4)) is network
    plain = timm.create_model("test_vit", num_classes=0).eval()
    assert fold_batch_norms(plain, torch.empty(0)) is plain, "nothing is computed without norms"


def test_threads_that_fold_one_network_at_once_leave_no_hooks_in_it() -> None:
    """The hooks of the other thread would keep all that the folded network computes from now on."""
    network, first = trained("test_resnet").network, True
    inside, done = threading.Event(), threading.Event()
    found = list[nn.Module]()

    def wait(*_: Any) -> None:
        nonlocal first
        if first:  # the thread below: another one folds while its hooks are there
            first = False
            inside.set()
            assert done.wait(60)

    next(iter(network.modules())).register_forward_pre_hook(wait)
    pictures = torch.rand(1, 3, 64, 64)
    thread = threading.Thread(target=lambda: found.append(fold_batch_norms(network, pictures)))
    thread.start()
    assert inside.wait(60)
    found.append(fold_batch_norms(network, pictures))
    done.set()
    thread.join()
    assert len(found) == 2
    for folded in found:
        hooks = [module._forward_hooks for module in folded.modules()]
        assert folded is not network and not any(hooks)


def test_an_encoder_that_threads_use_for_the_first_time_is_folded_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, calls = trained("test_resnet"), list[int]()
    all_here = threading.Barrier(4)

    def noted(network: nn.Module, images: Tensor) -> nn.Module:
        calls.append(1)
        return fold_batch_norms(network, images)

    monkeypatch.setattr("multimodal.tokenizers.encoder.fold_batch_norms", noted)
    pictures = images(made)

    def encode() -> None:
        all_here.wait()
        with torch.inference_mode():
            made(pictures)

    threads = [threading.Thread(target=encode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
