"""Requests that are wrong, too large, or hostile: each gets its status, and the server goes on."""

import asyncio
import base64
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx2
import openai
import pytest
from PIL import Image

from multimodal.api import Model
from multimodal.serve.engine.fetch import fetch, is_public
from multimodal.tokenizers.text import TextTokenizer
from tests.processes import wait_until

Make = Callable[..., Model]
HEADERS = {"Authorization": "Bearer sk-test"}
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "a bus"}]}


def with_image(url: Any) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"model": "tiny", "messages": [{"role": "user", "content": [part]}]}


def bomb() -> str:
    """A PNG of a few bytes whose header says 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(
            ">I", zlib.crc32(kind + data)
        )  # fmt: skip

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99)))
    return base64.b64encode(data + chunk(b"IEND", b"")).decode()


def png(mode: str, width: int, height: int) -> bytes:
    """A picture of nothing. In mode RGBA it is transparent."""
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


URI = "data:image/png;base64,"
CHAT: list[tuple[Any, int, str | None]] = [
    (b"", 400, "invalid_json"),
    (b"{", 400, "invalid_json"),
    (b"[1]", 400, "invalid_json"),
    (b"[" * 100_000, 400, "invalid_json"),
    (b"\xff\xfe\x00", 400, "invalid_json"),
    (b'{"model": ' + b"9" * 10_000 + b"}", 400, "invalid_json"),
    ({"model": "tiny"}, 400, "invalid_value"),
    ({**ASK, "model": "gpt-4"}, 404, "model_not_found"),
    ({**ASK, "model": 3}, 400, "invalid_value"),
    ({**ASK, "messages": []}, 400, None),
    ({**ASK, "messages": "a"}, 400, "invalid_value"),
    ({**ASK, "messages": [{"role": "user", "content": ""}]}, 400, None),
    ({**ASK, "messages": [{"role": "root", "content": "a"}]}, 400, "invalid_value"),
    ({**ASK, "messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "invalid_value"),
    ({**ASK, "messages": [{"role": "user", "content": "a " * 9000}]}, 400,
     "context_length_exceeded"),
    ({**ASK, "tools": []}, 400, "invalid_value"),
    ({**ASK, "n": 10**9}, 400, "invalid_value"),
    ({**ASK, "n": 1000}, 400, None),
    ({**ASK, "max_tokens": 0}, 400, "invalid_value"),
    ({**ASK, "max_tokens": 10**6}, 400, None),
    ({**ASK, "max_tokens": True}, 400, "invalid_value"),
    ({**ASK, "temperature": "hot"}, 400, "invalid_value"),
    ({**ASK, "temperature": -1}, 400, "invalid_value"),
    ({**ASK, "temperature": 1e-40}, 400, "invalid_value"),
    ({**ASK, "top_p": 0}, 400, "invalid_value"),
    ({**ASK, "frequency_penalty": 1}, 400, "invalid_value"),
    ({**ASK, "stop": [""]}, 400, "invalid_value"),
    ({**ASK, "stop": ["a"] * 17}, 400, None),
    ({**ASK, "stop": "a" * 257}, 400, None),
    ({**ASK, "seed": 2**70}, 400, "invalid_value"),
    ({**ASK, "response_format": {"type": "json_schema"}}, 400, None),
    ({**ASK, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
     400, None),
    (with_image(URI + "###"), 400, "invalid_image"),
    (with_image(URI + "AAAA"), 400, "invalid_image"),
    (with_image("data:image/png,abc"), 400, "invalid_image"),
    (with_image("data:" + "a" * 1_000_000), 400, "invalid_image"),
    (with_image("data:" + "a/b;c=d;" * 100_000 + "base64"), 400, "invalid_image"),
    (with_image("file:///etc/passwd"), 400, "invalid_image"),
    (with_image("http://127.0.0.1/a.png"), 400, "invalid_image"),
    (with_image({"a": 1}), 400, "invalid_value"),
    (with_image(URI + bomb()), 413, "image_too_large"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CHAT)))
def test_wrong_requests_are_named(server: Any, number: int) -> None:
    body, status, code = CHAT[number]
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    for more in ({}, {"stream": True}):
        if more and isinstance(body, dict):
            data = json.dumps({**body, **more}).encode()
        url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
        answer = httpx2.post(url, content=data, headers=HEADERS)
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert code is None or error["code"] == code
        assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/images/generations", {"prompt": ""}, 400),
        ("/v1/images/generations", {"prompt": "a", "size": "0x0"}, 400),
        ("/v1/images/generations", {"prompt": "a", "size": "99999x9"}, 400),
        ("/v1/images/generations", {"prompt": "a", "response_format": "url"}, 400),
        ("/v1/images/generations", {"prompt": "a", "n": 2, "stream": True}, 400),
        ("/v1/images/generations", {"prompt": "a", "n": 5, "size": "4096x4096"}, 400),
        ("/v1/images/generations", {"prompt": "a " * 5000}, 400),
        ("/v1/images/generations", {"prompt": "a", "steps": 10**9}, 400),
        ("/v1/images/edits", {"prompt": "a"}, 400),
        ("/v1/embeddings", {"input": []}, 400),
        ("/v1/embeddings", {"input": ""}, 400),
        ("/v1/embeddings", {"input": [[1, 2]]}, 400),
        ("/v1/embeddings", {"input": "a", "dimensions": 10**5}, 400),
        ("/v1/embeddings", {"input": ["a"] * 5000}, 400),
        ("/v1/nothing", {}, 404),
        ("/v1/models", {}, 405),
    ],
)
def test_wrong_requests_to_other_endpoints(server: Any, path: str, body: Any, status: int) -> None:
    url = f"http://127.0.0.1:{server.port}{path}"
    answer = httpx2.post(url, json={"model": "tiny", **body}, headers=HEADERS)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_forms_that_are_wrong(server: Any) -> None:
    url = f"http://127.0.0.1:{server.port}/v1/images/edits"
    image = {"image": ("a.png", png("RGB", 8, 8), "image/png")}
    fields = {"model": "tiny", "prompt": "a"}
    for files, data in (
        ({}, fields),
        (image, fields),  # nothing is transparent, and there is no mask
        ({**image, "mask": ("m.png", b"no image", "image/png")}, fields),
        ({**image, "other": ("m.png", b"", "image/png")}, fields),
        (image, {**fields, "n": "many"}),
    ):
        answer = httpx2.post(url, data=data, files=files or {"x": b""}, headers=HEADERS)
        assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text
    broken = {**HEADERS, "Content-Type": "multipart/form-data; boundary=x"}
    answer = httpx2.post(url, content=b"--y\r\nnothing", headers=broken)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_a_key_is_needed(server: Any) -> None:
    import openai

    for key in ("sk-wrong", "sk-test2", "x"):
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key=key).models.list()
    base = f"http://127.0.0.1:{server.port}"
    assert httpx2.get(f"{base}/v1/models").status_code == 401
    assert httpx2.get(f"{base}/health").json()["status"] == "ok"


def test_bodies_that_are_too_long_or_slow(tiny_model: Make, serving: Any) -> None:
    with serving(tiny_model(), max_body=1000, body_timeout=0.3) as server:
        url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
        answer = httpx2.post(url, content=b"x" * 1001, headers=HEADERS)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"
        # Without a length: in pieces.
        answer = httpx2.post(url, content=iter([b"x" * 600] * 2), headers=HEADERS)
        assert answer.status_code == 413
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n"
            slow.sendall(f"{head}Authorization: Bearer sk-test\r\n\r\n{{".encode())
            assert b" 408 " in slow.recv(1000)
        with socket.create_connection(("127.0.0.1", server.port)) as rude:
            rude.sendall(b"\x00\xff nothing of HTTP\r\n\r\n")
            assert b" 400 " in rude.recv(1000)
        assert server.app.received == 0


def test_a_full_queue_says_when_to_come_again(tiny_model: Make, serving: Any) -> None:
    import openai

    with serving(tiny_model(noise=0.1, tied=False), rows=1, requests=2) as server:
        how: dict[str, Any] = {**ASK, "max_tokens": 1000}
        streams = [server.client().chat.completions.create(**how, stream=True)]
        waiting = threading.Thread(
            target=lambda: server.client().chat.completions.create(**ASK, max_tokens=1)
        )
        waiting.start()
        while len(server.engines.scheduler.jobs) < 2:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError) as caught:
            server.client().chat.completions.create(**how)
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        assert caught.value.code == "queue_full"
        streams[0].close()
        waiting.join()


def test_a_reply_without_a_length_has_what_room_there_is(tiny_model: Make, serving: Any) -> None:
    ask: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "a bus"}]}
    with serving(tiny_model(noise=0.1, tied=False), max_tokens=7) as server:
        create = server.client().chat.completions.create
        assert create(**ask).usage.completion_tokens == 7
        with pytest.raises(openai.BadRequestError, match="max_tokens=8"):
            create(**ask, max_tokens=8)
    with serving(tiny_model(noise=0.1, tied=False)) as server:
        create = server.client().chat.completions.create
        limit = server.model.config.transformer.max_position_embeddings
        one = create(**ask, max_tokens=1).usage.prompt_tokens
        ask["messages"][0]["content"] = "a" + " bus" * 10
        each = (create(**ask, max_tokens=1).usage.prompt_tokens - one) // 9
        ask["messages"][0]["content"] = "a" + " bus" * ((limit - one - 20) // each)
        usage = create(**ask, max_tokens=1).usage
        assert 0 < limit - usage.prompt_tokens < 100
        assert create(**ask).usage.total_tokens == limit
        with pytest.raises(openai.BadRequestError, match="256 more"):
            create(**ask, max_tokens=256)


def test_decoded_images_that_wait_are_within_a_budget(server: Any) -> None:
    """An edit keeps 3 bytes of a pixel for the image, 3 for each result, and 1 for the mask."""
    url, budget = f"http://127.0.0.1:{server.port}/v1/images/edits", server.engines.decoded

    def edit(width: int, height: int, count: int) -> Any:
        files = {"image": ("a.png", png("RGBA", width, height), "image/png")}
        data = {"model": "tiny", "prompt": "a", "steps": "1", "n": str(count)}
        return httpx2.post(url, data=data, files=files, headers=HEADERS)

    others = budget.most - 7 * 800
    budget.take(others)
    assert edit(40, 20, 1).status_code == 200
    assert wait_until(lambda: budget.used == others)
    for width, count in ((41, 1), (40, 2)):
        answer = edit(width, 20, count)
        assert answer.status_code == 429 and answer.json()["error"]["code"] == "too_many_pixels"
    drawing = {"model": "tiny", "prompt": "a", "size": "100x100"}
    drawings = f"http://127.0.0.1:{server.port}/v1/images/generations"
    assert httpx2.post(drawings, json=drawing, headers=HEADERS).status_code == 429
    budget.give_back(others)
    answer = edit(2200, 2000, 16)
    assert answer.status_code == 400 and "together" in answer.json()["error"]["message"]
    assert wait_until(lambda: budget.used == 0)


def test_texts_that_cannot_fit_are_refused_before_they_are_tokenized(
    server: Any, monkeypatch: pytest.MonkeyPatch, sentences: tuple[str, ...]
) -> None:
    tokenizer, limit = server.model.text_tokenizer, server.engines.base.max_characters
    context = server.model.config.transformer.max_position_embeddings
    for text in (*sentences, "a  \n\n b", "\N{PILE OF POO} 狗" * 9, tokenizer.decode(range(300))):
        assert len(text) / len(tokenizer.encode(text)) <= limit / context
    lengths, encode = [0], TextTokenizer.encode

    def noted(self: TextTokenizer, text: str) -> list[int]:
        lengths.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(TextTokenizer, "encode", noted)
    long = "a " * limit
    for path, body in (
        ("chat/completions", {"messages": [{"role": "user", "content": long}]}),
        ("images/generations", {"prompt": long}),
        ("images/generations", {"prompt": "a", "negative_prompt": long}),
        ("embeddings", {"input": ["a", long]}),
    ):
        url = f"http://127.0.0.1:{server.port}/v1/{path}"
        answer = httpx2.post(url, json={"model": "tiny", **body}, headers=HEADERS)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["code"] == "context_length_exceeded"
        assert "model reads at most" in error["message"]
    assert max(lengths) < limit


def test_a_stream_that_waits_ends_when_its_client_leaves(tiny_model: Make, serving: Any) -> None:
    with serving(tiny_model(noise=0.1, tied=False), rows=1) as server:
        jobs, long = server.engines.scheduler.jobs, {**ASK, "max_tokens": 1000, "stream": True}
        running = server.client().chat.completions.create(**long)
        next(iter(running))
        first = jobs[0]
        with socket.create_connection(("127.0.0.1", server.port)) as waiting:
            body = json.dumps(long).encode()
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer sk-test"
            waiting.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            assert wait_until(lambda: len(jobs) == 2)
        assert wait_until(lambda: len(jobs) == 1)
        assert jobs == [first]
        running.close()


def test_a_client_that_reads_nothing_is_left(tiny_model: Make, serving: Any) -> None:
    with serving(tiny_model(noise=0.1, tied=False), write_timeout=0.2) as server:
        body = json.dumps({**ASK, "max_tokens": 1000, "stream": True}).encode()
        messages, sent = [{"type": "http.request", "body": body}], list[Any]()

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) == 3:
                await asyncio.Event().wait()

        scope = {
            "type": "http", "asgi": {"spec_version": "2.3"}, "http_version": "1.1",
            "method": "POST", "scheme": "http", "path": "/v1/chat/completions", "root_path": "",
            "query_string": b"", "headers": [(b"authorization", b"Bearer sk-test")],
        }  # fmt: skip
        asyncio.run(asyncio.wait_for(server.app(scope, receive, send), 60))
        assert len(sent) == 3
        assert wait_until(lambda: not server.engines.scheduler.jobs)
        # What it has not read stays in the connection, which the kernel ends.
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            option = socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT
            assert server.listening.getsockopt(*option) == 200
        path = 'path="/v1/chat/completions"'
        counted = server.engines.metrics.text().decode()
        assert f'multimodal_requests_total{{{path},status="408"}} 1.0' in counted


def test_addresses_of_private_networks_are_not_fetched() -> None:
    for address in (
        "127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "::1",
        "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
        "224.0.0.1", "255.255.255.255",
    ):  # fmt: skip
        assert not is_public(address), address
    assert is_public("93.184.216.34") and is_public("2606:2800:220:1::")
    for url in (
        "http://localhost/", "http://127.1/", "http://2130706433/", "http://[::1]/",
        "http://0x7f.1/", "ftp://a/b", "http:///", "http://a:99999/", "file:///etc/passwd",
    ):  # fmt: skip
        with pytest.raises(ValueError, match="public|expected|host|port|Port"):
            fetch(url, 100)


def test_redirects_and_long_answers_end(tiny_model: Make) -> None:
    """A server of the test, whose address is private: what is allowed then."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/image"
            self.send_response(200 if found else 302)
            self.send_header("Location", {"/ok": "/image", "/bad": "file:///a"}.get(self.path, "/"))
            self.end_headers()
            self.wfile.write(b"x" * 50 * found)

        def log_message(self, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{http.server_address[1]}"
        assert fetch(f"{base}/ok", 50, private=True) == b"x" * 50
        for path, size, reason in (("/ok", 49, "more than"), ("/", 50, "redirects"),
                                   ("/bad", 50, "expected an http")):  # fmt: skip
            with pytest.raises(ValueError, match=reason):
                fetch(base + path, size, private=True)
        http.shutdown()


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nX: ",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n",
    ],
)
def test_an_answer_a_byte_at_a_time_ends(head: bytes) -> None:
    """In its head, in the length of a piece, and in the body."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            connection, _ = listening.accept()
            with connection, suppress(OSError):
                connection.sendall(head)
                for _ in range(200):
                    time.sleep(0.05)
                    connection.sendall(b"0")

        threading.Thread(target=drip, daemon=True).start()
        with pytest.raises(ValueError, match="took too long"):
            fetch(f"http://127.0.0.1:{listening.getsockname()[1]}/", 10_000, True, 0.3)
