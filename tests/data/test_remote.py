"""Shards at an address: the same samples, piece by piece, whatever fails on the way."""

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from multimodal.cli import main
from multimodal.data.remote import transport
from multimodal.data.remote.folder import local_folder, remote_folder
from multimodal.data.shards import DamagedShard, Shards, index_shard, write_manifest, write_tar
from multimodal.data.verify import check
from tests.far import FAULTS, Far, failing, far

SAMPLES, SHARDS = 90, 3


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of three shards with several pieces each, and an empty cache beside it."""
    monkeypatch.setenv("MULTIMODAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MULTIMODAL_CACHE_BYTES", str(1 << 28))
    monkeypatch.setattr("multimodal.data.remote.pieces.PIECE", 1 << 12)
    monkeypatch.setattr(transport, "FIRST_PATIENCE", 0.5)
    return shards(tmp_path / "far")


def shards(folder: Path, offset: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    of_a_shard = SAMPLES // SHARDS
    for number in range(SHARDS):
        samples = []
        for n in range(number * of_a_shard, (number + 1) * of_a_shard):
            image = bytes((n * 7 + k + offset) % 251 for k in range(300 + 40 * n))
            samples.append((f"s{n:03d}", {"jpg": image, "json": b'{"caption": "%d"}' % n}))
        write_tar(folder / f"train-{number:04d}.tar", samples)
    write_manifest(folder, [index_shard(tar) for tar in sorted(folder.glob("*.tar"))])
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[Far]:
    with far(Far(folder)) as server:
        yield server


def without_pieces(folder: Path) -> None:
    """As older releases wrote it."""
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    for entry in manifest["shards"]:
        path = folder / entry["name"].replace(".tar", ".index.json")
        index = json.loads(path.read_text("utf-8"))
        del index["pieces"]
        path.write_text(json.dumps(index), "utf-8")
        entry["index_sha256"] = index_sha256(path)
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")


def index_sha256(path: Path) -> str:
    from multimodal.data.shards import file_sha256

    return file_sha256(path)


def test_one_sample_takes_one_piece(folder: Path, server: Far) -> None:
    shards = Shards(server.address + "/", "train")
    assert shards[31] == Shards(folder)[31]
    names = [path for path, _ in server.asked]
    assert names == ["/manifest.json", "/train-0001.index.json", "/train-0001.tar"]
    (_, asked) = server.asked[-1]
    assert asked is not None
    first, last = map(int, asked.removeprefix("bytes=").split("-"))
    assert last - first < (folder / "train-0001.tar").stat().st_size / 4
    server.asked.clear()
    assert shards[31] == Shards(folder)[31] and not server.asked
    again = pickle.loads(pickle.dumps(shards))
    assert again[31] == Shards(folder)[31] and not server.asked


@pytest.mark.parametrize("number", range(6))
def test_all_samples_are_those_of_the_folder(number: int, folder: Path) -> None:
    """By http in order, shuffled, with failing requests, from a server that ignores ranges, with
    indexes without pieces, and from another file system."""
    if number == 4:
        without_pieces(folder)
    if number == 5:
        fsspec.filesystem("memory").put(str(folder), "/bucket/far", recursive=True)
    fault = failing(0.3) if number == 2 else lambda path: None
    with far(Far(folder, fault, ranges=number != 3)) as server:
        address = "memory://bucket/far" if number == 5 else server.address
        shards, local = Shards(address), Shards(folder)
        assert shards.fingerprint == local.fingerprint and shards.sizes == local.sizes
        order = [n * 37 % SAMPLES for n in range(SAMPLES)] if number in (1, 2) else range(SAMPLES)
        assert [shards[n] for n in order] == [local[n] for n in order]
        assert list(shards) == list(local)
        tars = [path for path, _ in server.asked if path.endswith(".tar")]
        assert number != 4 or len(tars) == SHARDS
        assert number not in (0, 1) or len(tars) == len(set(server.asked)) - 1 - SHARDS


@pytest.mark.parametrize("fault", FAULTS)
def test_a_request_that_fails_is_made_again(fault: str, folder: Path) -> None:
    left = {"/manifest.json": 1, "/train-0001.index.json": 2, "/train-0001.tar": 2}

    def twice(path: str) -> str | None:
        left[path] = left.get(path, 0) - 1
        return fault if left[path] >= 0 else None

    with far(Far(folder, twice)) as server:
        assert Shards(server.address)[31] == Shards(folder)[31]
        assert len(server.asked) == 8


def test_reading_ahead_brings_samples_before_they_are_read(folder: Path, server: Far) -> None:
    from tests.processes import wait_until

    shards = Shards(server.address)
    shards.announce(range(SAMPLES))
    cache = remote_folder(shards.folder).cache  # type: ignore[union-attr]
    pieces = [p for n in range(SHARDS) for p in shards._index(n).pieces]
    assert wait_until(lambda: all(cache.has(piece.sha256) for piece in pieces))
    server.asked.clear()
    assert list(shards) == list(Shards(folder)) and not server.asked


def test_what_stays_away_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "RETRY_SECONDS", 0)
    with far(Far(folder, lambda path: "503" if path.endswith(".tar") else None)) as server:
        with pytest.raises(ValueError, match=r"/train-0001.tar, bytes .*503.*5 attempts in"):
            Shards(server.address)[31]
        with pytest.raises(ValueError, match=r"nowhere/manifest.json: cannot be read"):
            Shards(server.address + "/nowhere")
        assert [path for path, _ in server.asked].count("/nowhere/manifest.json") == 1
        (folder / "train-0000.tar").unlink()
        server.fault = lambda path: None
        with pytest.raises(ValueError, match=r"train-0000.tar.* cannot be read"):
            Shards(server.address)[0]
    with pytest.raises(ValueError, match=r"manifest.json: cannot be read .*5 attempts"):
        Shards(server.address)


def test_a_whole_file_in_place_of_a_range_is_not_read(folder: Path) -> None:
    """The connection is cut in the middle of the file, where nobody reads any more."""
    with far(Far(folder, lambda path: "cut", ranges=False)) as server:
        with pytest.raises(transport.NoRanges, match="train-0001.tar: the server sends whole"):
            transport.Transport(server.address).read("train-0001.tar", 0, 1000, retry_seconds=0)
        assert len(server.asked) == 1


def test_other_bytes_than_the_manifest_says_are_refused(folder: Path, server: Far) -> None:
    for name in ("train-0001.index.json", "train-0001.tar"):
        server.fault = lambda path: "other bytes" if path.endswith(name) else None  # noqa: B023
        with pytest.raises(DamagedShard, match=f"{name}.*SHA-256 differs.*data check"):
            Shards(server.address)[31]
        problems = list(check(server.address))
        assert problems and all(server.address in each and name in each for each in problems)
        assert Shards(server.address)[0] == Shards(folder)[0]
    server.fault = lambda path: None
    assert Shards(server.address)[31] == Shards(folder)[31]
    assert list(check(server.address)) == []
    assert main(["data", "check", server.address]) == 0


def test_a_file_that_does_not_end_is_not_written_to_the_disk(folder: Path, server: Far) -> None:
    server.ranges = False
    with open(folder / "train-0001.tar", "ab") as file:
        file.truncate(20 << 20)
    with pytest.raises(DamagedShard, match="train-0001.tar.*more than [0-9,]+ bytes"):
        Shards(server.address)[31]


def test_a_rebuilt_folder_is_read_anew(folder: Path, server: Far) -> None:
    before = list(Shards(server.address))
    shards(folder, offset=1)
    after = list(Shards(server.address))
    assert after == list(Shards(folder)) and after != before
    # In a folder that is not a mirror, this file has no effect.
    (folder / ".address").write_text("memory://elsewhere")
    assert list(Shards(folder)) == after


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x"])
def test_a_redirect_to_what_is_not_http_is_refused(target: str, folder: Path) -> None:
    with far(Far(folder, lambda path: target)) as server:
        with pytest.raises(ValueError, match="manifest.json: cannot be read"):
            Shards(server.address)
        assert len(server.asked) == 1
    with far(Far(folder)) as real:
        with far(Far(folder, lambda path: real.address + path)) as server:
            assert Shards(server.address)[31] == Shards(folder)[31]


def test_no_name_leads_out_of_the_cache(folder: Path, server: Far, tmp_path: Path) -> None:
    manifest = folder / "manifest.json"
    good = manifest.read_text("utf-8")
    for field in ("sha256", "index_sha256"):
        for wrong in ("../../../outside", "/etc/passwd", "", "A" * 64, "0" * 63 + "\n"):
            content = json.loads(good)
            content["shards"][1][field] = wrong
            manifest.write_text(json.dumps(content), "utf-8")
            without = field == "sha256"
            server.ranges = not without  # then the whole shard is the piece
            with pytest.raises(ValueError, match="SHA-256"):
                Shards(server.address)[31]
    for name in ("../train-0001.tar", "/etc/x.tar", "a/../../b.tar"):
        content = json.loads(good)
        content["shards"][1]["name"] = name
        manifest.write_text(json.dumps(content), "utf-8")
        with pytest.raises(DamagedShard, match="not the name of a shard"):
            Shards(server.address)
    inside = {"far", "cache"}
    assert set(os.listdir(tmp_path)) == inside


def test_pieces_that_are_not_in_order_are_refused(folder: Path, server: Far) -> None:
    manifest, path = folder / "manifest.json", folder / "train-0001.index.json"
    index = json.loads(path.read_text("utf-8"))
    start, stop, sha256 = index["pieces"][1]
    for wrong in (
        [start, 1 << 40, sha256],
        [stop, start, sha256],
        [-1, stop, sha256],
        [start, stop, "../x"],
        [start, stop],
        [float("inf"), stop, sha256],
        [start, start, sha256],
    ):
        path.write_text(json.dumps(index | {"pieces": [index["pieces"][0], wrong]}), "utf-8")
        content = json.loads(manifest.read_text("utf-8"))
        content["shards"][1]["index_sha256"] = index_sha256(path)
        manifest.write_text(json.dumps(content), "utf-8")
        with pytest.raises(ValueError, match=r"train-0001\.(index\.json|tar): "):
            list(Shards(server.address))


def test_local_addresses_work_too(folder: Path) -> None:
    address = f"file://{folder}"
    assert list(Shards(address)) == list(Shards(folder))
    assert local_folder(folder) == folder and remote_folder(folder) is None
    assert remote_folder(local_folder(address)) is not None
