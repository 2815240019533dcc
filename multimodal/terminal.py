"""What goes to a person's terminal."""

import contextlib
import sys


def print_error(message: str) -> None:
    """Print one line to stderr. File names may hold line breaks, escape codes or surrogates."""
    line = " ".join(part.strip() for part in message.splitlines() if part.strip())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    if sys.stderr is not None:
        encoding = sys.stderr.encoding or "utf-8"
        line = line.encode(encoding, "backslashreplace").decode(encoding)
    with contextlib.suppress(BrokenPipeError):
        print(line, file=sys.stderr, flush=True)


def print_status(message: str) -> None:
    """Print a line of progress to stderr."""
    if sys.stderr is not None:
        print(message, file=sys.stderr, flush=True)
