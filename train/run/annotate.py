"""Comments for a printed configuration: what each option of the model and the data is for."""

import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, get_type_hints

import docstring_parser

WIDTH = 96


def annotate(text: str, classes: dict[str, type[Any]]) -> str:
    """Put the docstring of each option above its line.

    Args:
        text: the configuration as YAML in block style.
        classes: where options of a class begin ("data", "model.init_args"), and the class.

    Returns:
        The same configuration, with comments.
    """
    documents = {
        f"{start}.{name}": document
        for start, owner in classes.items()
        for name, document in options_of(owner)
    }
    lines, path = list[str](), list[tuple[int, str]]()
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        name, colon, _ = line.strip().partition(":")
        if colon and not line.lstrip().startswith(("-", "#")):
            while path and path[-1][0] >= indent:
                path.pop()
            path.append((indent, name))
            document = documents.get(".".join(part for _, part in path))
            if document:
                for comment in textwrap.wrap(document, WIDTH - indent):
                    lines.append(f"{' ' * indent}# {comment}")
        lines.append(line)
    return "\n".join(lines) + "\n"


def options_of(owner: type[Any]) -> Iterator[tuple[str, str]]:
    """Name and docstring of each argument of a class, of its bases, and of arguments' classes."""
    for base in reversed(owner.__mro__):
        parsed = docstring_parser.parse(inspect.getdoc(base) or "")
        for parameter in parsed.params:
            for name in parameter.arg_name.split(","):
                yield name.strip(), " ".join((parameter.description or "").split())
    for name, kind in get_type_hints(owner.__init__).items():
        if is_dataclass(kind) and isinstance(kind, type):
            yield from ((f"{name}.{inner}", text) for inner, text in options_of(kind))
