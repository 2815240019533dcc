"""The level of detail: an encoder of pixels, a quantizer, a decoder.

The decoder may read the level of meaning beside the codes. The codes never depend on it.

It is a folder with ``config.json`` and ``model.safetensors``. Its fingerprint is a hash of the
config (preprocessing included) and the weights. Its codes' fingerprint leaves out the decoder: two
with the same one give the same codes.

To add a quantizer, write a subclass of ``Quantizer`` in a file of its own in quantizers/, and name
it in QUANTIZERS.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.schemas import Between, check_fields, construct
from multimodal.tokenizers import emu3, vit, vqgan
from multimodal.tokenizers.levels import Level
from multimodal.tokenizers.quantizers.fsq import FSQ
from multimodal.tokenizers.quantizers.ibq import IBQ
from multimodal.tokenizers.quantizers.lfq import LFQ
from multimodal.tokenizers.quantizers.quantizer import Quantized, Quantizer
from multimodal.tokenizers.quantizers.vq import VQ
from multimodal.tokenizers.weights import (
    Fit,
    check_range,
    check_shape,
    digest_of,
    load_folder,
    save_folder,
)

QUANTIZERS: dict[str, Callable[..., Quantizer]] = {"fsq": FSQ, "ibq": IBQ, "lfq": LFQ, "vq": VQ}
AUTOENCODERS: dict[str, Callable[..., vit.ViT | vqgan.VQGAN]] = {
    "vit": vit.ViT,
    "vqgan": vqgan.VQGAN,
    "emu3": emu3.Emu3,
}
Part = TypeVar("Part")


def make_quantizer(name: str, **options: Any) -> Quantizer:
    """Make a quantizer.

    Args:
        name: one of QUANTIZERS.
        options: arguments of its class, such as ``levels`` or ``codebook_size``.

    Raises:
        ValueError: for an unknown name, or options that its class does not take.
    """
    return _make("quantizer", QUANTIZERS, {"name": name, **options})


def _make(what: str, kinds: dict[str, Callable[..., Part]], options: Mapping[str, Any]) -> Part:
    """Call the class that ``options`` names with the other options. Raises ``ValueError``."""
    if "name" not in options:
        raise ValueError(f"{what}: name is missing")
    name = options["name"]
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(f"{what} {name!r:.80}: expected one of {', '.join(kinds)}")
    return construct(kinds[name], _without(options, ("name",)), f"{what} {name}")


@dataclass(frozen=True)
class VQTokenizerConfig:
    """What a level of detail is made of, besides its weights.

    Args:
        image_size: pixels of a side of the square image, a multiple of ``downsample``.
        fit: how other images are made square.
        downsample: pixels of a side of one code, a power of two.
        autoencoder: its name and options, ``{"name": "vit", "dim": 256, "encoder_depth": 4}``.
        quantizer: its name and options, ``{"name": "fsq", "levels": [7, 5, 5, 5, 5]}``.
        meaning_channels: C of the level of meaning that the decoder reads beside the codes. 0: the
            codes alone.
        meaning_fingerprint: of that level.

    Raises:
        ValueError: for sizes that do not fit.
    """

    image_size: Annotated[int, Between(1, 8192)] = 128
    fit: Fit = "squash"
    downsample: Annotated[int, Between(2, 256)] = 16
    autoencoder: dict[str, Any] = field(default_factory=lambda: {"name": "vit"})
    quantizer: dict[str, Any] = field(
        default_factory=lambda: {"name": "fsq", "levels": [7, 5, 5, 5, 5]}
    )
    meaning_channels: Annotated[int, Between(0, 2**16)] = 0
    meaning_fingerprint: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.downsample & (self.downsample - 1):
            raise ValueError(f"downsample={self.downsample}: expected a power of two from 2 on")
        if self.image_size % self.downsample:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of downsample={self.downsample}"
            )
        if bool(self.meaning_channels) != bool(self.meaning_fingerprint):
            raise ValueError(
                f"meaning_channels={self.meaning_channels}, "
                f"meaning_fingerprint={self.meaning_fingerprint!r}: expected both or none"
            )

    @property
    def grid(self) -> int:
        """Codes per side."""
        return self.image_size // self.downsample

    def stored(self) -> dict[str, Any]:
        """As in config.json. A decoder that reads codes alone says nothing about meaning."""
        stored = asdict(self)
        return stored if self.meaning_channels else _without(stored, MEANING)

    def of_codes(self) -> dict[str, Any]:
        """What decides the codes: all but the decoder."""
        stored = _without(asdict(self), MEANING)
        return {**stored, "autoencoder": _without(self.autoencoder, DECODER)}


MEANING = ("meaning_channels", "meaning_fingerprint")
DECODER = ("decoder_depth", "decodes")  # options that do not change the codes


def _without(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


class VQTokenizer(nn.Module):
    """An autoencoder with a quantizer between encoder and decoder.

    images: float[B, 3, H, W] in [-1, 1] <-> codes: int64[B, h, w] in [0, codebook_size).
    A decoder with ``meaning_channels`` C reads meaning too: float[B, h', w', C], on any grid.
    """

    def __init__(self, config: VQTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.quantizer = _make("quantizer", QUANTIZERS, config.quantizer)
        autoencoder = _make("autoencoder", AUTOENCODERS, config.autoencoder)
        channels = self.quantizer.channels
        self.encoder: nn.Module = autoencoder.encoder(config.downsample, config.grid, channels)
        self.decoder: vit.Decoder | vqgan.Decoder | vqgan.NoDecoder = autoencoder.decoder(
            config.downsample, config.grid, channels + config.meaning_channels
        )

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def downsample(self) -> int:
        return self.config.downsample

    @property
    def can_decode(self) -> bool:
        return not isinstance(self.decoder, vqgan.NoDecoder)

    @property
    def level(self) -> Level:
        return Level("detail", self.config.grid, 1, self.codebook_size)

    def forward(self, images: Tensor, meaning: Tensor | None = None) -> tuple[Tensor, Quantized]:
        """Encode and decode images.

        Args:
            images: float[B, 3, H, W] in [-1, 1]. H and W are multiples of ``downsample``.
            meaning: float[B, h', w', C] if the decoder reads it.

        Returns:
            The reconstructions, float[B, 3, H, W], not clipped, and the result of the quantizer.

        Raises:
            ValueError: for another shape or dtype, or meaning that is missing or not read.
        """
        _check_images(images, self.downsample)
        quantized: Quantized = self.quantizer(self.encoder(images))
        return self.decoder(self.joined(quantized.vectors, meaning)), quantized

    def joined(self, vectors: Tensor, meaning: Tensor | None) -> Tensor:
        """Code vectors and meaning side by side: float[B, h, w, channels of both]."""
        given = 0 if meaning is None else meaning.shape[-1]
        if given != self.config.meaning_channels:
            raise ValueError(
                f"meaning of {given} channels: the decoder reads {self.config.meaning_channels}"
            )
        if meaning is None:
            return vectors
        grid = vectors.shape[1:3]
        resized = F.interpolate(meaning.permute(0, 3, 1, 2), grid, mode="bilinear")
        return torch.cat([vectors, resized.permute(0, 2, 3, 1).to(vectors.dtype)], -1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: float[B, 3, H, W] in [-1, 1]. H and W are multiples of ``downsample``.

        Returns:
            int64[B, h, w] in [0, codebook_size).

        Raises:
            ValueError: for another shape, dtype or range.
        """
        _check_images(images, self.downsample)
        check_range(images)
        return self.quantizer(self.encoder(images)).codes

    @torch.no_grad()
    def decode(self, codes: Tensor, meaning: Tensor | None = None) -> Tensor:
        """Decode images from codes.

        Args:
            codes: int64[B, h, w] in [0, codebook_size).
            meaning: float[B, h', w', C] if the decoder reads it.

        Returns:
            float32[B, 3, H, W] in [-1, 1].

        Raises:
            ValueError: if a code is out of range, or meaning is missing or not read.
        """
        if codes.numel() and not (0 <= int(codes.min()) and int(codes.max()) < self.codebook_size):
            raise ValueError(
                f"codes from {int(codes.min())} to {int(codes.max())}: "
                f"expected 0 to {self.codebook_size - 1}"
            )
        vectors = self.joined(self.quantizer.lookup(codes), meaning)
        return self.decoder(vectors).float().clamp(-1, 1)

    @property
    def fingerprint(self) -> str:
        """Hash of config and weights, 16 hex digits."""
        return digest_of(self.config.stored(), self.state_dict())

    @property
    def codes_fingerprint(self) -> str:
        """Hash of config and weights without the decoder, 16 hex digits."""
        weights = self.state_dict().items()
        kept = {name: weight for name, weight in weights if not name.startswith("decoder.")}
        return digest_of(self.config.of_codes(), kept)

    def start_from(self, source: "VQTokenizer") -> None:
        """Take the weights of another tokenizer.

        If only this decoder reads meaning, its first layer has more inputs. Their weights are zero:
        the first reconstructions are those of the source.

        Raises:
            ValueError: if anything else differs.
        """
        before, now = source.config, self.config
        if replace(before, meaning_channels=0, meaning_fingerprint="") != replace(
            now, meaning_channels=0, meaning_fingerprint=""
        ) or (before.meaning_channels and before != now):
            raise ValueError(f"its configuration is {before}, that of this tokenizer {now}")
        weights = source.state_dict()
        if before != now:
            first, channels = self.decoder.first_layer, self.quantizer.channels
            name = next(k for k, v in self.named_parameters() if v is first)
            widened = torch.zeros_like(first)
            widened[:, :channels] = weights[name]
            weights[name] = widened
        self.load_state_dict(weights)

    def save(self, folder: str | Path) -> None:
        """Write the folder that ``load`` reads."""
        save_folder(self, self.config.stored(), folder)

    @classmethod
    def load(cls, folder: str | Path, verify: bool = True) -> "VQTokenizer":
        """Load a folder that ``save`` wrote, in eval mode.

        Args:
            verify: compare the fingerprint of what was read with that in the config.

        Raises:
            ValueError: if the folder is no image tokenizer, or its weights and config do not match.
        """

        def expected(config: VQTokenizerConfig) -> dict[str, Tensor]:
            with torch.device("meta"):  # shapes alone
                return cls(config).state_dict()

        stored = load_folder(
            cls, VQTokenizerConfig, expected, folder, "an image tokenizer", verify=verify
        )
        return stored.eval()


def _check_images(images: Tensor, downsample: int) -> None:
    check_shape(images)
    if images.shape[2] % downsample or images.shape[3] % downsample:
        raise ValueError(
            f"images of {images.shape[2]} x {images.shape[3]} pixels: "
            f"both sides must be multiples of {downsample}"
        )
