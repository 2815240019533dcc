"""Collective operations of torch.distributed. Without a process group there is one rank."""

import ipaddress
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from multimodal.torchrun import is_restart, rank_and_world_size

In = TypeVar("In")
Out = TypeVar("Out")
RESULT_TIMEOUT = timedelta(minutes=30)  # for a batch of another rank
POLL_INTERVAL = 0.02  # seconds
Objects = TypeVar("Objects", dict[str, Any], list[Any])


def leave_store_of_last_attempt() -> None:
    """In ranks that torchrun has started again: meet where no attempt before has met.

    torchrun keeps one store for all attempts (torch 2.15). It still has the addresses of the ranks
    that are gone, and a rank that is early would wait for those. The first rank need not be on the
    machine of the store: others may have joined or left. Call before the ranks connect.

    Raises:
        ValueError: if the first rank does not say in that store where the ranks meet.
    """
    if not is_restart() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    own_rank, ranks = rank_and_world_size()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, ranks, is_master=False)  # type: ignore[attr-defined]
    key = f"multimodal/address/{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    if own_rank == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            store.set(key, f"{address_beside(host, port)} {free.getsockname()[1]}")
    try:
        place = store.get(key).decode()
    except dist.DistStoreError as error:
        raise ValueError(
            f"{host}:{port}: the first rank has not said there where the ranks meet (torchrun gave "
            "it another store, as its machines have changed?): start torchrun again"
        ) from error
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place.split()
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # the first rank has the new one


def address_beside(host: str, port: int) -> str:
    """The address of this machine for those that know another one: ``host`` if it is this one."""
    family, kind, protocol, _, there = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as route:
        route.connect(there)  # of datagrams: nothing is sent
        here = str(route.getsockname()[0])
    same = here == there[0] or ipaddress.ip_address(here.partition("%")[0]).is_loopback
    return host if same else here


@contextmanager
def process_group() -> Iterator[int]:
    """Connect the processes that torchrun started, over gloo, for results on the CPU.

    Yields:
        The rank of this process. 0 without torchrun.
    """
    if rank_and_world_size()[1] == 1:
        yield 0
        return
    leave_store_of_last_attempt()
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


class SharedWork:
    """The batches of one command, shared by the ranks of torchrun. Without it one process does all.

    Results travel through the store of torch.distributed, so that the first rank has them in order.
    """

    def __init__(self) -> None:
        self.rank, self.ranks = rank_and_world_size()
        self._store: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> "SharedWork":
        if self.ranks > 1:
            leave_store_of_last_attempt()
            has_server = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            self._store = dist.PrefixStore(  # type: ignore[attr-defined]
                "multimodal/shared",
                dist.TCPStore(  # type: ignore[attr-defined]
                    os.environ["MASTER_ADDR"],
                    int(os.environ["MASTER_PORT"]),
                    self.ranks,
                    is_master=self.is_first and not has_server,
                    timeout=RESULT_TIMEOUT,
                    wait_for_workers=False,
                ),
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, _: Any) -> None:
        if self._store is None:
            return
        if error is not None or not self.is_first:
            reason = None if error is None else str(error) or type(error).__name__
            self._put(f"end/{self.rank}", reason)
        else:  # the store lives here: the others have to be able to say that they are done
            for other in range(1, self.ranks):
                self._get(f"end/{other}", other)

    def from_first(self, make: Callable[[], Out]) -> Out:
        """What ``make`` returns on the first rank, on all ranks."""
        if self.ranks == 1:
            return make()
        if self.is_first:
            value = make()
            self._put("first", value)
            return value
        made: Out = self._get("first", 0)
        return made

    def map_batches(
        self, items: Sequence[In], size: int, work: Callable[[Sequence[In], int], Iterable[Out]]
    ) -> Iterator[Out]:
        """The results of all items in order on the first rank, and none on the others.

        Args:
            size: items of a batch. A rank does whole batches, so no result depends on the ranks.
            work: takes items and the number of the first one, and gives a result for each.

        Raises:
            ValueError: on the first rank if another has failed: which, and why.
        """
        if self.ranks == 1:
            yield from work(items, 0)
            return
        for number, start in enumerate(range(0, len(items), size)):
            owner = number % self.ranks
            if owner == self.rank:
                results = list(work(items[start : start + size], start))
                if self.is_first:
                    yield from results
                else:
                    self._put(str(number), results)
            elif self.is_first:
                yield from self._get(str(number), owner)

    def _put(self, key: str, value: object) -> None:
        self._store.set(key, pickle.dumps(value))

    def _get(self, key: str, owner: int) -> Any:
        """What another rank has put. It may have ended with an error instead."""
        end = time.monotonic() + RESULT_TIMEOUT.total_seconds()
        while not self._store.check([key]):
            # in this order: it may put a result and end between the two looks
            if self._store.check([f"end/{owner}"]) and not self._store.check([key]):
                reason = pickle.loads(self._store.get(f"end/{owner}"))
                raise ValueError(f"rank {owner} of {self.ranks} has failed: {reason}")
            if time.monotonic() > end:
                raise ValueError(
                    f"rank {owner} of {self.ranks} has given no result for "
                    f"{RESULT_TIMEOUT.total_seconds():.0f} seconds"
                )
            time.sleep(POLL_INTERVAL)
        value = pickle.loads(self._store.get(key))
        if owner:
            self._store.delete_key(key)
        return value


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def global_sum(value: Tensor) -> Tensor:
    """The sum over all ranks, without a gradient."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


@cache
def host_group() -> Any:
    """The ranks as a group for tensors of the host. It is made once, and all ranks have to call.

    NCCL would need a GPU for them, and the host would wait for all that it does before.
    """
    return dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else None


def global_counts(counts: Sequence[int]) -> list[int]:
    """The sums over all ranks of numbers that each rank has on the host. No GPU is waited for."""
    if world_size() == 1:
        return list(counts)
    sums = torch.tensor(counts, dtype=torch.int64)
    dist.all_reduce(sums, group=host_group())
    return [int(count) for count in sums.tolist()]


def mean_over_ranks(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Average logged values over the ranks. The ranks must have equal shares of the batch.

    Args:
        parts: float[] by name. Of a name that starts with ``largest``, the maximum is taken.

    Returns:
        float32[] by name, detached, the same on all ranks.
    """
    values = torch.stack([value.detach().float() for value in parts.values()])
    largest = values.clone()
    if world_size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    means = global_sum(values) / world_size()
    return {
        name: (high if name.startswith("largest") else mean)
        for name, mean, high in zip(parts, means, largest, strict=True)
    }


def gather_objects(objects: Objects) -> Objects:
    """Merge a dictionary or a list of each rank, in the order of the ranks. All ranks get it."""
    if world_size() == 1:
        return objects
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, objects)
    if isinstance(objects, dict):
        return {key: value for part in parts for key, value in part.items()}
    return [item for part in parts for item in part]


def gather_with_gradients(local: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks, in the order of the ranks, with gradients.

    [B, ...] -> [ranks * B, ...]. B must be the same on all ranks.
    """
    if world_size() == 1:
        return local
    return _Gather.apply(local.contiguous())


class _Gather(torch.autograd.Function):
    """torch.distributed.nn has a deprecated one that permutes a transposed gradient on gloo
    (torch 2.15)."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.count = len(local)
        parts = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(parts, local)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # The loss of every rank depends on these rows, so sum over the ranks. A matrix product may
        # return a transposed gradient. Collectives read memory in order, so make it contiguous.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() * ctx.count :][: ctx.count]
