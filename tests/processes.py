"""Programs that tests start and end, and what lives of them afterwards."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

End = Callable[[int], object]  # how a program is ended, by the id of its main process
PATIENCE = 120.0  # seconds; a busy machine takes its time, and nothing here is measured


def start(arguments: list[str], stderr: Path) -> subprocess.Popen[bytes]:
    """Start ``python ARGUMENTS`` in a session of its own, which all its processes belong to.

    A shell starts jobs in its background with Ctrl-C ignored, and children inherit that.
    """
    with open(stderr, "wb") as errors:
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
            cwd=Path(__file__).parent.parent,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )


def living(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            # pid (name) state parent group session ...; a name may hold spaces.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        if fields and int(fields[3]) == session and fields[0] not in "ZX":
            found.append(int(entry.name))
    return found


def wait_until(happened: Callable[[], bool]) -> bool:
    """Whether it happens in time."""
    end = time.monotonic() + PATIENCE
    while not happened() and time.monotonic() < end:
        time.sleep(0.05)
    return happened()


def kill_main(main: int) -> None:
    os.kill(main, signal.SIGKILL)


def terminate_main(main: int) -> None:
    os.kill(main, signal.SIGTERM)


def terminate_group(main: int) -> None:
    os.killpg(main, signal.SIGTERM)


def press_ctrl_c(main: int) -> None:
    os.killpg(main, signal.SIGINT)


def press_ctrl_c_twice(main: int) -> None:
    os.killpg(main, signal.SIGINT)
    os.killpg(main, signal.SIGINT)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left, for the end of a test that has failed."""
    for pid in living(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()
