"""Each adversarial loss trains one side only. A teacher's features shape the codes."""

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from multimodal.tokenizers.detail import VQTokenizerConfig
from multimodal.train.optim import muon
from multimodal.train.tokenizers.auxiliary_losses import PatchDiscriminator, adversarial_losses
from multimodal.train.tokenizers.detail import DetailModule

# --- discriminator --------------------------------------------------------------------------------


def squares(count: int, seed: int) -> torch.Tensor:
    """float[B, 3, 32, 32] in [-1, 1]: noise of 4 x 4 pixels, with edges between."""
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return interpolate(noise * 2 - 1, scale_factor=4, mode="nearest")


def blur(images: torch.Tensor) -> torch.Tensor:
    return avg_pool2d(images, 5, 1, padding=2, count_include_pad=False)


def test_each_adversarial_loss_trains_one_side() -> None:
    torch.manual_seed(0)
    discriminator, images = PatchDiscriminator(8), squares(4, 0)
    reconstruction = blur(images).requires_grad_()
    losses = adversarial_losses(discriminator, images, reconstruction)
    losses["fool"].backward(retain_graph=True)
    assert reconstruction.grad is not None and reconstruction.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    reconstruction.grad = None
    losses["tell"].backward()
    assert reconstruction.grad is None
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_frozen_weights_give_the_same_scores() -> None:
    torch.manual_seed(0)
    discriminator, images = PatchDiscriminator(8).eval(), squares(2, 0)
    assert torch.equal(discriminator(images), discriminator(images, frozen=True))


def test_the_discriminator_learns_to_prefer_sharp_images() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(8)
    optimizer = torch.optim.AdamW(discriminator.parameters(), 2e-3)
    for seed in range(60):
        images = squares(8, seed)
        loss = adversarial_losses(discriminator, images, blur(images))["tell"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    discriminator.eval()
    images = squares(16, 1000)
    sharp, blurred = (discriminator(x).mean((1, 2, 3)) for x in (images, blur(images)))
    assert (sharp > blurred).all()
    # A step that fools the discriminator makes a blurred image sharper: neighbours differ more.
    picture = blur(images).requires_grad_()
    discriminator(picture, frozen=True).mean().backward()
    assert picture.grad is not None
    with torch.no_grad():
        moved = picture + 0.05 * picture.grad / picture.grad.std()
    roughness = [(x[..., 1:] - x[..., :-1]).abs().mean() for x in (picture, moved)]
    assert roughness[1] > roughness[0]


def test_fooling_weighs_as_much_as_the_pixels_at_the_last_layer() -> None:
    torch.manual_seed(0)
    vit = {"name": "vit", "dim": 32, "encoder_depth": 1, "decoder_depth": 1, "heads": 2}
    config = VQTokenizerConfig(image_size=32, downsample=8, autoencoder=vit)
    module = DetailModule(config, perceptual_weight=0.5, discriminator_weight=1.0)
    parts, _ = module.losses(squares(4, 0), None, adversarial=True)
    last = module.tokenizer.decoder.last_layer
    pixels = parts["mse"] + parts["l1"] + 0.5 * parts["perceptual"]
    (expected,) = torch.autograd.grad(pixels, last, retain_graph=True)
    (total,) = torch.autograd.grad(module.total(parts), last, retain_graph=True)
    torch.testing.assert_close((total - expected).norm(), expected.norm(), rtol=1e-3, atol=0)
    (direction,) = torch.autograd.grad(parts["fool"], last)
    cosine = torch.cosine_similarity((total - expected).flatten(), direction.flatten(), dim=0)
    assert cosine > 0.999
    without, _ = module.losses(squares(4, 0), None, adversarial=False)
    assert not {"fool", "tell"} & set(without)


@pytest.mark.parametrize("name", ["perceptual_weight", "discriminator_weight"])
def test_weights_below_zero_are_refused(name: str) -> None:
    config = VQTokenizerConfig(image_size=16, downsample=8)
    with pytest.raises(ValueError, match=f"{name}=-1.*expected 0 or more"):
        DetailModule(config, **{name: -1})


# --- teacher --------------------------------------------------------------------------------------

VIT = {"name": "vit", "dim": 32, "encoder_depth": 0, "decoder_depth": 0, "heads": 2}
CONFIG = VQTokenizerConfig(32, "squash", 8, VIT, {"name": "fsq", "levels": [5, 5, 5]})


def taught_module(weight: float) -> DetailModule:
    torch.manual_seed(0)
    return DetailModule(CONFIG, teacher_weight=weight, teacher="random")


def stripes() -> torch.Tensor:
    """Stripes of eight widths and directions, in two colours: float[8, 3, 32, 32]."""
    x, y = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    frequencies = ((1, 0), (0, 1), (1, 1), (0.3, 0), (0, 0.3), (2, 0), (0, 2), (0.5, 1.5))
    waves = [torch.sin(x * a + y * b) for a, b in frequencies]
    return torch.stack([torch.stack([wave, -wave, 0 * wave]) for wave in waves])


@pytest.mark.slow
def test_codes_learn_the_features_of_a_teacher_that_stays_frozen() -> None:
    images = stripes()
    learned: dict[float, tuple[float, float]] = {}
    for weight in (1e-6, 1.0):
        module = taught_module(weight)
        assert module.distillation is not None
        teacher = module.distillation.teacher.network
        before = [value.clone() for value in teacher.state_dict().values()]
        optimizer = muon(module, module.heads, 2e-3, 0.0)
        for _ in range(120):
            parts, _ = module.losses(images, None, False)
            total = module.total(parts)
            if weight < 1:  # the head learns here too, but the encoder gets no gradient of it
                codes = module.tokenizer(images)[1].vectors.detach()
                total = total + module.distillation(codes, images)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        learned[weight] = parts["teacher"].item(), parts["mse"].item()
        after = teacher.state_dict().values()
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert learned[1.0][0] < 0.8 * learned[1e-6][0], learned
    assert learned[1.0][1] < 0.5, "and the codes still make pictures"


def test_the_teacher_loss_trains_the_encoder_and_the_head_only() -> None:
    module = taught_module(1.0)
    parts, _ = module.losses(stripes(), None, False)
    parts["teacher"].backward()
    moved = {
        ".".join(name.split(".")[:2])
        for name, value in module.named_parameters()
        if value.grad is not None
    }
    assert moved == {"tokenizer.encoder", "distillation.head"}
    assert module.distillation in module.heads


@pytest.mark.parametrize(("weight", "teacher"), [(-1.0, "random"), (1.0, "")])
def test_a_teacher_has_to_be_named(weight: float, teacher: str) -> None:
    with pytest.raises(ValueError, match="needs teacher"):
        DetailModule(CONFIG, teacher_weight=weight, teacher=teacher)
