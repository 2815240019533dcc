"""Requests share a batch: each gets what it would get alone, and what happens to one is its own."""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
import torch
from torch import Tensor

from multimodal.api import Model
from multimodal.inference.decode import Decoder, Joining, Row
from multimodal.memory import NotEnoughMemory
from multimodal.model.layers.graphs import Run, StepGraphs
from multimodal.options import TextOptions
from multimodal.serve.engine.errors import ApiError, as_api_error
from multimodal.serve.engine.scheduler import Decoding, Job, Scheduler, Steps

Make = Callable[..., Model]
TEXTS = ("a red bus", "two dogs run on the beach", "the cat", "a", "blue", "a small blue circle")


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def test_same_seed_same_bytes_whatever_else_is_asked(server: Any) -> None:
    """Texts, drawings, edits of many clients, and each alone before. Scores are equal, too."""
    client = server.client()

    def answer(number: int) -> str:
        found = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": TEXTS[number % len(TEXTS)]}],
            temperature=[0.0, 1.0, 0.7][number % 3],
            top_p=[1.0, 0.9][number % 2],
            max_tokens=8 + 5 * (number % 4),
            seed=number,
            n=1 + number % 2,
            logprobs=True,
        )
        return str([(choice.message.content, choice.logprobs) for choice in found.choices])

    def draw(number: int) -> str:
        more = [{"guidance_scale": 1.0}, {}, {"steps": 3}][number % 3]
        drawn = client.images.generate(
            model="tiny", prompt=TEXTS[number % len(TEXTS)], extra_body={"seed": number, **more}
        )
        return str(drawn.data[0].b64_json)

    work = [(answer, number) for number in range(10)] + [(draw, number) for number in range(6)]
    alone = [ask(number) for ask, number in work]
    with ThreadPoolExecutor(len(work)) as pool:
        for order in (work, work[::-1]):
            together = list(pool.map(lambda each: each[0](each[1]), order))
            assert together == (alone if order is work else alone[::-1])
    assert len(set(alone)) == len(alone)


def test_a_client_that_leaves_makes_room(tiny_model: Make, serving: Any) -> None:
    """In a stream, in the middle of an answer, while it waits; and half-closed sockets."""
    with serving(tiny_model(noise=0.1, tied=False), rows=1) as server:
        scheduler = server.engines.scheduler
        long = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1000}
        stream = server.client().chat.completions.create(**long, stream=True)
        next(iter(stream))
        waiting = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
        body = b'{"model":"tiny","messages":[{"role":"user","content":"a"}],"max_tokens":999}'
        for each in waiting:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer sk-test"
            each.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: len(scheduler.jobs) == 4)
        assert scheduler.count_rows() == 1
        waiting[0].close()
        waiting[1].shutdown(socket.SHUT_RDWR)
        wait_for(lambda: len(scheduler.jobs) == 2)
        stream.close()
        wait_for(lambda: len(scheduler.jobs) == 1)
        waiting[2].close()
        wait_for(lambda: not scheduler.jobs and not scheduler.count_rows())
        answer = server.client().chat.completions.create(**{**long, "max_tokens": 3})
        assert answer.usage.completion_tokens == 3


def test_metrics_count(tiny_model: Make, serving: Any) -> None:
    with serving(tiny_model(noise=0.1, tied=False)) as server:
        ask = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
        answer = server.client().chat.completions.create(**ask)
        with pytest.raises(Exception, match="no model"):
            server.client().chat.completions.create(**{**ask, "model": "other"})
        url = f"http://127.0.0.1:{server.port}/metrics"
        text = httpx2.get(url, headers={"Authorization": "Bearer sk-test"}).text
        path = 'path="/v1/chat/completions"'
        for line in (
            f'multimodal_requests_total{{{path},status="200"}} 1.0',
            f'multimodal_requests_total{{{path},status="404"}} 1.0',
            f"multimodal_generated_tokens_total {answer.usage.completion_tokens}.0",
            f"multimodal_prompt_tokens_total {answer.usage.prompt_tokens}.0",
            f'multimodal_first_output_seconds_count{{{path},stream="false"}} 2.0',
            "multimodal_requests_running 0.0",
            "multimodal_requests_waiting 0.0",
            "multimodal_batch_rows 0.0",
        ):
            assert line in text


