"""The image tokenizer: images become one sequence of codes in levels, and codes become images.

``meaning`` is what a frozen pretrained encoder sees, ``detail`` is how the pixels look. Either may
be missing: without meaning an image is pixels alone, without detail nothing can be drawn.

A tokenizer is a folder. With one level it is the folder of this level. With two, ``config.json``
names them, and each has a folder of its own.

Shapes: B images, S pixels of a side, n codes of an image, K the code numbers of all levels.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multimodal.devices import full_float32
from multimodal.provenance import Provenance
from multimodal.tokenizers.detail import VQTokenizer
from multimodal.tokenizers.levels import Layout
from multimodal.tokenizers.meaning import Meaning
from multimodal.tokenizers.weights import (
    Fit,
    check_range,
    check_shape,
    digest_of,
    read_config_file,
    resize,
)

LEVELS = (["meaning", "detail"], ["meaning"], ["detail"])


class ImageTokenizer(nn.Module):
    """The levels, and their place in one sequence of codes.

    Args:
        meaning: the level of meaning, or None.
        detail: the level of detail, or None.

    Attributes:
        layout: the levels.
        image_size: S of the images that ``encode`` expects, the largest of any level.
        fit: how other images are made square.

    Raises:
        ValueError: for no level, levels that fit images differently, or a decoder that was made for
            another level of meaning.
    """

    def __init__(self, meaning: Meaning | None = None, detail: VQTokenizer | None = None) -> None:
        super().__init__()
        self.meaning, self.detail = meaning, detail
        levels = self._levels()
        self.layout = Layout(tuple(level.level for level in levels))
        self.image_size = max(level.config.image_size for level in levels)
        fits = sorted({level.config.fit for level in levels})
        if len(fits) > 1:
            raise ValueError(f"the levels fit images differently: {', '.join(fits)}")
        if detail is not None and (expected := detail.config.meaning_fingerprint):
            if meaning is None:
                raise ValueError("the decoder of detail reads a level of meaning: give it")
            if meaning.fingerprint != expected:
                raise ValueError(
                    f"the decoder of detail reads the level of meaning {expected}, "
                    f"not {meaning.fingerprint}"
                )
        self.fit: Fit = levels[0].config.fit
        self.provenance = Provenance()

    def __repr__(self) -> str:
        levels = ", ".join(
            f"{level.name} {level.grid} x {level.grid} x {level.groups} of {level.codebook_size}"
            for level in self.layout.levels
        )
        return f"ImageTokenizer({self.image_size} x {self.image_size} pixels, {self.fit}: {levels})"

    @property
    def can_draw(self) -> bool:
        """Whether codes become images."""
        return self.detail is not None and self.detail.can_decode

    @property
    def drawn_size(self) -> int:
        """Pixels of a side of the images that ``decode`` gives. Raises ``ValueError`` for none."""
        return self._drawing_level().config.image_size

    @property
    def codes_per_image(self) -> int:
        """n."""
        return self.layout.codes_per_image

    @property
    def codebook_size(self) -> int:
        """K."""
        return self.layout.codebook_size

    @torch.no_grad()
    @full_float32()
    def encode(self, images: Tensor, levels: Sequence[str] | None = None) -> Tensor:
        """Encode images. TF32, which torch allows on a GPU, would give other codes.

        Args:
            images: float[B, 3, S, S] in [-1, 1].
            levels: names of the levels to encode, in any order. None: all.

        Returns:
            int64[B, n], code numbers in [0, K). Of some levels their codes alone.

        Raises:
            ValueError: for another shape, dtype or range, or an unknown level.
        """
        check_shape(images)
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"images of {images.shape[2]} x {images.shape[3]} pixels: "
                f"expected {self.image_size} x {self.image_size}"
            )
        check_range(images)
        names = [level.name for level in self.layout.levels] if levels is None else levels
        parts = []
        for level in self.layout.chosen(names):
            if level.name == "meaning":
                assert self.meaning is not None, "the layout has it"
                codes = self.meaning.encode(images)
            else:
                assert self.detail is not None, "the layout has it"
                codes = self.detail.encode(self.detail_images(images))[..., None]
            parts.append(self.layout.flatten(level.name, codes))
        return torch.cat(parts, 1)

    def detail_images(self, images: Tensor) -> Tensor:
        """Images at the size of the level of detail: float[B, 3, H, W]."""
        assert self.detail is not None, "the layout has it"
        return resize(images, self.detail.config.image_size)

    def meaning_vectors(self, images: Tensor) -> Tensor | None:
        """What the decoder of detail reads beside its codes: float[B, h, w, C], or None."""
        if self.meaning is None or self.detail is None or not self.detail.config.meaning_channels:
            return None
        return self.meaning.vectors(self.meaning.encode(images))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode images from codes.

        Args:
            codes: int64[B, n], code numbers in [0, K).

        Returns:
            float32[B, 3, H, W] in [-1, 1], of the size of the level of detail.

        Raises:
            ValueError: if a code is out of the range of its place, or there is no level of detail.
        """
        detail = self._drawing_level()
        if codes.ndim != 2 or codes.shape[1] != self.codes_per_image:
            raise ValueError(
                f"codes of shape {tuple(codes.shape)}: expected [B, {self.codes_per_image}]"
            )
        vectors = None
        if detail.config.meaning_channels:
            assert self.meaning is not None, "checked when the levels were joined"
            vectors = self.meaning.vectors(self.layout.unflatten("meaning", codes))
        return detail.decode(self.layout.unflatten("detail", codes)[..., 0], vectors)

    def code_vectors(self) -> Iterator[Tensor]:
        """For each group of each level the vectors of its codes: float[codebook_size, C]."""
        if self.meaning is not None:
            for group in range(self.meaning.level.groups):
                yield self.meaning.code_vectors(group)
        if self.detail is not None:
            numbers = torch.arange(self.detail.codebook_size)
            yield self.detail.quantizer.lookup(numbers).detach()

    @property
    def fingerprint(self) -> str:
        """Hash of config and weights of all levels, 16 hex digits."""
        return self._digest(*(level.fingerprint for level in self._levels()))

    @property
    def codes_fingerprint(self) -> str:
        """Hash of what decides the codes, 16 hex digits: all but the decoder of detail."""
        return self._digest(*self.levels_fingerprints.values())

    @property
    def levels_fingerprints(self) -> dict[str, str]:
        """By the name of each level what decides its codes, 16 hex digits."""
        found = {}
        if self.meaning is not None:
            found["meaning"] = self.meaning.fingerprint
        if self.detail is not None:
            found["detail"] = self.detail.codes_fingerprint
        return found

    def _drawing_level(self) -> VQTokenizer:
        if self.detail is None or not self.detail.can_decode:
            missing = "level of detail" if self.detail is None else "decoder"
            raise ValueError(
                f"this image tokenizer has no {missing}: it reads images, and cannot draw them"
            )
        return self.detail

    def _levels(self) -> list[Meaning | VQTokenizer]:
        return [level for level in (self.meaning, self.detail) if level is not None]

    def _digest(self, *fingerprints: str) -> str:
        return (
            fingerprints[0] if len(fingerprints) == 1 else digest_of({"levels": fingerprints}, {})
        )

    def save(self, folder: str | Path) -> None:
        """Write the folder that ``load_image_tokenizer`` reads."""
        folder, levels = Path(folder), self._levels()
        folder.mkdir(parents=True, exist_ok=True)
        self.provenance.write(folder)
        if len(levels) == 1:
            levels[0].save(folder)
            return
        names = [level.name for level in self.layout.levels]
        for name, level in zip(names, levels, strict=True):
            level.save(folder / name)
        config = {"levels": names, "fingerprint": self.fingerprint}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")


