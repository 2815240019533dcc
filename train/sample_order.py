"""Which sample comes when: a function of (seed, epoch, position), whoever asks and wherever from.

A pass over the samples shuffles the shards, and the samples inside blocks of shards that lie next
to one another then. So each sample comes once, however many shards there are no more than a block
has to be at hand, and a reader opens each shard once a pass. What fits into one block is shuffled
as a whole.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

VERSION = 2  # of the order: a checkpoint of another cannot be gone on with
BLOCK = 1 << 16  # samples that are shuffled with one another, at least
Item: TypeAlias = tuple[int, int]  # (pass over its source, number of the sample)


class Shuffled:
    """Args: sizes: the samples of each shard; seed: with the number of a pass, it decides all."""

    def __init__(self, sizes: Sequence[int] | NDArray[np.int64], seed: int) -> None:
        self.sizes, self.seed = np.asarray(sizes, np.int64), seed
        self.starts = np.cumsum(self.sizes) - self.sizes
        self._layout: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None
        self._block: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def numbers(self, turn: int, start: int, stop: int) -> NDArray[np.int64]:
        """int64[stop - start]: the samples at these positions of a pass."""
        found = []
        _, _, ends = self._laid_out(turn)
        while start < stop:
            block = int(np.searchsorted(ends, start, side="right"))
            first = int(ends[block - 1]) if block else 0
            until = min(stop, int(ends[block]))
            found.append(self._shuffled(turn, block)[start - first : until - first])
            start = until
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _laid_out(self, turn: int) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
        """(pass, the order of the shards, the position at which each block ends)"""
        if self._layout is None or self._layout[0] != turn:
            shards = np.random.default_rng([self.seed, turn]).permutation(len(self.sizes))
            ends = np.cumsum(self.sizes[shards])
            # A block ends with the shard that fills it; what is left over joins the last one.
            block_ends: list[int] = []
            while (begun := block_ends[-1] if block_ends else 0) < ends[-1]:
                filled = int(np.searchsorted(ends, begun + BLOCK))
                if filled == len(ends) or ends[-1] - ends[filled] < BLOCK:
                    filled = len(ends) - 1
                block_ends.append(int(ends[filled]))
            self._layout = turn, shards, np.array(block_ends)
        return self._layout

    def _shuffled(self, turn: int, block: int) -> NDArray[np.int64]:
        if self._block is None or self._block[0] != (turn, block):
            _, shards, ends = self._laid_out(turn)
            if len(ends) == 1:
                numbers = np.random.default_rng([self.seed, turn]).permutation(len(self))
            else:
                shard_ends = np.cumsum(self.sizes[shards])
                first = int(ends[block - 1]) if block else 0
                inside = shards[(shard_ends > first) & (shard_ends <= ends[block])]
                numbers = np.concatenate([
                    np.arange(self.starts[shard], self.starts[shard] + self.sizes[shard])
                    for shard in inside
                ])  # fmt: skip
                np.random.default_rng([self.seed, turn, block]).shuffle(numbers)
            self._block = (turn, block), numbers
        return self._block[1]


class Order:
    """The samples of several sources, numbered through; an epoch has as many as all together.

    Args:
        sources: for each, the samples of its shards.
        weights: for each, its share of an epoch (of their sum); without, each sample comes once an
            epoch. A source of which more is asked than it has starts another pass, where it goes on
            in the next epoch: no sample comes again before all others of its source came.
        shuffle: False: from the first to the last, each epoch.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[int] | NDArray[np.int64]],
        seed: int = 0,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
    ) -> None:
        self.seed, self.weights, self.shuffle = seed, weights, shuffle
        self._all = Shuffled(np.concatenate([np.asarray(one) for one in sources]), seed)
        self._sources = [Shuffled(one, seed) for one in sources]
        self._starts = np.cumsum([0, *map(len, self._sources)])
        self.counts = np.array([len(one) for one in self._sources])
        if weights is not None:
            if len(weights) != len(sources) or not all(0 < w < float("inf") for w in weights):
                raise ValueError(
                    f"weights={list(weights)}: expected {len(sources)} positive numbers, one for "
                    "each folder"
                )
            shares = np.cumsum(weights) / np.sum(weights) * len(self)
            self.counts = np.diff(np.round(shares).astype(np.int64), prepend=0)
        self._turns: tuple[int, NDArray[np.int16]] | None = None
        self._counted: tuple[int, int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self._all)

    @property
    def shares(self) -> list[float]:
        """Of each source, in an epoch."""
        return [float(count) / len(self) for count in self.counts]

    def items(self, epoch: int, start: int, stop: int) -> list[Item]:
        """Those at the positions from start on, before stop."""
        if not self.shuffle:
            return [(epoch, number) for number in range(start, stop)]
        if self.weights is None:
            return [(epoch, int(n)) for n in self._all.numbers(epoch, start, stop)]
        turns = self._whose_turn(epoch)
        before = self._drawn_before(epoch, start)
        found: list[Item] = []
        for source in turns[start:stop]:
            shuffled = self._sources[source]
            drawn = epoch * int(self.counts[source]) + int(before[source])
            before[source] += 1
            turn, position = divmod(drawn, len(shuffled))
            number = int(shuffled.numbers(turn, position, position + 1)[0])
            found.append((turn, int(self._starts[source]) + number))
        self._counted = epoch, stop, before.copy()
        return found

    def _drawn_before(self, epoch: int, start: int) -> NDArray[np.int64]:
        """How many samples each source gave in an epoch before a position; on from the last call
        where that is possible, since counting them all takes time with every batch."""
        turns = self._whose_turn(epoch)
        at, counts = 0, np.zeros(len(self._sources), np.int64)
        if self._counted is not None and self._counted[0] == epoch and self._counted[1] <= start:
            at, counts = self._counted[1], self._counted[2]
        return counts + np.bincount(turns[at:start], minlength=len(self._sources))

    def _whose_turn(self, epoch: int) -> NDArray[np.int16]:
        if self._turns is None or self._turns[0] != epoch:
            turns = np.repeat(np.arange(len(self.counts), dtype=np.int16), self.counts)
            np.random.default_rng([self.seed, epoch, 1]).shuffle(turns)
            self._turns = epoch, turns
        return self._turns[1]
