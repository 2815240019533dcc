"""Run the commands of the tutorials, and write what they print below them.

    python -m docs.tutorials [PAGE ...]        by default all of docs/tutorials/
    python -m docs.tutorials --full PAGE       no command is made smaller: trains as the page says
    python -m docs.tutorials --given FOLDER --full docs/tutorials/my_domain_aerial.md

The blocks of a page run one after the other in one folder: ``sh`` (a command a line) and ``python``
(one program). A comment above a block says more: ``<!-- fails -->`` (an error is what is shown),
``<!-- file: NAME -->`` (the block is the content of a file). Below a block, ``<!-- output -->`` is
the place of what it prints. Pictures in the folder with the name of the page are files that the
commands have made.

``docs/tutorial_pages.py`` has what makes long commands small. Outputs and pictures that come after
such a command would be those of a small run: without ``--full`` they stay as they are. Errors are
always written.
"""

import argparse
import contextlib
import io
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from PIL import Image

from docs.commands import run_command
from docs.tutorial_pages import NEEDED, NOT_RUN, PAGES, Page

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs/tutorials"
PART = re.compile(
    r"^<!-- output -->\n(?:```text\n.*?^```\n)?"
    r"|^(?:<!-- (?P<mark>fails|file: \S+) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```\n",
    re.MULTILINE | re.DOTALL,
)
PICTURE = re.compile(r"!\[[^\]]*\]\((?P<folder>\w+)/(?P<name>[\w.-]+)\)")
PORT = "8000"  # of the servers of the pages; a free one is taken
PATIENCE = 300  # seconds until a server answers
MIN_SIDE = 192  # pixels; a smaller picture is enlarged
MAX_LINES, ENDS = 16, 7  # of a longer output the first and the last lines are shown


class Failed(Exception):
    """A command of a page ended otherwise than the page says."""


