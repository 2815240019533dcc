"""Drift while a server runs: its last requests are compared with a reference, again and again."""

import logging
from collections import deque
from pathlib import Path

from prometheus_client import Gauge

from multimodal.record.chain import Entry
from multimodal.record.drift import LEAST, WINDOW, drift, requests_of
from multimodal.record.report import countable_entries

EVERY = 50  # requests
log = logging.getLogger("multimodal.serve")


class DriftWatch:
    """Compares the last WINDOW requests with a reference after each EVERY requests.

    One comparison raises an alarm without cause with a probability of 1 % at most (``alpha`` of
    ``drift``). This is no rate of a day: 10,000 requests are 200 comparisons, with up to 2 such
    alarms on average. They come in groups: a window shares three quarters of its requests with the
    next one.

    Args:
        reference: a record (``multimodal serve --record``).
        gauge: by signal, the corrected p-value.

    Raises:
        ValueError: if the reference has too few requests.
    """

    def __init__(self, reference: str | Path, gauge: Gauge) -> None:
        self.reference = requests_of(countable_entries(reference, log.warning))
        if len(self.reference) < LEAST:
            raise ValueError(f"{reference}: has {len(self.reference)} requests, {LEAST} are needed")
        self.path, self.gauge = self.reference[0].facts.get("path"), gauge
        self.window: deque[Entry] = deque(maxlen=WINDOW)
        self.seen = 0

    def add(self, entry: Entry) -> bool:
        """Note a request. Returns whether it is time to ``compare``."""
        if entry.facts.get("path") != self.path:
            return False
        self.window.append(entry)
        self.seen += 1
        return self.seen % EVERY == 0

    def compare(self) -> None:
        """Set the gauge, and say in the log what has changed, or that it could not be found out."""
        try:
            for result in drift(self.reference, list(self.window)):
                self.gauge.labels(result.signal).set(result.p)
                if result.alarm:
                    log.warning("drift: %s", result)
        except Exception:  # nobody waits for what the thread returns
            log.exception("the last requests were not compared with the reference")
