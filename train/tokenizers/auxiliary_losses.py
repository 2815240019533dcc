"""Losses of an image tokenizer beside the pixels: a discriminator and the features of a teacher."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from multimodal.eval.metrics.features import Features


class PatchDiscriminator(nn.Module):
    """Scores overlapping patches of 54 x 54 pixels, high for patches of real images.

    Codes leave details open, such as an edge one pixel to the left or to the right. Squared errors
    then give the mean of all possible edges, a blur. Absolute errors give their median, without
    texture. A decoder that learns to fool a discriminator paints one of the possible edges.

    VQGAN (Esser et al. 2021, arXiv:2012.09841), with the patches of pix2pix (Isola et al. 2017,
    arXiv:1611.07004), the hinge loss of Lim & Ye 2017 (arXiv:1705.02894) and spectral normalisation
    (Miyato et al. 2018, arXiv:1802.05957).

    Args:
        width: channels of the first convolution.
    """

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        sizes = [(3, width, 2), (width, 2 * width, 2), (2 * width, 4 * width, 2)]
        sizes += [(4 * width, 4 * width, 1), (4 * width, 1, 1)]
        self.layers = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, after, 4 if stride == 2 else 3, stride, padding=1))
            for before, after, stride in sizes
        )

    def forward(self, images: Tensor, frozen: bool = False) -> Tensor:
        """Score images.

        Args:
            images: float[B, 3, H, W] in [-1, 1].
            frozen: compute no gradient for the weights, only for the images.

        Returns:
            float32[B, 1, H / 8, W / 8].
        """
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
    """The hinge losses, float32[] each.

    ``fool`` has a gradient for the reconstruction only, ``tell`` for the discriminator only.
    """
    real, fake = discriminator(images), discriminator(reconstruction.detach())
    return {
        "fool": -discriminator(reconstruction, frozen=True).mean(),
        "tell": F.relu(1 - real).mean() + F.relu(1 + fake).mean(),
    }


def adaptive_weight(pixels: Tensor, fool: Tensor, last: Tensor) -> Tensor:
    """The ratio of the gradients of the pixel losses and ``fool`` at the last layer (VQGAN)."""
    if not torch.is_grad_enabled():
        return torch.ones(()).to(fool)
    of_pixels, of_fool = (
        torch.linalg.vector_norm(torch.autograd.grad(loss, last, retain_graph=True)[0])
        for loss in (pixels, fool)
    )
    return (of_pixels / (of_fool + 1e-6)).clamp(max=1e4).detach()


class Distillation(nn.Module):
    """Predicts the features of a frozen teacher from the codes, by their cosine.

    After VQ-KD (BEiT v2, Peng et al. 2022, arXiv:2208.06366). VQ-KD trains on this loss alone. Here
    it is added to the pixel losses, so that the codes still make pictures.

    Shapes: B batch, h w the grid of codes, C channels of a code vector, D features of the teacher.

    Args:
        teacher: timm:MODEL or timm:MODEL=FILE, as for ``Features``. ``random`` teaches textures
            only.
        channels: C.
        width: of the head that reads the codes. The head is not exported.
    """

    def __init__(self, teacher: str, channels: int, width: int = 256) -> None:
        super().__init__()
        self.teacher = Features(teacher)
        self.head = nn.Sequential(
            nn.Linear(channels, width), nn.GELU(), nn.Linear(width, self.teacher.num_features)
        )

    def forward(self, vectors: Tensor, images: Tensor) -> Tensor:
        """The mean of 1 - cosine similarity over the grid.

        Args:
            vectors: float[B, h, w, C], code vectors.
            images: float[B, 3, H, W] in [-1, 1].

        Returns:
            float32[] in [0, 2].
        """
        with torch.no_grad():
            features = self.teacher.maps(images)[-1].float()
            target = F.interpolate(features, vectors.shape[1:3], mode="bilinear", antialias=True)
        predicted = rearrange(self.head(vectors).float(), "b h w d -> b d h w")
        return 1 - F.cosine_similarity(predicted, target, dim=1).mean()


def psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of a mean squared error on pixels in [-1, 1]."""
    return -10 * torch.log10(mse / 4)
