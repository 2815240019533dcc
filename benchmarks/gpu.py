"""What a graphics card does with this project: one command, one JSON line a figure.

    python benchmarks/gpu.py                 on a card: under 8 minutes, then docs/gpu.json
    python benchmarks/gpu.py --only decode   some of the parts (PARTS has them all)
    python benchmarks/gpu.py --tiny          tiny sizes on a CPU: that the script itself works

A line is ``{"figure", "value", "unit"}``, with what else belongs to it. Lines are printed as soon
as they are measured. Each part is a process with a time limit of its own, in the order of PARTS. A
part that fails, or that has no time left, is named in a line ``{"failed", "reason"}``, and the
others go on. ``docs/gpu.json`` is written on a card only, and keeps what an earlier run measured of
parts that this run was not asked for. Figures that it lacks are listed there under ``missing``.

FLOPs are those of ``train/cost.py``. Bytes of a decode step are those of all weights and of the
keys and values that are read. The floors are the time that these take at the matrix products and
the copies that were measured on the same card (part ``floors``).
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from on_card import decoding, drawing, training
from on_card.sizes import CARD, TINY, Figure, Sizes, floors

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs/gpu.json"
SECONDS = 470.0  # of all parts: with the start of the script under 8 minutes


@dataclass(frozen=True)
class Part:
    """What is measured in one process.

    Args:
        measure: yields figures.
        seconds: its limit.
        figures: their names.
    """

    measure: Callable[[Sizes], Iterator[Figure]]
    seconds: float
    figures: list[str]


def gpu_tests(sizes: Sizes) -> Iterator[Figure]:
    """``pytest -m gpu``."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    yield passed(done.stdout, done.returncode)


def passed(said: str, status: int) -> Figure:
    """What pytest said as a figure.

    Args:
        said: its output.
        status: its exit status.

    Raises:
        RuntimeError: if the tests did not run: a test file cannot be imported, or none has a test.
    """
    lines = said.strip().splitlines() or [""]
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (\w+)", lines[-1])}
    which = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if status not in (0, 1):  # 1: some tests failed
        raise RuntimeError("; ".join([f"pytest ended with status {status}", *which, lines[-1]]))
    more = {"failed": len(which), "which": which, "skipped": counts.get("skipped", 0)}
    return Figure("tests", counts.get("passed", 0), "passed", more)


def parts(sizes: Sizes) -> dict[str, Part]:
    """All parts in their order, by name: the most wanted come first, and all of them have time."""
    return {
        "floors": Part(floors, 20, ["floors/products", "floors/copies"]),
        "train_1b": Part(training.train_1b, 80, training.figures("1b")),
        "decode": Part(decoding.decode, 60, decoding.figures(sizes)),
        "tests": Part(gpu_tests, 100, ["tests"]),
        "train_large": Part(training.train_large, 65, training.figures("large")),
        "draw": Part(drawing.draw, 40, drawing.DRAWING),
        "tokenize": Part(drawing.tokenize, 35, drawing.TOKENIZING),
        "their_decode": Part(decoding.their_decode, 35, decoding.their_figures(sizes)),
        "their_train": Part(training.their_train, 35, ["train/transformers"]),
    }


PARTS = parts(CARD)


def run_part(name: str, sizes: Sizes) -> int:
    """Measure one part in this process, and print its figures. Returns the exit status."""
    try:
        for figure in parts(sizes)[name].measure(sizes):
            print(figure.line(), flush=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:500]
        print(json.dumps({"failed": name, "reason": reason}), flush=True)
        return 1
    return 0


def run_process(command: list[str], name: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Run a part as a process: its lines as they come, and one that names a failure.

    Args:
        command: prints JSON lines.
        name: of the part.
        seconds: after these it is ended.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, encoding="utf-8", start_new_session=True
    )
    assert process.stdout is not None
    ended = threading.Event()

    def end() -> None:
        ended.set()
        kill_group(process.pid)

    timer = threading.Timer(seconds, end)
    timer.start()
    named = False
    try:
        for line in _json_lines(process.stdout):
            named = named or "failed" in line
            yield line
        process.wait()
    finally:  # also after Ctrl-C, which does not reach another session
        timer.cancel()
        kill_group(process.pid)
        status = process.wait()
    if ended.is_set():
        yield {"failed": name, "reason": f"not done after {seconds:.0f} seconds"}
    elif status and not named:
        yield {"failed": name, "reason": f"the process ended with status {status}"}


def kill_group(leader: int) -> None:
    """End a process and those that it has started, which would keep the card."""
    with suppress(ProcessLookupError, PermissionError):  # none is left; macOS: they have ended
        os.killpg(leader, signal.SIGKILL)


def _json_lines(stream: IO[str]) -> Iterator[dict[str, Any]]:
    for text in stream:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # a library said something
        if isinstance(line, dict):
            yield line


def run_parts(
    names: list[str], seconds: float, command: Callable[[str], list[str]]
) -> Iterator[dict[str, Any]]:
    """All lines of some parts, one process after another.

    Args:
        seconds: of all parts together.
        command: of a part.
    """
    end = time.monotonic() + seconds
    for name in names:
        left = min(PARTS[name].seconds, end - time.monotonic())
        if left < 5:
            yield {"failed": name, "reason": f"no time was left of {seconds:.0f} seconds"}
            continue
        start = time.monotonic()
        for line in run_process(command(name), name, left):
            yield line | {"part": name}
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def summary(
    lines: list[dict[str, Any]], asked: list[str], before: dict[str, Any], about: dict[str, Any]
) -> dict[str, Any]:
    """What docs/gpu.json holds after a run.

    Args:
        lines: of this run.
        asked: the parts of this run.
        before: what the file holds now. Parts that were not asked for stay, if it is of this card.
        about: date, card, versions.
    """
    kept = before.get("figures", {}) if before.get("card") == about["card"] else {}
    figures = {name: f for name, f in kept.items() if f.get("part") not in asked}
    for line in lines:
        if "figure" in line:
            more = {key: value for key, value in line.items() if key != "figure"}
            figures[line["figure"]] = more | {"date": about["date"]}
    expected = [figure for part in PARTS.values() for figure in part.figures]
    return {
        **about,
        "figures": figures,
        "failed": [line for line in lines if "failed" in line and "figure" not in line],
        "missing": [figure for figure in expected if figure not in figures],
    }


def about_card() -> dict[str, Any]:
    import torch

    card = torch.cuda.get_device_properties()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "card": card.name,
        "memory_GB": round(card.total_memory / 1e9, 1),
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            **{name: version(name) for name in ("torch", "transformers")},
        },
        "cores": os.cpu_count(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all parts together")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        return run_part(options.part, TINY if options.tiny else CARD)
    import torch

    if not options.tiny and not torch.cuda.is_available():
        parser.error("no card is here: --tiny runs tiny sizes on a CPU")
    command = [sys.executable, __file__, *["--tiny"][: options.tiny], "--part"]
    lines = []
    for line in run_parts(options.only, options.seconds, lambda name: [*command, name]):
        print(json.dumps(line), flush=True)
        lines.append(line)
    if not options.tiny:
        before = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
        results = summary(lines, options.only, before, about_card())
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    return any("failed" in line and "figure" not in line for line in lines)


if __name__ == "__main__":
    # A part has a session of its own, so it has to be ended with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
