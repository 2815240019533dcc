"""Rates and differences between rates, with 95 % intervals that hold for few samples too.

- A rate: Wilson's score interval (1927). Unlike the usual plus-minus it stays in [0, 1], and 0 of n
  does not become certainty.
- A difference of two rates: Newcombe's hybrid of two of them (1998, Statistics in Medicine 17:873,
  method 10).

Both are for cases that do not depend on one another. ``Cases`` keeps the sample of each, for a
bootstrap over samples.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution
Z_OF_POWER = 0.8416212335729143  # the 80 % quantile


@dataclass
class Cases:
    """Values of cases, such as 1 for a claim that is true, and the sample of each.

    A sample may have several cases, or none. Those of one sample depend on one another.

    Args:
        values: one for each case.
        rows: for each case, the number of its sample.
    """

    values: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def add(self, row: int, values: Iterable[float]) -> None:
        """Add cases of one sample."""
        before = len(self.values)
        self.values += values
        self.rows += [row] * (len(self.values) - before)

    def add_count(self, row: int, count: int, n: int) -> None:
        """Add n cases of one sample, ``count`` of which have the value 1, the others 0."""
        assert 0 <= count <= n, f"{count} of {n}"
        self.add(row, [1.0] * count + [0.0] * (n - count))

    @property
    def mean(self) -> float:
        """Of all cases. 0 if there are none."""
        return sum(self.values) / len(self.values) if self.values else 0.0


@dataclass(frozen=True)
class Rate:
    """``count`` of ``n``.

    Raises:
        ValueError: unless 0 <= count <= n and n > 0.
    """

    count: int
    n: int

    def __post_init__(self) -> None:
        if not (0 <= self.count <= self.n and self.n > 0):
            raise ValueError(f"{self.count} of {self.n}: expected 0 <= count <= n and n > 0")

    @property
    def value(self) -> float:
        return self.count / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high)."""
        square = Z * Z / self.n
        middle = (self.value + square / 2) / (1 + square)
        half = math.sqrt(self.value * (1 - self.value) * square + square * square / 4)
        half /= 1 + square
        # Rounding must not move the ends away from 0 and 1.
        low = 0.0 if self.count == 0 else middle - half
        return low, 1.0 if self.count == self.n else middle + half


def difference_interval(a: Rate, b: Rate) -> tuple[float, float]:
    """(low, high) of the rate a minus the rate b, of groups without common samples."""
    difference = a.value - b.value
    (low_a, high_a), (low_b, high_b) = a.interval, b.interval
    return (
        difference - math.hypot(a.value - low_a, high_b - b.value),
        difference + math.hypot(high_a - a.value, b.value - low_b),
    )


def detectable_difference(a: Rate, b: Rate) -> float:
    """The smallest difference that groups of these sizes show in four of five samples.

    By the normal approximation: a test at 5 % with a power of 80 %, at the rate of both together.
    """
    n = a.n + b.n
    # That a sample has no case does not mean that there is none: take one.
    rate = min(max(a.count + b.count, 1), n - 1) / n
    return (Z + Z_OF_POWER) * math.sqrt(rate * (1 - rate) * (1 / a.n + 1 / b.n))
