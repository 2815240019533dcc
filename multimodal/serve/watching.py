"""What a server does beside its requests: it compares the last ones with a reference, again and
again, and takes out of its record what is too old.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import numpy as np
from prometheus_client import Gauge

from multimodal.api import Model
from multimodal.record.chain import Entry, Record
from multimodal.record.drift import LEAST, WINDOW, Rows, drift, prompts_of, requests_of
from multimodal.record.report import countable_entries
from multimodal.record.retention import keep
from multimodal.serve.engine.scheduler import Steps

EVERY = 50  # requests
AT_ONCE = 8  # prompts that are embedded between two steps of the batch
LONGEST = 10_000  # characters of a prompt that is embedded
DAY = 86_400.0
log = logging.getLogger("multimodal.serve")


class DriftWatch:
    """Compares the last WINDOW requests with a reference after each EVERY requests.

    One comparison raises an alarm without cause with a probability of 1 % at most (``alpha`` of
    ``drift``). This is no rate of a day: 10,000 requests are 200 comparisons, with up to 2 such
    alarms on average. They come in groups: a window shares three quarters of its requests with the
    next one.

    What prompts are about is compared, too, if the reference has texts.

    Args:
        reference: a record (``multimodal serve --record``).
        gauge: by signal, the corrected p-value.
        embed: gives the embeddings of texts, float32[N, D], without those that it cannot embed.

    Raises:
        ValueError: if the reference has too few requests.
    """

    def __init__(
        self,
        reference: str | Path,
        gauge: Gauge,
        embed: Callable[[Sequence[str]], Awaitable[Rows]],
    ) -> None:
        self.reference = requests_of(countable_entries(reference, log.warning))
        if len(self.reference) < LEAST:
            raise ValueError(f"{reference}: has {len(self.reference)} requests, {LEAST} are needed")
        self.path, self.gauge, self.embed = self.reference[0].facts.get("path"), gauge, embed
        self.prompts = [text[:LONGEST] for text in prompts_of(self.reference)]
        self.embedded: Rows | None = None  # those prompts
        self.window, self.seen = deque[Entry](maxlen=WINDOW), 0
        self.asked = deque[str](maxlen=WINDOW)  # prompts that are not embedded yet
        self.rows = deque[Rows](maxlen=WINDOW)  # of the last prompts
        self._comparing: asyncio.Task[None] | None = None

    def add(self, entry: Entry, prompt: str) -> None:
        """Note a request. In the event loop: it begins to compare when it is time to."""
        if entry.facts.get("path") != self.path:
            return
        self.window.append(entry)
        if self.prompts and prompt.strip():
            self.asked.append(prompt.strip()[:LONGEST])
        self.seen += 1
        if self.seen % EVERY == 0 and (self._comparing is None or self._comparing.done()):
            self._comparing = asyncio.create_task(self.compare())

    async def compare(self) -> None:
        """Set the gauge, and say in the log what has changed, or that it could not be found out."""
        try:
            window, embedded = list(self.window), await self._embedded()
            for result in await asyncio.to_thread(drift, self.reference, window, embedded=embedded):
                self.gauge.labels(result.signal).set(result.p)
                if result.alarm:
                    log.warning("drift: %s", result)
        except Exception:  # nobody waits for what the task returns
            log.exception("the last requests were not compared with the reference")

    async def _embedded(self) -> tuple[Rows, Rows] | None:
        """The prompts of the reference, and the last ones."""
        if not self.prompts:
            return None
        if self.embedded is None:
            self.embedded = await self.embed(self.prompts)
        asked = list(self.asked)
        self.rows.extend(await self.embed(asked))
        for _ in asked:  # others may have come meanwhile
            self.asked.popleft()
        return (self.embedded, np.stack(self.rows)) if self.rows else None

    def stop(self) -> None:
        """End a comparison that is not done."""
        if self._comparing is not None:
            self._comparing.cancel()


def embed_prompts(model: Model, prompts: Sequence[str]) -> Steps:
    """The work of ``DriftWatch.embed``. Returns float32[N, D] of the prompts that can be read."""
    rows: list[Rows] = [np.zeros((0, model.config.objectives.alignment_dim), np.float32)]
    for start in range(0, len(prompts), AT_ONCE):
        for row in model.embed_lines(prompts[start : start + AT_ONCE]):
            if not isinstance(row, ValueError):
                rows.append(row.numpy()[None])
        yield None
    return np.concatenate(rows)


async def keep_daily(record: Record, days: int, text_days: int) -> None:
    """Take what is too old out of a record: at once, and then once a day. See ``keep``."""
    while True:
        try:
            removed, redacted = await asyncio.to_thread(keep, record, days, text_days)
            if removed or redacted:
                log.info("%s: %d entries removed, %d redacted", record.path, removed, redacted)
        except (OSError, ValueError):
            log.exception("what is too old is still in the record")
        await asyncio.sleep(DAY)
