"""GGUF files, which gguf and transformers read: what is looked at before they do."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from multimodal.files import open_file

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes, by type
STRING, ARRAY = 8, 9  # types
MAX_ITEMS = 1 << 21  # of a list; gguf makes an array of each
MAX_DIMENSIONS = 4


@contextmanager
def gguf_alone(file: Path) -> Iterator[dict[str, Any]]:
    """How transformers is asked to read a GGUF file, and nothing that lies beside it.

    It would take a tokenizer or a template of that folder, and code that these name.

    Yields:
        Arguments of ``from_pretrained``.

    Raises:
        ValueError: without its packages, or for a header that is none.
    """
    try:
        import accelerate  # noqa: F401  # transformers needs it for GGUF
        import gguf  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(f"GGUF needs: pip install multimodal[gguf] ({error})") from error
    _check_header(file)
    with TemporaryDirectory() as folder:
        Path(folder, "model.gguf").symlink_to(file.resolve())
        yield {
            "pretrained_model_name_or_path": folder,
            "gguf_file": "model.gguf",
            "local_files_only": True,
            "trust_remote_code": False,
        }


def _check_header(path: Path) -> None:
    """Go through a header. gguf's reader finds no end in a list that is longer than the file.

    Raises:
        ValueError: if the file ends before its header does, or if it is no GGUF file.
    """
    with open_file(path) as file:

        def take(count: int) -> bytes:
            data = file.read(count) if count < 1 << 62 else b""
            if len(data) < count:
                raise ValueError("it ends before its header does")
            return data

        def number(letter: str) -> int:
            return int(struct.unpack(f"<{letter}", take(struct.calcsize(f"<{letter}")))[0])

        def skip_value(kind: int) -> None:
            if kind != STRING and kind not in SIZES:
                raise ValueError(f"its header has a value of type {kind}")
            take(number("Q") if kind == STRING else SIZES[kind])

        if take(4) != b"GGUF":
            raise ValueError("it begins otherwise")
        if (version := number("I")) not in (2, 3):
            raise ValueError(f"version {version}, expected 2 or 3")
        tensors, fields = number("Q"), number("Q")
        for _ in range(fields):
            take(number("Q"))  # its name
            kind, count = number("I"), 1
            if kind == ARRAY:
                kind, count = number("I"), number("Q")
            if count > MAX_ITEMS:
                raise ValueError(f"its header has a list of {count:,} items")
            for _ in range(count):
                skip_value(kind)
        for _ in range(tensors):
            take(number("Q"))  # its name
            if (dimensions := number("I")) > MAX_DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            take(8 * dimensions + 12)  # sizes, type and place
