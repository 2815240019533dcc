"""One thread computes for all requests: continuous batching over the rows of a ``Decoder``.

A request is a generator, its ``Steps``. It does a piece of its own work between two yields: some
codes are drawn, texts are embedded. Where it yields a ``Decoding``, its rows join the batch as soon
as there is room, and it goes on when they are done. Where it yields a ``Future``, such as an image
that another thread encodes, it goes on when that is done. Codes or an image that it yields are a
piece of output. In each turn

1. cancelled requests end, and their rows leave the batch,
2. requests do pieces of their own work, in turn, for a short time,
3. waiting rows join the batch, first those of the requests that have the fewest in it,
4. the batch decodes one token of each row.

So a short answer joins at the next step, whatever else is being decoded. What a row gives depends
on its own prompt and random numbers only (inference/sampling.py). Rows of different models, a base
and its adapters, are batches of their own, which take their steps in turn.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from multimodal.inference.decode import Decoder, Joining, Row
from multimodal.memory import NotEnoughMemory, is_out_of_memory
from multimodal.model.layers.prefixes import PrefixCache
from multimodal.model.network import MultimodalLM
from multimodal.options import Sampling
from multimodal.serve.engine.errors import ApiError

WORK_SECONDS = 0.05  # of pieces of work between two steps of the batch
LONG_SHARE = 0.75  # of the rows that drawings may take: an answer never waits for a drawing
MAX_RETRY_AFTER = 60  # seconds
log = logging.getLogger("multimodal.serve")


@dataclass(frozen=True)
class Decoding:
    """Rows to decode, with which network, and how. long: they are drawings."""

    network: MultimodalLM
    rows: Sequence[Row]
    sampling: Sampling
    repetition_penalty: float = 1.0
    log_probabilities: bool = False
    long: bool = False


Steps: TypeAlias = Generator[Decoding | Future[Any] | Tensor | Image.Image | None, None, Any]


class Job:
    """A request in the scheduler. Both functions are called in the scheduler's thread.

    Args:
        steps: its work.
        on_piece: is given a row, or None, and a piece of output.
        on_end: is given what the steps returned, or the error.
    """

    def __init__(
        self,
        steps: Steps,
        on_piece: Callable[[Row | None, Any], None],
        on_end: Callable[[Any], None],
    ) -> None:
        self.steps, self.on_piece, self.on_end = steps, on_piece, on_end
        self.decoding: Decoding | None = None
        self.waiting: list[Row] = []
        self.running: list[Row] = []
        self.cancelled = False
        self.began = time.monotonic()


class Scheduler:
    """The thread, and the requests in it.

    Args:
        rows: how many are decoded together.
        requests: how many there may be.
        prefix_bytes: see ``PrefixCache``.

    Attributes:
        jobs: requests that have not ended.
        prefixes: beginnings of prompts that were read.
    """

    def __init__(self, rows: int = 32, requests: int = 256, prefix_bytes: int = 0) -> None:
        self.rows, self.requests = rows, requests
        self.prefixes = PrefixCache(prefix_bytes)
        self.jobs: list[Job] = []
        self._decoders: dict[MultimodalLM, Decoder] = {}  # those that have rows
        self._ready: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopping = self._stopped = False
        self._seconds = 1.0  # that a request takes, a moving average
        self._full = 0  # so many rows were in the batches when memory did not suffice for more
        self._warned = False  # that prefixes are not kept
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def stopping(self) -> bool:
        """Whether no more requests are taken: it was told so, or its thread is dead."""
        return self._stopping or not self._thread.is_alive()

    def count_rows(self) -> int:
        """Rows in the batches of all models."""
        return sum(map(len, list(self._decoders.values())))

    def count_running(self) -> int:
        """Requests with rows in the batch."""
        return sum(bool(job.running) for job in list(self.jobs))

    def count_waiting(self) -> int:
        """Requests of which no row is in the batch."""
        return sum(not job.running for job in list(self.jobs))

    def submit(self, job: Job) -> None:
        """Take a request in.

        Raises:
            ApiError: 429 if there are too many, 503 if the server stops.
        """
        with self._changed:
            if self.stopping:
                raise ApiError(503, "the server stops", code="stopping", retry_after=5)
            if len(self.jobs) >= self.requests:
                seconds = math.ceil(self._seconds * len(self.jobs) / self.rows)
                raise ApiError(
                    429,
                    f"{len(self.jobs)} requests are being worked on or wait: try again later",
                    code="queue_full",
                    retry_after=min(max(1, seconds), MAX_RETRY_AFTER),
                )
            self.jobs.append(job)
            self._ready.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """End a request at the next step, if it has not ended."""
        with self._changed:
            job.cancelled = True
            self._changed.notify()

    def stop(self, seconds: float = 0.0) -> None:
        """Take no more requests, let those that are here end, and end the thread.

        Args:
            seconds: after which requests that have not ended get status 503.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(seconds)
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self._turn()
            except Exception as error:  # of no request: what is left of the batches is unknown
                log.exception("the scheduler failed: all requests end with an error")
                self._fail_all(RuntimeError(f"the scheduler failed: {error}"))
            except BaseException as error:  # such as a panic of a library in Rust
                with self._changed:
                    self._stopping = True  # nobody submits to a thread that is about to end
                self._fail_all(RuntimeError(f"the scheduler died: {error!r}"))
                raise

    def _wait_for_work(self) -> bool:
        """Returns whether there is any. Otherwise the scheduler has been stopped."""
        with self._changed:
            while not self._has_work():
                if self._stopping and not self.jobs:
                    return False
                self._changed.wait()
        return True

    def _fail_all(self, error: Exception) -> None:
        """End all requests. What one of them does at its end cannot keep the others from theirs."""
        with self._changed:
            jobs = list(self.jobs)
            self.jobs.clear()
            self._ready.clear()
            self._decoders.clear()
        for job in jobs:
            for end in (job.steps.close, partial(job.on_end, error)):
                try:
                    end()
                except BaseException:
                    log.exception("a request did not end as it should")

    def _has_work(self) -> bool:
        """Whether there is more to do than to wait for what other threads compute."""
        if self._ready or self._decoders or (self._stopped and self.jobs):
            return True
        return any(job.cancelled or job.waiting for job in self.jobs)

    def _turn(self) -> None:
        if self._stopped:
            for job in list(self.jobs):
                self._end(job, ApiError(503, "the server stopped", code="stopping"))
        for job in [job for job in list(self.jobs) if job.cancelled]:
            self._end(job, None)
        end = time.monotonic() + WORK_SECONDS
        for _ in range(len(self._ready)):
            self._advance(self._ready.popleft())
            if time.monotonic() > end:
                break
        self._let_join()
        for network in list(self._decoders):
            self._decode(network)

    def _advance(self, job: Job) -> None:
        """Do a piece of a request's own work."""
        if job not in self.jobs:  # it was cancelled
            return
        try:
            with torch.inference_mode():
                wanted = next(job.steps)
        except StopIteration as end:
            self._end(job, end.value)
        except Exception as error:
            self._end(job, error)
        else:
            if isinstance(wanted, Future):
                wanted.add_done_callback(lambda _: self._go_on(job))
            elif isinstance(wanted, Tensor | Image.Image):
                job.on_piece(None, wanted)
                self._ready.append(job)
            elif wanted is None or not wanted.rows:
                self._ready.append(job)
            else:
                job.decoding, job.waiting = wanted, list(wanted.rows)

    def _go_on(self, job: Job) -> None:
        """What a request has waited for is done. In any thread."""
        with self._changed:
            self._ready.append(job)
            self._changed.notify()

    def _let_join(self) -> None:
        """Let waiting rows into the batch, one of each request at a time."""
        count = self.count_rows()
        room, waiting = self.rows - count, [job for job in list(self.jobs) if job.waiting]
        if not room or not waiting or 0 < self._full <= count:
            return
        self._full = 0
        long = sum(len(job.running) for job in self.jobs if job.decoding and job.decoding.long)
        chosen: dict[Job, list[Row]] = {job: [] for job in waiting}
        while room:
            able = [
                job
                for job in waiting
                if len(chosen[job]) < len(job.waiting)
                and (not job.decoding.long or long < max(1, LONG_SHARE * self.rows))  # type: ignore[union-attr]
            ]
            if not able:
                break
            job = min(able, key=lambda job: len(job.running) + len(chosen[job]))
            chosen[job].append(job.waiting[len(chosen[job])])
            long += bool(job.decoding and job.decoding.long)
            room -= 1
        joining: dict[MultimodalLM, dict[Job, list[Row]]] = {}
        for job, rows in chosen.items():
            if rows and job.decoding is not None:
                joining.setdefault(job.decoding.network, {})[job] = rows
        for network, several in joining.items():
            if not self._join(network, several):
                # One of them does not fit. Alone each of them joins, or ends with its own error.
                for job, rows in several.items():
                    self._join(network, {job: rows}, ends=True)

    def _join(
        self, network: MultimodalLM, several: dict[Job, list[Row]], ends: bool = False
    ) -> bool:
        """Let rows into the batch of a network. All of their prompts are read together.

        Args:
            ends: whether requests end with the error.
        """
        decoder = self._decoders.get(network) or self._new_decoder(network)
        parts = []
        for job, rows in several.items():
            how = job.decoding
            assert how is not None, "it has rows that wait"
            parts.append(Joining(rows, how.sampling, how.repetition_penalty, how.log_probabilities))
        try:
            decoder.join_together(parts)
        except Exception as error:
            if isinstance(error, NotEnoughMemory) or is_out_of_memory(error):
                self._full = self.count_rows()  # if there are any, these wait until some have left
                ends = ends and not self._full
            for job in several if ends else ():
                self._end(job, error)
            return False
        self._decoders[network] = decoder
        for job, rows in several.items():
            job.waiting = job.waiting[len(rows) :]
            job.running += rows
        return True

    def _new_decoder(self, network: MultimodalLM) -> Decoder:
        """A decoder without rows. It plays the CUDA graphs of a network that has them.

        Exact rows are read and stepped without graphs, and no GPU makes their bits equal. But only
        exact rows read prompts in pieces that ``prefixes`` keeps (docs/guides/serving.md).
        """
        exact = network.graphs is None
        if not exact and self.prefixes.max_bytes and not self._warned:
            self._warned = True
            log.warning("CUDA graphs: beginnings of prompts are not kept, prefix_bytes is not used")
        return Decoder(network, exact, self.prefixes)

    def _decode(self, network: MultimodalLM) -> None:
        """Decode one token of each row of a network. Without rows, it needs no decoder."""
        decoder = self._decoders[network]
        if not len(decoder):
            del self._decoders[network]
            return
        here = set(map(id, decoder.rows))
        owners = {id(row): job for job in self.jobs for row in job.running if id(row) in here}
        try:
            pieces = decoder.step()
        except Exception as error:  # all rows are in the same tensors
            log.exception("the batch failed: its requests end with an error")
            del self._decoders[network]
            for job in {id(job): job for job in owners.values()}.values():
                self._end(job, RuntimeError(f"the batch failed: {error}"))
            return
        failed = {owners[id(row)]: reason for row, reason in decoder.failed}
        for row, piece in pieces:
            owners[id(row)].on_piece(row, piece)
        for job, reason in failed.items():
            self._end(job, RuntimeError(f"its next token failed: {reason}"))
        for job in {id(job): job for job in owners.values() if job not in failed}.values():
            job.running = [row for row in job.running if not row.done]
            if not job.running and not job.waiting:
                job.decoding = None
                self._ready.append(job)

    def _end(self, job: Job, result: Any) -> None:
        if job.decoding is not None and job.decoding.network in self._decoders:
            self._decoders[job.decoding.network].drop(job.running)
        job.steps.close()
        job.waiting, job.running = [], []
        with self._changed:
            self.jobs.remove(job)
        if isinstance(result, Exception) and not isinstance(result, ApiError | ValueError):
            log.error("a request failed", exc_info=result)
        self._seconds += 0.1 * (time.monotonic() - job.began - self._seconds)
        job.on_end(result)
