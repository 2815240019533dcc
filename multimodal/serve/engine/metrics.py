"""``/metrics`` in the format of Prometheus."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from multimodal.model.layers.prefixes import PrefixCache

if TYPE_CHECKING:
    from multimodal.serve.engine.scheduler import Scheduler

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Metrics:
    """Numbers of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter(
            "requests",
            "requests that ended, by address and status: of a stream, that of an error in it",
            "path",
            "status",
        )
        self.seconds = self._histogram("request_seconds", "from a request to its end", "path")
        self.first = self._histogram(
            "first_output_seconds",
            "from a request to the beginning of its response: of a stream, its first output",
            "path",
            "stream",
        )
        self.drift = Gauge(
            "drift_p",
            "how likely the last requests are without a change since the reference",
            ["signal"],
            "multimodal",
            registry=self.registry,
        )
        self._read = self._counter("prompt_tokens", "tokens of prompts")
        self._written = self._counter("generated_tokens", "tokens of texts and images")

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(name, about, labels, namespace="multimodal", registry=self.registry)

    def _histogram(self, name: str, about: str, *labels: str) -> Histogram:
        return Histogram(name, about, labels, "multimodal", registry=self.registry, buckets=SECONDS)

    def count_tokens(self, read: int, written: int) -> None:
        self._read.inc(read)
        self._written.inc(written)

    def watch(self, scheduler: "Scheduler") -> None:
        """Count the rows and requests of a scheduler when the numbers are read."""
        for name, about, count in (
            ("requests_running", "requests with rows in the batch", scheduler.count_running),
            ("requests_waiting", "requests without rows in the batch", scheduler.count_waiting),
            ("batch_rows", "rows in the batch", scheduler.count_rows),
            ("prefix_bytes", "of kept prefixes", lambda: scheduler.prefixes.bytes),
        ):
            gauge = Gauge(name, about, namespace="multimodal", registry=self.registry)
            gauge.set_function(count)
        self.registry.register(_Prefixes(scheduler.prefixes))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Prefixes(Collector):
    """Counters of a cache of prefixes."""

    def __init__(self, prefixes: PrefixCache) -> None:
        self.prefixes = prefixes

    def collect(self) -> Iterator[Metric]:
        kept, all_of = self.prefixes, "pieces that prompts begin with, which were kept or read"
        for name, about, hits, misses in (
            ("prefixes", all_of, kept.hits, kept.misses),
            ("prefix_tokens", f"tokens of {all_of}", kept.tokens_kept, kept.tokens_read),
        ):
            family = CounterMetricFamily(f"multimodal_{name}", about, labels=["source"])
            family.add_metric(["kept"], hits)
            family.add_metric(["read"], misses)
            yield family
