"""The levels of an image's codes, and their places in one flat sequence.

An image is read by meaning and drawn in detail: the codes of each level follow those of the level
before. Within a level they go row by row, and the codes of one position, one for each group, stand
side by side. Every group of every level has its own range of code numbers.

    meaning, 2 x 2 positions, 2 groups of 8        detail, 2 x 2 positions, 1 group of 100
    [0,8) [8,16) [0,8) [8,16) ... 4 times          [16,116) [16,116) [16,116) [16,116)

Shapes: n codes of an image, K the sum of all codebooks, h w a grid, G groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import torch
from torch import Tensor

from multimodal.schemas import Between, check_fields

MAX_CODES = 2**18  # of an image


@dataclass(frozen=True)
class Level:
    """One level of codes.

    Args:
        name: ``meaning`` or ``detail``.
        grid: positions per side.
        groups: G, codes at each position.
        codebook_size: of each group.

    Raises:
        ValueError: for a number out of its range.
    """

    name: str
    grid: Annotated[int, Between(1, 512)]
    groups: Annotated[int, Between(1, 64)]
    codebook_size: Annotated[int, Between(1, 2**22)]

    def __post_init__(self) -> None:
        check_fields(self)
        if self.codes > MAX_CODES:
            raise ValueError(f"{self}: {self.codes:,} codes of an image, over {MAX_CODES:,}")

    @property
    def codes(self) -> int:
        """How many codes of an image it has: h w G."""
        return self.grid**2 * self.groups

    @property
    def numbers(self) -> int:
        """How many code numbers it takes."""
        return self.groups * self.codebook_size


@dataclass(frozen=True)
class Layout:
    """The levels of an image tokenizer, in the order in which they are drawn.

    Raises:
        ValueError: for no level, or two of one name.
    """

    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        check_fields(self)
        names = [level.name for level in self.levels]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"levels {names}: expected at least one, each with its own name")

    @property
    def codes_per_image(self) -> int:
        """n."""
        return sum(level.codes for level in self.levels)

    @property
    def codebook_size(self) -> int:
        """K, the code numbers of all levels."""
        return sum(level.numbers for level in self.levels)

    def __getitem__(self, name: str) -> Level:
        """A level by its name. Raises ``ValueError`` if there is none."""
        for level in self.levels:
            if level.name == name:
                return level
        names = ", ".join(level.name for level in self.levels)
        raise ValueError(f"level {name!r}: this image tokenizer has {names}")

    def chosen(self, names: Sequence[str]) -> list[Level]:
        """Levels by name, in the order of all. Raises ``ValueError`` for an unknown name."""
        chosen = [self[name] for name in names]
        return [level for level in self.levels if level in chosen]

    def span(self, name: str, among: Sequence[str] | None = None) -> slice:
        """Where the codes of a level stand among the codes of some levels. None: of all."""
        before = self.levels[: self.levels.index(self[name])]
        start = sum(level.codes for level in before if among is None or level.name in among)
        return slice(start, start + self[name].codes)

    def offset(self, name: str) -> int:
        """The first code number of a level."""
        return sum(level.numbers for level in self.levels[: self.levels.index(self[name])])

    def numbers(self, name: str) -> slice:
        """The code numbers of a level."""
        return slice(self.offset(name), self.offset(name) + self[name].numbers)

    def indices(self, names: Sequence[str]) -> Tensor:
        """Where the codes of some levels stand among the n codes of an image: int64[codes].

        Levels keep their order, whatever the order of the names is.
        """
        spans = [self.span(level.name) for level in self.chosen(names)]
        return torch.cat([torch.arange(span.start, span.stop) for span in spans])

    @cached_property
    def first(self) -> Tensor:
        """The smallest code number of each place: int64[n]."""
        parts = []
        for level in self.levels:
            starts = self.offset(level.name) + level.codebook_size * torch.arange(level.groups)
            parts.append(starts.repeat(level.grid**2))
        return torch.cat(parts)

    @cached_property
    def last(self) -> Tensor:
        """The largest code number of each place: int64[n]."""
        sizes = [torch.full((level.codes,), level.codebook_size) for level in self.levels]
        return self.first + torch.cat(sizes) - 1

    def flatten(self, name: str, codes: Tensor) -> Tensor:
        """The codes of a level as they stand in the sequence.

        Args:
            codes: int64[B, h, w, G], each in [0, codebook_size of the level).

        Returns:
            int64[B, h w G], code numbers.
        """
        flat = codes.flatten(1)
        return flat + self.first[self.span(name)].to(codes.device)

    def unflatten(self, name: str, codes: Tensor) -> Tensor:
        """The reverse of ``flatten`` for whole images: int64[B, n] -> int64[B, h, w, G].

        Raises:
            ValueError: if a code of the level is out of its range.
        """
        span, level = self.span(name), self[name]
        found = codes[:, span] - self.first[span].to(codes.device)
        if found.numel() and not (0 <= int(found.min()) and int(found.max()) < level.codebook_size):
            raise ValueError(
                f"{name} codes from {int(found.min())} to {int(found.max())}: "
                f"expected 0 to {level.codebook_size - 1}"
            )
        return found.view(len(codes), level.grid, level.grid, level.groups)
