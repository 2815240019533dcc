"""Run the application with uvicorn, until a signal ends it, in this process or in several."""

import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import uvicorn

from multimodal.api import Model
from multimodal.origin.credentials import Signer
from multimodal.serve.app import make_app
from multimodal.serve.engine.settings import LOCAL_HOSTS, Settings
from multimodal.serve.workers import Supervisor, check_free, shared_socket
from multimodal.terminal import print_error

KEEP_ALIVE = 30  # seconds that an idle connection stays
Fallback: TypeAlias = tuple[str, Model] | None
Load: TypeAlias = Callable[[], tuple[Model, Fallback]]


def make_server(
    model: Model,
    settings: Settings,
    host: str,
    port: int,
    fallback: Fallback = None,
    signer: Signer | None = None,
    on_start: Callable[[], None] = lambda: None,
) -> uvicorn.Server:
    """A server that is not running yet.

    Args:
        model, settings, fallback, signer: see ``make_app``.
        on_start: is called when it listens.
    """
    settings = replace(settings, local=host in LOCAL_HOSTS)
    config = uvicorn.Config(
        make_app(model, settings, fallback, signer),
        host=host,
        port=port,
        log_level="warning",
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=round(settings.stop_timeout),
        server_header=False,
    )
    return _Server(config, settings, on_start)


class _Server(uvicorn.Server):
    """Ends connections whose client reads nothing for ``Settings.write_timeout`` seconds. What it
    has not read is in the buffers of the connection, so the kernel has to end it (Linux).
    """

    def __init__(
        self, config: uvicorn.Config, settings: Settings, on_start: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self.settings, self.on_start = settings, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and hasattr(socket, "TCP_USER_TIMEOUT"):
            for listening in (each for server in self.servers for each in server.sockets):
                milliseconds = round(1000 * self.settings.write_timeout)
                listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self.on_start()

    async def on_tick(self, counter: int) -> bool:
        """Whether to end. A worker whose scheduler is dead does, and is started again."""
        app: Any = self.config.app
        is_worker = bool(self.settings.peers)
        dead = is_worker and app.app.state.engines.scheduler.stopping
        return await super().on_tick(counter) or dead


def serve(
    load: Load,
    settings: Settings,
    host: str,
    port: int,
    workers: int,
    on_ready: Callable[[], Any],
    signer: Signer | None = None,
) -> int:
    """Answer requests. SIGINT and SIGTERM let running requests end, and then return.

    Args:
        load: the model, and the fallback. Each worker calls it: it can be pickled.
        workers: how many processes there are. 1: this one.
        on_ready: is called before the first request is answered.
        signer: of images that are drawn, in all workers.

    Returns:
        The exit status.

    Raises:
        OSError: if the address is in use.
        ValueError: what ``load`` raises. Of several workers the first one says it itself.
    """
    check_free(host, port)
    if workers == 1:
        model, fallback = load()
        make_server(model, settings, host, port, fallback, signer, on_ready).run()
        return 0
    with tempfile.TemporaryDirectory(prefix="multimodal-serve-") as folder:
        work = _Work(load, replace(settings, peers=folder), host, port, signer)
        return Supervisor(work, workers, settings.stop_timeout, on_ready).run()


@dataclass(frozen=True)
class _Work:
    """What a worker does."""

    load: Load
    settings: Settings
    host: str
    port: int
    signer: Signer | None

    def __call__(self, number: int, answers: Callable[[], None]) -> None:
        settings = replace(self.settings, worker=number)
        if settings.record:
            settings = replace(settings, record=str(record_of(settings.record, number)))
        try:
            model, fallback = self.load()
            server = make_server(
                model, settings, self.host, self.port, fallback, self.signer, answers
            )
        except (ValueError, OSError) as error:
            print_error(f"multimodal serve: worker {number}: {error}")
            sys.exit(1)
        with shared_socket(self.host, self.port) as listening:
            server.run([listening])


def record_of(path: str | Path, number: int) -> Path:
    """The record of a worker: NAME.3.jsonl. Each has a chain of its own."""
    path = Path(path)
    return path.with_name(f"{path.stem}.{number}{path.suffix}")
