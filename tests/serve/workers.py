"""What a worker does in tests: it says who it is, at an address that workers share.

GET /        the process
GET /FOLDER  the same, when FOLDER/go exists. Before, FOLDER/PROCESS says that it was asked.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from signal import SIGTERM, signal

from multimodal.serve.workers import shared_socket


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        folder = Path(self.path)
        if folder != Path("/"):
            (folder / str(os.getpid())).touch()
            while not (folder / "go").exists():
                time.sleep(0.02)
        body = str(os.getpid()).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@dataclass(frozen=True)
class Says:
    """A worker. fails: before it answers."""

    port: int
    fails: bool = False

    def __call__(self, number: int, answers: Callable[[], None]) -> None:
        if self.fails:
            raise SystemExit(3)
        server = HTTPServer(("127.0.0.1", self.port), Handler, bind_and_activate=False)
        server.socket.close()
        server.socket = shared_socket("127.0.0.1", self.port)
        server.server_activate()
        signal(SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
        answers()
        server.serve_forever()
        server.server_close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
