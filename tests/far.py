"""A server of files over HTTP with Range, which can be slow and fail. Also run as a program:

python tests/far.py FOLDER [--latency 0.02] [--failing 0.05]

The program prints its port, and serves until it is ended.
"""

import argparse
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

Fault = str | None
STALL = 30.0  # seconds without an answer; a reader gives up long before
FAULTS = ("500", "503", "429", "close", "cut", "stall")


class Far(ThreadingHTTPServer):
    """Serves a folder.

    Args:
        fault: called with the path of each request: a fault of FAULTS, "other bytes", or the
            address to redirect to. None: the request is answered.
        latency: seconds before each answer.
        ranges: False ignores the header Range, as ``python -m http.server`` does.

    Attributes:
        asked: (path, header Range) of each request.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        folder: Path,
        fault: Callable[[str], Fault] = lambda path: None,
        latency: float = 0.0,
        ranges: bool = True,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.fault, self.latency, self.ranges = folder, fault, latency, ranges
        self.asked: list[tuple[str, str | None]] = []
        self.ending = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A reader that gave up is no error here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement
    server: Far

    def do_GET(self) -> None:
        server, path = self.server, unquote(urlsplit(self.path).path)
        asked = self.headers.get("Range")
        server.asked.append((path, asked))
        fault = server.fault(path)
        if server.latency:
            time.sleep(server.latency)
        if fault == "stall":
            server.ending.wait(STALL)
        if fault in ("stall", "close") or server.ending.is_set():
            self.close_connection = True
            return
        if fault is not None and ":" in fault:
            self._answer(302, b"", {"Location": fault})
            return
        if fault is not None and fault.isdigit():
            self._answer(int(fault), b"not now")
            return
        file = server.folder / path.lstrip("/")
        if not file.is_file():
            self._answer(404, b"no such file")
            return
        size, status, headers = file.stat().st_size, 200, dict[str, str]()
        start, stop = 0, size
        if asked is not None and server.ranges:
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
            assert found, asked
            start, stop = int(found[1]), min(size, int(found[2] or size) + 1)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            status = 206
        with open(file, "rb") as opened:
            opened.seek(start)
            data = opened.read(stop - start)
        if fault == "other bytes":
            data = bytes(255 - byte for byte in data)
        self._answer(status, data, headers, len(data) // 2 if fault == "cut" else len(data))

    def _answer(
        self,
        status: int,
        data: bytes,
        headers: dict[str, str] | None = None,
        sent: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[:sent])
        if sent is not None and sent < len(data):
            self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def far(server: Far) -> Iterator[Far]:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ending.set()
        server.shutdown()
        server.server_close()
        thread.join()


def failing(share: float, seed: int = 0) -> Callable[[str], Fault]:
    """That share of all requests has a fault, of each kind as often."""
    rng, lock = random.Random(seed), threading.Lock()

    def fault(path: str) -> Fault:
        with lock:
            return rng.choice(FAULTS) if rng.random() < share else None

    return fault


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--failing", type=float, default=0.0)
    arguments = parser.parse_args()
    server = Far(arguments.folder, failing(arguments.failing), arguments.latency)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
