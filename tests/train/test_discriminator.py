"""The discriminator: each loss teaches its own side only, and it learns to tell sharp from soft."""

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from multimodal.tokenizers.image import ImageTokenizerConfig
from multimodal.train.discriminator import PatchDiscriminator, adversarial_losses
from multimodal.train.image_tokenizer import ImageTokenizerModule


def squares(count: int, seed: int) -> torch.Tensor:
    """float[B, 3, 32, 32] in [-1, 1]: noise of 4 x 4 pixels, with edges between."""
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return interpolate(noise * 2 - 1, scale_factor=4, mode="nearest")


def soft(images: torch.Tensor) -> torch.Tensor:
    return avg_pool2d(images, 5, 1, padding=2, count_include_pad=False)


def test_each_loss_teaches_one_side() -> None:
    torch.manual_seed(0)
    critic, images = PatchDiscriminator(8), squares(4, 0)
    reconstruction = soft(images).requires_grad_()
    losses = adversarial_losses(critic, images, reconstruction)
    losses["fool"].backward(retain_graph=True)
    assert reconstruction.grad is not None and reconstruction.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in critic.parameters())
    reconstruction.grad = None
    losses["tell"].backward()
    assert reconstruction.grad is None
    assert all(parameter.grad is not None for parameter in critic.parameters())


def test_frozen_weights_give_the_same_scores() -> None:
    torch.manual_seed(0)
    critic, images = PatchDiscriminator(8).eval(), squares(2, 0)
    assert torch.equal(critic(images), critic(images, frozen=True))


def test_it_learns_to_tell_and_what_it_likes_is_sharp() -> None:
    torch.manual_seed(0)
    critic = PatchDiscriminator(8)
    optimizer = torch.optim.AdamW(critic.parameters(), 2e-3)
    for seed in range(60):
        images = squares(8, seed)
        loss = adversarial_losses(critic, images, soft(images))["tell"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    critic.eval()
    images = squares(16, 1000)
    assert (critic(images).mean((1, 2, 3)) > critic(soft(images)).mean((1, 2, 3))).all()
    # Going where it fools the critic, a soft picture becomes sharper: its neighbours differ more.
    picture = soft(images).requires_grad_()
    critic(picture, frozen=True).mean().backward()
    assert picture.grad is not None
    with torch.no_grad():
        moved = picture + 0.05 * picture.grad / picture.grad.std()
    roughness = [(x[..., 1:] - x[..., :-1]).abs().mean() for x in (picture, moved)]
    assert roughness[1] > roughness[0]


def test_fooling_weighs_as_much_as_the_pixels_at_the_last_layer() -> None:
    torch.manual_seed(0)
    vit = {"name": "vit", "dim": 32, "encoder_depth": 1, "decoder_depth": 1, "heads": 2}
    config = ImageTokenizerConfig(image_size=32, downsample=8, autoencoder=vit)
    module = ImageTokenizerModule(config, perceptual_weight=0.5, discriminator_weight=1.0)
    parts, _ = module.losses(squares(4, 0), None, judged=True)
    last = module.tokenizer.decoder.last_layer
    pixels = parts["mse"] + parts["l1"] + 0.5 * parts["perceptual"]
    (expected,) = torch.autograd.grad(pixels, last, retain_graph=True)
    (whole,) = torch.autograd.grad(module.total(parts), last, retain_graph=True)
    torch.testing.assert_close((whole - expected).norm(), expected.norm(), rtol=1e-3, atol=0)
    (direction,) = torch.autograd.grad(parts["fool"], last)
    cosine = torch.cosine_similarity((whole - expected).flatten(), direction.flatten(), dim=0)
    assert cosine > 0.999
    unjudged, _ = module.losses(squares(4, 0), None, judged=False)
    assert not {"fool", "tell"} & set(unjudged)


@pytest.mark.parametrize("name", ["perceptual_weight", "discriminator_weight"])
def test_weights_below_zero_are_refused(name: str) -> None:
    config = ImageTokenizerConfig(image_size=16, downsample=8)
    with pytest.raises(ValueError, match=f"{name}=-1.*expected 0 or more"):
        ImageTokenizerModule(config, **{name: -1})
