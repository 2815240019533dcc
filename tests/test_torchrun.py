"""A rank ends with the process that has started it, however that one ends."""

import signal
from pathlib import Path

import pytest

from tests.processes import PATIENCE, finish, living, start, wait_until

# As Lightning starts its ranks. A rank that were left would sleep for an hour.
LAUNCHER = """
import os, subprocess, sys, time
from pathlib import Path
from multimodal.torchrun import end_with_launcher

end_with_launcher()
if "LOCAL_RANK" not in os.environ:
    subprocess.Popen([sys.executable, *sys.argv], env=os.environ | {"LOCAL_RANK": "1"})
else:
    Path(sys.argv[1]).touch()
time.sleep(3600)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux only")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ranks_end_with_their_launcher(number: int, tmp_path: Path) -> None:
    script, started = tmp_path / "launcher.py", tmp_path / "started"
    script.write_text(LAUNCHER, "utf-8")
    process = start([str(script), str(started)], tmp_path / "stderr")
    try:
        assert wait_until(started.exists), (tmp_path / "stderr").read_text()
        assert len(living(process.pid)) == 2
        process.send_signal(number)
        process.wait(PATIENCE)
        assert wait_until(lambda: not living(process.pid)), living(process.pid)
    finally:
        finish(process)
