"""The level of meaning: quantized features of a frozen pretrained encoder.

Without gradients: the features are rotated onto their first principal components, and k-means of
these gives the codes. It is residual (each group quantizes what the groups before have left, as in
Juang & Gray 1982) or product (each group has channels of its own, Jegou et al. 2011). No codebook
collapses, and it takes minutes on a CPU. Clusters of a teacher's features as image tokens: Wang et
al. 2024 (arXiv:2411.04406).

With gradients: finite scalar quantization of a projection that is trained
(train/tokenizers/meaning.py).

A classifier learns to ignore colours, and captions name them. So a position may have one more code:
that of the mean colours of its four quarters.

Shapes: B images, S pixels of a side, h w the grid, D features of the encoder, C components, G
groups, K codebook size of a group. With colours, features have 12 more channels, and codes one more
group.
"""

import reprlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from multimodal.schemas import Between, check_fields
from multimodal.tokenizers.encoder import Encoder
from multimodal.tokenizers.levels import Level
from multimodal.tokenizers.quantizers.fsq import FSQ, LevelCount, count_codes
from multimodal.tokenizers.quantizers.kmeans import Clusters, kmeans, nearest
from multimodal.tokenizers.weights import Fit, digest_of, load_folder, resize, save_folder

COLOUR_CHANNELS = 12  # red, green and blue of four quarters
Form: TypeAlias = Literal["residual", "product", "fsq"]


@dataclass(frozen=True)
class MeaningConfig:
    """What a level of meaning is made of, besides its weights.

    Args:
        encoder: its name, ``timm:MODEL`` or ``open_clip:MODEL``.
        stages: of the encoder, side by side. None: its final features.
        image_size: S, pixels of a side of the image that the encoder reads.
        fit: how other images are made square.
        grid: positions per side. A coarser grid than the encoder's is its mean.
        groups: G, codes of the features at a position.
        codebook_size: K. Of ``fsq`` it is the product of the levels.
        channels: C. Of ``fsq`` it is one for each level of each group.
        form: ``residual``, ``product`` or ``fsq``.
        colours: whether a position has one more code: that of its colours.
        fsq_levels: of ``fsq``, how many values each channel of a group has.

    Raises:
        ValueError: for a number out of its range, an unknown form, or channels that do not split
            evenly.
    """

    encoder: str
    stages: tuple[Annotated[int, Between(-99, 99)], ...] = ()
    image_size: Annotated[int, Between(1, 1024)] = 224
    fit: Fit = "squash"
    grid: Annotated[int, Between(1, 256)] = 7
    groups: Annotated[int, Between(1, 64)] = 2
    codebook_size: Annotated[int, Between(1, 2**22)] = 1024
    channels: Annotated[int, Between(1, 2**14)] = 128
    form: Form = "residual"
    fsq_levels: tuple[LevelCount, ...] = ()
    colours: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "fsq_levels", tuple(self.fsq_levels))
        if (self.form == "fsq") != bool(self.fsq_levels):
            levels = reprlib.repr(self.fsq_levels)
            raise ValueError(f"form={self.form!r}, fsq_levels={levels}: only fsq has levels")
        if self.fsq_levels:
            object.__setattr__(self, "codebook_size", count_codes(self.fsq_levels))
            object.__setattr__(self, "channels", self.groups * len(self.fsq_levels))
        if self.form == "product" and self.channels % self.groups:
            raise ValueError(f"channels={self.channels} do not split into {self.groups} groups")

    def stored(self) -> dict[str, Any]:
        """As in config.json. What is not used is not in it."""
        optional = ("fsq_levels", "colours")
        return {k: v for k, v in asdict(self).items() if v or k not in optional}

    @property
    def group_channels(self) -> int:
        """The channels that one group quantizes."""
        return self.channels if self.form == "residual" else self.channels // self.groups

    @property
    def level(self) -> Level:
        return Level("meaning", self.grid, self.groups + self.colours, self.codebook_size)

    @property
    def vector_channels(self) -> int:
        """The channels that a decoder reads."""
        return self.channels + COLOUR_CHANNELS * self.colours

    @property
    def codebooks_shape(self) -> tuple[int, ...]:
        """Groups, codes, and the components that a group quantizes."""
        return self.groups, self.codebook_size, self.group_channels


