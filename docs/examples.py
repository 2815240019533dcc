"""Run the examples of the documentation, and write what they print below them.

    python -m docs.examples [PAGE ...]           by default README, and pages of docs/
    python -m docs.examples --check [PAGE ...]   write nothing, and name what differs

An example is a block of ``console``, with commands after ``$``, or of ``pycon``, with statements
after ``>>>``. Those of a page run one after the other in one empty folder, in which ``prepare`` has
put some pictures. Of a block below the comment ``<!-- of the model -->`` the output depends on the
weights: of it the check compares the number of lines. A page with the comment ``<!-- slow -->``
takes more than some seconds.
"""

import argparse
import contextlib
import doctest
import io
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from docs.commands import run_command

DOCS = Path(__file__).resolve().parent
BLOCK = re.compile(
    r"^(?P<mark><!-- of the model -->\n)?```(?P<kind>console|pycon)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
SLOW = "<!-- slow -->"


@dataclass(frozen=True)
class Result:
    """A block of a page, and what it looks like after it has run."""

    written: str
    run: str
    of_the_model: bool

    @property
    def agrees(self) -> bool:
        if self.of_the_model:
            return self.written.count("\n") == self.run.count("\n")
        return self.written == self.run


def pages() -> list[Path]:
    """README and pages that have examples. Tutorials take minutes, and have their own tests."""
    found = [page for page in sorted(DOCS.rglob("*.md")) if page.parent.name != "tutorials"]
    found.append(DOCS.parent / "README.md")
    return [page for page in found if BLOCK.search(page.read_text("utf-8"))]


def prepare(folder: Path) -> None:
    """scene.png, other.png; photos/: twelve pictures with a text; notes/box.md."""
    from multimodal.scenes.captions import captions
    from multimodal.scenes.rendering import render
    from multimodal.scenes.scene import sample_scene

    rng = random.Random(0)
    (folder / "photos").mkdir()
    for number in range(12):
        scene = sample_scene(rng)
        render(scene).save(folder / "photos" / f"{number:02}.png")
        (folder / "photos" / f"{number:02}.txt").write_text(captions(scene, rng, 1)[0] + "\n")
    for name, shape in (("scene", "circle"), ("other", "star")):
        scene = sample_scene(rng)
        while shape not in [item.shape for item in scene.objects]:
            scene = sample_scene(rng)
        render(scene).save(folder / f"{name}.png")
    (folder / "notes").mkdir()
    (folder / "notes" / "box.md").write_text("# The box\n\nThere is a key in it.\n")


def run_page(text: str, folder: Path) -> list[Result]:
    """Run the blocks of a page in a folder."""
    names: dict[str, Any] = {"__name__": "__main__"}
    results = []
    environment = {"MULTIMODAL_CACHE": str(folder / ".cache"), "COLUMNS": "92"}
    with contextlib.chdir(folder), mock.patch.dict(os.environ, environment):
        for block in BLOCK.finditer(text):
            written = block["text"]
            run = run_python(written, names) if block["kind"] == "pycon" else run_shell(written)
            run = run.replace(f"{folder}/", "")
            results.append(Result(written, run, block["mark"] is not None))
    return results


def run_shell(block: str) -> str:
    """Commands after ``$``, with lines that end in a backslash going on, and what they print."""
    shown = ""
    for command in re.findall(r"^\$ ((?:.*\\\n)*.*)\n", block, re.MULTILINE):
        status, printed, errors = run_command(command.replace("\\\n", " "))
        printed += errors if status else ""
        shown += f"$ {command}\n{printed}" + "\n" * (bool(printed) and printed[-1] != "\n")
    return shown


def run_python(block: str, names: dict[str, Any]) -> str:
    """Statements after ``>>>``, and what they print."""
    shown = ""
    for part in doctest.DocTestParser().parse(block):
        if isinstance(part, str):
            shown += part
            continue
        lines = part.source.splitlines()
        shown += f">>> {lines[0]}\n" + "".join(f"... {line}".rstrip() + "\n" for line in lines[1:])
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            try:
                exec(compile(part.source, "<example>", "single"), names)
            except Exception as error:
                print("Traceback (most recent call last):\n    ...")
                print("".join(traceback.format_exception_only(error)), end="")
        shown += out.getvalue()
    return shown


def rewritten(text: str, results: list[Result]) -> str:
    runs = iter(results)

    def put(block: re.Match[str]) -> str:
        return f"{block['mark'] or ''}```{block['kind']}\n{next(runs).run}```"

    return BLOCK.sub(put, text)


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        prepare(folder)
        yield folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE")
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args(argv)
    differ = 0
    for page in arguments.pages or pages():
        text, start = page.read_text("utf-8"), time.process_time()
        with workplace() as folder:
            results = run_page(text, folder)
            if page.resolve() == DOCS / "index.md" and not arguments.check:
                for name in ("scene.png", "drawing.png"):  # the page shows them
                    shutil.copyfile(folder / name, DOCS / "images" / name)
        wrong = [result for result in results if not result.agrees]
        seconds = time.process_time() - start
        print(f"{page}: {len(results)} examples, {len(wrong)} differ, {seconds:.0f} s", flush=True)
        if arguments.check:
            differ += len(wrong)
            for result in wrong:
                print(f"--- written\n{result.written}--- run\n{result.run}")
        else:
            page.write_text(rewritten(text, results), "utf-8")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
