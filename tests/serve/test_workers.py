"""Workers: one that dies takes its own connections with it, and is started again."""

import base64
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from multimodal.commands.folders.log import main as log_main
from multimodal.origin.credentials import find_credentials
from multimodal.record.chain import verify
from multimodal.serve.engine.metrics import Metrics
from multimodal.serve.engine.scheduler import Job, Steps
from multimodal.serve.peers import merged
from multimodal.serve.server import record_of
from multimodal.serve.workers import Supervisor, check_free
from tests.processes import (
    PATIENCE,
    End,
    finish,
    kill_main,
    living,
    press_ctrl_c,
    start,
    terminate_group,
    terminate_main,
    wait_until,
)
from tests.serve.workers import Says, free_port


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def ask(port: int, path: str = "/") -> str:
    """What one worker says, on a connection of its own. Empty: the connection broke."""
    try:
        return httpx2.get(f"http://127.0.0.1:{port}{path}", timeout=60).text
    except httpx2.TransportError:
        return ""


def asked(port: int, times: int = 20) -> set[str]:
    return {ask(port) for _ in range(times)} - {""}


@contextmanager
def supervised(target: Any, count: int) -> Iterator[Supervisor]:
    supervisor = Supervisor(target, count, stop_timeout=10, on_ready=lambda: None)
    # Signals are of the main thread: here its event stands for them.
    thread = threading.Thread(target=supervisor.watch)
    thread.start()
    try:
        yield supervisor
    finally:
        supervisor.stopping.set()
        thread.join()


def test_a_worker_that_dies_takes_only_its_own_with_it(tmp_path: Path) -> None:
    port = free_port()
    with supervised(Says(port), 3) as supervisor:
        wait_for(lambda: all(worker.answers for worker in supervisor.workers))
        before = asked(port, 60)
        assert len(before) == 3, "the kernel deals connections out"
        victim = str(supervisor.workers[1].process.pid)  # type: ignore[union-attr]
        with ThreadPoolExecutor(30) as pool:
            running = [pool.submit(ask, port, str(tmp_path)) for _ in range(30)]
            wait_for(lambda: before <= {path.name for path in tmp_path.iterdir()})
            os.kill(int(victim), signal.SIGKILL)
            (tmp_path / "go").touch()
            answers = {each.result() for each in running}
        assert "" in answers and victim not in answers, "the victim's get an error"
        assert before - {victim} <= answers, "and the others answers"
        assert asked(port), "new connections go to those that live"
        wait_for(lambda: len(asked(port)) == 3)
        assert victim not in asked(port)
        processes = [worker.process.pid for worker in supervisor.workers if worker.process]
        supervisor.stopping.set()
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes))
    assert ask(port) == ""


def test_a_worker_that_never_answers_ends_the_start() -> None:
    supervisor = Supervisor(Says(free_port(), fails=True), 3, 5, on_ready=lambda: None)
    assert supervisor.watch() == 1
    assert all(worker.process is None for worker in supervisor.workers)


SUPERVISOR = """
import sys
from multimodal.serve.workers import Supervisor
from tests.serve.workers import Says

if __name__ == "__main__":
    sys.exit(Supervisor(Says(int(sys.argv[1])), 2, 3600, lambda: None).run())
"""


@pytest.mark.parametrize("end", [kill_main, terminate_main, terminate_group, press_ctrl_c])
def test_workers_end_with_their_supervisor(end: End, tmp_path: Path) -> None:
    """Killed, or told twice, while requests run that never end."""
    port, stderr = free_port(), tmp_path / "stderr"
    (tmp_path / "asked").mkdir()
    process = start(["-c", SUPERVISOR, str(port)], stderr)
    try:
        assert wait_until(lambda: len(asked(port, 10)) == 2), stderr.read_text()
        threads = [
            threading.Thread(target=ask, args=(port, str(tmp_path / "asked")), daemon=True)
            for _ in range(10)
        ]
        for thread in threads:
            thread.start()
        assert wait_until(lambda: len(list((tmp_path / "asked").iterdir())) == 2)
        end(process.pid)
        if end is not kill_main:
            # Two signals at once can be one for Python, so the second waits for the first.
            assert wait_until(lambda: "a second signal" in stderr.read_text())
            assert living(process.pid), "the first signal lets requests end"
            end(process.pid)
        process.wait(PATIENCE)
        assert wait_until(lambda: not living(process.pid)), living(process.pid)
        assert "Traceback" not in stderr.read_text(), stderr.read_text()
    finally:
        finish(process)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_whose_scheduler_is_dead_ends(
    tiny_model: Callable[..., Any], serving: Callable[..., Any]
) -> None:
    def dies() -> Steps:
        yield None
        raise SystemExit

    with tempfile.TemporaryDirectory() as folder, serving(tiny_model(), peers=folder) as server:
        assert ask(server.port, "/health")
        server.engines.scheduler.submit(Job(dies(), print, print))
        wait_for(lambda: not ask(server.port, "/health"))


