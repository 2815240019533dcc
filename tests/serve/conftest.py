"""A server in a thread of the test process, with the tiny model."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from multimodal.api import Model
from multimodal.origin.credentials import Signer
from multimodal.serve.app import Gate
from multimodal.serve.engine.engine import Engines
from multimodal.serve.engine.settings import Settings
from multimodal.serve.server import make_server

Make = Callable[..., Model]
NAME, KEY = "tiny", "sk-test"


@dataclass
class Running:
    """A server that answers at ``port``."""

    model: Model
    port: int
    app: Any
    listening: socket.socket

    @property
    def engines(self) -> Engines:
        return self.app.app.state.engines

    def client(self, **more: Any) -> Any:
        import openai

        url = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(**{"base_url": url, "api_key": KEY, "max_retries": 0, **more})


@contextmanager
def running(
    model: Model, fallback: Any = None, signer: Signer | None = None, **settings: Any
) -> Iterator[Running]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        port = listening.getsockname()[1]
        made = Settings(**{"name": NAME, "keys": (KEY,), **settings})
        server = make_server(model, made, "127.0.0.1", port, fallback, signer)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            app = server.config.app
            assert isinstance(app, Gate)
            yield Running(model, port, app, listening)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def serving() -> Callable[..., Any]:
    """``with serving(model, **settings) as server``"""
    return running


@pytest.fixture(scope="module")
def server(tiny_model: Make) -> Iterator[Running]:
    with running(tiny_model(noise=0.1, tied=False)) as server:
        yield server
