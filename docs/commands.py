"""Run a command of a page of the documentation."""

import contextlib
import io
import re
import shlex
import subprocess
from unittest import mock


def run_command(line: str) -> tuple[int, str, str]:
    """The exit status, what is printed, and the messages: ours in this process, others by bash."""
    if not line.startswith("multimodal "):
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr
    from multimodal.cli import main

    ours, sign, rest = (*re.split(r" ([|>]) ", line, maxsplit=1), "", "")[:3]
    out, errors = io.StringIO(), io.StringIO()
    # What is printed is not to depend on the processor or its devices.
    quiet = mock.patch("multimodal.devices.print_error")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), quiet:
        try:
            status = main(shlex.split(ours, comments=True)[1:])
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    printed = out.getvalue()
    if sign:
        command = ["bash", "-c", f"cat {sign} {rest}"]
        done = subprocess.run(command, input=printed, capture_output=True, text=True)
        status, printed = status or done.returncode, done.stdout
    return status, printed, errors.getvalue()
