"""Two ways to compute attention: the same values and the same gradients."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from multimodal.api import Model
from multimodal.model.layers.attention import attend, attention_mask, without_cudnn_attention
from multimodal.model.network import MultimodalLM
from multimodal.model.sequences import Packed, describe, draw, pack
from multimodal.model.training_batch import TrainingBatch

CODES = np.arange(16) * 5 % 64
TEXT = list(b"two dogs")


@pytest.mark.parametrize("masked", [True, False])
def test_attention_in_training_is_that_of_torch(masked: bool) -> None:
    """With gradients, a CPU computes attention by products. Values and gradients are the same."""
    torch.manual_seed(0)
    shapes = [(2, 6, 9, 8), (2, 3, 9, 8), (2, 3, 9, 8)]
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    documents = torch.tensor([[1] * 5 + [2] * 4, [1] * 7 + [0] * 2])
    mask = attention_mask(documents, torch.zeros_like(documents)) if masked else None
    output = attend(q, k, v, mask)
    twice = (k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1))
    expected = torch.nn.functional.scaled_dot_product_attention(q, *twice, attn_mask=mask)
    assert torch.allclose(output, expected, atol=1e-6)
    gradient = torch.randn_like(output)
    ours = torch.autograd.grad(output, (q, k, v), gradient)
    theirs = torch.autograd.grad(expected, (q, k, v), gradient)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def rows_of_all_kinds(model: Model) -> Packed:
    v = model.vocabulary
    masked = np.arange(16) % 3 == 0
    sequences = [
        describe(v, CODES, [TEXT, TEXT[:3]], [(TEXT[:2], TEXT[5:])]),
        draw(v, TEXT, CODES, masked),
        draw(v, TEXT, CODES),
        draw(v, None, CODES, ~masked),
    ]
    return pack(sequences, 64, v.pad)


def losses_and_gradients(network: MultimodalLM, packed: Packed) -> tuple[Tensor, list[Tensor]]:
    """Of two pairs. The first two states are those of the images, the others those of the texts."""
    ids = torch.arange(2, device=packed.ids.device)
    image_states, text_states = packed.states.view(2, 2)
    tokens = int((packed.documents > 0).sum())
    total, _ = network(TrainingBatch(packed, image_states, text_states, ids, ids, tokens))
    learned = [weight for weight in network.parameters() if weight.requires_grad]
    return total.detach(), list(torch.autograd.grad(total, learned, allow_unused=True))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_backends_of_attention_are_one_rule(
    tiny_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Causal, bidirectional, packed and padded: the same loss and gradients from both."""
    import torch.nn.attention.flex_attention as library

    if device == "cpu":  # the kernel has no backward pass there, but its definition has one
        monkeypatch.setattr(library, "_validate_device", lambda *_: None)
    model = tiny_model(noise=0.1).to(device)
    network = model.network.train()
    packed = rows_of_all_kinds(model).to(torch.device(device))
    loss, gradients = losses_and_gradients(network, packed)
    network.attention_backend = "flex"
    flex_loss, flex_gradients = losses_and_gradients(network, packed)
    assert flex_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for gradient, flex_gradient in zip(gradients, flex_gradients, strict=True):
        if gradient is not None:
            assert torch.allclose(gradient, flex_gradient, atol=1e-4, rtol=1e-3)
    # The rule matters here: a causal mask alone gives another loss.
    packed.blocks = torch.zeros_like(packed.blocks)
    assert abs(losses_and_gradients(network, packed)[0].item() - loss.item()) > 1e-4


def test_cudnn_attention_is_left_out_until_the_last_of_several_threads_leaves() -> None:
    cuda = torch.backends.cuda
    before = cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    cuda.enable_cudnn_sdp(True)
    try:
        first, second = without_cudnn_attention(), without_cudnn_attention()
        states = []
        for enter in (first.__enter__, second.__enter__):
            enter()
            states.append(cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]
        for leave in (first, second):  # in the order in which they came
            leave.__exit__(None, None, None)
            states.append(cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]
        assert states == [False, False, False, True]
        with pytest.raises(KeyError), without_cudnn_attention():
            raise KeyError
        assert cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    finally:
        cuda.enable_cudnn_sdp(before)