def blocks(language: str, text: str) -> list[str]:
    """The blocks of a language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def lines_of(block: str) -> list[str]:
    """The commands of a block of ``sh``; lines that end in a backslash go on."""
    joined = re.sub(r"\\\n\s*", "", block).splitlines()
    return [line for line in joined if line.strip() and not line.startswith("#")]


def commands(block: str) -> list[list[str]]:
    """The arguments of each ``multimodal ...`` line."""
    lines = [line for line in lines_of(block) if line.startswith("multimodal ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


class Run:
    """The blocks of a page, one after the other, in the working folder.

    Args:
        name: of the page.
        full: no command is made smaller.
        given: the folder has the data that the page is about.

    Attributes:
        as_written: whether every command until now was run as the page has it.
    """

    def __init__(self, name: str, full: bool, given: bool) -> None:
        self.page = PAGES.get(name, Page())
        self.full, self.as_written = full, given or not self.page.stands_in
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.server: subprocess.Popen[str] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])

    def block(self, mark: str | None, kind: str, text: str) -> str:
        """What the block prints.

        Raises:
            Failed: a command failed, or did not, and the page says otherwise.
        """
        text = text.replace(f":{PORT}", f":{self.port}")
        if mark and mark.startswith("file: "):
            path = Path(mark.removeprefix("file: "))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
            return ""
        if kind == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(text, "<tutorial>", "exec"), self.names)  # code of our pages
            printed = out.getvalue()
        elif kind == "sh":
            printed = "".join(self.command(line, mark == "fails") for line in lines_of(text))
        else:
            return ""
        return printed.replace(f"{Path.cwd()}/", "").replace(f":{self.port}", f":{PORT}")

    def command(self, line: str, fails: bool) -> str:
        if any(line.startswith(start) for start in NOT_RUN):
            self.as_written &= not line.startswith(NEEDED)
            return self.only_checked(line)
        more = next((x for start, x in self.page.smaller.items() if line.startswith(start)), "")
        if more and not self.full:
            self.as_written = False
            line = f"{line} {more}"
        if line.startswith("multimodal serve"):
            return self.serve(shlex.split(line, comments=True)[1:])
        status, printed, errors = run_command(line)
        if (status != 0) != fails:
            raise Failed(f"{line}\nexit status {status}\n{printed}{errors}")
        return printed + errors * fails

    def only_checked(self, line: str) -> str:
        """That the verb and the options of a command of ours exist."""
        words = shlex.split(line, comments=True)
        if "fit" in words:
            ours = [*words[words.index("fit") :], "--print_config"]
        elif words[0] == "multimodal":
            ours = [*words[1:3], "--help"] if words[1] == "data" else [words[1], "--help"]
        else:
            return ""
        status, _, errors = run_command(shlex.join(["multimodal", *ours]))
        if status:
            raise Failed(f"{line}\n{errors}")
        return ""

    def serve(self, arguments: list[str]) -> str:
        """Start a server in place of the one that runs, and wait until it answers."""
        self.stop()
        command = [sys.executable, "-m", "multimodal", *arguments, "--port", self.port]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        self.server, started = server, time.monotonic()
        while time.monotonic() - started < PATIENCE:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", int(self.port))).close()
                assert server.stdout is not None
                return server.stdout.readline()
            if server.poll() is not None:
                raise Failed(f"{shlex.join(command)}\nexit status {server.returncode}")
            time.sleep(0.1)
        raise Failed(f"{shlex.join(command)}\ndoes not answer")

    def stop(self) -> None:
        if self.server is not None:
            self.server.terminate()  # running requests end first
            self.server.communicate()
            self.server = None


def shortened(printed: str) -> str:
    lines = [line.rstrip() for line in printed.rstrip("\n").split("\n")]
    if len(lines) > MAX_LINES:
        lines = [*lines[:ENDS], "...", *lines[-ENDS:]]
    return "\n".join(lines)


def enlarged(path: Path) -> bytes:
    """A picture that is large enough to be looked at, as a PNG."""
    image = Image.open(path)
    factor = max(1, MIN_SIDE // min(image.size))
    out = io.BytesIO()
    image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST).save(
        out, "PNG", optimize=True
    )
    return out.getvalue()


def run_page(
    page: Path, folder: Path, full: bool = False, given: bool = False
) -> tuple[str, dict[str, bytes]]:
    """Run a page in a folder from ``workplace``; full, given: see ``Run``.

    Returns:
        Its text with the outputs that were seen, and the content of its pictures by name.

    Raises:
        Failed: a command failed.
    """
    text, run = page.read_text("utf-8"), Run(page.stem, full, given)
    wanted = [m["name"] for m in PICTURE.finditer(text) if m["folder"] == page.stem]
    pictures: dict[str, bytes] = {}
    printed, known = "", True

    def replaced(part: re.Match[str]) -> str:
        nonlocal printed, known
        if part["kind"] is None:  # the place of an output
            output = f"<!-- output -->\n```text\n{shortened(printed)}\n```\n"
            return output if known and printed else part[0]
        printed = run.block(part["mark"], part["kind"], part["text"])
        known = run.as_written or part["mark"] == "fails"
        if run.as_written:
            made = {name: folder / name for name in wanted if (folder / name).is_file()}
            pictures.update({name: enlarged(path) for name, path in made.items()})
        return part[0]

    environment = {"COLUMNS": "92", "MULTIMODAL_CACHE": str(folder / ".cache")}
    with contextlib.chdir(folder), mock.patch.dict(os.environ, environment):
        try:
            return PART.sub(replaced, text), pictures
        finally:
            run.stop()


@contextlib.contextmanager
def workplace(page: Path, given: Path | None = None) -> Iterator[Path]:
    """A folder with what a reader of the page has before the first command."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        if given is not None:
            shutil.copytree(given, folder, dirs_exist_ok=True)
        elif page.stem in PAGES:
            PAGES[page.stem].given(folder)
        yield folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE")
    parser.add_argument("--full", action="store_true", help="make no command smaller")
    parser.add_argument("--given", type=Path, help="a folder: what a reader has before")
    arguments = parser.parse_args(argv)
    status = 0
    for page in arguments.pages or sorted(FOLDER.glob("*.md")):
        before = page.read_text("utf-8")
        with workplace(page, arguments.given) as folder:
            try:
                text, pictures = run_page(page, folder, arguments.full, arguments.given is not None)
            except Failed as error:
                print(f"{page}: {error}", file=sys.stderr)
                status = 1
                continue
        page.write_text(text, "utf-8")
        for name, content in pictures.items():
            path = page.with_suffix("") / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        print(f"{page}: {'as it was' if text == before else 'changed'}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
