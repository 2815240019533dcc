"""The soak of a server fails where the server does."""

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest

from benchmarks import serving_soak
from benchmarks.serving_soak import (
    Soak,
    changed,
    long_request,
    mistake,
    problems_of,
    right_request,
)
from multimodal.serve.endpoints.streams import server_sent
from multimodal.serve.engine.errors import ApiError

Make = Callable[..., Any]
CHUNK = server_sent({"choices": [{"delta": {"content": "a"}}]})


@pytest.fixture(scope="module")
def soak(tiny_model: Make, serving: Callable[..., Any]) -> Iterator[Soak]:
    with serving(tiny_model(noise=0.1, tied=False), name="bench", keys=()) as server:
        yield Soak(server.port, os.getpid())


@pytest.mark.parametrize(
    ("status", "answer", "wrong"),
    [
        (200, b'{"a": 1}', ""),
        (400, b'{"error": {"type": "invalid_request_error"}}', ""),
        (503, b'{"error": {"type": "server_error"}}', ""),
        (500, b'{"error": {"type": "server_error"}}', "status 500"),
        (200, b"<html>", "no JSON"),
        (200, b"", "no JSON"),
        (200, CHUNK + b"data: [DONE]\n\n", ""),
        (200, server_sent({"b64_json": "AAAA"}, "image_generation.completed"), ""),
        (200, CHUNK + server_sent(ApiError(400, "too long").body()), ""),
        (200, CHUNK + server_sent(ApiError(500, "it failed").body()), "an error of the server"),
        (200, CHUNK + b"data: {\n\n", "no JSON"),
    ],
)
def test_an_answer_is_judged_by_its_status_and_its_events(
    status: int, answer: bytes, wrong: str
) -> None:
    found = mistake(status, answer)
    assert found.startswith(wrong) if wrong else found == ""


def test_right_requests_of_all_kinds_are_answered(soak: Soak) -> None:
    soak.statuses.clear()
    requests = [right_request(random.Random(number)) for number in range(60)]
    for request in requests:
        soak.ask(request.path, request.body())
    assert soak.statuses == Counter({"200": 60}) and soak.failures == []
    assert {request.path for request in requests} == {
        "/v1/chat/completions", "/v1/embeddings", "/v1/images/generations", "/v1/images/edits",
    }  # fmt: skip
    assert any(request.files for request in requests)


def test_changed_requests_of_all_kinds_are_refused_or_answered(soak: Soak) -> None:
    soak.statuses.clear()
    for number in range(150):
        rng = random.Random(f"changed {number}")
        request = right_request(rng)
        soak.ask(request.path, changed(request, rng))
    assert soak.failures == [] and {"200", "400"} <= set(soak.statuses) <= {"200", "400", "404"}


def test_who_reads_slowly_gets_all_of_it(soak: Soak) -> None:
    for number in range(2):
        request = long_request(random.Random(number))
        at_once = soak.ask(request.path, request.body())
        slowly = soak.ask(request.path, request.body(), "slow", slow=0.5)
        assert len(slowly) == len(at_once) > 100_000
    assert soak.failures == [] and soak.statuses["slow"] == 2


def test_what_is_no_answer_is_a_failure(soak: Soak, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Soak(soak.port, soak.pid)
    monkeypatch.setattr(serving_soak, "post", lambda *_: (500, b"{}"))
    request = right_request(random.Random(0))
    other.ask(request.path, request.body())
    monkeypatch.undo()
    other.port = 1  # nobody listens
    other.ask(request.path, request.body())
    assert [failure.split(":")[0] for failure in other.failures] == [
        "status 500", "ConnectionRefusedError(111, 'Connection refused')"
    ]  # fmt: skip


def right(before: float, after: float, **statuses: int) -> dict[str, Any]:
    megabytes = {"after_a_tenth": {"megabytes": before}, "after_all": {"megabytes": after}}
    return {"statuses": {"200": 100, **statuses}, **megabytes}


def test_failures_growth_and_refused_requests_are_problems() -> None:
    assert problems_of([], right(1000.0, 1100.0)) == []
    assert problems_of(["status 500: a"], right(1000.0, 900.0)) == ["status 500: a", "1 failures"]
    (grown,) = problems_of([], right(1000.0, 1200.0))
    assert "memory has grown by more than 15%: 1000.0 to 1200.0 MB" == grown
    (refused,) = problems_of([], right(1.0, 1.0, **{"400": 3}))
    assert "{'400': 3}" in refused


@pytest.mark.parametrize("failures", [[], ["status 500: /v1/embeddings"]])
def test_the_exit_status_is_the_judgement(
    failures: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used = {"megabytes": 1000.0, "files": 7, "threads": 3}
    monkeypatch.setattr("sys.argv", ["serving_soak", "--seconds", "0", "--requests", "100"])
    monkeypatch.setattr(serving_soak, "server", lambda *_: nullcontext())
    monkeypatch.setattr(serving_soak, "process_at", lambda port: os.getpid())
    monkeypatch.setattr(Soak, "used", lambda self: used)
    monkeypatch.setattr(Soak, "fuzz", lambda self, seconds: self.failures.extend(failures))
    monkeypatch.setattr(Soak, "answer", lambda self, requests: [used] * 100)
    with pytest.raises(SystemExit) if failures else nullcontext() as caught:
        serving_soak.main()
    output = capsys.readouterr()
    assert caught is None or caught.value.code == 1
    assert output.err.splitlines() == [*failures, *["1 failures"] * len(failures)]
    assert json.loads(output.out)["failures"] == len(failures)
