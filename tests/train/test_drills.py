"""Drills with two machines: network namespaces that a cable joins. Needs root, and `ip netns`."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multimodal.train.run.damage import check_checkpoint
from tests.launches import launch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 400.0  # seconds; most of them to import torch on a busy machine
TIMEOUT = 20  # seconds of a collective


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Machines:
    """Two namespaces, NAME0 with the address 10.77.1.1 and NAME1 with 10.77.1.2."""

    def __init__(self, name: str) -> None:
        self.names = [f"{name}0", f"{name}1"]
        self.started: list[subprocess.Popen[str]] = []

    def connect(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ends = [f"{name}-end" for name in self.names]
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, end) in enumerate(zip(self.names, ends, strict=True), 1):
            ip("link", "set", end, "netns", name)
            inside = ("netns", "exec", name, "ip")
            ip(*inside, "addr", "add", f"10.77.1.{number}/24", "dev", end)
            ip(*inside, "link", "set", end, "up")
            ip(*inside, "link", "set", "lo", "up")

    def cut(self) -> None:
        """The cable is pulled: no packet arrives, and nobody is told."""
        ip("netns", "exec", self.names[1], "ip", "link", "set", f"{self.names[1]}-end", "down")

    def start(self, arguments: list[str], folder: Path) -> None:
        shared = {"MASTER_ADDR": "10.77.1.1", "MASTER_PORT": "29511", "WORLD_SIZE": "2"}
        for number, name in enumerate(self.names):
            own = {"RANK": str(number), "NODE_RANK": str(number), "LOCAL_RANK": "0"}
            own |= {"GLOO_SOCKET_IFNAME": f"{name}-end", "PYTHONPATH": str(ROOT)}
            with open(folder / f"{number}.txt", "w") as stderr:
                process = subprocess.Popen(
                    ["ip", "netns", "exec", name, sys.executable, "-m", "multimodal.cli"]
                    + arguments,
                    env=os.environ | shared | own | {"OMP_NUM_THREADS": "1"},
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    text=True,
                )
            self.started.append(process)

    def wait(self) -> list[int]:
        return [process.wait(PATIENCE) for process in self.started]

    def end(self) -> None:
        for process in self.started:
            process.kill()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture
def machines() -> Iterator[Machines]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and ip")
    both = Machines(f"mm{os.getpid()}-")
    try:
        both.connect()
    except subprocess.CalledProcessError as error:
        both.end()
        pytest.skip(f"no network namespaces here: {error.stderr}")
    yield both
    both.end()


def fit(work: Path, run: Path, steps: int) -> list[str]:
    command = ["fit", "--config", str(work / "joint.yaml"), "--output", str(run)]
    command += ["--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", "ddp"]
    command += ["--trainer.max_steps", str(steps), "--trainer.limit_val_batches", "0"]
    return [*command, "--rank_timeout", str(TIMEOUT), "--threads", "1"]


def wait_for_a_checkpoint(run: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not (run / "checkpoints/last.ckpt").exists():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_a_machine_that_is_lost_ends_the_run_with_one_line(
    work: Path, tmp_path: Path, machines: Machines
) -> None:
    run = tmp_path / "run"
    machines.start(fit(work, run, 100_000), tmp_path)
    wait_for_a_checkpoint(run)
    machines.cut()
    assert machines.wait() == [1, 1]
    for rank in range(2):
        last = (tmp_path / f"{rank}.txt").read_text().splitlines()[-1]
        assert last.startswith(f"multimodal fit (rank {rank} of 2): error: step "), last
        assert "another rank has ended or does not answer any more" in last
        assert f"resume with --ckpt_path {run}/checkpoints/last.ckpt" in last
        assert "Traceback" not in (tmp_path / f"{rank}.txt").read_text()
    check_checkpoint(run / "checkpoints/last.ckpt")


def test_a_slow_machine_costs_time_alone(work: Path, tmp_path: Path, machines: Machines) -> None:
    """It stands still for a third of the timeout, several times. The weights are the same."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    two = ["--trainer.devices", "2", "--trainer.num_nodes", "1"]
    launch([*fit(work, whole, 12)[:-2], *two], ranks=2)
    machines.start(fit(work, run, 12), tmp_path)
    wait_for_a_checkpoint(run)
    slow = machines.started[1]  # `ip netns exec` becomes the program
    for _ in range(2):
        if slow.poll() is None:
            slow.send_signal(signal.SIGSTOP)
            time.sleep(TIMEOUT / 3)
            slow.send_signal(signal.SIGCONT)
            time.sleep(1)
    assert machines.wait() == [0, 0], (tmp_path / "0.txt").read_text()
    weights, expected = (load_file(r / "model/model.safetensors") for r in (run, whole))
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
