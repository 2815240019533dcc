"""The cache never exceeds its limit, whoever writes, fails, is killed or damages its files."""

import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from multimodal.data.remote.cache import BLOCK, Cache
from tests.processes import wait_until

ROOT = Path(__file__).resolve().parents[2]
# Writes entries and reads them again, for ever or `count` times.
WRITER = """
import hashlib, random, sys
from pathlib import Path
from multimodal.data.remote.cache import Cache
folder, limit, seed, count = Path(sys.argv[1]), *map(int, sys.argv[2:])
cache, rng = Cache(folder, limit), random.Random(seed)
for _ in range(count):
    n = rng.randrange(40)
    data = bytes([n]) * (1000 + 900 * n)
    sha256 = hashlib.sha256(data).hexdigest()
    with cache.entry(sha256, len(data)) as entry:
        if not entry.complete:
            entry.write(data[: len(data) // 2])
            entry.write(data)
            if rng.random() < 0.1:
                continue
            cache.publish(entry)
        assert entry.read(0, len(data)) == data
print("done")
"""


def used(folder: Path) -> int:
    """Bytes in the cache, measured without its own count. A renamed file counts once."""
    sizes: dict[int, int] = {}
    for path, _, names in os.walk(folder):
        for name in names:
            if name == "total":
                continue
            try:
                about = os.stat(Path(path) / name)
            except FileNotFoundError:
                continue
            sizes[about.st_ino] = about.st_size
    return sum(sizes.values())


def put(cache: Cache, data: bytes) -> str:
    sha256 = hashlib.sha256(data).hexdigest()
    with cache.entry(sha256, len(data)) as entry:
        if not entry.complete:
            entry.write(data)
            cache.publish(entry)
        assert entry.read(0, len(data)) == data
    return sha256


def test_the_entry_read_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10 * BLOCK)
    names = [put(cache, bytes([n]) * BLOCK) for n in range(9)]
    time.sleep(0.01)
    put(cache, bytes([0]) * BLOCK)
    put(cache, bytes([99]) * BLOCK * 2)
    assert [n for n, name in enumerate(names) if not cache.has(name)] == [1, 2]
    with pytest.raises(ValueError, match="40,961 bytes do not fit into a cache of 40,960"):
        put(cache, bytes(10 * BLOCK + 1))
    put(cache, bytes(10 * BLOCK))
    assert used(tmp_path) == 10 * BLOCK


def test_a_damaged_entry_is_written_anew(tmp_path: Path) -> None:
    data = bytes(range(256)) * 64
    sha256 = put(Cache(tmp_path, 1 << 20), data)
    path = tmp_path / sha256[:2] / sha256
    for wrong in (b"", data[:-1], data[:-1] + b"\0", data + b"\0"):
        path.write_bytes(wrong)
        cache = Cache(tmp_path, 1 << 20)
        with cache.entry(sha256, len(data)) as entry:
            assert not entry.complete
        assert cache.find(sha256) is None
        put(cache, data)
        assert path.read_bytes() == data
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(OSError):
        cache.find(sha256)


def test_a_deleted_cache_and_a_lost_count_do_no_harm(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 8 * BLOCK)
    for n in range(5):
        put(cache, bytes([n]) * BLOCK)
    for content in (b"", b"not a number", b"-5"):
        (tmp_path / "total").write_bytes(content)
        put(cache, os.urandom(2 * BLOCK))
        assert used(tmp_path) <= 8 * BLOCK
    (tmp_path / "total").unlink()
    put(cache, os.urandom(6 * BLOCK))
    assert used(tmp_path) <= 8 * BLOCK
    for path in tmp_path.glob("??/*"):
        path.unlink()
    sha256 = put(cache, bytes(8 * BLOCK))
    assert used(tmp_path) == 8 * BLOCK and cache.has(sha256)


def test_one_of_many_writes_and_the_others_read(tmp_path: Path) -> None:
    data, wrote = bytes(5000), []
    sha256 = hashlib.sha256(data).hexdigest()
    caches = [Cache(tmp_path, 1 << 20) for _ in range(8)]

    def work(cache: Cache) -> None:
        with cache.entry(sha256, len(data)) as entry:
            if not entry.complete:
                wrote.append(cache)
                time.sleep(0.05)
                if len(wrote) == 1:
                    return  # the first one fails
                entry.write(data)
                cache.publish(entry)
            assert entry.read(0, len(data)) == data

    threads = [threading.Thread(target=work, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrote) == 2 and used(tmp_path) == 5000
    assert (tmp_path / "total").read_text().split() == [str(2 * BLOCK)]


def test_the_limit_holds_with_several_processes_and_one_killed(tmp_path: Path) -> None:
    limit = 128 << 10

    def start(seed: int, count: int) -> subprocess.Popen[bytes]:
        arguments = [str(tmp_path), str(limit), str(seed), str(count)]
        return subprocess.Popen(
            [sys.executable, "-c", WRITER, *arguments], cwd=ROOT, stdout=subprocess.PIPE
        )

    killed, others = start(0, 10**9), [start(seed, 150) for seed in (1, 2)]
    most, ruler = 0, Cache(tmp_path, limit)
    rng = random.Random(0)
    until_kill = time.monotonic() + 60
    try:
        while any(process.poll() is None for process in others):
            with ruler._total():  # or what goes in one folder and comes in the next counts twice
                most = max(most, used(tmp_path))
            if most > limit // 2 and rng.random() < 0.05 or time.monotonic() > until_kill:
                killed.kill()
        assert all(process.communicate()[0] == b"done\n" for process in others)
    finally:
        for process in (killed, *others):
            process.kill()
            process.wait()
    assert limit // 2 < most <= limit
    assert wait_until(lambda: used(tmp_path) <= limit)
    cache = Cache(tmp_path, limit)
    put(cache, bytes(limit))  # what the killed one left is cleared away
    assert used(tmp_path) == limit
