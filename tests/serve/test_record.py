"""What a server notes about requests, with and without their texts."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from multimodal.inference.decode import Decoder
from multimodal.record.chain import Entry, Record, entries, verify
from multimodal.record.drift import EMBEDDINGS, Rows
from multimodal.record.report import failures
from multimodal.serve.engine.metrics import Metrics
from multimodal.serve.engine.settings import Settings
from multimodal.serve.watching import DriftWatch

Make = Callable[..., Any]


class Log:
    """Reads a record while it is written. An entry comes when its request is over."""

    def __init__(self, path: Path) -> None:
        self.path, self.read = path, 0

    def all(self) -> list[Entry]:
        return [entry for entry in entries(self.path) if isinstance(entry, Entry)]

    def next(self) -> Entry:
        """Wait for the entry after those that were read."""
        deadline = time.monotonic() + 20
        while len(found := self.all()) <= self.read and time.monotonic() < deadline:
            time.sleep(0.01)
        self.read += 1
        return found[self.read - 1]


@pytest.fixture(scope="module")
def recorded(
    tiny_model: Make, serving: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Log]]:
    path = tmp_path_factory.mktemp("record") / "requests.jsonl"
    with serving(tiny_model(noise=0.1), record=str(path), record_texts=True) as server:
        yield server, Log(path)


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Decoder.step

    def slow(self: Decoder) -> list[Any]:
        time.sleep(0.05)
        return step(self)

    monkeypatch.setattr(Decoder, "step", slow)


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_is_noted_with_what_was_asked_and_answered(
    recorded: tuple[Any, Log], stream: bool
) -> None:
    server, log = recorded
    messages: Any = [{"role": "user", "content": "two dogs run"}]
    asked = {"model": "tiny", "messages": messages, "max_tokens": 5, "seed": 3, "temperature": 1}
    made = server.client().chat.completions.create(**asked, stream=stream)
    if stream:
        chunks = list(made)
        name, reply = chunks[0].id, "".join(c.choices[0].delta.content or "" for c in chunks)
    else:
        name, reply = made.id, made.choices[0].message.content
    entry = log.next()
    facts = entry.facts
    assert facts["id"] == name and facts["path"] == "/v1/chat/completions"
    assert facts["status"] == 200 and facts["seconds"] >= 0
    assert facts["fingerprint"] == server.model.fingerprint
    assert facts["seed"] == 3 and facts["settings"]["temperature"] == 1
    assert facts["usage"]["completion_tokens"] <= 5 and facts["finish_reasons"]
    assert "two dogs run" in entry.texts["prompt"] and entry.texts["reply"].strip() == reply.strip()
    assert verify(log.path) == []


def test_what_a_client_writes_into_settings_is_text(recorded: tuple[Any, Log]) -> None:
    server, log = recorded
    messages: Any = [{"role": "user", "content": "a"}]
    ask = {"model": "tiny", "messages": messages, "max_tokens": 2}
    server.client().chat.completions.create(**ask, stop=["Mrs Smith"])
    entry = log.next()
    assert entry.texts["stop"] == '["Mrs Smith"]' and "Smith" not in json.dumps(entry.facts)
    server.client().chat.completions.create(**ask, response_format={"type": "json_object"})
    entry = log.next()
    assert json.loads(entry.texts["response_format"]) == {"type": "json_object"}
    assert "response_format" not in entry.facts["settings"]


def test_drawings_and_embeddings_are_noted(recorded: tuple[Any, Log]) -> None:
    server, log = recorded
    client = server.client()
    client.images.generate(model="tiny", prompt="a red bus", extra_body={"seed": 1})
    first = log.next()
    client.images.generate(model="tiny", prompt="a red bus", extra_body={"seed": 1})
    again = log.next()
    assert first.facts["drawn"] == again.facts["drawn"] and len(first.facts["drawn"]) == 1
    assert first.texts == {"prompt": "a red bus"} and first.facts["seed"] == 1
    client.embeddings.create(model="tiny", input=["a dog", "a cat"])
    assert log.next().texts == {"prompt": "a dog\na cat"}
    assert verify(log.path) == []


def test_mistakes_are_noted_by_their_code(recorded: tuple[Any, Log]) -> None:
    server, log = recorded
    with pytest.raises(openai.NotFoundError):
        server.client().embeddings.create(model="other", input="a dog")
    facts = log.next().facts
    assert (facts["status"], facts["code"]) == (404, "model_not_found")
    assert "error 404 model_not_found" in failures(log.all())


def test_callers_without_a_key_are_counted_and_not_noted(recorded: tuple[Any, Log]) -> None:
    """They could fill the disk, and the window that is compared with earlier requests."""
    server, log = recorded
    for _ in range(3):
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key="wrong").embeddings.create(model="tiny", input="a dog")
    server.client().embeddings.create(model="tiny", input="a cat")
    assert log.next().texts == {"prompt": "a cat"}
    counted = 'multimodal_requests_total{path="/v1/embeddings",status="401"} 3.0'
    assert counted in server.client().get("/../metrics", cast_to=str)


def test_feedback_names_the_reply_that_it_is_about(recorded: tuple[Any, Log]) -> None:
    server, log = recorded
    client = server.client()
    messages: Any = [{"role": "user", "content": "two dogs"}]
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=messages)
    name = raw.headers["x-request-id"]
    assert log.next().facts["request"] == name
    about = {"id": name, "rating": "down", "reason": "hallucination"}
    client.post("/feedback", body={**about, "comment": "no"}, cast_to=object)
    facts = log.next().facts
    assert (facts["kind"], facts["about"], facts["rating"]) == ("feedback", name, "down")
    groups = failures(log.all())
    for group in ("thumbs down", "thumbs down: hallucination"):
        assert groups[group][-1].facts["request"] == name
    for wrong in ({"rating": "sideways"}, {"reason": "it is ugly"}):
        with pytest.raises(openai.BadRequestError):
            client.post("/feedback", body={**about, **wrong}, cast_to=object)
        assert log.next().facts["status"] == 400


def test_without_texts_only_digests_are_kept(
    tiny_model: Make, serving: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "requests.jsonl"
    with serving(tiny_model(noise=0.1), record=str(path)) as server:
        server.client().embeddings.create(model="tiny", input="a secret dog")
    (line,) = path.read_text("utf-8").splitlines()
    assert "secret" not in line and json.loads(line)["digests"].keys() == {"prompt"}
    assert verify(path) == []


def test_a_request_that_a_stop_cuts_off_is_noted(
    tiny_model: Make, serving: Callable[..., Any], tmp_path: Path, slow_steps: None
) -> None:
    path = tmp_path / "requests.jsonl"
    with (
        ThreadPoolExecutor() as threads,
        serving(tiny_model(noise=0.1, tied=False), record=str(path), stop_timeout=0.2) as server,
    ):
        messages: Any = [{"role": "user", "content": "two dogs run"}]
        create = server.client().chat.completions.create
        asked = threads.submit(create, model="tiny", messages=messages, max_tokens=1000)
        while not server.engines.scheduler.count_running():
            time.sleep(0.01)
    assert asked.exception() is not None
    (entry,) = Log(path).all()
    assert entry.facts["status"] in (499, 503)


@pytest.mark.parametrize("stream", [True, False])
def test_what_was_written_for_a_client_that_left_is_noted_and_counted(
    tiny_model: Make, serving: Callable[..., Any], tmp_path: Path, slow_steps: None, stream: bool
) -> None:
    log, messages = Log(tmp_path / "requests.jsonl"), [{"role": "user", "content": "two dogs"}]
    settings = {"record": str(log.path), "record_texts": True}
    with serving(tiny_model(noise=0.1, tied=False), **settings) as server:
        create = partial(server.client().chat.completions.create, model="tiny", max_tokens=900)
        shown = ""
        if stream:
            chunks = create(messages=messages, stream=True)
            while len(shown) < 3:
                shown += next(chunks).choices[0].delta.content or ""
            chunks.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                create(messages=messages, timeout=0.5)
        entry = log.next()
        written = server.engines.metrics.text().decode()
    facts = entry.facts
    assert facts["status"] == 499 and "client left" in failures([entry])
    assert 0 < facts["usage"]["completion_tokens"] < 900 and facts["usage"]["prompt_tokens"] > 0
    assert entry.texts["reply"].startswith(shown.strip()) and entry.texts["reply"]
    assert f"generated_tokens_total {facts['usage']['completion_tokens']}.0" in written


def test_a_drawing_whose_client_left_is_noted_with_the_codes_that_it_has(
    tiny_model: Make, serving: Callable[..., Any], tmp_path: Path, slow_steps: None
) -> None:
    log = Log(tmp_path / "requests.jsonl")
    with serving(tiny_model(noise=0.1, tied=False), record=str(log.path)) as server:
        drawing = server.client().images.generate(
            model="tiny", prompt="a red bus", stream=True, partial_images=3
        )
        next(iter(drawing))
        drawing.close()
        facts = log.next().facts
    assert facts["status"] == 499
    assert 4 <= facts["usage"]["output_tokens"] < 16 and facts["usage"]["input_tokens"] > 0


def test_without_a_record_feedback_has_no_place(server: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="keeps no record"):
        server.client().post("/feedback", body={"id": "x", "rating": "up"}, cast_to=object)


def test_the_last_requests_are_compared_with_an_earlier_record(
    tiny_model: Make, serving: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multimodal.serve.watching.EVERY", 20)
    model, name = tiny_model(noise=0.1), str(tmp_path / "reference")
    for tokens, expected in ((2, None), (2, 1.0), (9, 0.01)):
        more = {"drift_reference": name, "record": str(tmp_path / f"now{expected}")}
        with serving(model, **({"record": name} if expected is None else more)) as server:
            for number in range(20):
                messages: Any = [{"role": "user", "content": f"{number} dogs"}]
                server.client().chat.completions.create(
                    model="tiny", messages=messages, max_tokens=tokens
                )
            metrics = server.client().get("/../metrics", cast_to=str)
            deadline = time.monotonic() + 20
            while expected and "drift_p{" not in metrics and time.monotonic() < deadline:
                metrics = server.client().get("/../metrics", cast_to=str)
        if expected is not None:
            assert "drift_p{" in metrics
            shown = 'multimodal_drift_p{signal="tokens written"} '
            value = float(metrics.partition(shown)[2].split()[0]) if shown in metrics else 1.0
            assert (value < 0.01) == (expected < 1), (expected, value)


async def no_rows(prompts: Sequence[str]) -> Rows:
    return np.zeros((0, 2), np.float32)


def test_what_prompts_are_about_is_compared_where_the_reference_has_texts(
    tiny_model: Make, serving: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a prompt that is too long to be embedded nor one without a text ends it."""
    monkeypatch.setattr("multimodal.serve.watching.EVERY", 21)
    model, name = tiny_model(noise=0.1), str(tmp_path / "reference")
    shown = f'multimodal_drift_p{{signal="{EMBEDDINGS}"}} '
    for texts, about, changes in (
        (True, "dogs", None),
        (False, "dogs", False),
        (False, "?!", True),
    ):
        more = {"drift_reference": name, "record": str(tmp_path / f"now{changes}")}
        if changes is None:
            more = {"record": name, "record_texts": texts}
        with serving(model, **more) as server:
            client = server.client()
            for number in range(20):
                client.embeddings.create(model="tiny", input=f"{number} {about}")
            with suppress(openai.BadRequestError):
                client.embeddings.create(model="tiny", input="long " * 2000)
            metrics, deadline = "", time.monotonic() + 20
            while changes is not None and shown not in metrics and time.monotonic() < deadline:
                metrics = client.get("/../metrics", cast_to=str)
        if changes is not None:
            assert shown in metrics
            assert (float(metrics.partition(shown)[2].split()[0]) < 0.01) == changes


