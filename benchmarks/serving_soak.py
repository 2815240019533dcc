"""Does ``multimodal serve`` stand hostile requests, and does its memory stay flat?

    python -m benchmarks.serving_soak [--model starter] [--seconds 600] [--requests 20000]
        [--out docs/serving_soak.json]

First, for --seconds, four clients send requests that were right and have been changed at random:
values of JSON, fields of a form, bytes of the body, bytes of an image, or the connection itself
(cut, half closed, never read, another length than was said). They ask for chats, drawings, edits
and embeddings. Two clients read long answers slowly, for some seconds, and then to the end.
Meanwhile one client asks the same right question again and again, and has to get the same answer. A
status of 500, an error of the server inside a stream, a body that is no JSON, or an answer that
does not come within two minutes counts as a failure, and is printed.

Then --requests right requests (chats, drawings, edits, embeddings) by eight clients. Memory
(resident), open files and threads of the server are noted a hundred times. The last line is JSON.

The exit status is 1 if anything has failed, or if the memory has grown by more than MAX_GROWTH from
a tenth of the right requests to all of them. What it was is on stderr.
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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.serving import free_port, server
from multimodal.files import write_json
from multimodal.hub.names import find_model
from multimodal.model.checkpoint import read_config

PATIENCE = 120.0  # seconds
MAX_GROWTH = 0.15  # of the memory after a tenth of the right requests
BOUNDARY = "soak-soak"
ODD: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**70, 1e308, float("nan"), "", "a", "\x00", "\ud800", "a " * 5000,
    [], [[]], {}, {"type": "text"}, {"a": {"b": [1]}}, "data:image/png;base64,AAAA",
    "http://127.0.0.1/a.png", "file:///etc/passwd",
]  # fmt: skip


def picture(seed: int, side: int = 48, transparent: bool = False) -> bytes:
    """A PNG of noise. transparent: its upper half is."""
    shape = (side, side, 4 if transparent else 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    if transparent:
        pixels[: side // 2, :, 3] = 0
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def data_uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@dataclass(frozen=True)
class Body:
    """The bytes of a request, and their content type."""

    kind: str
    data: bytes


@dataclass(frozen=True)
class Request:
    """What is sent: as a form if there are files, else as JSON."""

    path: str
    fields: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)

    def body(self) -> Body:
        if not self.files:
            return Body("application/json", json.dumps(self.fields).encode())
        parts = [(f'name="{name}"', as_text(value)) for name, value in self.fields.items()]
        parts += [(f'name="{n}"; filename="{n}.png"', data) for n, data in self.files.items()]
        lines = list[bytes]()
        for about, data in parts:
            head = f"--{BOUNDARY}\r\nContent-Disposition: form-data; {about}\r\n"
            lines += [head.encode(), data]
        data = b"\r\n".join([*lines, f"--{BOUNDARY}--\r\n".encode()])
        return Body(f"multipart/form-data; boundary={BOUNDARY}", data)


def as_text(value: Any) -> bytes:
    """A value as a field of a form has it."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "surrogatepass")


def right_request(rng: random.Random) -> Request:
    """A request that the server answers."""
    seed = rng.randrange(2**31)
    image = {"type": "image_url", "image_url": {"url": data_uri(picture(seed))}}
    text = {"type": "text", "text": rng.choice(["a red bus", "what is it?", "two dogs on", "é 狗"])}
    content = rng.choice([[image], [image, text], [text], text["text"]])
    kind = rng.choice(["chat"] * 5 + ["embeddings"] * 2 + ["draw", "edit"])
    files, fields = dict[str, bytes](), dict[str, Any]()
    if kind == "chat":
        path = "/v1/chat/completions"
        fields = {"messages": [{"role": "user", "content": content}]}
        fields |= {"max_tokens": rng.choice([1, 4, 8])}
        fields |= rng.choice([{}, {"stream": True}, {"n": 2, "temperature": 1.0, "seed": 3},
            {"logprobs": True}, {"stop": ["a"]}])  # fmt: skip
    elif kind == "embeddings":
        path = "/v1/embeddings"
        fields = rng.choice([{"input": "a bus"}, {"input": ["a", "b"]}, {"input": text["text"]},
            {"messages": [{"role": "user", "content": [image]}]}])  # fmt: skip
    else:
        path = "/v1/images/generations" if kind == "draw" else "/v1/images/edits"
        fields = {"prompt": text["text"], "seed": seed, "steps": rng.choice([1, 2])}
        fields |= rng.choice([{}, {"n": 2}, {"size": "64x32"}, {"output_format": "webp"},
            {"stream": True, "partial_images": 1}, {"temperature": 1.0, "top_p": 0.9}])  # fmt: skip
    if kind == "edit":
        files = rng.choice([{"image": picture(seed, transparent=True)},
            {"image": picture(seed), "mask": picture(seed, transparent=True)}])  # fmt: skip
    return Request(path, {"model": "bench", **fields}, files)


