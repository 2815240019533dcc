"""The loss of distillation: its values and gradients are those of the formula."""

import pytest
import torch

from multimodal.model import distillation
from multimodal.model.distillation import Teaching, losses_of_taught, teacher_losses
from multimodal.model.objectives import ObjectivesConfig, token_losses
from multimodal.model.sequences import NO_LOSS, OBJECTIVES


def tensors(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """States and heads of a student of 8 channels and a teacher of 12, and its states by row."""
    torch.manual_seed(seed)
    return torch.randn(10, 8), torch.randn(30, 8), torch.randn(25, 12), torch.randn(30, 12)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("slice_size", [1, 1 << 20])
def test_losses_and_gradients_are_those_of_the_formula(
    temperature: float, slice_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "SLICE", slice_size)
    hidden, head, states, teacher_head = tensors()
    index = torch.tensor([3, 3, 0, 24, 7, 9, 11, 2, 1, 5])
    hidden.requires_grad_()
    head.requires_grad_()
    teaching = Teaching(states, teacher_head, temperature, {})
    ours = teacher_losses(hidden, head, teaching, index)
    weights = torch.linspace(0, 1, 10)
    gradients = torch.autograd.grad((weights * ours).sum(), (hidden, head))

    h, m = (x.detach().double().requires_grad_() for x in (hidden, head))
    p = (states[index].double() @ teacher_head.double().T / temperature).softmax(-1)
    q = (h @ m.T / temperature).softmax(-1)
    expected = temperature**2 * (p * (p / q).log()).sum(-1)
    theirs = torch.autograd.grad((weights * expected).sum(), (h, m))
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_a_target_is_a_mixture_of_the_data_and_the_teacher() -> None:
    """At temperature 1 the gradient is that of a cross-entropy with mixed targets."""
    hidden, head, states, teacher_head = tensors(1)
    targets, index = torch.randint(0, 30, (10,)), torch.arange(10)
    caption, image = map(OBJECTIVES.index, ("caption", "image"))
    objectives = torch.tensor([caption] * 4 + [image] * 6)
    config = ObjectivesConfig(weights={"image": 0.4}, z_loss_weight=0)
    hidden.requires_grad_()
    weights = dict.fromkeys(OBJECTIVES, 0.3)
    teacher = (
        teacher_losses(hidden, head, Teaching(states, teacher_head, 1.0, weights), index),
        weights,
    )
    total, parts = token_losses(hidden, head, targets, objectives, config, teacher=teacher)
    (gradient,) = torch.autograd.grad(total, hidden)

    mixed = 0.7 * torch.nn.functional.one_hot(targets, 30)
    mixed = mixed + 0.3 * (states[index] @ teacher_head.T).softmax(-1)
    losses = torch.nn.functional.cross_entropy(hidden @ head.T, mixed, reduction="none")
    expected = losses[:4].mean() + 0.4 * losses[4:].mean()
    (theirs,) = torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(gradient, theirs)
    assert parts.keys() >= {"caption", "image", "teacher/caption", "teacher/image"}
    torch.testing.assert_close(parts["teacher/caption"], teacher[0][:4].mean().detach())


def test_a_teacher_of_one_objective_with_fewer_ids_teaches_that_alone() -> None:
    hidden, head, states, teacher_head = tensors(2)
    text, image = map(OBJECTIVES.index, ("text", "image"))
    objectives = torch.tensor(
        [image, text, NO_LOSS, text, text, image, image, image, text, NO_LOSS]
    )
    positions = torch.arange(10) + 5
    taught = objectives == text
    counts = {name: int((objectives == number).sum()) for number, name in enumerate(OBJECTIVES)}
    counts["log_z"] = 8
    teaching = Teaching(states, teacher_head[:20], 1.0, {"text": 1.0})
    ours = losses_of_taught(hidden, head, teaching, positions, objectives, counts)
    assert not ours[~taught].any()
    p = (states[positions[taught]] @ teacher_head[:20].T).double().softmax(-1)
    q = (hidden[taught] @ head.T).double().softmax(-1)[:, :20]  # ids from 20 on take from it
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(ours[taught].double(), expected, rtol=1e-5, atol=1e-5)

    # The data have no say where it teaches, and all elsewhere.
    config, targets = ObjectivesConfig(weights={"text": 2.0}, z_loss_weight=0), torch.arange(10)
    about = (objectives, config, None, 0.0, 1, (ours, teaching.weights), counts)
    total, parts = token_losses(hidden, head, targets, *about)
    images = objectives == image
    of_images = torch.nn.functional.cross_entropy(hidden[images] @ head.T, targets[images])
    weight = config.weight_of("image")
    torch.testing.assert_close(total, 2 * ours[taught].mean() + weight * of_images)
    assert [name for name in parts if name.startswith("teacher/")] == ["teacher/text"]