def test_prompts_are_embedded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multimodal.serve.watching.EVERY", 30)
    embedded = list[list[str]]()

    async def embed(prompts: Sequence[str]) -> Rows:
        embedded.append(list(prompts))
        return np.array([[len(prompt), 0] for prompt in prompts], np.float32)

    record = Record(tmp_path / "reference", keep_texts=True)
    facts = {"path": "/v1/embeddings", "status": 200}
    noted = [record.append(facts, {"prompt": f"before {number}"}) for number in range(25)]
    record.close()

    async def ask() -> DriftWatch:
        watch = DriftWatch(record.path, Metrics().drift, embed)
        for number in range(60):
            watch.add(noted[0], f"now {number}")
            if watch._comparing is not None:
                await watch._comparing
        return watch

    watch = asyncio.run(ask())
    assert sorted(embedded[0]) == sorted(f"before {number}" for number in range(25))
    assert embedded[1:] == [[f"now {n}" for n in range(30)], [f"now {n}" for n in range(30, 60)]]
    assert len(watch.rows) == 60


def test_a_server_takes_out_of_its_record_what_is_old(
    tiny_model: Make, serving: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "requests.jsonl"
    record = Record(path, keep_texts=True)
    for days in (50, 20, 1):
        time_ = (datetime.now(UTC) - timedelta(days=days)).isoformat()
        record.append({"time": time_, "path": "/v1/embeddings"}, {"prompt": f"of {days}"})
    record.close()
    kept = {"record": str(path), "record_texts": True, "record_days": 30, "record_text_days": 7}
    with serving(tiny_model(), **kept) as server:
        server.client().embeddings.create(model="tiny", input="of now")
        deadline = time.monotonic() + 20
        while b"of 20" in path.read_bytes() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert verify(path) == []
    texts = [entry.texts.get("prompt") for entry in Log(path).all()]
    assert b"of 50" not in path.read_bytes() and texts[:2] == [None, "of 1"]
    assert sorted(map(str, texts[2:])) == ["None", "of now"], "and what prune has noted"
    with pytest.raises(ValueError, match="record_days: give record"):
        Settings(record_days=3)


def test_a_comparison_that_fails_is_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no comparison")

    record = Record(tmp_path / "reference")
    for _ in range(20):
        record.append({"path": "/v1/embeddings", "status": 200})
    record.close()
    watch = DriftWatch(record.path, Metrics().drift, no_rows)
    monkeypatch.setattr("multimodal.serve.watching.drift", fails)
    asyncio.run(watch.compare())
    assert "were not compared" in caplog.text and "no comparison" in caplog.text