def load_image_tokenizer(folder: str | Path, verify: bool = True) -> ImageTokenizer:
    """Load a tokenizer folder, in eval mode.

    Args:
        verify: compare the fingerprint of what was read with that in the config.

    Raises:
        ValueError: if the folder is no image tokenizer, or its weights and config do not match.
    """
    folder = Path(folder)
    try:
        config = read_config_file(folder / "config.json")
    except ValueError as error:
        raise ValueError(f"{folder}: not an image tokenizer of this release: {error}") from error
    names = config.get("levels")
    if not isinstance(names, list):
        names, places = ["meaning" if "encoder" in config else "detail"], [folder]
    else:
        if names not in LEVELS:
            raise ValueError(f"{folder}: levels={names!r:.80}: expected some of {LEVELS[0]}")
        places = [folder / name for name in names]
    found: dict[str, Any] = {}
    for name, place in zip(names, places, strict=True):
        load = Meaning.load if name == "meaning" else VQTokenizer.load
        found[name] = load(place, verify)
    tokenizer = ImageTokenizer(**found)
    if verify and len(names) > 1 and tokenizer.fingerprint != config.get("fingerprint"):
        raise ValueError(
            f"{folder}: fingerprint is {tokenizer.fingerprint}, its config says "
            f"{config.get('fingerprint')}: its levels do not belong together"
        )
    tokenizer.provenance = Provenance.read(folder)
    return tokenizer.eval()
