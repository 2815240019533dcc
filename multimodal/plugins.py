"""Code of a user: a function or a class in a file of theirs, by ``FILE.py:NAME``."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def from_file(address: str, kind: str, names: Iterable[str], what: str) -> Any:
    """What is called NAME in a Python file; address: ``FILE.py:NAME``.

    Args:
        kind, names, what: for errors: what it is for, what else there is, and what NAME is.

    Raises:
        ValueError: if there is no such file, or nothing of that name in it.
    """
    path, colon, name = address.rpartition(":")
    if not colon:
        raise ValueError(f"no {kind} {address!r}: expected {', '.join(names)}, or FILE.py:{what}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise ValueError(f"{path}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise ValueError(f"{path}: has no {what.lower()} {name}")
    return getattr(module, name)