def long_request(rng: random.Random) -> Request:
    """A request whose answer is longer than the buffers between client and server."""
    fields = {"model": "bench", "prompt": "a red bus", "steps": 1, "size": "1536x1536"}
    more = rng.choice([{}, {"stream": True}])
    return Request("/v1/images/generations", {**fields, "seed": rng.randrange(2**31), **more})


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All places inside a value of JSON."""
    keys = value if isinstance(value, dict) else range(len(value)) if type(value) is list else ()
    return [at] * bool(at) + [place for key in keys for place in places(value[key], (*at, key))]


def changed(request: Request, rng: random.Random) -> Body:
    """The body with one to three values that are not right, or with other bytes."""
    fields = copy.deepcopy(request.fields)
    for _ in range(rng.randint(1, 3)):
        if not (known := places(fields)):
            break
        *way, last = rng.choice(known)
        inside: Any = fields
        for key in way:
            inside = inside[key]
        if rng.random() < 0.2:
            del inside[last]
        else:
            inside[last] = copy.deepcopy(rng.choice(ODD))
    files = {name: other_bytes(data, rng) for name, data in request.files.items()}
    body = Request(request.path, fields, files).body()
    return Body(body.kind, other_bytes(body.data, rng))


def other_bytes(data: bytes, rng: random.Random) -> bytes:
    """Some bytes are others in one of five, and the end is missing in one of ten."""
    found = bytearray(data)
    if rng.random() < 0.2:
        for _ in range(rng.randint(1, 8)):
            found[rng.randrange(len(found))] = rng.randrange(256)
    return bytes(found[: rng.randrange(len(found))] if rng.random() < 0.1 else found)


def post(port: int, path: str, body: Body, slow: float = 0.0) -> tuple[int, bytes]:
    """The status and the answer. slow: seconds in which hardly anything is read."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.connect()
        if slow:  # so that the kernel does not read instead
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        connection.request("POST", path, body.data, {"Content-Type": body.kind})
        answer, end, begin = connection.getresponse(), time.monotonic() + slow, b""
        while time.monotonic() < end:
            begin += answer.read(64)
            time.sleep(0.1)
        return answer.status, begin + answer.read()
    finally:
        connection.close()


def mistake(status: int, answer: bytes) -> str:
    """What is wrong with an answer. Empty: nothing."""
    if status >= 500 and status != 503:
        return f"status {status}"
    try:
        if not answer.startswith((b"data: ", b"event: ")):
            json.loads(answer)
            return ""
        lines = [line for line in answer.splitlines() if line.startswith(b"data: {")]
        errors = [error for line in lines if (error := json.loads(line[6:]).get("error"))]
    except ValueError as error:
        return f"no JSON ({error})"
    failed = any(error["type"] == "server_error" for error in errors)
    return "an error of the server in a stream" if failed else ""


