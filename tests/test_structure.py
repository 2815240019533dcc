"""Imports go one way through the rooms, nothing goes in a circle, rooms and files stay small."""

import re
import statistics
from pathlib import Path

import pytest

from tests.structure import (
    BELOW,
    FOUNDATION,
    MAX_FILES,
    MAX_LINES,
    MAX_MEDIAN_LINES,
    ROOT,
    circles,
    graph,
    mermaid,
    modules,
    room_of,
    rooms,
    wrong_imports,
)

MODULES = modules()


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_only_what_is_below_it(room: str) -> None:
    members = {module: path for module, path in MODULES.items() if room_of(module) == room}
    assert members, f"the guard lists a room {room} that is not there"
    wrong = {
        module: names
        for module, path in members.items()
        if (names := wrong_imports(path.read_text("utf-8"), module))
    }
    assert not wrong, f"{room} may import {BELOW[room]} only"


def test_every_module_has_a_room() -> None:
    rooms_of = {module: room_of(module) for module in MODULES}
    unknown = {m: r for m, r in rooms_of.items() if r is not None and r not in BELOW}
    assert not unknown, "name the new room in tests/structure.py: what may it import?"
    assert set(FOUNDATION) <= {module.rpartition(".")[2] for module in MODULES}


def test_the_order_of_rooms_itself_has_no_circle() -> None:
    order = {room: set(below) for room, below in BELOW.items()}
    assert circles(order) == []
    assert "data" not in BELOW["model"] and "model" not in BELOW["data"], "they never meet"


def test_no_module_imports_in_a_circle() -> None:
    assert circles(graph()) == []


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, [["b", "c"]]),
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}, [["a", "b", "c"]]),
        ({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}, []),
    ],
)
def test_the_guard_finds_circles(edges: dict[str, set[str]], expected: list[list[str]]) -> None:
    assert circles(edges) == expected


def test_the_guard_sees_a_circle_of_types_only(tmp_path: Path) -> None:
    package = tmp_path / "multimodal"
    package.mkdir()
    (package / "one.py").write_text("from multimodal.two import Two\n")
    (package / "two.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from multimodal.one import One\nclass Two: ...\n"
    )
    assert circles(graph(tmp_path)) == [["multimodal.one", "multimodal.two"]]


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("model.network", "import multimodal.train.cli", ["multimodal.train.cli"]),
        ("model.network", "from multimodal import train", ["multimodal.train"]),
        ("model.network", "from .. import train", ["multimodal.train"]),
        ("model.network", "from ..eval import page", ["multimodal.eval.page"]),
        ("model.network", "from ..data.images import Fit", ["multimodal.data.images.Fit"]),
        ("data.images", "from multimodal.model import x", ["multimodal.model.x"]),
        ("data.shards", "from multimodal.data import builder", ["multimodal.data.builder"]),
        ("inference.text", "from multimodal.api import Model", ["multimodal.api.Model"]),
        ("api", "import multimodal.commands.draw", ["multimodal.commands.draw"]),
        ("commands.folders.info", "from ...train import cli", ["multimodal.train.cli"]),
        ("model.network", "def f():\n    import multimodal.eval.x", ["multimodal.eval.x"]),
        ("model.network", "import_module('multimodal.train')", ["multimodal.train"]),
        ("model.network", "from train.cli import main", ["train.cli.main"]),
        ("files", "from multimodal.data import images", ["multimodal.data.images"]),
        ("eval.page", "from ..train import cli", ["multimodal.train.cli"]),
        ("eval.page", "from multimodal import load", []),
        ("eval.page", "from multimodal.scenes import scene", ["multimodal.scenes.scene"]),
        ("eval.tasks.scene_captions", "from multimodal.scenes.scene import Scene", []),
        ("train.joint", "from multimodal.scenes import scene", ["multimodal.scenes.scene"]),
        ("tokenizers.text", "from multimodal.model.x import y", ["multimodal.model.x.y"]),
        ("tokenizers.text", "from .. import data", ["multimodal.data"]),
        ("tokenizers.text", "from .vq import x\nfrom tokenizers import Tokenizer", []),
        ("train.loop", "from multimodal import eval\nfrom ..tokenizers import vq", []),
        (
            "model.network",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..api import Model",
            ["multimodal.api.Model"],
        ),
    ],
)
def test_the_guard_sees_every_kind_of_import(module: str, source: str, wrong: list[str]) -> None:
    assert wrong_imports(source, f"multimodal.{module}") == wrong


def test_rooms_and_files_are_small_enough_to_read() -> None:
    for room in rooms():
        assert len(room.lines) <= MAX_FILES, f"{room.name} has {len(room.lines)} files"
    lines = {module: n for room in rooms() for module, n in room.lines.items()}
    assert {module: n for module, n in lines.items() if n > MAX_LINES} == {}
    assert statistics.median(lines.values()) <= MAX_MEDIAN_LINES
    tests = {str(p): len(p.read_bytes().splitlines()) for p in (ROOT / "tests").rglob("*.py")}
    assert {path: n for path, n in tests.items() if n > MAX_LINES} == {}


def test_tests_mirror_the_rooms() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if any(path.glob("test_*.py"))}
    assert folders == {room.split(".")[0] for room in BELOW} - {"foundation", "api"}


def test_the_picture_of_the_architecture_is_drawn_from_the_code() -> None:
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    picture = text.split("```mermaid\n")[1].split("\n```")[0]
    assert picture == mermaid(), "python tests/structure.py --mermaid prints the new one"


def test_the_files_that_the_walks_and_the_map_name_exist() -> None:
    """`text.py: generate_ids` in a row of a room, and paths anywhere in the guide and the map."""
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    homes = {
        "commands": "multimodal/commands", "inference": "multimodal/inference", "train": "train",
        "index": "multimodal/index",
        "model": "multimodal/model", "data": "multimodal/data", "tokenizers": "tokenizers",
        "model/layers": "multimodal/model/layers",
    }  # fmt: skip
    steps = re.findall(r"^\| ([\w/]+) \| `(\w+\.py): ([^|]+)`(?:, `([\w_, `]+)`)? \|", text, re.M)
    assert len(steps) > 15
    for room, file, names, more in steps:
        source = (ROOT / homes[room] / file).read_text("utf-8")
        for name in re.findall(r"\w+", f"{names} {more}"):
            assert re.search(rf"(def|class) {name}\b", source), f"{room}/{file}: {name}"
    readme = (ROOT / "README.md").read_text("utf-8")
    for path in re.findall(
        r"`((?:multimodal|eval|train|tokenizers|tests)/[\w/]+\.py)`", text + readme
    ):
        assert (ROOT / path).is_file(), path
