"""What a record says: how much was asked and how fast it was answered, and what failed."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from multimodal.record.chain import Entry

EXAMPLES = 5  # of each group of failures


def summary(entries: Iterable[Entry]) -> dict[str, Any]:
    """Counts, tokens and seconds of the requests.

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
        times.append(str(facts.get("time")))
        if facts.get("kind") == "feedback":
            feedback[str(facts.get("rating"))] += 1
            continue
        for name in ("path", "status", "model"):
            by[name][str(facts.get(name))] += 1
        by["filter"].update(map(str, facts.get("filters") or ()))
        by["finish_reason"].update(map(str, facts.get("finish_reasons") or ()))
        if isinstance(facts.get("seconds"), int | float):
            seconds[str(facts.get("path"))].append(float(facts["seconds"]))
        given = facts.get("usage")
        usage: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
        for kind, names in (
            ("read", ("prompt_tokens", "input_tokens")),
            ("written", ("completion_tokens", "output_tokens")),
        ):
            for name in names:
                tokens[kind] += int(usage.get(name) or 0)
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
    answered); ``thumbs down`` (by feedback); ``client left``.
    """
    groups: dict[str, list[Entry]] = defaultdict(list)
    by_id: dict[str, Entry] = {}
    for entry in entries:
        facts = entry.facts
        if facts.get("kind") == "feedback":
            rated = by_id.get(str(facts.get("about")))
            if facts.get("rating") == "down" and rated is not None:
                groups["thumbs down"].append(rated)
            continue
        for name in ("id", "request"):
            by_id[str(facts.get(name))] = entry
        status, reasons = facts.get("status"), facts.get("finish_reasons") or ()
        if status == 499:
            groups["client left"].append(entry)
        elif isinstance(status, int) and status >= 400:
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
