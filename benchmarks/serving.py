"""Captions a second of ``multimodal serve``: many clients at once against the same work one by one.

    python -m benchmarks.serving [--model starter] [--clients 32] [--requests 960] [--rounds 3]
        [--threads 2]

Each request is an image of noise and shapes (64 x 64, PNG in a data URI) and asks for a greedy
caption of up to 32 tokens, streamed. All are sent to a server one after the other, and to another,
which has not seen the images either, by --clients at once. The texts must be equal. The same
weights exported, behind benchmarks/peers/transformers_server.py, answer the same clients.

The three take turns: a part of the requests each, --rounds times, so that a machine that is slower
for a while is slower for all. A round is ten requests of each client: the batch fills at its start
and drains at its end, and neither is what a server under load does. The clients share the processor
with the servers, so they note what comes and when, and read it after the round. The last line is
JSON: captions a second of all three, the medians and 99th percentiles of the seconds to the first
token and to the end, and ratios: the median of those of the rounds, and all of them. --out writes
it to a file.
"""

import argparse
import base64
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from multimodal.export.hf import export_hf
from multimodal.files import write_json
from multimodal.hub.names import find_model
from multimodal.model.checkpoint import read_config

TOKENS = 32
HEAD = """POST /v1/chat/completions HTTP/1.1\r
Host: 127.0.0.1\r
Content-Type: application/json\r
Content-Length: {}\r
\r
"""


def request_of(number: int) -> bytes:
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    corner = rng.integers(0, 40, 2).tolist()
    colour = tuple(rng.integers(0, 256, 3).tolist())
    ImageDraw.Draw(image).ellipse([*corner, corner[0] + 24, corner[1] + 24], colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}]
    body = {"model": "bench", "messages": [{"role": "user", "content": content}],
        "max_tokens": TOKENS, "stream": True}  # fmt: skip
    return json.dumps(body).encode()


class Client:
    """One connection that stays open. It computes nothing while others are served."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=600)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, body: bytes) -> list[tuple[float, bytes]]:
        """What came, and the seconds to it from the request on."""
        start, received = time.perf_counter(), list[tuple[float, bytes]]()
        self._socket.sendall(HEAD.format(len(body)).encode("ascii") + body)
        while not received or not received[-1][1].endswith(b"0\r\n\r\n"):
            data = self._socket.recv(65536)
            received.append((time.perf_counter() - start, data))
            if not data or not received[0][1].startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"a request failed: {received[0][1][:300]!r}")
        return received


def read_answer(received: Sequence[tuple[float, bytes]]) -> tuple[str, float, float]:
    """The text, and the seconds to its first token and to its end."""
    answer = b"".join(data for _, data in received)
    ends = list(accumulate(len(data) for _, data in received))
    place, text, first = answer.index(b"\r\n\r\n") + 4, "", 0.0
    while size := int(answer[place : (line := answer.index(b"\r\n", place))], 16):
        chunk, place = answer[line + 2 : line + 2 + size], line + 2 + size + 2
        for event in chunk.split(b"\n\n"):
            if not event.startswith(b"data: {"):
                continue
            for choice in json.loads(event[6:])["choices"]:
                if piece := choice["delta"].get("content"):
                    first = first or received[bisect_left(ends, place - 2)][0]
                    text += piece
    return text, first or received[-1][0], received[-1][0]


@dataclass
class Side:
    """What clients got of one server."""

    port: int
    clients: int
    texts: list[str] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    wholes: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # captions a second of each round

    def measure(self, bodies: Sequence[bytes]) -> None:
        mine = threading.local()

        def ask(body: bytes) -> list[tuple[float, bytes]]:
            if not hasattr(mine, "client"):
                mine.client = Client(self.port)
            return mine.client.ask(body)

        start = time.perf_counter()
        with ThreadPoolExecutor(self.clients) as pool:
            answers = list(pool.map(ask, bodies))
        self.rates.append(len(bodies) / (time.perf_counter() - start))
        results = list(map(read_answer, answers))
        self.texts += [text for text, _, _ in results]
        self.firsts += [first for _, first, _ in results]
        self.wholes += [whole for _, _, whole in results]

    def numbers(self) -> dict[str, float]:
        seconds = sum(len(self.texts) / len(self.rates) / rate for rate in self.rates)
        numbers = {"captions_per_second": round(len(self.texts) / seconds, 2)}
        for name, values in (("first_token", self.firsts), ("whole", self.wholes)):
            ordered = sorted(values)
            last = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
            numbers[f"{name}_p50"] = round(statistics.median(ordered), 4)
            numbers[f"{name}_p99"] = round(last, 4)
        return numbers

    def ratios(self, other: "Side") -> list[float]:
        """How many times its captions a second each round has."""
        return [round(a / b, 2) for a, b in zip(self.rates, other.rates, strict=True)]

    def equal(self, other: "Side") -> int:
        pairs = zip(self.texts, other.texts, strict=True)
        return sum(one.strip() == two.strip() for one, two in pairs)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def server(port: int, module: str, *arguments: object) -> Iterator[int]:
    """``python -m MODULE ARGUMENTS``. Yields its port when it answers."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, "MULTIMODAL_API_KEY": ""}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    try:
        while process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.2)
        else:
            raise SystemExit("the server ended")
        yield port
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="starter")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=960)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    each = arguments.requests // arguments.rounds
    with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:

        def start(clients: int, module: str, port: int, *options: object) -> Side:
            servers.enter_context(server(port, module, *options))
            side = Side(port, clients)
            Side(port, 4).measure([request_of(2**31 + number) for number in range(4)])  # warm up
            return side

        def ours(clients: int) -> Side:
            port = free_port()
            options = ["--name", "bench", "--port", port, "--threads", arguments.threads]
            return start(clients, "multimodal", port, "serve", arguments.model, *options)

        alone, together = ours(1), ours(arguments.clients)
        export_hf(arguments.model, exported := Path(folder) / "exported")
        port, module = free_port(), "benchmarks.peers.transformers_server"
        theirs = start(arguments.clients, module, port, exported, port, arguments.threads)
        for number in range(arguments.rounds):
            bodies = [request_of(number * each + n) for n in range(each)]
            for side in (alone, together, theirs):
                side.measure(bodies)
            rates = ", ".join(f"{side.rates[-1]:.1f}" for side in (alone, together, theirs))
            print(f"round {number + 1} of {arguments.rounds}: {rates} captions/s", flush=True)
    ratios, to_theirs = together.ratios(alone), together.ratios(theirs)
    result = {
        "benchmark": "serving",
        "model": arguments.model,
        "fingerprint": read_config(find_model(arguments.model)).fingerprints.model,
        "clients": arguments.clients,
        "requests": len(together.texts),
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "one_by_one": alone.numbers(),
        "at_once": together.numbers(),
        "transformers": theirs.numbers(),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "ratio_to_transformers": statistics.median(to_theirs),
        "ratios_to_transformers": to_theirs,
        "equal_texts": together.equal(alone),
        "equal_texts_of_transformers": together.equal(theirs),
    }
    print(json.dumps(result))
    if arguments.out is not None:
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
