"""The rooms of the package, read off its imports: which may import which, and whether they do.

    python tests/structure.py            prints a table of rooms, files, lines, arrows and circles
    python tests/structure.py --mermaid  prints the picture of docs/architecture.md

Every import counts: inside functions, under TYPE_CHECKING, and by ``import_module("name")``.
"""

import ast
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("multimodal", "tokenizers", "eval", "train")

# Modules at the top of multimodal/ that every room may use, and that use no room.
FOUNDATION = (
    "devices", "distributed", "energy", "files", "memory", "options", "plugins", "provenance",
    "schemas", "seeds", "terminal", "torchrun", "worker_server",
)  # fmt: skip
# The front doors: `import multimodal`, and the command line, which finds verbs by name.
FRONT_DOORS = (
    "multimodal",
    "multimodal.cli",
    "multimodal.__main__",
    *(f"multimodal.{n}" for n in ("load", "Model", "Index", "build_shards", "__version__")),
)
BELOW: dict[str, tuple[str, ...]] = {
    "foundation": (),
    "tokenizers.quantizers": ("foundation",),
    "tokenizers": ("foundation", "tokenizers.quantizers"),
    "hub": ("foundation",),
    "data.formats": ("foundation",),
    "data.remote": ("foundation",),
    "data": ("foundation", "tokenizers", "data.formats", "data.remote"),
    "data.tables": ("foundation", "data", "data.formats"),
    "data.builder": ("foundation", "hub", "data", "data.formats", "data.tables"),
    # The decoder alone: it knows ids and tensors, and nothing of what they mean.
    "model.layers": ("foundation",),
    "adapters": ("foundation", "tokenizers", "hub", "model.layers"),
    "model": ("foundation", "tokenizers", "hub", "model.layers", "adapters"),
    "released": ("foundation", "tokenizers", "model", "model.layers"),
    "scenes": ("foundation", "data"),
    "origin": ("foundation", "data", "data.remote", "model"),
    "record": ("foundation",),
    "filters": ("foundation",),
    "inference": ("foundation", "tokenizers", "data", "data.formats", "model", "model.layers"),
    "export": (
        "foundation", "tokenizers", "hub", "data", "model", "model.layers", "adapters",
        "inference",
    ),
    "api": (
        "foundation", "tokenizers", "hub", "data", "data.formats", "model", "model.layers",
        "inference",
    ),
    "index": ("foundation", "data", "data.formats", "model", "inference", "api"),
    "commands.vectors": (
        "foundation", "data", "data.formats", "inference", "api", "index", "commands",
    ),
    "commands": (
        "foundation", "data", "data.formats", "inference", "api", "index", "record", "origin",
    ),
    "commands.folders": (
        "foundation", "tokenizers", "hub", "data", "data.builder", "data.formats", "data.remote",
        "model", "adapters", "export", "released", "scenes", "commands", "record", "origin",
    ),
    # Requests know the model's front door and the decode loop. Nothing below knows of requests.
    "serve.engine": (
        "foundation", "filters", "origin", "data", "model", "model.layers", "inference", "api",
    ),
    "serve.endpoints": (
        "foundation", "filters", "origin", "data", "model", "inference", "serve.engine",
    ),
    "serve": (
        "foundation", "data", "record", "filters", "origin", "api", "commands", "serve.engine",
        "serve.endpoints",
    ),
    "eval.metrics": ("foundation", "tokenizers", "tokenizers.quantizers"),
    # The protocol of evaluators, which the tasks implement and the commands use.
    "eval.evaluator": ("foundation", "data", "inference", "api", "eval.metrics"),
    "eval.tasks": (
        "foundation", "tokenizers", "data", "model", "inference", "api", "eval.evaluator",
        "eval.metrics",
    ),
    # What an evaluator finds wrong: it asks as the tasks do, in other words or of changed pictures.
    "eval.trust": (
        "foundation", "data", "model", "inference", "api", "eval.evaluator", "eval.metrics",
        "eval.tasks",
    ),
    "eval": (
        "foundation", "tokenizers", "hub", "data", "data.builder", "model", "inference", "api",
        "commands", "commands.vectors", "eval.evaluator", "eval.metrics", "eval.tasks",
    ),
    # What is held out of the data of a run, mixed into them, or made of them.
    "train.mixing": ("foundation", "data", "data.remote", "model", "scenes"),
    # What guards the folder of a run: it knows Lightning, and nothing of what is trained.
    "train.run": ("foundation",),
    "train": (
        "foundation", "tokenizers", "tokenizers.quantizers", "hub", "data", "data.remote", "model",
        "model.layers", "adapters", "inference", "api", "export", "eval", "eval.evaluator",
        "eval.metrics", "eval.tasks", "train.mixing", "train.run",
    ),
    "train.tokenizers": (
        "foundation", "tokenizers", "tokenizers.quantizers", "hub", "data", "model", "adapters",
        "eval.metrics", "train", "train.run",
    ),
    "train.forecasts": (
        "foundation", "tokenizers", "hub", "data", "model", "model.layers", "adapters", "train",
        "train.run",
    ),
    "train.rewards": (
        "foundation", "tokenizers", "data", "model", "inference", "eval.metrics", "eval.tasks",
        "train",
    ),
    "train.preferences": (
        "foundation", "hub", "tokenizers", "data", "model", "inference", "api", "commands",
        "eval.metrics", "eval.tasks", "train", "train.rewards",
    ),
}  # fmt: skip
# What is exact about scenes: evaluators like any other, and the page of the demo.
KNOWS_SCENES = ("eval.metrics.scene_", "eval.tasks.scene_", "eval.trust.scene_", "eval.demo")
MAX_FILES = 16
MAX_LINES = 400
MAX_MEDIAN_LINES = 250


