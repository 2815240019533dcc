"""However a job is ended, no process of it lives on, and a rerun gives the same result."""

import subprocess
from pathlib import Path

import pytest

from multimodal.cli import main
from multimodal.data.shards import Shards, index_shard, write_manifest, write_tar
from tests.processes import (
    PATIENCE,
    End,
    finish,
    kill_main,
    living,
    press_ctrl_c,
    press_ctrl_c_twice,
    start,
    terminate_group,
    terminate_main,
    wait_until,
)

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")

# The workers have no end of work: one sleeps, the other computes without letting go of the GIL.
JOB = """
import os, sys, time
from functools import partial
from pathlib import Path
from multimodal import cli
from multimodal.data.parallel import map_units

def work(folder, unit):
    Path(folder, str(unit)).write_text(str(os.getpid()))
    if unit % 2:
        sum(range(10**14))
    time.sleep(3600)

def verb(arguments):
    return list(map_units(partial(work, sys.argv[1]), range(4), workers=2))

if __name__ == "__main__":
    cli._run = lambda verb_name, rest: verb(rest)
    sys.argv.insert(1, sys.argv[1])
    sys.exit(cli.main())
"""


@pytest.mark.parametrize(
    "end", [kill_main, terminate_main, terminate_group, press_ctrl_c, press_ctrl_c_twice]
)
def test_workers_end_with_their_main_process(end: End, tmp_path: Path) -> None:
    script, units, stderr = tmp_path / "job.py", tmp_path / "units", tmp_path / "stderr"
    script.write_text(JOB, "utf-8")
    units.mkdir()
    process = start([str(script), str(units)], stderr)
    try:
        assert wait_until(lambda: len(list(units.iterdir())) == 2), stderr.read_text()
        assert len(living(process.pid)) >= 4, "the main process, two workers and their server"
        end(process.pid)
        process.wait(PATIENCE)
        assert wait_until(lambda: not living(process.pid)), living(process.pid)
        said = stderr.read_text()
        assert "Traceback" not in said, said
        if end in (press_ctrl_c, press_ctrl_c_twice):
            assert process.returncode == 130 and said.count("\n") == 1 and "interrupted" in said
    finally:
        finish(process)


IMPORT = """
import os, signal, sys, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except:
    pass
"""


def test_ctrl_c_in_an_import_that_swallows_it_ends_the_program(tmp_path: Path) -> None:
    (tmp_path / "greedy.py").write_text(IMPORT, "utf-8")
    script, stderr = tmp_path / "job.py", tmp_path / "stderr"
    body = (
        "import sys\nfrom multimodal import cli\ncli._run = lambda *_: bool(__import__('greedy'))\n"
    )
    script.write_text(f"{body}sys.exit(cli.main())\n", "utf-8")
    process = start([str(script), "caption"], stderr)
    try:
        assert process.wait(PATIENCE) == 130
        assert stderr.read_text() == "multimodal caption: interrupted\n"
    finally:
        finish(process)


# The main process ends while a worker is being started: a second later its semaphore is gone.
START = """
import os, sys, time
from multimodal.data.parallel import worker_context

class Slow:
    def __reduce__(self):
        return time.sleep, (1.0,)

class Broken:
    def __reduce__(self):
        return int, ("no number",)

if __name__ == "__main__":
    context = worker_context()
    lock = context.Lock()
    last = lock if sys.argv[1] == "gone" else Broken()
    worker = context.Process(target=print, args=(Slow(), last))
    worker.start()
    if sys.argv[1] == "gone":
        del lock, last  # the last references: the semaphore is removed
        os._exit(1)
    worker.join()
"""


@pytest.mark.parametrize("ending", ["gone", "broken"])
def test_a_worker_that_starts_when_its_main_ends_says_nothing(ending: str, tmp_path: Path) -> None:
    script, stderr = tmp_path / "job.py", tmp_path / "stderr"
    script.write_text(START, "utf-8")
    process = start([str(script), ending], stderr)
    try:
        process.wait(PATIENCE)
        assert wait_until(lambda: not living(process.pid)), living(process.pid)
        said = stderr.read_text()
        # What is wrong with a worker of a main process that lives is said.
        assert ("no number" in said) if ending == "broken" else not said, said
    finally:
        finish(process)


@pytest.mark.slow
@pytest.mark.parametrize("end", [kill_main, terminate_group, press_ctrl_c_twice])
def test_a_killed_job_is_finished_by_its_rerun(
    end: End, tiny_model_folder: Path, tmp_path: Path
) -> None:
    scenes, shards = tmp_path / "scenes", tmp_path / "shards"
    assert main(["data", "scenes", str(scenes), "--count", "240", "--size", "32"]) == 0
    samples = [(sample.key, dict(sample.members)) for sample in Shards(scenes, "train")]
    shards.mkdir()
    for number in range(12):
        part = samples[20 * number : 20 * number + 20]
        write_tar(shards / f"train-{number:04d}.tar", part)
    write_manifest(shards, [index_shard(tar) for tar in sorted(shards.glob("*.tar"))])
    job = ["embed", "--model", str(tiny_model_folder), "--data", str(shards)]

    def options(out: str, workers: int) -> list[str]:
        return ["--out-dir", str(tmp_path / out), "--threads", "1", "--workers", str(workers)]

    stderr = tmp_path / "stderr"
    process = start(["-m", "multimodal.cli", *job, *options("killed", 2)], stderr)
    try:
        done = tmp_path / "killed"
        assert wait_until(lambda: bool(list(done.glob("*.jsonl")))), stderr.read_text()
        end(process.pid)
        process.wait(PATIENCE)
        assert wait_until(lambda: not living(process.pid)), living(process.pid)
        assert "Traceback" not in stderr.read_text()
    finally:
        finish(process)
    assert main([*job, *options("killed", 2)]) == 0
    assert main([*job, *options("whole", 1)]) == 0
    names = [{path.name for path in (tmp_path / n).iterdir()} for n in ("killed", "whole")]
    assert names[0] == names[1]
    for name in names[0]:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("end", [kill_main, terminate_main, terminate_group, press_ctrl_c_twice])
def test_a_forecast_ends_with_its_loaders(end: End, work: Path, tmp_path: Path) -> None:
    stderr = tmp_path / "stderr"
    options = ["--config", str(work / "joint.yaml"), "--data.workers", "2"]
    process = start(["-m", "multimodal.cli", "info", *options], stderr)
    try:
        # The main process, and what loads its data.
        assert wait_until(lambda: len(living(process.pid)) >= 3), stderr.read_text()
        end(process.pid)
        process.wait(PATIENCE)
        assert wait_until(lambda: not living(process.pid)), living(process.pid)
        assert "Traceback" not in stderr.read_text(), stderr.read_text()
    except subprocess.TimeoutExpired:
        pytest.fail(f"it goes on: {stderr.read_text()}")
    finally:
        finish(process)
