"""Imports point one way: tokenizers, then the core, then eval, then train. Files stay short."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("tokenizers", "train", "eval")
# The one file that may name every part: it finds a verb's module by name, when the verb is called.
FREE = Path("multimodal/cli.py")
MAY_IMPORT = {
    "tokenizers": {"tokenizers"},
    "multimodal": {"multimodal", "tokenizers"},
    "eval": {"eval", "multimodal", "tokenizers"},
    "train": {"train", "eval", "multimodal", "tokenizers"},
}
MAX_LINES = 450


def python_files(folder: str) -> list[Path]:
    """Paths relative to the root; multimodal/tokenizers and the like are links, not followed."""
    paths = [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in paths if path != FREE)


def imported(source: str, path: Path) -> Iterator[str]:
    """Absolute dotted names of everything that `source`, at `path` under the root, imports."""
    parts = path.parent.parts
    package = parts if parts[0] == "multimodal" else ("multimodal", *parts)
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                base = node.module or ""
                if node.level:
                    above = package[: len(package) - node.level + 1]
                    base = ".".join((*above, base) if base else above)
                # `from multimodal import train` imports multimodal.train.
                yield from (f"{base}.{alias.name}" for alias in node.names)
            case ast.Call(
                func=ast.Name("import_module" | "__import__")
                | ast.Attribute(attr="import_module" | "find_spec"),
                args=[ast.Constant(str(name)), *_],
            ):
                yield name


def part_of(name: str) -> str | None:
    """Which of the four parts a dotted name is in; None for what is not ours."""
    match name.split("."):
        case ["multimodal", ("tokenizers" | "train" | "eval") as folder, *_]:
            return folder
        case ["multimodal", *_]:
            return "multimodal"
        case _:
            return None


def wrong_imports(source: str, path: Path) -> list[str]:
    allowed = MAY_IMPORT[path.parts[0]]
    names = sorted(set(imported(source, path)))
    # The root folders are never imported by their bare names: that makes a second copy of a module.
    # (A bare `tokenizers` is Hugging Face's.)
    bare = [name for name in names if name.split(".")[0] in ("train", "eval")]
    return bare + [name for name in names if part_of(name) not in (None, *allowed)]


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder: str) -> None:
    bad = {
        str(path): names
        for path in python_files(folder)
        if (names := wrong_imports((ROOT / path).read_text(encoding="utf-8"), path))
    }
    assert not bad, f"{folder} may import {sorted(MAY_IMPORT[folder])} only"


@pytest.mark.parametrize(
    ("path", "source", "bad"),
    [
        ("multimodal/model/network.py", "import multimodal.train.cli", ["multimodal.train.cli"]),
        ("multimodal/model/network.py", "from multimodal import train", ["multimodal.train"]),
        ("multimodal/model/network.py", "from . import train", ["multimodal.train"]),
        ("multimodal/model/network.py", "from .eval import score", ["multimodal.eval.score"]),
        ("multimodal/commands/info.py", "from ..train import cli", ["multimodal.train.cli"]),
        ("multimodal/commands/info.py", "from .. import train", ["multimodal.train"]),
        (
            "multimodal/model/network.py",
            "def f():\n    import multimodal.eval.x",
            ["multimodal.eval.x"],
        ),
        ("multimodal/model/network.py", "import_module('multimodal.train')", ["multimodal.train"]),
        ("multimodal/model/network.py", "from train.cli import main", ["train.cli.main"]),
        ("eval/score.py", "from ..train import cli", ["multimodal.train.cli"]),
        ("eval/score.py", "from ..model import load", []),
        (
            "tokenizers/text.py",
            "from multimodal.model.network import x",
            ["multimodal.model.network.x"],
        ),
        ("tokenizers/text.py", "from .. import images", ["multimodal.data.images"]),
        ("tokenizers/text.py", "from .vq import x\nfrom tokenizers import Tokenizer", []),
        ("train/loop.py", "from multimodal import eval, model\nfrom ..tokenizers import vq", []),
        ("multimodal/model/network.py", "from multimodal.training_notes import x", []),
    ],
)
def test_the_guard_sees_every_kind_of_import(path: str, source: str, bad: list[str]) -> None:
    assert wrong_imports(source, Path(path)) == bad


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_files_are_short_enough_to_read(folder: str) -> None:
    lengths = {path: len((ROOT / path).read_bytes().splitlines()) for path in python_files(folder)}
    assert {str(path): n for path, n in lengths.items() if n > MAX_LINES} == {}