class Meaning(nn.Module):
    """A frozen encoder, and the codebooks of its features.

    Args:
        config: the sizes.
        encoder: if given, else one without weights, to be loaded.
    """

    center: Tensor
    components: Tensor
    codebooks: Tensor
    palette: Tensor

    def __init__(self, config: MeaningConfig, encoder: Encoder | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder or Encoder(config.encoder, config.stages, pretrained=False)
        blank = torch.zeros(1, 3, config.image_size, config.image_size)
        try:
            with torch.no_grad():
                _, height, width, channels = self.encoder(blank).shape
        except (AssertionError, RuntimeError, ValueError) as error:  # of its own code
            raise ValueError(
                f"image_size={config.image_size}: {config.encoder} does not read it ({error})"
            ) from error
        if height != width or config.grid > height:
            raise ValueError(
                f"grid={config.grid}: {config.encoder} has {height} x {width} positions at "
                f"{config.image_size} pixels"
            )
        if config.channels > channels:
            raise ValueError(f"channels={config.channels}: the encoder has {channels}")
        self.register_buffer("center", torch.zeros(channels))
        self.register_buffer("components", torch.zeros(channels, config.channels))
        self.register_buffer("codebooks", torch.zeros(config.codebooks_shape))
        if config.colours:
            self.register_buffer("palette", torch.zeros(config.codebook_size, COLOUR_CHANNELS))
        self.fsq: FSQ | None = None
        if config.fsq_levels:
            self.fsq = FSQ(config.fsq_levels)
            self.codebooks.copy_(self.fsq.lookup(torch.arange(config.codebook_size)))
        self.requires_grad_(False).eval()

    @property
    def level(self) -> Level:
        return self.config.level

    def train(self, mode: bool = True) -> "Meaning":
        return super().train(False)  # always frozen

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features on the grid.

        Args:
            images: float[B, 3, H, W] in [-1, 1]. Another size than S is resized.

        Returns:
            float32[B, h, w, D], and with colours those of the four quarters of each position.
        """
        grid = self.config.grid
        images = resize(images, self.config.image_size)
        features: Tensor = self.encoder(images)
        if features.shape[1] != grid:
            features = F.adaptive_avg_pool2d(features.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)
        if not self.config.colours:
            return features
        quarters = F.adaptive_avg_pool2d(images.float(), 2 * grid)
        colours = rearrange(quarters, "b c (h i) (w j) -> b h w (i j c)", i=2, j=2)
        return torch.cat([features, colours.to(features.dtype)], -1)

    def encode(self, images: Tensor) -> Tensor:
        """float[B, 3, H, W] in [-1, 1] -> codes: int64[B, h, w, G] in [0, K)."""
        return self.quantize(self.features(images))

    def project(self, features: Tensor) -> Tensor:
        """Features, without or with colours -> components: float[..., C]."""
        return (features[..., : len(self.center)] - self.center) @ self.components

    def quantize(self, features: Tensor) -> Tensor:
        """Features -> codes: int64[..., G] in [0, K)."""
        codes = []
        # In fp32: distances in bf16 would pick other centres.
        with torch.autocast(features.device.type, enabled=False):
            rest = self.project(features.float()).flatten(0, -2)
            for group, codebook in enumerate(self.codebooks):
                part = self._part(rest, group)
                found = nearest(part, codebook)[0] if self.fsq is None else self.fsq(part).codes
                codes.append(found)
                if self.config.form == "residual":
                    rest = rest - codebook[found]
            if self.config.colours:
                colours = features[..., len(self.center) :].float().flatten(0, -2)
                codes.append(nearest(colours, self.palette)[0])
        return torch.stack(codes, -1).view(*features.shape[:-1], self.level.groups)

    def _part(self, components: Tensor, group: int) -> Tensor:
        """What a group quantizes."""
        if self.config.form == "residual":
            return components
        return components.chunk(self.config.groups, -1)[group]

    def lookup(self, codes: Tensor) -> Tensor:
        """codes: int64[..., G] in [0, K) -> components: float[..., C]. Of fsq in [-1, 1]."""
        groups = [self.codebooks[group][codes[..., group]] for group in range(self.config.groups)]
        if self.config.form == "residual":
            return torch.stack(groups).sum(0)
        return torch.cat(groups, -1)

    def vectors(self, codes: Tensor) -> Tensor:
        """What a decoder reads: ``lookup``, scaled to a standard deviation of about 1, and colours.

        int64[..., G] in [0, K) -> float[..., vector_channels].
        """
        variances = self.codebooks.var((1, 2))
        residual = self.config.form == "residual"  # groups are added, not side by side
        variance = variances.sum() if residual else variances.mean()
        vectors = self.lookup(codes) / variance.sqrt().clamp(min=1e-6)
        if not self.config.colours:
            return vectors
        return torch.cat([vectors, self.code_vectors(self.config.groups)[codes[..., -1]]], -1)

    def code_vectors(self, group: int) -> Tensor:
        """The vectors of the codes of a group, float[K, C'], with a standard deviation of 1."""
        book = self.codebooks[group] if group < self.config.groups else self.palette
        return book / book.std().clamp(min=1e-6)

    @property
    def fingerprint(self) -> str:
        """Hash of config and weights, 16 hex digits."""
        return digest_of(self.config.stored(), self.state_dict())

    def save(self, folder: str | Path) -> None:
        """Write the folder that ``load`` reads."""
        save_folder(self, self.config.stored(), folder)

    @classmethod
    def load(cls, folder: str | Path, verify: bool = True) -> "Meaning":
        """Raises ``ValueError`` for a folder that ``save`` did not write.

        Args:
            verify: compare the fingerprint of what was read with that in the config.
        """

        def expected(config: MeaningConfig) -> dict[str, Tensor]:
            with torch.device("meta"):  # shapes alone, whatever encoder the config names
                return cls(config).state_dict()

        return load_folder(
            cls, MeaningConfig, expected, folder, "a level of meaning", verify=verify
        )


def round_to_half(module: nn.Module) -> None:
    """Round all weights to half precision, kept in fp32: a folder of half the size."""
    with torch.no_grad():
        for weight in module.state_dict().values():
            if weight.is_floating_point() and weight.abs().max() < torch.finfo(torch.half).max:
                weight.copy_(weight.half().float())


@dataclass(frozen=True)
class Fitted:
    """What fitting the codebooks found out.

    Attributes:
        explained: the share of the variance of the features that the components keep.
        lost: for each group, the share of the variance of the components that the codes up to this
            group lose. Of colours the share of their variance.
        clusters: of each group: its use and perplexity.
    """

    explained: float
    lost: list[float]
    clusters: list[Clusters]


@torch.no_grad()
def fit_codebooks(
    meaning: Meaning,
    features: Tensor,
    seed: int = 0,
    rounds: int = 25,
    standardise: bool = False,
    on_round: Callable[[int, float], object] = lambda group, error: None,
) -> Fitted:
    """Find the principal components, and cluster them.

    Args:
        meaning: gets its codebooks.
        features: float32[N, D] with colours if there are any, of many positions.
        seed: of the clusters.
        rounds: of k-means.
        standardise: give all channels the same variance first. Of final features the strong
            channels say more (docs/decisions/meaning.md).
        on_round: is given the group and the share of the variance that is lost so far.
    """
    config = meaning.config
    features, colours = features.tensor_split([len(meaning.center)], 1)
    mean, std = features.mean(0), torch.ones(features.shape[1])
    if standardise:
        std = features.std(0).clamp(min=1e-6)
    standard = (features - mean) / std
    covariance = standard.T.double() @ standard.double() / len(standard)
    values, vectors = torch.linalg.eigh(covariance)
    vectors = vectors[:, -config.channels :].flip(1)
    # The sign of an eigenvector is the solver's whim: make its largest entry positive.
    largest = vectors.abs().argmax(0)
    vectors = vectors * vectors[largest, torch.arange(config.channels)].sign()
    if config.form == "product":  # deal the components to the groups: each gets strong and weak
        order = torch.arange(config.channels).view(-1, config.groups).T.flatten()
        vectors = vectors[:, order]
    meaning.center.copy_(mean)
    meaning.components.copy_(vectors.float() / std[:, None])
    rest = meaning.project(features)
    variance = float(rest.square().sum(1).mean())
    clusters, lost = [], []
    known = 0.0  # of product groups that are done
    for group in range(config.groups):
        part = meaning._part(rest, group)
        total = float(part.square().sum(1).mean())

        before = known if config.form == "product" else variance - total

        def report(error: float, kept: float = before + total, group: int = group) -> None:
            on_round(group, (variance - kept + error) / variance)

        found = kmeans(part, config.codebook_size, rounds, seed + group, report)
        meaning.codebooks[group].copy_(found.centres)
        clusters.append(found)
        if config.form == "residual":
            rest = rest - found.centres[nearest(rest, found.centres)[0]]
            lost.append(found.error / variance)
        else:
            known += total - found.error
            lost.append(1 - known / variance)
    if config.colours:
        spread = float((colours - colours.mean(0)).square().sum(1).mean())

        def report_colours(error: float) -> None:
            on_round(config.groups, error / spread)

        found = kmeans(colours, config.codebook_size, rounds, seed + config.groups, report_colours)
        meaning.palette.copy_(found.centres)
        clusters.append(found)
        lost.append(found.error / spread)
    explained = float(values[-config.channels :].sum() / values.sum())
    return Fitted(explained, lost, clusters)