# --- the scheduler alone --------------------------------------------------------------------------


class Counting(Row):
    """A row of ``length`` tokens, which may fail."""

    ids = slice(0, 300)

    def __init__(self, number: int, length: int, fails: bool = False) -> None:
        super().__init__(number, [[1, 2, 3 + number]], length)
        self.fails = fails

    def take(self, token: int, log_probability: float) -> Iterator[int]:
        if self.fails:
            raise RuntimeError("a row failed")
        self.generated.append(token)
        self.done = len(self.generated) == self.max_new_tokens
        yield token


class Ends:
    """Jobs and what became of them."""

    def __init__(self, model: Model, **limits: int) -> None:
        self.network, self.scheduler = model.network, Scheduler(**limits)
        self.results, self.order = dict[str, Any](), list[str]()

    def submit(self, name: str, steps: Steps) -> Job:
        def ended(result: Any) -> None:
            self.results[name] = result
            self.order.append(name)

        job = Job(steps, lambda row, piece: None, ended)
        self.scheduler.submit(job)
        return job

    def decoding(self, rows: list[Row], long: bool = False) -> Steps:
        yield Decoding(self.network, rows, TextOptions(), long=long)
        return [len(row.generated) for row in rows]


@pytest.fixture
def ends(tiny_model: Make) -> Iterator[Ends]:
    ends = Ends(tiny_model(noise=0.1), rows=4, requests=20)
    yield ends
    ends.scheduler.stop(0)
    assert not ends.scheduler.jobs


def test_short_answers_pass_long_drawings(ends: Ends) -> None:
    """Drawings that would fill the batch leave a row to others."""
    for number in range(5):
        ends.submit(
            f"drawing {number}", ends.decoding([Counting(n, 200) for n in range(2)], long=True)
        )
    ends.submit("answer", ends.decoding([Counting(0, 3)]))
    wait_for(lambda: "answer" in ends.results)
    assert ends.order == ["answer"] and ends.results["answer"] == [3]


def test_many_rows_of_one_request_do_not_keep_others_out(ends: Ends) -> None:
    ends.submit("many", ends.decoding([Counting(n, 10) for n in range(12)]))
    ends.submit("one", ends.decoding([Counting(0, 10)]))
    wait_for(lambda: len(ends.results) == 2)
    assert ends.order == ["one", "many"] and ends.results["many"] == [10] * 12


