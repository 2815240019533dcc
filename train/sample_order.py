"""The order of the samples: a function of (seed, epoch, position), the same on any number of ranks.

A pass over the samples first shuffles the shards. It then divides the shuffled shards into blocks,
and shuffles the samples of each block. So each sample comes once a pass. Only one block has to be
at hand at a time, and a reader opens each shard once a pass. Data of one block are fully shuffled.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch.utils.data import Sampler

VERSION = 2  # of the order; a checkpoint with another version cannot be resumed
BLOCK = 1 << 16  # least number of samples that are shuffled with each other
Item: TypeAlias = tuple[int, int]  # (pass over its source, number of the sample)


class Shuffled:
    """The shuffled samples of one source, for any number of passes.

    Args:
        sizes: number of samples of each shard.
        seed: decides the order, with the number of the pass.
    """

    def __init__(self, sizes: Sequence[int] | NDArray[np.int64], seed: int) -> None:
        self.sizes, self.seed = np.asarray(sizes, np.int64), seed
        self.starts = np.cumsum(self.sizes) - self.sizes
        self._layout: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None
        self._block: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def numbers(self, pass_number: int, start: int, stop: int) -> NDArray[np.int64]:
        """The samples at positions [start, stop) of a pass, int64[stop - start]."""
        parts = []
        _, _, ends = self._blocks(pass_number)
        while start < stop:
            block = int(np.searchsorted(ends, start, side="right"))
            first = int(ends[block - 1]) if block else 0
            until = min(stop, int(ends[block]))
            parts.append(self._shuffled(pass_number, block)[start - first : until - first])
            start = until
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _blocks(self, pass_number: int) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
        """(pass, the order of the shards, the position at which each block ends)"""
        if self._layout is None or self._layout[0] != pass_number:
            shards = np.random.default_rng([self.seed, pass_number]).permutation(len(self.sizes))
            ends = np.cumsum(self.sizes[shards])
            # A block ends with the shard that fills it. An unfilled rest joins the last block.
            block_ends: list[int] = []
            while (start := block_ends[-1] if block_ends else 0) < ends[-1]:
                last = int(np.searchsorted(ends, start + BLOCK))
                if last == len(ends) or ends[-1] - ends[last] < BLOCK:
                    last = len(ends) - 1
                block_ends.append(int(ends[last]))
            self._layout = pass_number, shards, np.array(block_ends)
        return self._layout

    def _shuffled(self, pass_number: int, block: int) -> NDArray[np.int64]:
        """The samples of one block, int64[samples of the block]."""
        if self._block is None or self._block[0] != (pass_number, block):
            _, shards, ends = self._blocks(pass_number)
            if len(ends) == 1:
                numbers = np.random.default_rng([self.seed, pass_number]).permutation(len(self))
            else:
                shard_ends = np.cumsum(self.sizes[shards])
                first = int(ends[block - 1]) if block else 0
                inside = shards[(shard_ends > first) & (shard_ends <= ends[block])]
                parts = [
                    np.arange(self.starts[shard], self.starts[shard] + self.sizes[shard])
                    for shard in inside
                ]
                numbers = np.concatenate(parts)
                np.random.default_rng([self.seed, pass_number, block]).shuffle(numbers)
            self._block = (pass_number, block), numbers
        return self._block[1]


class Order:
    """The order of the samples of several sources.

    Samples are numbered over all sources, in the order of the sources.

    Args:
        sources: for each source, the number of samples of each shard.
        seed: decides the order.
        weights: for each source, its share of an epoch, relative to the others. Without weights,
            each sample comes once an epoch. A source that is used up starts another pass, and
            continues it in the next epoch. So no sample comes again before all others of its
            source.
        shuffle: False takes the samples in their stored order.
        length: samples of an epoch, with weights. By default as many as all sources have.

    Raises:
        ValueError: for weights that are not one positive number for each source.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[int] | NDArray[np.int64]],
        seed: int = 0,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
        length: int | None = None,
    ) -> None:
        self.seed, self.weights, self.shuffle = seed, weights, shuffle
        self._all = Shuffled(np.concatenate([np.asarray(sizes) for sizes in sources]), seed)
        self._sources = [Shuffled(sizes, seed) for sizes in sources]
        self._starts = np.cumsum([0, *map(len, self._sources)])
        self.counts = np.array([len(source) for source in self._sources])
        self._length = len(self._all) if weights is None or length is None else length
        if weights is not None:
            if len(weights) != len(sources) or not all(0 < w < float("inf") for w in weights):
                raise ValueError(
                    f"weights={list(weights)}: expected {len(sources)} positive numbers, one for "
                    "each folder"
                )
            shares = np.cumsum(weights) / np.sum(weights) * len(self)
            self.counts = np.diff(np.round(shares).astype(np.int64), prepend=0)
        self._sequence: tuple[int, NDArray[np.int16]] | None = None
        self._counted: tuple[int, int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return self._length

    @property
    def shares(self) -> list[float]:
        """The share of each source in an epoch."""
        return [float(count) / len(self) for count in self.counts]

    def items(self, epoch: int, start: int, stop: int) -> list[Item]:
        """The samples at positions [start, stop) of an epoch."""
        if not self.shuffle:
            return [(epoch, number) for number in range(start, stop)]
        if self.weights is None:
            return [(epoch, int(n)) for n in self._all.numbers(epoch, start, stop)]
        before = self._drawn_before(epoch, start)
        items: list[Item] = []
        for source in self._source_sequence(epoch)[start:stop]:
            shuffled = self._sources[source]
            drawn = epoch * int(self.counts[source]) + int(before[source])
            before[source] += 1
            pass_number, position = divmod(drawn, len(shuffled))
            number = int(shuffled.numbers(pass_number, position, position + 1)[0])
            items.append((pass_number, int(self._starts[source]) + number))
        self._counted = epoch, stop, before.copy()
        return items

    def _drawn_before(self, epoch: int, start: int) -> NDArray[np.int64]:
        """How many samples of each source come before a position of an epoch, int64[sources].

        Continues from the last call if possible: counting from 0 takes time with every batch.
        """
        sequence = self._source_sequence(epoch)
        counted, counts = 0, np.zeros(len(self._sources), np.int64)
        if self._counted is not None and self._counted[0] == epoch and self._counted[1] <= start:
            counted, counts = self._counted[1], self._counted[2]
        return counts + np.bincount(sequence[counted:start], minlength=len(self._sources))

    def _source_sequence(self, epoch: int) -> NDArray[np.int16]:
        """The source of each position of an epoch, int16[len(self)]."""
        if self._sequence is None or self._sequence[0] != epoch:
            sequence = np.repeat(np.arange(len(self.counts), dtype=np.int16), self.counts)
            np.random.default_rng([self.seed, epoch, 1]).shuffle(sequence)
            self._sequence = epoch, sequence
        return self._sequence[1]


class GlobalBatches(Sampler[list[Item]]):
    """Yields this rank's share of each global batch, a function of (seed, epoch, step).

    A global batch is a fixed list of samples. The ranks take its samples in turn. A shuffled order
    is for training: an incomplete last batch is dropped.

    Args:
        order: of the samples.
        global_batch_size: samples per step, over all ranks.
        rank: of this process.
        world_size: number of ranks.
        limit: use the first ``limit`` samples. 0 uses all.
        same_epoch: every epoch is the first one, to overfit a few batches.

    Attributes:
        announce: is called with each batch of this rank, ``ahead`` batches before it is yielded.
            None: nothing is.

    Raises:
        ValueError: if the batch size is not a multiple of the ranks, or there are too few samples.
    """

    def __init__(
        self,
        order: Order,
        global_batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        limit: int = 0,
        same_epoch: bool = False,
    ) -> None:
        if global_batch_size % world_size:
            raise ValueError(
                f"global_batch_size={global_batch_size} is not a multiple of {world_size} ranks"
            )
        if order.shuffle and len(order) < global_batch_size:
            raise ValueError(
                f"{len(order)} samples are fewer than one global batch of {global_batch_size}: "
                "give more data or a smaller global_batch_size"
            )
        self.order, self.global_batch_size = order, global_batch_size
        self.size = min(len(order), limit or len(order))
        if not order.shuffle and (rest := self.size % world_size):
            # With unequal numbers of samples, ranks would wait for each other for ever.
            rank_zero_warn(
                f"the last {rest} of {self.size} samples cannot be shared equally by {world_size} "
                "ranks: they are not measured"
            )
            self.size -= rest
            if not self.size:
                raise ValueError(f"{rest} samples are too few for {world_size} ranks")
        self.rank, self.world_size = rank, world_size
        self.epoch, self.same_epoch = 0, same_epoch
        self.start = (0, 0)  # epoch, and batches of it before a resume
        self.announce: Callable[[list[Item]], None] | None = None
        self.ahead = 0

    @property
    def sampler(self) -> "GlobalBatches":
        """Lightning calls ``set_epoch`` on ``loader.batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        # Validation uses the captions and masks of epoch 0 every time.
        self.epoch = epoch if self.order.shuffle and not self.same_epoch else 0

    def __len__(self) -> int:
        full, rest = divmod(self.size, self.global_batch_size)
        return full + bool(rest and not self.order.shuffle)

    @property
    def skipped(self) -> int:
        """Batches of this epoch that were done before a resume."""
        epoch, batches = self.start
        return batches if epoch == self.epoch else 0

    def __iter__(self) -> Iterator[list[Item]]:
        coming: deque[list[Item]] = deque()
        for batch in range(self.skipped, len(self)):
            start = batch * self.global_batch_size
            stop = min(self.size, start + self.global_batch_size)
            items = self.order.items(self.epoch, start, stop)[self.rank :: self.world_size]
            if self.announce is not None:
                self.announce(items)
            coming.append(items)
            if len(coming) > self.ahead:
                yield coming.popleft()
        yield from coming