def be_rude(port: int, path: str, body: Body, rng: random.Random) -> None:
    """A connection that does not keep to the rules."""
    data = body.data
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {body.kind}\r\n"
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

    def __init__(self, port: int, pid: int) -> None:
        self.port, self.pid = port, pid
        self.statuses: Counter[str] = Counter()
        self.failures: list[str] = []

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

    def ask(self, path: str, body: Body, name: str = "", slow: float = 0.0) -> bytes:
        """Send it, and note the status (or a name) and what is wrong with the answer."""
        answer = b""
        try:
            status, answer = post(self.port, path, body, slow)
            self.statuses[name or str(status)] += 1
            wrong = mistake(status, answer)
        except Exception as error:
            wrong = repr(error)
        if wrong:
            self.failures.append(f"{wrong}: {path} {body.data[:300]!r}: {answer[:300]!r}")
        return answer

    def fuzz(self, seconds: float, seed: int = 0) -> None:
        end = time.monotonic() + seconds

        def client(number: int) -> None:
            rng = random.Random(f"{seed} {number}")
            while time.monotonic() < end:
                request = right_request(rng)
                body = changed(request, rng)
                if rng.random() < 0.2:
                    be_rude(self.port, request.path, body, rng)
                    self.statuses["rude"] += 1
                else:
                    self.ask(request.path, body)

        def slow_reader(number: int) -> None:
            rng = random.Random(f"{seed} slow {number}")
            while time.monotonic() < end:
                request = long_request(rng)
                self.ask(request.path, request.body(), "slow", rng.uniform(2, 8))

        def question() -> None:
            part = {"type": "image_url", "image_url": {"url": data_uri(picture(1))}}
            messages = [{"role": "user", "content": [part]}]
            fields = {"model": "bench", "max_tokens": 8, "messages": messages}
            asked, first = Request("/v1/chat/completions", fields), None
            while time.monotonic() < end:
                answer = self.ask(asked.path, asked.body(), "the same question")
                text = text_of(answer)
                first = text if first is None else first
                if text is None or text != first:
                    self.failures.append(f"{answer[:300]!r} instead of {first!r}")
                time.sleep(0.2)

        clients = [partial(client, number) for number in range(4)]
        readers = [partial(slow_reader, number) for number in range(2)]
        run_all([question, *clients, *readers])

    def answer(self, requests: int) -> list[dict[str, float]]:
        """Right requests, and what the server uses meanwhile."""
        used, count = [], 100
        with ThreadPoolExecutor(8) as pool:
            for part in range(count):
                rng = random.Random(f"right {part}")
                several = [right_request(rng) for _ in range(requests // count)]
                list(pool.map(lambda one: self.ask(one.path, one.body()), several))
                used.append(self.used())
        return used


def text_of(answer: bytes) -> str | None:
    """The text of a chat. None: it is no answer to one."""
    try:
        return str(json.loads(answer)["choices"][0]["message"]["content"])
    except (ValueError, LookupError, TypeError):
        return None


def process_at(port: int) -> int:
    """The id of the process that has a port in its command."""

    def command_of(process: Path) -> bytes:
        try:
            return (process / "cmdline").read_bytes()
        except OSError:
            return b""

    (found,) = (
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and str(port).encode() in command_of(entry)
    )
    return found


def problems_of(failures: Sequence[str], right: Mapping[str, Any]) -> list[str]:
    """Why the server has not stood it. Empty: it has.

    Args:
        right: of right requests their ``statuses``, and ``megabytes`` in between and at the end.
    """
    problems = [*failures[:50], *([f"{len(failures)} failures"] if failures else [])]
    if others := {status: n for status, n in right["statuses"].items() if status != "200"}:
        problems.append(f"right requests without an answer, by status: {others}")
    before, after = (right[when]["megabytes"] for when in ("after_a_tenth", "after_all"))
    if after > before * (1 + MAX_GROWTH):
        problems.append(f"memory has grown by more than {MAX_GROWTH:.0%}: {before} to {after} MB")
    return problems


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
        soak = Soak(port, process_at(port))
        before = soak.used()
        soak.fuzz(arguments.seconds)
        fuzzed, statuses = soak.used(), dict(soak.statuses)
        soak.statuses.clear()
        used = soak.answer(arguments.requests)
    result: dict[str, Any] = {
        "benchmark": "serving_soak",
        "model": arguments.model,
        "fingerprint": read_config(find_model(arguments.model)).fingerprints.model,
        "fuzz": {"seconds": arguments.seconds, "statuses": statuses,
            "before": before, "after": fuzzed},
        "right": {"requests": arguments.requests, "statuses": dict(soak.statuses),
            "after_a_tenth": used[9], "after_half": used[49], "after_all": used[-1]},
        "failures": len(soak.failures),
    }  # fmt: skip
    problems = problems_of(soak.failures, result["right"])
    for problem in problems:
        print(problem, file=sys.stderr)
    print(json.dumps(result))
    if arguments.out is not None:
        write_json(arguments.out, result)
    if problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
