"""A critic of patches, so that reconstructions are sharp instead of the mean of all that could be.

What codes leave open (an edge one pixel to the left or to the right) squares paint as its mean, a
blur, and absolute errors as its median, without texture. A critic that tells real patches from
decoded ones, and a decoder that learns to fool it, settle for one of the possible edges: VQGAN
(Esser et al. 2021, arXiv:2012.09841), with the patches of pix2pix (Isola et al. 2017,
arXiv:1611.07004), the hinge loss of Lim & Ye 2017 (arXiv:1705.02894) and spectral normalisation
(Miyato et al. 2018, arXiv:1802.05957).
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """Scores for overlapping patches of 54 x 54 pixels, high for real ones."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        sizes = [(3, width, 2), (width, 2 * width, 2), (2 * width, 4 * width, 2)]
        sizes += [(4 * width, 4 * width, 1), (4 * width, 1, 1)]
        self.layers = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, after, 4 if stride == 2 else 3, stride, padding=1))
            for before, after, stride in sizes
        )

    def forward(self, images: Tensor, frozen: bool = False) -> Tensor:
        """float[B, 3, H, W] in [-1, 1] -> float32[B, 1, H / 8, W / 8]; frozen: no gradient for the
        weights, only for the images"""
        x = images
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Conv2d) and layer.bias is not None
            weight, bias = layer.weight, layer.bias
            if frozen:
                weight, bias = weight.detach(), bias.detach()
            x = F.leaky_relu(x, 0.2) if number else x
            x = F.conv2d(x, weight, bias, layer.stride, padding=1)
        return x.float()


def adversarial_losses(
    discriminator: PatchDiscriminator, images: Tensor, reconstruction: Tensor
) -> dict[str, Tensor]:
    """fool: for the decoder alone; tell: for the discriminator alone. Both float32[]."""
    real, fake = discriminator(images), discriminator(reconstruction.detach())
    return {
        "fool": -discriminator(reconstruction, frozen=True).mean(),
        "tell": F.relu(1 - real).mean() + F.relu(1 + fake).mean(),
    }
