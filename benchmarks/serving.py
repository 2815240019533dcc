"""Captions a second of ``multimodal serve``: many clients at once against the same work one by one.

    python benchmarks/serving.py [--model starter] [--clients 32] [--requests 128] [--threads 2]

The server is a process of its own. Each request is an image of noise and shapes (64 x 64, PNG in a
data URI) and asks for a greedy caption of up to 32 tokens, streamed. First all are sent one after
the other, then by --clients at once. The texts must be equal. The last line is JSON: captions a
second of both and their ratio, and the medians and 99th percentiles of the seconds to the first
token and to the end.
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
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

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


def measure(port: int, bodies: list[bytes], clients: int) -> tuple[list[str], dict[str, Any]]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="starter")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "multimodal", "serve", arguments.model, "--name", "bench"]
    command += ["--port", str(port), "--threads", str(arguments.threads)]
    environment = {**os.environ, "MULTIMODAL_API_KEY": ""}
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                if server.poll() is not None:
                    raise SystemExit("the server ended") from None
                time.sleep(0.2)
        bodies = [request_of(number) for number in range(arguments.requests)]
        measure(port, [request_of(-1 - n % 2**31 + 2**31) for n in range(4)], 4)  # warm up
        alone, one_by_one = measure(port, bodies, 1)
        # Other bytes of the same pixels would do, too: the codes of an image are kept.
        together, at_once = measure(port, bodies, arguments.clients)
        ratio = at_once["captions_per_second"] / one_by_one["captions_per_second"]
        result = {
            "benchmark": "serving",
            "model": arguments.model,
            "clients": arguments.clients,
            "requests": arguments.requests,
            "threads": arguments.threads,
            "one_by_one": one_by_one,
            "at_once": at_once,
            "ratio": round(ratio, 2),
            "equal_texts": sum(a == b for a, b in zip(alone, together, strict=True)),
        }
        print(json.dumps(result))
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
