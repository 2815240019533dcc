"""What tests of training share: runs in processes of their own, and what a run has logged.

The processes are forked from a server that has imported everything once: a new interpreter would
take seconds to import torch and Lightning.
"""

import csv
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import lightning as L

from multimodal.cli import main

Environment = dict[str, str]
PATIENCE = 200.0  # seconds for a process; a busy machine takes its time


def logged(run: Path, name: str = "train/total") -> dict[int, str]:
    """step -> the figure, as text: of the newest log that has the step."""
    older = sorted((run / "logs").glob("metrics.*.csv"), key=lambda path: path.suffixes)
    found: dict[int, str] = {}
    for path in (*older, run / "logs" / "metrics.csv"):
        with open(path, newline="") as file:
            found |= {int(r["step"]): r[name] for r in csv.DictReader(file) if r.get(name)}
    return found


@dataclass(frozen=True)
class Ended:
    """How a process has ended.

    Attributes:
        status: its exit status; -9: killed by SIGKILL.
        stdout: what it has printed.
        stderr: its messages.
    """

    status: int | None
    stdout: str
    stderr: str


def one_process(
    commands: Sequence[list[str]],
    environment: Environment,
    before: Callable[[], None] | None,
    output: str,
) -> None:
    """What a process does: ``before()``, then `multimodal ARGUMENTS` for each of the commands."""
    os.setsid()  # so that its workers are killed with it
    os.environ |= environment
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT), number)
    if before:
        before()
    for arguments in commands:
        if status := main([*arguments, "--threads", "1"]):
            sys.exit(status)


def start(
    *commands: list[str],
    environment: Environment | None = None,
    before: Callable[[], None] | None = None,
    output: str = "/dev/null",
) -> ForkServerProcess:
    """Start `multimodal ARGUMENTS`, one command after the other, in a process of its own.

    Args:
        commands: the arguments, without ``--threads``, which is 1.
        environment: is added to that of the server.
        before: is called first, in that process.
        output: its stdout and stderr go to the files ``output.stdout`` and ``output.stderr``.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["multimodal.train.cli"])
    process = server.Process(target=one_process, args=(commands, environment or {}, before, output))
    process.start()
    return process


def run_processes(
    *commands: list[str],
    environments: Sequence[Environment] = ({},),
    before: Callable[[], None] | None = None,
) -> list[Ended]:
    """Run `multimodal ARGUMENTS` in a process for each environment, all at the same time."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"{folder}/{rank}" for rank in range(len(environments))]
        started = [
            start(*commands, environment=environment, before=before, output=output)
            for environment, output in zip(environments, outputs, strict=True)
        ]
        try:
            for process in started:
                process.join(PATIENCE)
            return [
                Ended(
                    process.exitcode,
                    *(Path(f"{output}.{name}").read_text("utf-8") for name in ("stdout", "stderr")),
                )
                for process, output in zip(started, outputs, strict=True)
            ]
        finally:
            for process in started:
                process.kill()  # one that waits for a rank that is gone


def torchrun(ranks: int) -> list[Environment]:
    """The environments of the processes that torchrun would start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(ranks)}
    return [shared | {"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(ranks)]


def sharded(ranks: int = 1) -> list[str]:
    """The options of FSDP2: each rank has a part of every weight."""
    strategy = "--trainer.strategy"
    sizes = {"data_parallel_size": ranks, "tensor_parallel_size": 1}
    options = [strategy, "lightning.pytorch.strategies.ModelParallelStrategy"]
    return options + [f"{strategy}.{name}={size}" for name, size in sizes.items()]


def die_before(step: int) -> None:
    """This process and its workers are killed before that step of a training."""

    def die(module: L.LightningModule, *_: Any) -> None:
        if module.global_step == step:
            os.killpg(0, signal.SIGKILL)

    L.LightningModule.on_train_batch_start = die  # type: ignore[method-assign]


def launch(*commands: list[str], ranks: int = 1, dies_at: int | None = None) -> None:
    """Run commands on so many ranks. All must succeed, or be killed before the step ``dies_at``."""
    before = None if dies_at is None else partial(die_before, dies_at)
    environments = torchrun(ranks) if ranks > 1 else [{}]
    ends = run_processes(*commands, environments=environments, before=before)
    assert {end.status for end in ends} == {0 if dies_at is None else -signal.SIGKILL}, ends
