"""Does ``multimodal serve`` stand hostile requests, and does its memory stay flat?

    python -m benchmarks.serving_soak [--model starter] [--seconds 600] [--requests 20000]
        [--out docs/serving_soak.json]

First, for --seconds, four clients send requests that were right and have been changed at random:
values of JSON, bytes of the body, bytes of an image, or the connection itself (cut, half closed,
never read, another length than was said). Meanwhile one client asks the same right question again
and again, and has to get the same answer. Any status of 500, a body that is no JSON, or an answer
that does not come within two minutes counts as a failure, and is printed.

Then --requests right requests (captions of different images, texts, embeddings) by eight clients.
Memory (resident), open files and threads of the server are noted a hundred times. The last line is
JSON.
"""

import argparse
import base64
import copy
import http.client
import io
import json
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.serving import free_port, server
from multimodal.files import write_json

PATIENCE = 120.0
ODD: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**70, 1e308, float("nan"), "", "a", "\x00", "\ud800", "a " * 5000,
    [], [[]], {}, {"type": "text"}, {"a": {"b": [1]}}, "data:image/png;base64,AAAA",
    "http://127.0.0.1/a.png", "file:///etc/passwd",
]  # fmt: skip


def picture(seed: int, side: int = 48) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def data_uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def right_request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A path and a body that the server answers."""
    image = {"type": "image_url", "image_url": {"url": data_uri(picture(rng.randrange(2**31)))}}
    text = {"type": "text", "text": rng.choice(["a red bus", "what is it?", "two dogs on", "é 狗"])}
    content = rng.choice([[image], [image, text], [text], text["text"]])
    chat = {"messages": [{"role": "user", "content": content}], "max_tokens": rng.choice([1, 4, 8])}
    more = rng.choice([{}, {"stream": True}, {"n": 2, "temperature": 1.0, "seed": 3},
        {"logprobs": True}, {"stop": ["a"]}])  # fmt: skip
    path, body = rng.choice(
        [
            ("/v1/chat/completions", {**chat, **more}),
            ("/v1/chat/completions", {**chat, **more}),
            ("/v1/embeddings", {"input": rng.choice(["a bus", ["a", "b"], text["text"]])}),
        ]
    )
    return path, {"model": "bench", **body}


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All places inside a value of JSON."""
    keys = value if isinstance(value, dict) else range(len(value)) if type(value) is list else ()
    return [at] * bool(at) + [place for key in keys for place in places(value[key], (*at, key))]


def changed(body: dict[str, Any], rng: random.Random) -> bytes:
    """The body with one to three values that are not right, or with other bytes."""
    body = copy.deepcopy(body)
    for _ in range(rng.randint(1, 3)):
        if not (known := places(body)):
            break
        *way, last = rng.choice(known)
        inside: Any = body
        for key in way:
            inside = inside[key]
        if rng.random() < 0.2:
            del inside[last]
        else:
            inside[last] = copy.deepcopy(rng.choice(ODD))
    data = bytearray(json.dumps(body).encode())
    if rng.random() < 0.2:
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)


