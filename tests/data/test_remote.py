"""Shards at an address are the shards themselves, fetched when they are read, and checked."""

from pathlib import Path

import fsspec
import pytest

from multimodal.cli import main
from multimodal.data.remote import local_folder
from multimodal.data.shards import DamagedShard, Shards, index_shard, write_manifest, write_tar
from multimodal.train.data import ShardData


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of three shards, of which only the address is used; and a cache of its own."""
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


def test_shards_are_fetched_when_they_are_read(far: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(far), "/bucket/far", recursive=True)
    shards = Shards("memory://bucket/far/", "train")
    fetched = shards.folder
    assert len(shards) == 9 and not list(fetched.glob("*.tar"))
    assert shards[4] == Shards(far)[4]
    assert [tar.name for tar in fetched.glob("*.tar")] == ["train-0001.tar"]
    assert list(shards) == list(Shards(far))
    memory.rm("/bucket/far/train-0002.tar")
    assert Shards("memory://bucket/far")[8] == Shards(far)[8], "what is here is not fetched again"
    assert not list(fetched.glob(".*.part"))
    with pytest.raises(ValueError, match="memory://bucket/nowhere/manifest.json: cannot be read"):
        Shards("memory://bucket/nowhere")


def test_what_was_damaged_on_the_way_is_noticed(far: Path) -> None:
    address = f"file://{far}"
    shard = far / "train-0001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:600] + bytes([data[600] ^ 1]) + data[601:])
    with pytest.raises(DamagedShard, match="SHA-256 differs"):
        Shards(address)[4]
    shard.unlink()
    (local_folder(address) / "train-0001.tar").unlink()
    with pytest.raises(ValueError, match=r"train-0001.tar: cannot be read"):
        Shards(address)[4]


def test_a_folder_that_was_built_anew_is_fetched_anew(far: Path) -> None:
    address = f"file://{far}"
    list(Shards(address))
    samples = list(Shards(far))
    write_tar(far / "train-0001.tar", [(s.key, s.members) for s in samples[5:2:-1]])
    write_manifest(far, [index_shard(tar) for tar in sorted(far.glob("*.tar"))])
    again = [sample.key for sample in Shards(address)]
    assert again == [s.key for s in [*samples[:3], *samples[5:2:-1], *samples[6:]]]
    # a file of that name in another folder sends nobody anywhere
    (far / ".address").write_text("memory://elsewhere")
    assert list(Shards(far))[4] == Shards(address)[4]


def test_training_reads_addresses(far: Path) -> None:
    address = f"file://{far}"
    data = ShardData([address, str(far)], augmented=[address])
    one, other = data.shards("train")
    assert [sample.key for sample in one] == [sample.key for sample in other]