def module_of(path: Path) -> str:
    """The dotted name of a file, under ``multimodal``; path: relative to the root."""
    parts = path.with_suffix("").parts
    parts = parts if parts[0] == "multimodal" else ("multimodal", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module and its file. The links multimodal/eval and the like are not followed."""
    paths = [path for part in PARTS for path in (root / part).rglob("*.py")]
    return {module_of(path.relative_to(root)): path for path in sorted(paths)}


def room_of(module: str) -> str | None:
    """The room of a dotted name. None: it is not ours, or a front door."""
    first, *rest = module.split(".")
    if first != "multimodal" or module in FRONT_DOORS or not rest:
        return None
    if rest[0] in FOUNDATION:
        return "foundation"
    pair = ".".join(rest[:2])
    return pair if pair in BELOW else rest[0]


def imports(source: str, module: str) -> Iterator[str]:
    """The dotted names that a module's source imports, as they are written, relative ones resolved.

    ``from a import b`` gives ``a.b``, because b may be a module.
    """
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                base = node.module or ""
                if node.level:
                    above = package[: len(package) - node.level + 1]
                    base = ".".join([*above, base] if base else above)
                yield from (f"{base}.{alias.name}" for alias in node.names)
            case ast.Call(
                func=ast.Name("import_module" | "__import__")
                | ast.Attribute(attr="import_module" | "find_spec"),
                args=[ast.Constant(str(name)), *_],
            ):
                yield name


def wrong_imports(source: str, module: str) -> list[str]:
    """What a module may not import: by its room, or by the bare name of a root folder."""
    room = room_of(module)
    names = sorted(set(imports(source, module)))
    # A bare `train` or `eval` would make a second copy of a module. `tokenizers` is Hugging Face's.
    wrong = [name for name in names if name.split(".")[0] in ("train", "eval")]
    if room is None:
        return wrong
    allowed = {room, *BELOW[room]}
    if module.removeprefix("multimodal.").startswith(KNOWS_SCENES):
        allowed.add("scenes")
    return wrong + [name for name in names if room_of(name) not in (None, *allowed)]


def graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Which modules of ours each module imports."""
    files = modules(root)
    edges: dict[str, set[str]] = {}
    for module, path in files.items():
        found = set()
        for name in imports(path.read_text("utf-8"), module):
            found |= {n for n in (name, name.rpartition(".")[0]) if n in files and n != module}
        # `from multimodal.x import y` runs multimodal/__init__.py, which imports on demand only.
        edges[module] = {n for n in found if n != "multimodal"}
    return edges


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach one another (strongly connected components, Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in edges.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = [stack.pop()]
            while component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1:
                components.append(sorted(component))

    for node in edges:
        if node not in index:
            visit(node)
    return components


@dataclass(frozen=True)
class Room:
    """name; floor: 0 for rooms that import no other; lines: of each file; arrows: to rooms."""

    name: str
    floor: int
    lines: dict[str, int]
    arrows: tuple[str, ...]


def rooms(root: Path = ROOT) -> list[Room]:
    """All rooms as they are, lowest floor first."""
    files, edges = modules(root), graph(root)
    members: dict[str, list[str]] = {}
    for module in files:
        members.setdefault(room_of(module) or "front doors", []).append(module)
    arrows = {
        room: {r for m in own for n in edges[m] if (r := room_of(n)) not in (None, room)}
        for room, own in members.items()
    }

    def floor(room: str, path: tuple[str, ...] = ()) -> int:
        below = [other for other in arrows[room] if other not in path]
        return 1 + max((floor(other, (*path, room)) for other in below), default=-1)

    return sorted(
        (
            Room(
                room,
                floor(room),
                {m: len(files[m].read_bytes().splitlines()) for m in own},
                tuple(sorted(arrows[room])),
            )
            for room, own in members.items()
        ),
        key=lambda room: (room.floor, room.name),
    )


def mermaid(root: Path = ROOT) -> str:
    """The rooms and their arrows as a Mermaid picture.

    An arrow is left out where other arrows lead to the same room, and those to the foundation are.
    """
    shown = [room for room in rooms(root) if room.name not in ("foundation", "front doors")]
    direct = {room.name: set(room.arrows) - {"foundation"} for room in shown}

    def reached(start: str) -> set[str]:
        """Rooms that an arrow from ``start`` leads to, and those behind them."""
        found, waiting = set[str](), [start]
        while waiting:
            new = direct[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    lines = ["flowchart BT"]
    for room in shown:
        label = room.name.replace(".", "/")
        lines.append(f'    {room.name.replace(".", "_")}["{label}"]')
    for room in shown:
        behind = {name for near in direct[room.name] for name in reached(near)}
        for target in sorted(direct[room.name] - behind):
            lines.append(f"    {room.name.replace('.', '_')} --> {target.replace('.', '_')}")
    return "\n".join(lines)


def main() -> None:
    if "--mermaid" in sys.argv[1:]:
        print(mermaid())
        return
    print(f"{'floor':5} {'room':13} {'files':>5} {'median':>6} {'longest':>7}  imports")
    for room in rooms():
        lines = sorted(room.lines.values())
        median = statistics.median(lines)
        print(
            f"{room.floor:5} {room.name:13} {len(lines):5} {median:6.0f} {lines[-1]:7}  "
            f"{', '.join(room.arrows)}"
        )
    lines = [n for room in rooms() for n in room.lines.values()]
    upward = [
        (module, name)
        for module, path in modules().items()
        for name in wrong_imports(path.read_text("utf-8"), module)
    ]
    print(
        f"{len(lines)} files, median {statistics.median(lines):.0f} lines, longest {max(lines)}; "
        f"arrows upwards: {upward or 'none'}; circles: {circles(graph()) or 'none'}"
    )


if __name__ == "__main__":
    main()