def post(port: int, path: str, data: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("POST", path, data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def be_rude(port: int, path: str, data: bytes, rng: random.Random) -> None:
    """A connection that does not keep to the rules."""
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    length = rng.choice([len(data), len(data) + 99, 0, -1, 2**40])
    sent = f"{head}Content-Length: {length}\r\n\r\n".encode() + data
    with socket.create_connection(("127.0.0.1", port), timeout=10) as rude:
        kind = rng.randrange(4)
        try:
            if kind == 0:  # cut off
                rude.sendall(sent[: rng.randrange(len(sent))])
            elif kind == 1:  # half closed, then read a little
                rude.sendall(sent)
                rude.shutdown(socket.SHUT_WR)
                rude.recv(100)
            elif kind == 2:  # never read
                rude.sendall(sent)
                time.sleep(rng.random())
            else:
                rude.sendall(bytes(rng.randrange(256) for _ in range(200)) + b"\r\n\r\n")
                rude.recv(100)
        except OSError:  # the server hangs up
            pass


class Soak:
    """One server and what was seen of it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.statuses: Counter[str] = Counter()
        self.failures: list[str] = []
        (self.pid,) = (
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and str(port).encode() in command_of(entry)
        )

    def used(self) -> dict[str, float]:
        process = Path(f"/proc/{self.pid}")
        status = dict(
            line.split(":", 1) for line in (process / "status").read_text("utf-8").splitlines()
        )
        return {
            "megabytes": round(int(status["VmRSS"].split()[0]) / 1024, 1),
            "files": len(list((process / "fd").iterdir())),
            "threads": int(status["Threads"]),
        }

    def ask(self, path: str, data: bytes) -> None:
        """Send it, and note the status and what is wrong with the answer."""
        try:
            status, answer = post(self.port, path, data)
            self.statuses[str(status)] += 1
            if status >= 500 and status != 503:
                self.failures.append(f"{status}: {path} {data[:300]!r}: {answer[:300]!r}")
            elif not answer.startswith(b"data: "):
                json.loads(answer)
        except Exception as error:
            self.failures.append(f"{error!r}: {path} {data[:300]!r}")

    def fuzz(self, seconds: float, seed: int = 0) -> None:
        end = time.monotonic() + seconds

        def client(number: int) -> None:
            rng = random.Random(f"{seed} {number}")
            while time.monotonic() < end:
                path, body = right_request(rng)
                data = changed(body, rng)
                if rng.random() < 0.2:
                    be_rude(self.port, path, data, rng)
                    self.statuses["rude"] += 1
                else:
                    self.ask(path, data)

        def question() -> None:
            path, body = "/v1/chat/completions", {"model": "bench", "max_tokens": 8}
            part = {"type": "image_url", "image_url": {"url": data_uri(picture(1))}}
            data = json.dumps({**body, "messages": [{"role": "user", "content": [part]}]}).encode()
            first = None
            while time.monotonic() < end:
                status, answer = post(self.port, path, data)
                text = json.loads(answer)["choices"][0]["message"]["content"]
                first = text if first is None else first
                self.statuses["the same question"] += 1
                if text != first:
                    self.failures.append(f"{status}: {text!r} instead of {first!r}")
                time.sleep(0.2)

        run_all([question, *(lambda n=n: client(n) for n in range(4))])

    def answer(self, requests: int) -> list[dict[str, float]]:
        """Right requests, and what the server uses meanwhile."""
        used, count = [], 100
        with ThreadPoolExecutor(8) as pool:
            for part in range(count):
                rng = random.Random(f"right {part}")
                several = [right_request(rng) for _ in range(requests // count)]
                list(pool.map(lambda one: self.ask(one[0], json.dumps(one[1]).encode()), several))
                used.append(self.used())
        return used


def command_of(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def run_all(tasks: list[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(len(tasks)) as pool:
        for future in [pool.submit(task) for task in tasks]:
            future.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="starter")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    port = free_port()
    options = ["serve", arguments.model, "--name", "bench", "--port", port, "--threads", 1]
    with server(port, "multimodal", *options):
        soak = Soak(port)
        before = soak.used()
        soak.fuzz(arguments.seconds)
        fuzzed, statuses = soak.used(), dict(soak.statuses)
        soak.statuses.clear()
        used = soak.answer(arguments.requests)
    result = {
        "benchmark": "serving_soak",
        "model": arguments.model,
        "fuzz": {"seconds": arguments.seconds, "statuses": statuses,
            "before": before, "after": fuzzed},
        "right": {"requests": arguments.requests, "statuses": dict(soak.statuses),
            "after_a_tenth": used[9], "after_half": used[49], "after_all": used[-1]},
        "failures": len(soak.failures),
    }  # fmt: skip
    for failure in soak.failures[:50]:
        print(failure, file=sys.stderr)
    print(json.dumps(result))
    if arguments.out is not None:
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