def test_a_network_with_graphs_plays_them_and_says_what_is_not_kept(
    tiny_model: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a GPU, but that steps are not recorded. Without graphs beginnings are kept."""
    recorded = list[Run]()

    def record(run: Run) -> Run:
        recorded.append(run)
        return run

    def tokens(model: Model) -> tuple[list[list[int]], int]:
        ends = Ends(model, rows=4, prefix_bytes=1 << 20)
        rows = [Counting(n, 10 + n) for n in range(3)]
        for number, row in enumerate(rows):
            row.prompts, row.ends = [[*range(5, 45), number]], [40]
            ends.submit(str(number), ends.decoding([row]))
        wait_for(lambda: len(ends.results) == 3)
        ends.scheduler.stop(0)
        return [row.generated for row in rows], ends.scheduler.prefixes.hits

    plain, graphed = tiny_model(noise=0.1), tiny_model(noise=0.1)
    graphed.network.graphs = StepGraphs(record)
    expected, hits = tokens(plain)
    assert hits == 2 and "not kept" not in caplog.text
    assert tokens(graphed) == (expected, 0)
    assert recorded and caplog.text.count("beginnings of prompts are not kept") == 1


def test_an_error_ends_its_own_request(ends: Ends) -> None:
    def wrong() -> Steps:
        yield None
        raise ValueError("temperature=-1: expected more")

    slow = ends.submit("slow", ends.decoding([Counting(0, 4000)]))
    ends.submit("wrong", wrong())
    ends.submit("too long", ends.decoding([Counting(0, 10**6)]))
    wait_for(lambda: len(ends.results) == 2)
    assert all(isinstance(ends.results[name], ValueError) for name in ("wrong", "too long"))
    ends.scheduler.cancel(slow)
    wait_for(lambda: "slow" in ends.results)


def test_what_other_threads_compute_keeps_nobody_waiting(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request goes on, or ends, when its future does. Meanwhile others run, or nothing does."""
    turns = []
    turn = Scheduler._turn
    monkeypatch.setattr(Scheduler, "_turn", lambda self: (turns.append(1), turn(self)))
    encoded = {name: Future[int]() for name in ("right", "wrong", "left")}

    def waits(name: str) -> Steps:
        yield encoded[name]
        yield Decoding(ends.network, [row := Counting(0, encoded[name].result())], TextOptions())
        return len(row.generated)

    jobs = {name: ends.submit(name, waits(name)) for name in encoded}
    ends.submit("other", ends.decoding([Counting(0, 5)]))
    wait_for(lambda: "other" in ends.results)
    assert ends.order == ["other"] and len(ends.scheduler.jobs) == 3
    before = len(turns)
    time.sleep(0.1)
    assert len(turns) <= before + 1, "a scheduler whose requests all wait sleeps"
    ends.scheduler.cancel(jobs["left"])
    wait_for(lambda: "left" in ends.results)
    encoded["wrong"].set_exception(ValueError("no image"))
    wait_for(lambda: "wrong" in ends.results)
    assert isinstance(ends.results["wrong"], ValueError)
    encoded["right"].set_result(7)
    encoded["left"].set_result(7)
    wait_for(lambda: "right" in ends.results)
    assert ends.results["right"] == 7 and ends.results["left"] is None


def test_a_request_that_waits_for_ever_ends_when_the_scheduler_stops(ends: Ends) -> None:
    def waits() -> Steps:
        yield Future[int]()

    ends.submit("waits", waits())
    ends.scheduler.stop(0.05)
    assert ends.results["waits"].status == 503


def test_the_scheduler_outlives_a_batch_that_fails(ends: Ends) -> None:
    ends.submit("fails", ends.decoding([Counting(0, 5, fails=True)]))
    wait_for(lambda: "fails" in ends.results)
    assert isinstance(ends.results["fails"], RuntimeError)
    ends.submit("next", ends.decoding([Counting(0, 5)]))
    wait_for(lambda: "next" in ends.results)
    assert ends.results["next"] == [5]


class Choiceless(Counting):
    """A row that allows no token at all, from its third on."""

    def allowed(self) -> Tensor:
        return torch.full((300,), len(self.generated) < 2)


def test_a_row_without_a_token_leaves_the_others_in_the_batch(ends: Ends) -> None:
    def drawn(rows: list[Row]) -> Steps:
        yield Decoding(ends.network, rows, TextOptions(temperature=1.0))
        return [len(row.generated) for row in rows]

    ends.submit("right", ends.decoding([Counting(0, 9)]))
    ends.submit("wrong", ends.decoding([Counting(1, 9, fails=True), Counting(1, 9)]))
    ends.submit("none", drawn([Choiceless(2, 9)]))
    wait_for(lambda: len(ends.results) == 3)
    assert ends.results["right"] == [9] and ends.order[-1] == "right"
    assert "a row failed" in str(ends.results["wrong"])
    assert "nothing can be chosen" in str(ends.results["none"])
    assert all(isinstance(ends.results[name], RuntimeError) for name in ("wrong", "none"))


@pytest.mark.parametrize(
    "error",
    [
        NotEnoughMemory("a batch needs about 9 GB of memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
)
def test_rows_wait_for_memory_that_others_have(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    refused, join = list[int](), Decoder.join_together

    def joined(self: Decoder, several: Sequence[Joining]) -> None:
        rows = len(self) + sum(len(part.rows) for part in several)
        if rows > 1:
            refused.append(rows)
            raise error
        join(self, several)

    monkeypatch.setattr(Decoder, "join_together", joined)
    ends.submit("first", ends.decoding([Counting(0, 40)]))
    wait_for(lambda: ends.scheduler.count_rows() == 1)
    ends.submit("second", ends.decoding([Counting(1, 40)]))
    wait_for(lambda: len(ends.results) == 2)
    assert ends.order == ["first", "second"] and ends.results["second"] == [40]
    assert 0 < len(refused) <= 2, "it was not tried again at each step"
    ends.submit("too many", ends.decoding([Counting(n, 40) for n in range(3)]))
    wait_for(lambda: "too many" in ends.results)
    told = as_api_error(ends.results["too many"])
    assert (told.status, told.retry_after) == (503, 5) and str(error) not in told.message


@pytest.mark.parametrize("where", ["piece", "end", "stop"])
def test_an_error_of_no_request_ends_all_and_the_scheduler_goes_on(
    ends: Ends, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is raised by what a request is told, or while its work is ended."""

    def fails(*_: Any) -> None:
        raise RuntimeError("nobody caught it")

    def work() -> Steps:
        try:
            yield from ends.decoding([Counting(0, 4000 if where == "stop" else 5)])
        finally:
            if where == "stop":
                fails()

    ends.submit("other", ends.decoding([Counting(0, 4000)]))
    on_piece, on_end = ((fails if where == each else print) for each in ("piece", "end"))
    broken = Job(work(), on_piece, on_end)
    ends.scheduler.submit(broken)
    if where == "stop":
        wait_for(lambda: bool(broken.running))
        ends.scheduler.cancel(broken)
    wait_for(lambda: "other" in ends.results)
    assert isinstance(ends.results["other"], RuntimeError)
    assert "the scheduler failed" in caplog.text and "nobody caught it" in caplog.text
    ends.submit("next", ends.decoding([Counting(0, 5)]))
    wait_for(lambda: "next" in ends.results)
    assert ends.results["next"] == [5] and not ends.scheduler.stopping
    assert not ends.scheduler.jobs and not ends.scheduler.count_rows()


class Panics(Counting):
    """A row with an error as those of libraries in Rust, which are no ``Exception``."""

    def take(self, token: int, log_probability: float) -> Iterator[int]:
        raise BaseException("a panic")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_scheduler_that_dies_ends_all_requests_and_its_server_says_so(
    tiny_model: Make, serving: Any
) -> None:
    with serving(tiny_model()) as server:
        url = f"http://127.0.0.1:{server.port}/health"
        assert httpx2.get(url).status_code == 200
        scheduler, results = server.engines.scheduler, list[Any]()

        def submit(row: Row) -> None:
            def steps() -> Steps:
                yield Decoding(server.model.network, [row], TextOptions())

            scheduler.submit(Job(steps(), lambda row, piece: None, results.append))

        submit(Counting(0, 4000))
        submit(Panics(1, 4000))
        wait_for(lambda: httpx2.get(url).status_code == 503)
        assert [type(result) for result in results] == [RuntimeError] * 2
        with pytest.raises(ApiError, match="the server stops"):
            submit(Counting(2, 5))


def test_a_stopping_scheduler_lets_requests_end(tiny_model: Make) -> None:
    ends = Ends(tiny_model(), rows=2)
    ends.submit("running", ends.decoding([Counting(0, 50)]))
    wait_for(lambda: ends.scheduler.count_rows() == 1)
    stopping = threading.Thread(target=ends.scheduler.stop, args=(30,))
    stopping.start()
    wait_for(lambda: ends.scheduler.stopping)
    with pytest.raises(ApiError) as caught:
        ends.submit("late", ends.decoding([Counting(0, 5)]))
    assert caught.value.status == 503 and caught.value.retry_after
    stopping.join()
    assert ends.results["running"] == [50]
