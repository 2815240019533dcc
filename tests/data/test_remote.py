"""Shards at an address are downloaded when they are read, and checked."""

from pathlib import Path

import fsspec
import pytest

from multimodal.cli import main
from multimodal.data.remote import local_folder
from multimodal.data.shards import DamagedShard, Shards, index_shard, write_manifest, write_tar
from multimodal.train.data import ShardData


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of three shards, to be read by its address, and a separate cache."""
    monkeypatch.setenv("MULTIMODAL_CACHE", str(tmp_path / "cache"))
    assert main(["data", "scenes", str(tmp_path / "scenes"), "--count", "9", "--size", "16"]) == 0
    samples = list(Shards(tmp_path / "scenes", "train"))
    folder = tmp_path / "far"
    folder.mkdir()
    for number in range(3):
        chosen = [(s.key, s.members) for s in samples[3 * number : 3 * number + 3]]
        write_tar(folder / f"train-{number:04d}.tar", chosen)
    write_manifest(folder, [index_shard(tar) for tar in sorted(folder.glob("*.tar"))])
    return folder


def test_shards_are_downloaded_when_they_are_read(remote: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(remote), "/bucket/far", recursive=True)
    shards = Shards("memory://bucket/far/", "train")
    mirror = shards.folder
    assert len(shards) == 9 and not list(mirror.glob("*.tar"))
    assert shards[4] == Shards(remote)[4]
    assert [tar.name for tar in mirror.glob("*.tar")] == ["train-0001.tar"]
    assert list(shards) == list(Shards(remote))
    memory.rm("/bucket/far/train-0002.tar")
    assert Shards("memory://bucket/far")[8] == Shards(remote)[8], (
        "local shards are not downloaded again"
    )
    assert not list(mirror.glob(".*.part"))
    with pytest.raises(ValueError, match="memory://bucket/nowhere/manifest.json: cannot be read"):
        Shards("memory://bucket/nowhere")


def test_damage_of_a_download_is_noticed(remote: Path) -> None:
    address = f"file://{remote}"
    shard = remote / "train-0001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:600] + bytes([data[600] ^ 1]) + data[601:])
    with pytest.raises(DamagedShard, match="SHA-256 differs"):
        Shards(address)[4]
    shard.unlink()
    (local_folder(address) / "train-0001.tar").unlink()
    with pytest.raises(ValueError, match=r"train-0001.tar: cannot be read"):
        Shards(address)[4]


def test_a_rebuilt_folder_is_downloaded_again(remote: Path) -> None:
    address = f"file://{remote}"
    list(Shards(address))
    samples = list(Shards(remote))
    write_tar(remote / "train-0001.tar", [(s.key, s.members) for s in samples[5:2:-1]])
    write_manifest(remote, [index_shard(tar) for tar in sorted(remote.glob("*.tar"))])
    again = [sample.key for sample in Shards(address)]
    assert again == [s.key for s in [*samples[:3], *samples[5:2:-1], *samples[6:]]]
    # In a folder that is not a mirror, this file has no effect.
    (remote / ".address").write_text("memory://elsewhere")
    assert list(Shards(remote))[4] == Shards(address)[4]


def test_training_reads_addresses(remote: Path) -> None:
    address = f"file://{remote}"
    data = ShardData([address, str(remote)], augmented=[address])
    first, second = data.shards("train")
    assert [sample.key for sample in first] == [sample.key for sample in second]