def test_an_address_that_is_in_use_is_not_shared() -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as other:
        with pytest.raises(OSError, match="in use"):
            check_free("127.0.0.1", other.getsockname()[1])
    check_free("127.0.0.1", free_port())


def test_metrics_of_workers_are_told_apart() -> None:
    texts = {}
    for worker, count in (("0", 3), ("1", 4)):
        counted = Metrics()
        counted.requests.labels("/v1/embeddings", "200").inc(count)
        counted.seconds.labels("/v1/embeddings").observe(0.2 * count)
        texts[worker] = counted.text().decode()
    found = merged(texts).decode()
    assert found.count("# TYPE multimodal_requests_total counter") == 1
    one, other = ({} for _ in range(2))
    for family in text_string_to_metric_families(found):
        for sample in family.samples:
            labels = dict(sample.labels)
            worker = labels.pop("worker")
            key = sample.name, *sorted(labels.items())
            (one if worker == "0" else other)[key] = sample.value
    for worker, values in (("0", one), ("1", other)):
        expected = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(texts[worker])
            for sample in family.samples
        }
        assert values == expected


def test_each_worker_has_a_record(tmp_path: Path) -> None:
    assert record_of(tmp_path / "a.b.jsonl", 3) == tmp_path / "a.b.3.jsonl"


@pytest.mark.slow
def test_the_command_with_workers(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two models answer; one is killed while both write, and comes again; a signal ends all."""
    port, record = free_port(), tmp_path / "record.jsonl"
    command = [sys.executable, "-m", "multimodal", "serve", str(tiny_model_folder)]
    command += ["--port", str(port), "--threads", "1", "--workers", "2", "--record", str(record)]
    command += ["--sign", str(tmp_path / "keys")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a red bus"}],
        "max_tokens": 5, "temperature": 1.0, "seed": 1}  # fmt: skip

    def chat(**changed: Any) -> str:
        try:
            asked = httpx2.post(f"{url}/v1/chat/completions", json=body | changed, timeout=60)
            (choice,) = asked.json()["choices"]
            return f"{choice['message']['content']} ({choice['finish_reason']})"
        except httpx2.TransportError:
            return ""

    def long_chat() -> str:
        return chat(temperature=0.0, max_tokens=900)

    def drawn() -> bytes:
        asked = {"model": "tiny", "prompt": "a red bus", "seed": 1}
        answer = httpx2.post(f"{url}/v1/images/generations", json=asked, timeout=60)
        return base64.b64decode(answer.json()["data"][0]["b64_json"])

    def numbers() -> set[str]:
        try:
            text = httpx2.get(f"{url}/metrics", timeout=60).text
        except httpx2.TransportError:  # it was the victim's
            return set()
        return {part[:1] for part in text.split('worker="')[1:]}

    def busy() -> set[str]:
        samples = (
            sample
            for family in text_string_to_metric_families(httpx2.get(f"{url}/metrics").text)
            for sample in family.samples
            if sample.name.endswith("_running")
        )
        return {sample.labels["worker"] for sample in samples if sample.value}

    try:
        assert process.stdout is not None and str(port) in process.stdout.readline()
        wait_for(lambda: numbers() == {"0", "1"})
        assert len({chat() for _ in range(8)}) == 1, "the same bytes, whichever answers"
        signed = [find_credentials(drawn(), "image/png") for _ in range(8)]
        assert {each.state for each in signed} == {"valid"}
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [
            pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
        ]
        with ThreadPoolExecutor(12) as pool:
            running = [pool.submit(long_chat) for _ in range(12)]
            wait_for(lambda: busy() == {"0", "1"})
            os.kill(int(workers[0]), signal.SIGKILL)
            answers = [each.result() for each in running]
        assert "" in answers, "those of the victim get an error"
        assert len({*answers}) == 2, "those of the other one their answers, all of them whole"
        wait_for(lambda: chat())
        wait_for(lambda: numbers() == {"0", "1"})
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    finally:
        process.kill()
    records = [record_of(record, number) for number in range(2)]
    assert not any(verify(path) for path in records)
    assert log_main(["verify", *map(str, records)]) == 0
    assert log_main(["report", *map(str, records)]) == 0
    assert "requests" in capsys.readouterr().out


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_answers_and_ends_by_a_signal(tiny_model_folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "multimodal", "serve", str(tiny_model_folder)]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--threads", "1"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert str(port) in process.stdout.readline()
    url = f"http://127.0.0.1:{port}"

    def up() -> bool:
        try:
            return httpx2.get(f"{url}/health").status_code == 200
        except httpx2.TransportError:
            return False

    assert wait_until(up)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 900}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(httpx2.post, f"{url}/v1/chat/completions", json=body, timeout=60)
        assert wait_until(lambda: "running 1.0" in httpx2.get(f"{url}/metrics").text)
        process.send_signal(signal.SIGTERM)
        assert running.result().status_code == 200, "what was running ends"
    assert process.wait(30) in (0, -signal.SIGTERM)
