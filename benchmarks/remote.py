"""Samples a second from a shard folder over HTTP: local, remote, and with requests that fail.

    python benchmarks/remote.py [--samples 3000] [--bytes 60000] [--latency 0.03] [--failing 0.05]

It writes a folder of random samples, and a server of another process sends it, each answer after
the latency. A share of the requests fails: statuses 500, 503 and 429, closed and cut connections,
and answers that never come, each as often. Samples are read in the order of a training, with the
same reading ahead, and compared with the folder. Rounds take turns, with an empty cache each. The
last line is JSON.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the server is that of the tests

from multimodal.data.shards import Shards, index_shard, write_manifest, write_tar  # noqa: E402
from multimodal.train.data import GlobalBatchLoader  # noqa: E402
from multimodal.train.examples import ShardDataset  # noqa: E402
from multimodal.train.sample_order import GlobalBatches, Order  # noqa: E402

BATCH, PER_SHARD = 64, 500


def write_folder(folder: Path, samples: int, size: int) -> None:
    rng = random.Random(0)
    for first in range(0, samples, PER_SHARD):
        chosen = [
            (f"s{n:06d}", {"jpg": rng.randbytes(size), "json": b'{"caption": "a photo"}'})
            for n in range(first, min(first + PER_SHARD, samples))
        ]
        write_tar(folder / f"train-{first // PER_SHARD:04d}.tar", chosen)
    write_manifest(folder, [index_shard(tar) for tar in sorted(folder.glob("*.tar"))])


def read(address: str | Path, local: Shards) -> tuple[float, int]:
    """(samples a second, samples that were read), in the order of a training."""
    start = time.perf_counter()
    shards = Shards(address, "train")
    batches = GlobalBatches(Order([shards.sizes]), BATCH)
    GlobalBatchLoader(ShardDataset([shards], 16, "squash", 0), batches, 0)  # announces batches
    seen = {}
    for items in batches:
        for _, number in items:
            seen[number] = shards[number]
    seconds = time.perf_counter() - start
    assert all(sample == local[number] for number, sample in seen.items())
    return len(seen) / seconds, len(seen)


class Largest:
    """The largest size of a cache, looked at all the time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bytes, self._ended = folder, 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Largest":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.1):
            sizes = {}
            for path, _, names in os.walk(self.folder):
                for name in names:
                    try:
                        about = os.stat(f"{path}/{name}")
                    except FileNotFoundError:
                        continue
                    sizes[about.st_ino] = about.st_size
            self.bytes = max(self.bytes, sum(sizes.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--bytes", type=int, default=60_000, help="of a sample")
    parser.add_argument("--latency", type=float, default=0.03, help="seconds before an answer")
    parser.add_argument("--failing", type=float, default=0.05, help="share of the requests")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=1 << 30, help="bytes of the cache")
    arguments = parser.parse_args()
    os.environ["MULTIMODAL_CACHE_BYTES"] = str(arguments.limit)
    speeds: dict[str, list[float]] = {}
    servers, largest, counts = [], 0, set()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "far"
        folder.mkdir()
        write_folder(folder, arguments.samples, arguments.bytes)
        local = Shards(folder, "train")
        addresses = {}
        try:
            for way, failing in (("remote", 0.0), ("remote, failing", arguments.failing)):
                command = [sys.executable, str(ROOT / "tests/far.py"), str(folder)]
                command += ["--latency", str(arguments.latency), "--failing", str(failing)]
                servers.append(subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8"))
                port = int(servers[-1].stdout.readline())  # type: ignore[union-attr]
                addresses[way] = f"http://127.0.0.1:{port}"
            for number in range(arguments.rounds):
                for way, address in {"local": folder, **addresses}.items():
                    cache = Path(name) / f"cache-{way}-{number}"
                    os.environ["MULTIMODAL_CACHE"] = str(cache)
                    with Largest(cache / "shards") as size:
                        speed, count = read(address, local)
                    speeds.setdefault(way, []).append(speed)
                    counts.add(count)
                    largest = max(largest, size.bytes)
                    print(f"{way:16} {speed:8.0f} samples a second", flush=True)
                cached = read(addresses["remote, failing"], local)[0]
                speeds.setdefault("remote, cached", []).append(cached)
        finally:
            for server in servers:
                server.kill()
                server.wait()
    middle = {way: median(each) for way, each in speeds.items()}
    figures = {
        "failing_of_remote": middle["remote, failing"] / middle["remote"],
        "remote_of_local": middle["remote"] / middle["local"],
        "cached_of_local": middle["remote, cached"] / middle["local"],
        "samples_per_second": middle,
        "samples_read": sorted(counts),
        "largest_cache": largest,
        **vars(arguments),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
