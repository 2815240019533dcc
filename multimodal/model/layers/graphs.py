"""CUDA graphs of the step that reads one token of each row (``Transformer.forward_token``).

A graph is all kernels of a step in one launch. Launched one by one, the host is what a step waits
for: 20 ms for ``1b`` on an H200, whose memory could deliver the weights in 0.5 ms. No compiler is
needed: what the step launches is recorded as it is, in a fraction of a second.

A graph reads and writes the same memory each time. So ids and positions are copied to buffers, and
a cache is lent by ``StepGraphs``, which lends it again when nobody holds it. There are few shapes:
rows are padded to powers of two, columns to ROOM_MULTIPLE. The first step of a shape is run as it
is, the second is recorded, and all others are played.

Shapes: B rows, P the power of two from B on, S columns of the cache, D width.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from threading import Lock
from typing import Any, TypeAlias

import torch
from torch import Tensor

from multimodal.model.layers.attention import KVCache, visible
from multimodal.model.layers.compiled import ROOM_MULTIPLE
from multimodal.model.layers.transformer import Transformer
from multimodal.terminal import print_error

MAX_FREE = 3  # caches that are kept though nobody uses them
ONE_AT_A_TIME = Lock()  # steps of all threads: see ``cuda_graph``
Run: TypeAlias = Callable[[], Tensor]


@dataclass
class _Shared:
    """What all graphs of a device share.

    Attributes:
        stream: records them. Libraries keep memory for each stream: cuBLAS 32 MiB on an H200.
        last: the stream on which a graph was recorded or played last.
        graphs: those that are left.
    """

    stream: torch.cuda.Stream
    last: torch.cuda.Stream
    graphs: "weakref.WeakSet[torch.cuda.CUDAGraph]" = field(default_factory=weakref.WeakSet)

    def begin(self) -> torch.cuda.Stream:
        """The current stream, after it waits for the last graph."""
        now = torch.cuda.current_stream()
        if now != self.last:
            now.wait_stream(self.last)
            self.last = now
        return now

    def pool(self) -> Any:
        """The memory of all graphs: torch refuses a pool whose graphs are all gone."""
        for graph in self.graphs:
            return graph.pool()
        return torch.cuda.graph_pool_handle()


@cache
def _shared(device: int) -> _Shared:
    now = torch.cuda.current_stream(device)
    return _Shared(torch.cuda.Stream(device), now)  # type: ignore[no-untyped-call]


def cuda_graph(run: Run) -> Run:
    """Record what a function launches on the current device.

    All graphs of a device use the same memory, so one may write where another has left its result.
    Their order does not matter ("Graph memory management" in torch's notes on CUDA), if the caller
    holds ``ONE_AT_A_TIME`` while it records one, and while it plays one and copies the result.

    The result is the same tensor each time. The function has run before, so that libraries have
    set themselves up. It must not wait for the card.
    """
    graph, shared = torch.cuda.CUDAGraph(), _shared(torch.cuda.current_device())
    stream, now = shared.stream, shared.begin()
    stream.wait_stream(now)
    with torch.cuda.stream(stream):
        run()  # libraries have memory of their own for each stream
        # Other threads may use the card meanwhile.
        graph.capture_begin(shared.pool(), capture_error_mode="thread_local")
        try:
            output = run()
        finally:
            graph.capture_end()
    shared.graphs.add(graph)
    now.wait_stream(stream)

    def play() -> Tensor:
        shared.begin()
        graph.replay()
        return output

    return play


class _Step:
    """The step of one shape on one cache.

    Args:
        keys, values: for each layer float[P, G, S, d], parts of memory that stays where it is.
        record: makes a function that does the same from one that has run.
    """

    def __init__(
        self,
        transformer: Transformer,
        keys: list[Tensor],
        values: list[Tensor],
        record: Callable[[Run], Run],
    ) -> None:
        rows, columns, device = len(keys[0]), keys[0].shape[2], keys[0].device
        self.ids = ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = positions = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._record, self._runs, self._rows = record, 0, 0

        def run() -> Tensor:  # without ``self``: a cycle would keep the memory
            seen = visible(positions, columns)
            return transformer.forward_token(ids, positions, seen, keys, values, positions[:, 0])

        self._run: Run = run

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """int64[B], int64[B, 1] -> float[B, D]"""
        # A graph records the current device, which need not be that of the memory.
        with ONE_AT_A_TIME, torch.cuda.device_of(self.ids):  # type: ignore[no-untyped-call]
            return self._read(ids, positions)

    def _read(self, ids: Tensor, positions: Tensor) -> Tensor:
        rows = len(ids)
        if rows != self._rows:  # padding reads id 0 at position 0
            self._rows = rows
            self.ids.zero_()
            self.positions.zero_()
        self.ids[:rows] = ids
        self.positions[:rows] = positions
        self._runs += 1
        if self._runs == 2:
            self._run = self._recorded()
        return self._run()[:rows].clone()  # the next step of any shape writes to the same memory

    def _recorded(self) -> Run:
        try:
            return self._record(self._run)
        except RuntimeError as error:
            reason = (str(error).splitlines() or ["?"])[0]
            print_error(f"no CUDA graph of {len(self.ids)} rows, slower without it: {reason:.200}")
            return self._run


@dataclass(eq=False)
class _Memory:
    """A cache that stays where it is.

    Attributes:
        keys, values: for each layer float[P, G, S, d].
        borrower: the cache object that uses it. None, or gone: it is free.
        steps: by their rows and columns.
    """

    keys: list[Tensor]
    values: list[Tensor]
    borrower: "weakref.ref[KVCache]"
    steps: dict[tuple[int, int], _Step] = field(default_factory=dict)

    @property
    def is_free(self) -> bool:
        return self.borrower() is None

    @property
    def rows(self) -> int:
        return len(self.keys[0])

    @property
    def columns(self) -> int:
        return self.keys[0].shape[2]


class StepGraphs:
    """Caches, and the recorded steps that use them, of one network at a time.

    A copy of it is empty, because a copy of the network has other weights.

    Args:
        record: see ``cuda_graph``. A test on a CPU gives another function.
    """

    def __init__(self, record: Callable[[Run], Run] = cuda_graph) -> None:
        self._record = record
        self._memories: dict[int, _Memory] = {}  # by address, the oldest first
        self._weights: tuple[int, ...] = ()
        self._lock = Lock()

    def __deepcopy__(self, memo: object) -> "StepGraphs":
        return StepGraphs(self._record)

    def __reduce__(self) -> tuple[object, ...]:
        return StepGraphs, (self._record,)

    @torch.inference_mode(False)  # or it could only be written to in that mode
    def cache(self, transformer: Transformer, rows: int, tokens: int) -> KVCache:
        """A cache of zeros, for at least so many rows and tokens of each."""
        rows, columns = (
            power_of_two(rows),
            ROOM_MULTIPLE * power_of_two(-(-tokens // ROOM_MULTIPLE)),
        )
        with self._lock:
            weights = tuple(weight.data_ptr() for weight in transformer.parameters())
            if weights != self._weights:  # graphs would read the weights where they were
                self._weights = weights
                self._memories.clear()
            fitting = [
                memory
                for memory in self._memories.values()
                if memory.is_free and memory.rows >= rows and memory.columns >= columns
            ]
            if not fitting:
                self._forget(rows, columns)
                made = self._new_cache(transformer, rows, columns)
                memory = _Memory(made.keys, made.values, weakref.ref(made))
                self._memories[made.address] = memory
                return made
            memory = min(fitting, key=lambda memory: memory.rows * memory.columns)
            lent = KVCache(memory.keys, memory.values)
            memory.borrower = weakref.ref(lent)
        for tensor in (*memory.keys, *memory.values):
            tensor.zero_()  # a number that is not finite would spoil what it is multiplied with
        return lent

    def _new_cache(self, transformer: Transformer, rows: int, columns: int) -> KVCache:
        """An empty cache. Where memory is short, all that is free is given back for it."""
        try:
            return transformer.empty_cache(rows, columns)
        except torch.OutOfMemoryError:
            pass  # the error holds what there was room for, so try again without it
        lent = {address: each for address, each in self._memories.items() if not each.is_free}
        self._memories = lent
        return transformer.empty_cache(rows, columns)

    def _forget(self, rows: int, columns: int) -> None:
        """Drop free memory: what a new one of these sizes has room for, and the oldest."""
        free = [address for address, memory in self._memories.items() if memory.is_free]
        old = free[: max(0, len(free) - MAX_FREE + 1)]
        for address in free:
            memory = self._memories[address]
            if address in old or (memory.rows <= rows and memory.columns <= columns):
                del self._memories[address]

    @torch.inference_mode()
    def step(
        self, transformer: Transformer, ids: Tensor, positions: Tensor, cache: KVCache, end: int
    ) -> Tensor:
        """Read one token of each row, as ``Transformer.forward_token`` does.

        Args:
            ids: int64[B].
            positions: int64[B, 1].
            cache: lent by this object.
            end: the columns that are filled after this step.

        Returns:
            float[B, D], normed.
        """
        memory = self._memories[cache.address]
        shape = power_of_two(len(ids)), -(-end // ROOM_MULTIPLE) * ROOM_MULTIPLE
        if shape not in memory.steps:
            keys, values = (
                [x[: shape[0], :, : shape[1]] for x in each]
                for each in (memory.keys, memory.values)
            )
            memory.steps[shape] = _Step(transformer, keys, values, self._record)
        return memory.steps[shape](ids, positions)


def power_of_two(number: int) -> int:
    """The least one that is not below a number."""
    return 1 << (number - 1).bit_length()
