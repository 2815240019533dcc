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


def test_it_is_only_for_a_decoder_whose_codes_are_there() -> None:
    config = ImageTokenizerConfig(image_size=16, downsample=8)
    with pytest.raises(ValueError, match="decoder_only"):
        ImageTokenizerModule(config, discriminator_weight=0.1)
