"""Captions a second of ``multimodal serve``: many clients at once against the same work one by one.

    python -m benchmarks.serving [--model starter] [--clients 32] [--requests 128] [--threads 2]

Each request is an image of noise and shapes (64 x 64, PNG in a data URI) and asks for a greedy
caption of up to 32 tokens, streamed. All are sent to a server one after the other, and to another,
which has not seen the images either, by --clients at once. The texts must be equal.

The same weights exported, behind benchmarks/peers/transformers_server.py, then answer the same
clients.

The last line is JSON: captions a second of all three and ratios, and the medians and 99th
percentiles of the seconds to the first token and to the end. --out writes it to a file.
"""

import argparse
import base64
import http.client
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from multimodal.export.hf import export_hf
from multimodal.files import write_json

TOKENS = 32


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


def ask(port: int, body: bytes) -> tuple[str, float, float]:
    """The text, and the seconds to its first token and to its end."""
    start, first, text = time.perf_counter(), 0.0, ""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit(f"status {answer.status}: {answer.read()[:300]!r}")
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        for choice in json.loads(line[6:])["choices"]:
            if piece := choice["delta"].get("content"):
                first = first or time.perf_counter() - start
                text += piece
    connection.close()
    end = time.perf_counter() - start
    return text, first or end, end


Pass = tuple[list[str], dict[str, Any]]  # the texts, and the numbers


def ratio(one: dict[str, Any], other: dict[str, Any]) -> float:
    return round(one["captions_per_second"] / other["captions_per_second"], 2)


def equal(one: Sequence[str], other: Sequence[str]) -> int:
    return sum(a.strip() == b.strip() for a, b in zip(one, other, strict=True))


def measure(port: int, bodies: list[bytes], clients: int) -> Pass:
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        results = list(pool.map(lambda body: ask(port, body), bodies))
    seconds = time.perf_counter() - start
    numbers: dict[str, Any] = {"captions_per_second": round(len(bodies) / seconds, 2)}
    for name, values in (
        ("first_token", [first for _, first, _ in results]),
        ("whole", [end for _, _, end in results]),
    ):
        ordered = sorted(values)
        numbers[f"{name}_p50"] = round(statistics.median(ordered), 4)
        numbers[f"{name}_p99"] = round(ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)], 4)
    return [text for text, _, _ in results], numbers


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
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    bodies = [request_of(number) for number in range(arguments.requests)]

    def measured(clients: int, module: str, port: int, *options: object) -> Pass:
        with server(port, module, *options):  # a new one has kept no codes
            measure(port, [request_of(2**31 + number) for number in range(4)], 4)  # warm up
            return measure(port, bodies, clients)

    def ours(clients: int) -> Pass:
        port = free_port()
        options = ["--name", "bench", "--port", port, "--threads", arguments.threads]
        return measured(clients, "multimodal", port, "serve", arguments.model, *options)

    alone, one_by_one = ours(1)
    together, at_once = ours(arguments.clients)
    with tempfile.TemporaryDirectory() as folder:
        export_hf(arguments.model, exported := Path(folder) / "exported")
        port, module = free_port(), "benchmarks.peers.transformers_server"
        theirs, peer = measured(arguments.clients, module, port, exported, port, arguments.threads)
    result = {
        "benchmark": "serving",
        "model": arguments.model,
        "clients": arguments.clients,
        "requests": arguments.requests,
        "threads": arguments.threads,
        "one_by_one": one_by_one,
        "at_once": at_once,
        "transformers": peer,
        "ratio": ratio(at_once, one_by_one),
        "ratio_to_transformers": ratio(at_once, peer),
        "equal_texts": equal(alone, together),
        "equal_texts_of_transformers": equal(theirs, together),
    }
    print(json.dumps(result))
    if arguments.out is not None:
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
