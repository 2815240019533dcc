"""What an entry keeps of facts and texts that are too long."""

import hashlib
import json
from collections.abc import Mapping
from itertools import islice
from typing import Any

from multimodal.files import parse_json

MAX_TEXTS = 8 << 20  # bytes of JSON of the texts of an entry that are kept
MAX_FACTS = 1 << 20  # bytes of JSON of the values of its facts
MAX_LENGTH = 2048  # of a string, a list or an object in them: a request has that many inputs
MAX_DEPTH = 16  # of objects in objects in them


def digest(text: str) -> str:
    """The SHA-256 of a text, 64 hex digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def cut_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as they will be read, cut to the limits."""
    cut = {name: _cut(value) for name, value in facts.items()}
    sizes = {name: len(json.dumps(value)) for name, value in cut.items()}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        if sum(sizes.values()) <= MAX_FACTS:
            break
        cut[name], sizes[name] = None, len("null")
    kept: dict[str, Any] = parse_json(json.dumps(cut))
    return kept


def _cut(value: Any, depth: int = 0) -> Any:
    """A value of JSON without what is too long in it. Of a long string the digest stays."""
    if isinstance(value, str) and len(value) > MAX_LENGTH:
        return f"{value[:MAX_LENGTH]}... ({len(value):,} characters, SHA-256 {digest(value)})"
    if not isinstance(value, list | tuple | Mapping):
        return value
    if depth == MAX_DEPTH:
        return "..."
    if isinstance(value, Mapping):
        items = islice(value.items(), MAX_LENGTH)
        return {_cut(name): _cut(item, depth + 1) for name, item in items}
    return [_cut(item, depth + 1) for item in value[:MAX_LENGTH]]


def short_texts(texts: Mapping[str, str]) -> dict[str, str]:
    """The texts that are short enough to be kept, the shortest first."""
    kept, left = dict[str, str](), MAX_TEXTS
    for name, text in sorted(texts.items(), key=lambda item: len(item[1])):
        left -= len(json.dumps(text))
        if left < 0:
            break
        kept[name] = text
    return kept
