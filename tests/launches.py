"""What tests of training share: runs in processes of their own, and what a run has logged."""

import csv
import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

import lightning as L

from multimodal.cli import main


def logged(run: Path, name: str = "train/total") -> dict[int, str]:
    """step -> the figure, as text: of the newest log that has the step."""
    older = sorted((run / "logs").glob("metrics.*.csv"), key=lambda path: path.suffixes)
    found: dict[int, str] = {}
    for path in (*older, run / "logs" / "metrics.csv"):
        with open(path, newline="") as file:
            found |= {int(r["step"]): r[name] for r in csv.DictReader(file) if r.get(name)}
    return found


def one_rank(commands: list[list[str]], environment: dict[str, str], dies_at: int | None) -> None:
    """What a process of a launch does: `multimodal ARGUMENTS`, for each of the commands."""

    def die(module: L.LightningModule, *_: Any) -> None:
        if module.global_step == dies_at:
            os.killpg(0, signal.SIGKILL)

    os.setsid()  # so that its workers are killed with it
    os.environ |= environment
    L.LightningModule.on_train_batch_start = die  # type: ignore[method-assign]
    for arguments in commands:
        assert main([*arguments, "--threads", "1"]) == 0


def launch(*commands: list[str], ranks: int = 1, dies_at: int | None = None) -> None:
    """Run `multimodal ARGUMENTS`, one command after the other, in as many processes as torchrun
    would start, but with everything imported already; SIGKILL them before the step ``dies_at``."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["multimodal.train.cli"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started = []
    for rank in range(ranks):
        environment = shared | {"LOCAL_RANK": str(rank)} if ranks > 1 else {}
        started.append(
            processes.Process(target=one_rank, args=(list(commands), environment, dies_at))
        )
        started[-1].start()
    try:
        for process in started:
            process.join(200)
        ends = {process.exitcode for process in started}
        assert ends == {0 if dies_at is None else -signal.SIGKILL}
    finally:
        for process in started:
            process.kill()  # one that waits for a rank that is gone
