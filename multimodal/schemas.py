"""What a file or a caller may give for a class: the types of its arguments, and their ranges.

The schema of a file is the signature of the class that is made of it. A range stands beside the
type, ``Annotated[int, Between(1, 1024)]``. So a number that would take hours or all memory is
refused by its name before anything is made of it.
"""

import inspect
import math
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar

Made = TypeVar("Made")
MAX_NUMBER = 2**63 - 1  # of an integer without a range: what torch and numpy take


@dataclass(frozen=True)
class Between:
    """The smallest and the largest number that is allowed."""

    low: float
    high: float

    def __repr__(self) -> str:  # as --help shows it
        ends = [f"{n:,}" if isinstance(n, int) else f"{n:g}" for n in (self.low, self.high)]
        return " to ".join(ends)


Positive = Annotated[float, Between(5e-324, 1e300)]


def check_value(name: str, value: object, kind: Any) -> None:
    """Check a value against a type as it stands in a signature.

    Args:
        name: what to call the value in errors.
        kind: a type hint. A list may stand for a tuple, and an integer for a float.

    Raises:
        ValueError: ``NAME=VALUE: expected ...``.
    """
    if not _fits(value, kind):
        raise ValueError(f"{name}={_short(value)}: expected {_described(kind)}")


def check_fields(record: Any) -> None:
    """Check all fields of a dataclass, for its ``__post_init__``. Raises ``ValueError``."""
    kind: Any = type(record)
    hints = _hints(kind)
    for item in fields(record):
        check_value(item.name, getattr(record, item.name), hints[item.name])


def construct(make: Callable[..., Made], values: object, name: str = "") -> Made:
    """Call a class with the values that a file has for its arguments.

    Where an argument is a dataclass, its values are an object in the file.

    Args:
        make: the class. Its signature has types.
        values: what the file has.
        name: of the object in the file, for errors.

    Raises:
        ValueError: names the value and what was expected. Unknown and missing values are errors.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{name or 'the content'}={_short(values)}: expected an object")
    start = f"{name}." if name else ""
    parameters, hints = _parameters(make), _hints(make)
    unknown = [key for key in values if key not in parameters]
    if unknown:
        known = ", ".join(parameters)
        raise ValueError(f"{start}{_plain(unknown[0])}: unknown; there are {known}")
    arguments: dict[str, Any] = {}
    for key, parameter in parameters.items():
        if key not in values:
            if parameter.default is parameter.empty:
                raise ValueError(f"{start}{key}: is missing")
            continue
        arguments[key] = _nested(values[key], hints[key], start + key)
    try:
        return make(**arguments)
    except ValueError as error:
        raise ValueError(f"{start}{error}" if start else str(error)) from error


def _nested(value: object, kind: Any, name: str) -> Any:
    """A value of a file as an argument: objects become dataclasses, lists tuples."""
    kinds = typing.get_args(kind) if _is_union(kind) else (kind,)
    for each in kinds:
        if isinstance(each, type) and is_dataclass(each) and not _fits(value, kind):
            return construct(each, value, name)
    several = [items for each in kinds if (items := _items(each)) is not None]
    for items in several:
        if isinstance(value, list) and is_dataclass(items):
            value = tuple(_nested(item, items, f"{name}.{n}") for n, item in enumerate(value))
    check_value(name, value, kind)
    return tuple(value) if several and isinstance(value, list) else value


@lru_cache(256)  # a file may have a million lines, each of which is made into an object
def _parameters(make: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(make).parameters


@lru_cache(256)
def _hints(make: Callable[..., Any]) -> dict[str, Any]:
    function = make.__init__ if isinstance(make, type) else make  # type: ignore[misc]
    return typing.get_type_hints(function, include_extras=True)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _items(kind: Any) -> Any:
    """The type of the items of a sequence. None: it is no sequence."""
    if typing.get_origin(kind) in (list, tuple, Sequence):
        return typing.get_args(kind)[0]
    return None


def _fits(value: object, kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin is Annotated:
        plain, *limits = arguments
        if not _fits(value, plain):
            return False
        ranges = [limit for limit in limits if isinstance(limit, Between)]
        return all(limit.low <= typing.cast(Any, value) <= limit.high for limit in ranges)
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in arguments)
    if _is_union(kind):
        return any(_fits(value, each) for each in arguments)
    if origin is dict or origin is Mapping:
        of_key, of_value = arguments
        return isinstance(value, Mapping) and all(
            _fits(key, of_key) and _fits(each, of_value) for key, each in value.items()
        )
    if (items := _items(kind)) is not None:
        return (
            isinstance(value, list | tuple)
            and _length(kind) in (None, len(value))
            and all(_fits(item, items) for item in value)
        )
    if kind is float:
        return _is_number(value) and math.isfinite(typing.cast(float, value))
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER
    if kind is None:
        return value is None
    return isinstance(value, kind)


def _length(kind: Any) -> int | None:
    """Of a tuple with so many places. None: any."""
    places = typing.get_args(kind)
    is_tuple = typing.get_origin(kind) is tuple and ... not in places
    return len(places) if is_tuple else None


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) <= MAX_NUMBER


def _described(kind: Any) -> str:
    """A type in the words of someone who writes JSON."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        ranges = [str(limit) for limit in arguments[1:] if isinstance(limit, Between)]
        return " from ".join([_described(arguments[0]), *ranges])
    if origin is Literal:
        return " or ".join(repr(each) for each in arguments)
    if _is_union(kind):
        return " or ".join(_described(each) for each in arguments)
    if (items := _items(kind)) is not None:
        several = "a list" if (length := _length(kind)) is None else f"a list of {length}"
        return f"{several}, each of it {_described(items)}"
    if origin in (dict, Mapping):
        if arguments[1] is Any:
            return "an object"
        return f"an object, each value of it {_described(arguments[1])}"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    if kind in (None, type(None)):
        return "nothing (null)"
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _short(value: object) -> str:
    """A value in an error: a long or a deep one is cut."""
    text = reprlib.repr(value)
    return text if len(text) < 120 else f"{text[:100]}..."


def _plain(key: object) -> str:
    return key if isinstance(key, str) and len(key) < 60 else _short(key)
