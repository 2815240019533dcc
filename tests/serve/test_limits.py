"""Requests that are wrong, too large, or hostile: each gets its status, and the server goes on."""

import base64
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from PIL import Image

from multimodal.api import Model
from multimodal.serve.engine.fetch import fetch, is_public

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


def small() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


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
    ({**ASK, "top_p": 0}, 400, "invalid_value"),
    ({**ASK, "frequency_penalty": 1}, 400, "invalid_value"),
    ({**ASK, "stop": [""]}, 400, "invalid_value"),
    ({**ASK, "seed": 2**70}, 400, "invalid_value"),
    ({**ASK, "response_format": {"type": "json_schema"}}, 400, None),
    ({**ASK, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
     400, None),
    (with_image(URI + "###"), 400, "invalid_image"),
    (with_image(URI + "AAAA"), 400, "invalid_image"),
    (with_image("data:image/png,abc"), 400, "invalid_image"),
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
    image = {"image": ("a.png", base64.b64decode(small()), "image/png")}
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
