"""Shards in a bucket, from a server that speaks S3 (moto)."""

from pathlib import Path

import pytest

from multimodal.cli import main
from multimodal.data.shards import Shards, index_shard, write_manifest, write_tar

moto = pytest.importorskip("moto.server")
s3fs = pytest.importorskip("s3fs")


def test_shards_in_a_bucket_are_those_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        bucket = s3fs.S3FileSystem(skip_instance_cache=True)
        bucket.mkdir("bucket")
        bucket.put(str(folder), "bucket/far", recursive=True)
        shards = Shards("s3://bucket/far", "train")
        assert [shards[n] for n in (7, 19, 0)] == [Shards(folder)[n] for n in (7, 19, 0)]
        assert list(shards) == list(Shards(folder))
        with pytest.raises(ValueError, match="s3://bucket/no/manifest.json: cannot be read"):
            Shards("s3://bucket/no")
        assert main(["data", "check", "s3://bucket/far"]) == 0
    finally:
        server.stop()
