"""The metrics of all workers, whichever is asked: each tells its own at a socket in one folder.

Their numbers are not added up. They have the label ``worker``, so that one that was started again
is seen as what it is: sum over it where only the sum matters.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

PATIENCE = 2.0  # seconds in which another worker has to tell its numbers
log = logging.getLogger("multimodal.serve")


class Peers:
    """The workers of a server, one of which this is.

    Args:
        folder: of the sockets. Only this user may enter it.
        number: of this worker.
        text: its own metrics.
    """

    def __init__(self, folder: str | Path, number: int, text: Callable[[], bytes]) -> None:
        self.folder, self.number, self.text = Path(folder), number, text

    async def listen(self) -> asyncio.Server:
        """Tell the others from now on."""

        async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                writer.write(self.text())
                await writer.drain()
            writer.close()

        return await asyncio.start_unix_server(tell, self.folder / f"{self.number}.sock")

    async def metrics(self) -> bytes:
        """Those of all workers that answer."""
        numbers = sorted(int(path.stem) for path in self.folder.glob("*.sock"))
        texts = await asyncio.gather(*(self._ask(number) for number in numbers))
        return merged(
            {str(n): text for n, text in zip(numbers, texts, strict=True) if text is not None}
        )

    async def _ask(self, number: int) -> str | None:
        if number == self.number:
            return self.text().decode()
        try:
            async with asyncio.timeout(PATIENCE):
                reader, writer = await asyncio.open_unix_connection(self.folder / f"{number}.sock")
                try:
                    return (await reader.read()).decode()
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return None  # it has ended, and is being started again


def merged(texts: Mapping[str, str]) -> bytes:
    """Metrics by worker as one text, in the format of Prometheus."""
    registry = CollectorRegistry()
    registry.register(_Labelled(texts))
    return generate_latest(registry)


class _Labelled(Collector):
    def __init__(self, texts: Mapping[str, str]) -> None:
        self.texts = texts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for worker, text in self.texts.items():
            for family in text_string_to_metric_families(text):
                name = family.name
                into = families.setdefault(name, Metric(name, family.documentation, family.type))
                for sample in family.samples:
                    into.add_sample(sample.name, {**sample.labels, "worker": worker}, sample.value)
        yield from families.values()
