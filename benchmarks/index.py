"""Search time and recall of an index of 100,000 entries, on one core (one thread).

    python benchmarks/index.py [--count 100000] [--width 256] [--out docs/index.json]

The rows are synthetic, of the width of the starter's embeddings, in clusters: 2,000 centres of unit
norm, and rows around them with gaussian noise of half that norm, in all directions. So a row has
about fifty neighbours at a cosine of 0.8. One tenth of the centres are in ten groups of twenty
that nearly coincide (10 % noise): there it is a thousand. Queries are new rows of the same
clusters.

Timed is what a search does after the query is embedded: the ten nearest rows of the graph, and
their entries from the mapped file. ``milliseconds_of_a_search`` is the time of the CPU: other work
on the machine does not count. ``waited`` is that of the clock, with it. Recall is against all
products (exact). The build adds all rows to the graph with one thread. The last line is JSON.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from multimodal.index.storage import Entry, Root, read_config, read_files, write_index
from multimodal.index.vectors import Rows, Vectors

CENTRES, NOISE, NEAR = 2000, 0.5, 0.1
QUERIES, K = 1000, 10


def unit(rows: Rows) -> Rows:
    result: Rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return result


def clustered(count: int, width: int, seed: int) -> tuple[Rows, Rows]:
    """float32[count, width] rows and float32[QUERIES, width] queries of the same clusters."""
    rng = np.random.default_rng(seed)
    noise = 1 / width**0.5  # of unit norm, on average
    centres = unit(rng.normal(size=(CENTRES, width)))
    for start in range(0, CENTRES, CENTRES // 10):
        group = centres[start : start + CENTRES // 100]
        group[:] = unit(group[:1] + NEAR * noise * rng.normal(size=group.shape))

    def around(number: int) -> Rows:
        chosen = centres[rng.integers(CENTRES, size=number)]
        return unit(chosen + NOISE * noise * rng.normal(size=(number, width)))

    return around(count), around(QUERIES)


def milliseconds(seconds: list[float]) -> dict[str, float]:
    points = {"median": 0.5, "p99": 0.99}
    return {name: round(1000 * float(np.quantile(seconds, q)), 2) for name, q in points.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    count, width = arguments.count, arguments.width
    rows, queries = clustered(count, width, arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vectors, start = Vectors(width), time.thread_time()
        for first in range(0, count, 1000):
            numbers = range(first, min(first + 1000, count))
            vectors.add(numbers, rows[first : first + 1000])
        build = time.thread_time() - start
        entries: list[Entry | None] = [
            Entry(0, f"photos/{n:06}.jpg", f"{n:064x}", (f"the caption of photo {n}",))
            for n in range(count)
        ]
        config = {"model": "0" * 16, "width": width, "kind": "images", "roots": (Root("/"),)}
        start = time.thread_time()
        write_index(folder, config, vectors, entries)
        write = time.thread_time() - start
        megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        start = time.thread_time()
        vectors, stored = read_files(folder, read_config(folder), verify=True)
        opened = time.thread_time() - start
        start = time.thread_time()
        assert sum(entry is not None for entry in stored) == count
        read_all = time.thread_time() - start
        times, waits, found = [], [], []
        for query in queries:
            start, busy = time.perf_counter(), time.thread_time()
            (nearest,) = vectors.search(query[None], K)
            assert all(stored[number] is not None for number, _ in nearest)
            times.append(time.thread_time() - busy)
            waits.append(time.perf_counter() - start)
            found.append({number for number, _ in nearest})
        exact = np.argpartition(-(queries @ rows.T), K, axis=1)[:, :K]
    recall = float(
        np.mean([len(a & set(b)) / K for a, b in zip(found, exact.tolist(), strict=True)])
    )
    result = {
        "entries": count,
        "width": width,
        "seed": arguments.seed,
        "queries": QUERIES,
        "recall_at_10": round(recall, 4),
        "milliseconds_of_a_search": milliseconds(times),
        "milliseconds_of_a_search_waited": milliseconds(waits),
        "cpu_seconds": {
            "build": round(build, 1),
            "write": round(write, 2),
            "open_and_verify": round(opened, 2),
            "read_all_entries": round(read_all, 2),
        },
        "megabytes": round(megabytes, 1),
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(f"recall@10 {recall:.4f}, {result['milliseconds_of_a_search']} ms a search on one core")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
