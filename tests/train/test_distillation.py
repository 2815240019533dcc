"""Codes taught by a frozen network: they come to tell its features, and it stays as it is."""

import pytest
import torch

from multimodal.tokenizers.image import ImageTokenizerConfig
from multimodal.train.image_tokenizer import ImageTokenizerModule
from multimodal.train.optim import muon

VIT = {"name": "vit", "dim": 32, "encoder_depth": 0, "decoder_depth": 0, "heads": 2}
CONFIG = ImageTokenizerConfig(32, "squash", 8, VIT, {"name": "fsq", "levels": [5, 5, 5]})


def module(weight: float) -> ImageTokenizerModule:
    torch.manual_seed(0)
    return ImageTokenizerModule(CONFIG, teacher_weight=weight, teacher="random")


def pictures() -> torch.Tensor:
    """Stripes of eight widths and directions, in two colours."""
    x, y = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    waves = [torch.sin(x * a + y * b) for a, b in ((1, 0), (0, 1), (1, 1), (0.3, 0), (0, 0.3),
                                                   (2, 0), (0, 2), (0.5, 1.5))]  # fmt: skip
    return torch.stack([torch.stack([wave, -wave, 0 * wave]) for wave in waves])


def test_codes_learn_what_the_teacher_sees_and_it_does_not_move() -> None:
    images = pictures()
    learned: dict[float, tuple[float, float]] = {}
    for weight in (1e-6, 1.0):
        one = module(weight)
        assert one.distillation is not None
        before = [value.clone() for value in one.distillation.teacher.network.state_dict().values()]
        optimizer = muon(one, one.heads, 2e-3, 0.0)
        for _ in range(120):
            parts, _ = one.losses(images, None, False)
            # The head learns in both, but only in one does the encoder hear of it.
            total = one.total(parts) + (0 if weight == 1 else 1) * one.distillation(
                one.tokenizer(images)[1].vectors.detach(), images
            )
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        learned[weight] = parts["teacher"].item(), parts["mse"].item()
        after = one.distillation.teacher.network.state_dict().values()
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert learned[1.0][0] < 0.8 * learned[1e-6][0], learned
    assert learned[1.0][1] < 0.5, "and the codes still make pictures"


def test_only_the_codes_and_the_head_are_taught() -> None:
    one = module(1.0)
    parts, _ = one.losses(pictures(), None, False)
    parts["teacher"].backward()
    moved = {name.split(".")[0] + "." + name.split(".")[1]
             for name, value in one.named_parameters() if value.grad is not None}  # fmt: skip
    assert moved == {"tokenizer.encoder", "distillation.head"}
    assert one.distillation in one.heads


@pytest.mark.parametrize(("weight", "teacher"), [(-1.0, "random"), (1.0, "")])
def test_a_teacher_has_to_be_named(weight: float, teacher: str) -> None:
    with pytest.raises(ValueError, match="needs teacher"):
        ImageTokenizerModule(CONFIG, teacher_weight=weight, teacher=teacher)
