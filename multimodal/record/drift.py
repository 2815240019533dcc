"""Whether requests of now differ from those of a reference: tests that say how often they err.

Numbers (lengths, seconds, likelihoods) are compared by the two-sample Kolmogorov-Smirnov test,
rates (errors, empty replies) by Fisher's exact test, and embeddings of prompts by the energy
distance (Szekely and Rizzo 2013) with 999 permutations. The p-values are corrected together (Holm
1979), so that all tests of one window raise an alarm without cause with a probability of ``alpha``
at most, if requests are independent. Requests of one client that come in bursts are not: then there
are more alarms. Who compares many windows gets more alarms, too: of N windows up to ``alpha`` N on
average, whether they overlap or not. If they do, the alarms come in groups.

Shapes: R requests of the reference, W of the window, D width of embeddings.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from multimodal.record.chain import Entry
from multimodal.record.report import NOT_ADMITTED, NOT_REQUESTS, READ, WRITTEN

Rows = NDArray[np.float32]
WINDOW = 200
LEAST = 20  # requests of each side
PERMUTATIONS = 999
MOST_EMBEDDED = 400  # rows of each side


def _usage(*names: str) -> Callable[[Mapping[str, Any]], Any]:
    def number(facts: Mapping[str, Any]) -> Any:
        usage = facts.get("usage") or {}
        return next((usage[name] for name in names if usage.get(name) is not None), None)

    return number


# A number of a request, or None where it has none.
NUMBERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "tokens of prompts": _usage(*READ),
    "tokens written": _usage(*WRITTEN),
    "images in prompts": lambda facts: (
        None if facts.get("images") is None else len(facts["images"])
    ),
    "log-likelihood of a token": lambda facts: facts.get("likelihood"),
    "seconds": lambda facts: facts.get("seconds"),
}
RATES: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    # A client that left (499) is none.
    "errors": lambda facts: (facts.get("status") or 0) >= 400 and facts.get("status") != 499,
    "empty replies": lambda facts: bool(facts.get("empty")),
    "replies over the limit": lambda facts: "length" in (facts.get("finish_reasons") or ()),
    "filtered": lambda facts: bool(facts.get("filters")),
}
EMBEDDINGS = "what prompts are about"


@dataclass(frozen=True)
class Drift:
    """One test of a window.

    Attributes:
        signal: what was compared.
        before, now: medians, or rates. Of embeddings 0 and the energy distance.
        p: how likely a difference as large is without a cause, corrected for the number of tests.
        alarm: whether p is below ``alpha``.
    """

    signal: str
    before: float
    now: float
    p: float
    alarm: bool

    def __str__(self) -> str:
        word = "ALARM" if self.alarm else "no change shows"
        return (
            f"{self.signal}: {self.before:.4g} before, {self.now:.4g} now (p {self.p:.2g}): {word}"
        )


def requests_of(entries: Sequence[Entry], path: str | None = None) -> list[Entry]:
    """The requests of one address, by default of that with the most.

    Records of older servers have those of callers without a key, too. They are left out.
    """
    asked = [
        entry
        for entry in entries
        if entry.facts.get("kind") not in NOT_REQUESTS
        and entry.facts.get("status") not in NOT_ADMITTED
    ]
    paths = [str(entry.facts.get("path")) for entry in asked]
    if path is None and paths:
        path = max(sorted(set(paths)), key=paths.count)
    return [entry for entry, each in zip(asked, paths, strict=True) if each == path]


def prompts_of(requests: Sequence[Entry]) -> list[str]:
    """Their prompts that have a text, at most MOST_EMBEDDED of them, drawn at random (seed 0)."""
    texts = [text for entry in requests if (text := entry.texts.get("prompt", "").strip())]
    chosen = np.random.default_rng(0).permutation(len(texts))[:MOST_EMBEDDED]
    return [texts[number] for number in chosen]


def drift(
    reference: Sequence[Entry],
    window: Sequence[Entry],
    alpha: float = 0.01,
    embedded: tuple[Rows, Rows] | None = None,
) -> list[Drift]:
    """Compare a window of requests with a reference.

    Args:
        reference, window: requests of one address, that can be counted (``countable_entries``).
        alpha: the probability of an alarm without a cause, of all tests of this window together.
        embedded: float32[R, D] and float32[W, D], of their prompts.

    Returns:
        A result for each signal that both sides have. The smallest p comes first.

    Raises:
        ValueError: for too few requests.
    """
    from scipy import stats

    for name, side in (("reference", reference), ("window", window)):
        if len(side) < LEAST:
            raise ValueError(f"the {name} has {len(side)} requests: {LEAST} at least are needed")
    found: list[tuple[str, float, float, float]] = []
    sides = [[entry.facts for entry in side] for side in (reference, window)]
    for name, number in NUMBERS.items():
        before, now = ([float(v) for f in side if (v := number(f)) is not None] for side in sides)
        if min(len(before), len(now)) >= LEAST and len(set(before + now)) > 1:
            with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
                # It warns where it takes the limit, since the exact way has failed.
                p = float(stats.ks_2samp(before, now).pvalue)
            found.append((name, float(np.median(before)), float(np.median(now)), p))
    for name, happened in RATES.items():
        counts = [sum(map(happened, side)) for side in sides]
        if any(counts):
            table = [[count, len(side) - count] for count, side in zip(counts, sides, strict=True)]
            p = float(stats.fisher_exact(table).pvalue)
            old, new = (count / len(side) for count, side in zip(counts, sides, strict=True))
            found.append((name, old, new, p))
    if embedded is not None and min(map(len, embedded)) >= LEAST:
        distance, p = energy_test(*embedded)
        found.append((EMBEDDINGS, 0.0, distance, p))
    found.sort(key=lambda each: each[-1])
    results, largest = list[Drift](), 0.0
    for place, (name, old, new, p) in enumerate(found):
        largest = max(largest, min(1.0, p * (len(found) - place)))
        results.append(Drift(name, old, new, largest, largest < alpha))
    return results


def energy_test(first: Rows, second: Rows, seed: int = 0) -> tuple[float, float]:
    """The energy distance of two sets of rows, and its p-value by permutations.

    Args:
        first, second: float32[N, D] and float32[M, D]. Of more than MOST_EMBEDDED some are drawn.
    """
    rng = np.random.default_rng(seed)
    parts = [
        rows if len(rows) <= MOST_EMBEDDED else rng.permutation(rows)[:MOST_EMBEDDED]
        for rows in (first, second)
    ]
    rows = np.concatenate(parts).astype(np.float64)
    squares = (rows**2).sum(1)
    squared = squares[:, None] + squares - 2 * rows @ rows.T
    distances = np.sqrt(np.maximum(squared, 0))
    n, m = map(len, parts)
    belongs = np.zeros((n + m, 1 + PERMUTATIONS))
    belongs[:n, 0] = 1
    for column in range(1, 1 + PERMUTATIONS):
        belongs[rng.permutation(n + m)[:n], column] = 1
    other = 1 - belongs
    to_first = distances @ belongs
    within_first = (belongs * to_first).sum(0) / n**2
    between = (other * to_first).sum(0) / (n * m)
    within_second = (other * (distances @ other)).sum(0) / m**2
    energy = 2 * between - within_first - within_second
    reached = int((energy[1:] >= energy[0] - 1e-12).sum())
    return float(energy[0]), (1 + reached) / (1 + PERMUTATIONS)
