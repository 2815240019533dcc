"""What goes to a person's terminal, in the encoding that it has, and what is understood there."""

import argparse
import codecs
import contextlib
import difflib
import sys
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Of a verb. Its help stands as it is written, and an option is given whole or not at all."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        usual: dict[str, Any] = {
            "formatter_class": argparse.RawDescriptionHelpFormatter,
            "allow_abbrev": False,
        }
        super().__init__(*arguments, **usual | options)

    def error(self, message: str) -> NoReturn:
        """Names the option that an unknown one is close to, too."""
        unknown = message.partition("unrecognized arguments: ")[2].split()
        for option in (each.partition("=")[0] for each in unknown if each.startswith("--")):
            if close := difflib.get_close_matches(option, self._flags(), n=1):
                message += f"; did you mean {close[0]}?"
        super().error(message)

    def _flags(self) -> list[str]:
        """Its options, and those of its subcommands."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                flags += [flag for each in action.choices.values() for flag in each._flags()]
        return flags


def shown(text: str | Path) -> str:
    """A path or a message without lone surrogates: bytes that are not UTF-8 become ``\\\\xNN``."""
    return "".join(_escaped(c) if "\ud800" <= c <= "\udfff" else c for c in str(text))


def _escaped(surrogate: str) -> str:
    code = ord(surrogate)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def one_line(message: str) -> str:
    """A message on one line. File names may hold line breaks, escape codes or surrogates."""
    line = " ".join(part.strip() for part in message.splitlines() if part.strip())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown(line))


def print_error(message: str) -> None:
    """Print one line to stderr."""
    line = one_line(message)
    if sys.stderr is not None:
        encoding = sys.stderr.encoding or "utf-8"
        line = line.encode(encoding, "backslashreplace").decode(encoding)
    with contextlib.suppress(BrokenPipeError):
        print(line, file=sys.stderr, flush=True)


def print_status(message: str) -> None:
    """Print a line of progress to stderr."""
    if sys.stderr is not None:
        print(message, file=sys.stderr, flush=True)


def print_any_text() -> None:
    """Let stdout take any text, whatever its encoding.

    A path that is not valid UTF-8 goes out with the bytes with which it came in. A letter that the
    encoding lacks, as Latin-1 lacks most, goes out as ``\\\\uNNNN`` instead of ending the program.
    """
    codecs.register_error("multimodal", _replace)
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="multimodal")  # type: ignore[union-attr]


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = error.object[error.start]
    if 0xDC80 <= ord(letter) <= 0xDCFF:
        return bytes([ord(letter) - 0xDC00]), error.start + 1
    return letter.encode("ascii", "backslashreplace"), error.start + 1
