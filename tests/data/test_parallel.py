"""Maps give the same results in the same order with any engine, and after workers are killed."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multimodal.data import parallel
from multimodal.data.parallel import Engine, exclusive_lock, map_units

ENGINES: tuple[Engine, ...] = ("processes", "ray")


def square(folder: Path, unit: int) -> int:
    """Square a number. The first process that gets unit 3 is killed."""
    marker = folder / "died"
    if unit == 3 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return unit * unit


def die(unit: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return unit


def fail(unit: int) -> int:
    if unit == 2:
        raise ValueError("unit 2 cannot be done")
    return unit


@pytest.mark.parametrize("engine", ["processes", pytest.param("ray", marks=pytest.mark.slow)])
def test_no_result_is_lost_with_a_killed_worker(engine: Engine, tmp_path: Path) -> None:
    function = partial(square, tmp_path)
    assert list(map_units(function, range(9), engine, workers=2)) == [n * n for n in range(9)]
    assert (tmp_path / "died").exists()


def test_no_result_is_lost_if_a_worker_dies_while_the_caller_is_busy(tmp_path: Path) -> None:
    """The pool is already broken when the next unit is submitted."""
    results = map_units(partial(square, tmp_path), range(12), workers=2)
    first = next(results)
    while not (tmp_path / "died").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    assert [first, *results] == [n * n for n in range(12)]


def test_a_unit_that_another_rank_lost_is_done_after_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(parallel, "RANK_TIMEOUT", 0.1)
    assert list(map_units(abs, range(4), done=lambda unit: False)) == [0, 1, 2, 3]
    monkeypatch.setenv("RANK", "1")
    assert list(map_units(abs, range(4), done=lambda unit: False)) == [1, 3], (
        "only the units of this rank"
    )


def test_a_unit_that_kills_every_worker_ends_the_work() -> None:
    with pytest.raises(ChildProcessError, match="killed 3 times at the same unit"):
        list(map_units(die, range(3), workers=2))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_error_of_a_unit_reaches_the_caller(engine: Engine) -> None:
    results = map_units(fail, range(9), engine, workers=2)
    assert next(results) == 0
    with pytest.raises(ValueError, match=r"^unit 2 cannot be done$"):
        list(results)


def test_wrong_arguments() -> None:
    for arguments, message in (({"workers": 0}, "workers=0"), ({"engine": "dask"}, "dask")):
        with pytest.raises(ValueError, match=message):
            list(map_units(fail, range(2), **arguments))  # type: ignore[arg-type]


def test_a_lock_is_held_by_one_process(tmp_path: Path) -> None:
    with exclusive_lock(tmp_path, "lock"):
        with pytest.raises(ValueError, match="another process"), exclusive_lock(tmp_path, "lock"):
            pass
    with exclusive_lock(tmp_path, "lock"):
        pass
    assert list(tmp_path.iterdir()) == []


# --- data build -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 pictures with captions, some of them damaged. A build makes three parts of them."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(300):
        pixels = rng.integers(0, 256, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"p{number}.jpg")
        (folder / f"p{number}.txt").write_text(f"picture {number}")
        if number % 50 == 7:
            (folder / f"p{number}.jpg").write_bytes(b"\xff\xd8 not a picture")
    return folder


def command(source: Path, out: Path, *options: str) -> list[str]:
    line = [sys.executable, "-m", "multimodal.cli", "data", "build", str(source), str(out)]
    return [*line, "--image-size", "48", "--shard-size", "70", "--val-share", "0.2", *options]


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def expected(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("built")
    subprocess.run(command(photos, out), check=True, capture_output=True)
    assert "rejected.jsonl" in hashes(out) and len(hashes(out)) > 8
    return hashes(out)


@pytest.mark.parametrize(
    "options",
    [
        ("--workers", "2"),
        pytest.param(("--workers", "2", "--engine", "ray"), marks=pytest.mark.slow),
    ],
)
def test_a_build_gives_the_same_bytes_with_any_workers(
    options: tuple[str, ...], photos: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    subprocess.run(command(photos, tmp_path / "out", *options), check=True, capture_output=True)
    assert hashes(tmp_path / "out") == expected


def test_ranks_of_torchrun_share_a_build(
    photos: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    ranks = [
        subprocess.Popen(
            command(photos, tmp_path / "out"),
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (1, 0)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert outputs[0] == "" and "kept 294 of 300" in outputs[1], "only the first rank prints"
    assert hashes(tmp_path / "out") == expected


def test_a_rank_above_0_only_makes_its_parts(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}
    subprocess.run(command(photos, out), env=environment, check=True, timeout=120)
    suffixes = {path.suffix for path in (out / ".building/parts").iterdir()}
    assert suffixes == {".bin", ".json"} and len(list(out.glob(".building/parts/*.bin"))) == 1
    assert [path.name for path in out.iterdir()] == [".building"]


def test_a_build_that_is_killed_several_times_gives_the_same_bytes(
    photos: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out, parts, killed = tmp_path / "out", set[str](), 0
    for moment in range(4):  # after one part, two parts, three parts, all shards
        process = subprocess.Popen(
            command(photos, out, "--workers", "2"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while process.poll() is None:
            parts_now = {path.name for path in out.glob(".building/parts/*.json")}
            if parts_now - parts or (moment == 3 and list(out.glob(".building/*.tar"))):
                break
            time.sleep(0.005)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
        if (out / "manifest.json").exists():
            break  # it finished before the kill
        left = {path.name for path in out.glob(".building/parts/*.json")}
        assert parts <= left
        parts = left
    else:
        subprocess.run(command(photos, out), check=True, capture_output=True)
    assert killed >= 2
    assert hashes(out) == expected
