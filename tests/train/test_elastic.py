"""torchrun starts the ranks of a run again when one dies, and the run goes on by itself."""

import os
import socket
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from multimodal import distributed
from multimodal.cli import main
from multimodal.train.run import resuming, stopping
from tests.launches import launch, logged, run_processes, torchrun

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
# What torchrun runs: a rank of the first start dies before a step.
DIES_ONCE = """
import os, signal, sys
import lightning as L
from multimodal.cli import main

def die(module, *_):
    if module.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    L.LightningModule.on_train_batch_start = die
sys.exit(main(sys.argv[1:]))
"""


def assert_same(run: Path, other: Path) -> None:
    weights, expected = (load_file(r / "model/model.safetensors") for r in (run, other))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert logged(run) == logged(other)


def fit(work: Path, run: Path, *more: str) -> list[str]:
    config = ["fit", "--config", str(work / "joint.yaml"), "--output", str(run)]
    return [*config, "--trainer.max_steps", "8", "--threads", "1", *more]


TWO_RANKS = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_second_start_goes_on_where_the_first_one_saved(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: bool
) -> None:
    """With --init_from, which started it; before the first checkpoint it starts anew."""
    start = ["--init_from", str(work / "joint/model")]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main([*fit(work, whole), *start]) == 0
    launch([*fit(work, run), *start], dies_at=5 if checkpoint else 2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main([*fit(work, run), *start]) == 0
    assert_same(run, whole)


def test_a_second_start_cannot_replace_the_first(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert main([*fit(work, tmp_path), "--overwrite"]) == 1
    assert "a second start would replace" in capsys.readouterr().err


def in_folder_of_its_rank(folder: Path) -> None:
    """As if each rank ran on a machine with a disk of its own."""
    os.chdir(folder / os.environ["RANK"])


def test_ranks_that_see_different_checkpoints_do_not_train(work: Path, tmp_path: Path) -> None:
    for rank in "01":
        (tmp_path / rank).mkdir()
    run = tmp_path / "0/run"
    start = ["--trainer.max_steps", "3", "--trainer.limit_val_batches", "0"]
    assert main([*fit(work, run), *start]) == 0
    before = (run / "checkpoints/step=3.ckpt").read_bytes()
    ends = run_processes(
        fit(work, Path("run"), *TWO_RANKS, "--ckpt_path", "auto"),
        environments=torchrun(2),
        before=partial(in_folder_of_its_rank, tmp_path),
    )
    for end in ends:
        assert end.status == 1 and "Traceback" not in end.stderr, end.stderr
        assert "(rank 0: step=3.ckpt; rank 1: none (a new run))" in end.stderr
        assert "--output has to be a folder that all ranks see" in end.stderr
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step=3.ckpt", "last.ckpt"}
    assert (run / "checkpoints/step=3.ckpt").read_bytes() == before


def test_many_ranks_with_different_checkpoints_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is the step that a link leads to, not its name."""
    last = tmp_path / "last.ckpt"
    last.symlink_to("step=8.ckpt")
    for others in ([], ["step=8.ckpt"]):
        monkeypatch.setattr(resuming, "gather_objects", lambda own, rest=others: [*own, *rest])
        resuming.check_same_checkpoint(str(last))
    others = ["step=8.ckpt"] * 9 + ["step=4.ckpt"]
    monkeypatch.setattr(resuming, "gather_objects", lambda own: [*own, *others])
    with pytest.raises(ValueError, match="different checkpoints") as error:
        resuming.check_same_checkpoint(str(last))
    ranks = "(ranks 0, 1, 2, 3, 4, 5, 6, 7, ...: step=8.ckpt; rank 10: step=4.ckpt)"
    assert ranks in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("first", ["10.0.0.2", "127.0.0.1"])
def test_ranks_meet_on_the_machine_of_the_first_one(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After machines have joined or left, it need not be that of the store."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    monkeypatch.setattr(distributed, "address_beside", lambda host, port: first)
    places = []
    for rank in "01":
        environment = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_RESTART_COUNT": "1"}
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        distributed.leave_store_of_last_attempt()
        assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "False"
        places.append((os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]))
    assert places[0] == places[1] and places[0][0] == first
    assert places[0][1] != str(store.port), "a port that no attempt before has used"


def test_the_address_of_this_machine_is_that_of_its_route(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.address_beside("127.0.0.1", 80) == "127.0.0.1"
    assert distributed.address_beside("localhost", 80) == "localhost"

    class Route(socket.socket):
        def connect(self, address: Any) -> None:
            assert address == ("10.0.0.1", 80)

        def getsockname(self) -> Any:
            return "10.0.0.2", 5000

    found = [(socket.AF_INET, socket.SOCK_DGRAM, 0, "", ("10.0.0.1", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(socket, "socket", Route)
    assert distributed.address_beside("node-1", 80) == "10.0.0.2"


@pytest.mark.filterwarnings("ignore:.*_set_pg_timeout:FutureWarning")
@pytest.mark.parametrize("public", [True, False])
def test_the_timeout_of_ranks_is_set_by_old_and_new_torch(
    public: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 2.14 torch has a private function for it."""
    if public and not hasattr(dist, "set_timeout"):
        pytest.skip("this torch is older")
    if not public:
        monkeypatch.delattr(dist, "set_timeout", raising=False)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        stopping.set_timeout(timedelta(seconds=77), None)
        group: Any = dist.group.WORLD
        options = group._get_backend(torch.device("cpu")).options
        assert options._timeout == timedelta(seconds=77)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_ends_as_if_nothing_had_happened(
    work: Path, tmp_path: Path
) -> None:
    whole, run, script = tmp_path / "whole", tmp_path / "run", tmp_path / "dies_once.py"
    launch(fit(work, whole, *TWO_RANKS), ranks=2)
    script.write_text(DIES_ONCE)
    elastic = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *elastic, "--max-restarts", "1", str(script)]
    done = subprocess.run(
        [*command, *fit(work, run, *TWO_RANKS)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "Signal 9" in done.stderr or "exitcode: -9" in done.stderr, done.stderr
    assert_same(run, whole)
