"""What a record says: how much was asked and how fast it was answered, and what failed."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from multimodal.record.chain import PRUNED, Entry, entries
from multimodal.schemas import check_value

EXAMPLES = 5  # of each group of failures
READ, WRITTEN = ("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens")
NOT_REQUESTS = ("feedback", PRUNED)  # kinds of entries
NOT_ADMITTED = (401, 403)  # statuses for callers who may not ask anything
# The facts that are counted and compared. Each may be missing or null; others may be anything.
FACTS: dict[str, Any] = {
    "time": str, "kind": str, "path": str, "status": int, "seconds": float, "likelihood": float,
    "usage": Mapping[str, Any], "images": list[Any], "filters": list[Any],
    "finish_reasons": list[Any], "reason": str,
}  # fmt: skip


def countable_entries(path: str | Path, on_problem: Callable[[str], object]) -> list[Entry]:
    """The entries of a record that can be counted.

    Args:
        on_problem: is told of each other line what is wrong with it, in one line.

    Raises:
        UnreadableFile: if there is no such file.
    """
    found = []
    for entry in entries(path):
        if isinstance(entry, str):
            on_problem(f"{path}: {entry}")
            continue
        try:
            _check_facts(entry.facts)
        except ValueError as error:
            on_problem(f"{path}: entry {entry.number}: {error}")
        else:
            found.append(entry)
    return found


def _check_facts(facts: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for a fact of another type than a server writes."""
    for name, kind in FACTS.items():
        check_value(name, facts.get(name), kind | None)
    for name in (*READ, *WRITTEN):
        check_value(f"usage.{name}", (facts.get("usage") or {}).get(name), int | None)


def summary(entries: Iterable[Entry]) -> dict[str, Any]:
    """Counts, tokens and seconds of the requests.

    Args:
        entries: that can be counted, see ``countable_entries``.

    Returns:
        ``requests``, ``from`` and ``to`` (times), ``by`` path, status, model and filter (counts),
        ``tokens`` read and written, ``feedback`` (counts), and of each path the median and the 99th
        percentile of the seconds that it took.
    """
    by: dict[str, Counter[str]] = {
        name: Counter() for name in ("path", "status", "model", "filter", "finish_reason")
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    tokens, feedback, times = Counter[str](), Counter[str](), list[str]()
    for entry in entries:
        facts = entry.facts
        if facts.get("kind") == PRUNED:
            continue
        times.append(str(facts.get("time")))
        if facts.get("kind") == "feedback":
            feedback[str(facts.get("rating"))] += 1
            continue
        for name in ("path", "status", "model"):
            by[name][str(facts.get(name))] += 1
        by["filter"].update(map(str, facts.get("filters") or ()))
        by["finish_reason"].update(map(str, facts.get("finish_reasons") or ()))
        if facts.get("seconds") is not None:
            seconds[str(facts.get("path"))].append(float(facts["seconds"]))
        usage = facts.get("usage") or {}
        for kind, names in (("read", READ), ("written", WRITTEN)):
            tokens[kind] += sum(usage.get(name) or 0 for name in names)
    return {
        "requests": by["path"].total(),
        "from": min(times, default=None),
        "to": max(times, default=None),
        "by": {name: dict(counts.most_common()) for name, counts in by.items()},
        "tokens": dict(tokens),
        "feedback": dict(feedback),
        "seconds": {path: _percentiles(values) for path, values in seconds.items()},
    }


def failures(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """The requests that went wrong, by how. One may be in several groups.

    Groups: ``error STATUS CODE``; ``filtered``; ``empty`` (nothing was written); ``over the limit``
    (a text ended at its limit of tokens); ``fallback: WHY`` (something else than the model has
    answered); ``thumbs down`` (by feedback), and ``thumbs down: REASON`` if that says why; ``client
    left``; ``feedback without a request`` (the feedback itself, about what is in none of these
    entries).
    """
    entries, groups = list(entries), defaultdict[str, list[Entry]](list)
    # Feedback may come first: a client knows the id of a stream before its entry is written.
    by_id = {
        str(entry.facts[name]): entry
        for entry in entries
        if entry.facts.get("kind") not in NOT_REQUESTS
        for name in ("id", "request")
        if entry.facts.get(name) is not None
    }
    for entry in entries:
        facts = entry.facts
        if facts.get("kind") == "feedback":
            rated = by_id.get(str(facts.get("about")))
            if rated is None:
                groups["feedback without a request"].append(entry)
            elif facts.get("rating") == "down":
                groups["thumbs down"].append(rated)
                if reason := facts.get("reason"):
                    groups[f"thumbs down: {str(reason)[:20]}"].append(rated)
        if facts.get("kind") in NOT_REQUESTS:
            continue
        status, reasons = facts.get("status"), facts.get("finish_reasons") or ()
        if status == 499:
            groups["client left"].append(entry)
        elif status is not None and status >= 400:
            groups[f"error {status} {facts.get('code') or ''}".strip()].append(entry)
        if facts.get("filters"):
            groups["filtered"].append(entry)
        if "length" in reasons:
            groups["over the limit"].append(entry)
        fallback = facts.get("fallback") if isinstance(facts.get("fallback"), list) else None
        named = [each for each in fallback if isinstance(each, dict)] if fallback else []
        for why in sorted({str(each.get("why"))[:20] for each in named}):
            groups[f"fallback: {why}"].append(entry)
        if facts.get("empty"):
            groups["empty"].append(entry)
    return dict(groups)


def _percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p50": round(statistics.median(ordered), 4),
        "p99": round(ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)], 4),
    }
