"""Shards in a bucket, from a server that speaks S3 (moto)."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from multimodal.cli import main
from multimodal.data.shards import Shards, index_shard, write_manifest, write_tar

if TYPE_CHECKING:
    from s3fs import S3FileSystem


def test_shards_in_a_bucket_are_those_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: "S3FileSystem"
) -> None:
    folder = tmp_path / "far"
    folder.mkdir()
    monkeypatch.setenv("MULTIMODAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("multimodal.data.remote.pieces.PIECE", 1 << 12)
    for number in range(2):
        samples = [
            (f"s{number}{n}", {"jpg": bytes([n]) * (500 * n), "json": b"[]"}) for n in range(10)
        ]
        write_tar(folder / f"train-{number:04d}.tar", samples)
    write_manifest(folder, [index_shard(tar) for tar in sorted(folder.glob("*.tar"))])
    s3.put(str(folder), "bucket/far", recursive=True)
    shards = Shards("s3://bucket/far", "train")
    assert [shards[n] for n in (7, 19, 0)] == [Shards(folder)[n] for n in (7, 19, 0)]
    assert list(shards) == list(Shards(folder))
    with pytest.raises(ValueError, match="s3://bucket/no/manifest.json: cannot be read"):
        Shards("s3://bucket/no")
    assert main(["data", "check", "s3://bucket/far"]) == 0
