"""An address is read as a shard folder, or refused by name. It never becomes a local folder."""

import os
from pathlib import Path

import fsspec
import pytest
import yaml

from multimodal.cli import main
from multimodal.data.builder.build import build_shards
from multimodal.data.encode import encode_shards
from multimodal.data.shards import Shards, read_manifest
from multimodal.files import address_of, atomic_folder, local_path, new_folder, open_file
from tests.photos import picture

FAR = "memory://elsewhere/far"
NOWHERE = "memory://elsewhere/nowhere"
MODEL = ("--model", "starter")

# Each with an address in one place, where the verb takes only what is on this machine.
REFUSED = [
    ["data", "build", FAR, "out"],
    ["data", "build", "photos", FAR],
    ["data", "build", "t.csv", "out", "--images", FAR],
    ["data", "index", FAR],
    ["data", "index", "shards", "--out", FAR],
    ["data", "questions", "shards", FAR],
    ["data", "scenes", FAR, "--count", "1"],
    ["data", "report", "shards", "--out", f"{FAR}/report.html"],
    ["tokenizer", "text", "shards", "--out", f"{FAR}/text.json"],
    ["tokenizer", "encode", "shards", FAR, "--tokenizer", "starter"],
    ["tokenizer", "encode", "shards", "out", "--tokenizer", FAR],
    ["tokenizer", "import", FAR, "out"],
    ["tokenizer", "import", "a.pt", FAR],
    ["tokenizer", "join", FAR, "starter", "--out", "out"],
    ["export", "hf", FAR, "out"],
    ["export", "hf", "starter", FAR],
    ["caption", FAR, *MODEL],
    ["caption", "photos/a.png", "--model", FAR],
    ["caption", "--data", "shards", "--out-dir", FAR, *MODEL],
    ["embed", "photos", "--out", f"{FAR}/rows.npy", *MODEL],
    ["embed", "--text", f"{FAR}/lines.txt", "--out", "rows.npy", *MODEL],
    ["search", "dog", "--images", FAR, *MODEL],
    ["draw", "dog", "--out", f"{FAR}/dog.png", *MODEL],
    ["eval", "captioning", *MODEL, "--data", "shards", "--output", f"{FAR}/report.json"],
    ["eval", "captioning", *MODEL, "--data", "shards", "--page", f"{FAR}/report.html"],
    ["data", "duplicates", "shards", "--output", f"{FAR}/copies.jsonl"],
    ["index", "photos", FAR, *MODEL],
    ["search", "dog", "--index", FAR, *MODEL],
    ["caption", "photos/a.png", "--index", FAR, *MODEL],
    ["caption", "photos/a.png", "--adapter", FAR, *MODEL],
    ["draw", "dog", "--out", "dog.png", "--sign", FAR, *MODEL],
    ["prefer", "starter", "--data", "shards", "--out", FAR],
    ["quantize", FAR, "out"],
    ["quantize", "starter", FAR],
    ["export", "gguf", "starter", f"{FAR}/model.gguf"],
    ["export", "model", "starter", FAR],
    ["push", "starter", "me/name", "--results", f"{FAR}/report.json"],
    ["provenance", FAR],
    ["log", "report", FAR],
    ["log", "prune", FAR, "--before", "2026-01-01"],
    ["drift", FAR, FAR],
    ["serve", "starter", "--record", FAR],
    ["serve", "starter", "--record", FAR, "--workers", "2"],
    ["serve", "starter", "--filters", FAR],
    ["serve", "starter", "--sign", FAR],
    ["serve", "starter", "--record", "r.jsonl", "--drift-reference", FAR],
    ["fit", "--config", "fit.yaml", "--output", FAR],
    ["fit", "--config", "fit.yaml", "--init_from", FAR],
    ["fit", "--config", FAR],
    ["info", "--config", FAR],
    ["search", FAR, "--images", "photos", *MODEL],
    ["prompts", "--prompts", FAR],
]
# What works at an address as on this machine.
READ = [
    ["info", FAR],
    ["data", "check", FAR],
    ["data", "duplicates", FAR],
    ["data", "questions", FAR, "asked"],
    ["data", "report", FAR, "--out", "report.html"],
    ["tokenizer", "text", FAR, "--out", "text.json", "--vocabulary-size", "300"],
    ["tokenizer", "encode", FAR, "codes", "--tokenizer", "starter"],
    ["caption", "--data", FAR, "--out-dir", "captions", *MODEL, "--max-tokens", "2"],
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photos, shards of them, and the same shards at an address."""
    folder = tmp_path_factory.mktemp("addresses")
    (folder / "photos").mkdir()
    for name in "abc":
        (folder / "photos" / f"{name}.png").write_bytes(picture(ord(name)))
        (folder / "photos" / f"{name}.txt").write_text(f"a photo of a dog {name}", "utf-8")
    (folder / "t.csv").write_text("image,caption\na.png,one\n", "utf-8")
    config = {
        "model": {
            "class_path": "multimodal.train.joint.JointModule",
            "init_args": {
                "text_tokenizer": "starter", "image_tokenizer": "starter", "size": "tiny",
                "warmup_steps": 1,
            },
        },
        "data": {"folders": ["shards"], "global_batch_size": 2, "workers": 0},
        "trainer": {"max_steps": 1},
    }  # fmt: skip
    (folder / "fit.yaml").write_text(yaml.safe_dump(config), "utf-8")
    build_shards(folder / "photos", folder / "shards")
    fsspec.filesystem("memory").put(str(folder / "shards"), "/elsewhere/far", recursive=True)
    return folder


@pytest.fixture(autouse=True)
def here(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTIMODAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(work)


def no_local_folder() -> None:
    assert not [name for name in os.listdir() if ":" in name]


@pytest.mark.parametrize("argv", REFUSED, ids=" ".join)
def test_what_has_to_be_local_is_refused_by_name(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"multimodal {argv[0]}: error: {FAR}")
    assert "an address" in error or "from the Hugging Face Hub" in error
    no_local_folder()


@pytest.mark.parametrize("argv", READ, ids=" ".join)
def test_shard_folders_are_read_at_addresses(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 0
    wrong = [NOWHERE if argument == FAR else argument for argument in argv]
    assert main([f"x{a}" if a in ("asked", "codes", "captions") else a for a in wrong]) == 1
    assert f"{NOWHERE}/manifest.json: cannot be read" in "".join(capsys.readouterr())
    no_local_folder()


def test_file_addresses_are_read_like_others(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"file://{work}/shards"
    assert main(["data", "check", address]) == 0
    assert main(["data", "check", f"{address}x"]) == 1
    assert "shardsx/manifest.json: cannot be read" in capsys.readouterr().err
    assert list(Shards(address)) == list(Shards(work / "shards"))


def test_a_path_object_of_an_address_is_the_address(work: Path) -> None:
    assert read_manifest(Path(FAR)) == read_manifest(work / "shards")
    assert list(Shards(Path(FAR))) == list(Shards(work / "shards"))
    assert address_of(Path("s3://b/x")) == address_of("s3://b/x") == "s3://b/x"
    assert address_of("simplecache::s3://b/x") is not None
    for local in ("C:/photos", "photos/a:b", "/data/x", "a.jpg", "", "timm:net=/a/b.pth"):
        assert address_of(local) is None, local


def test_what_writes_refuses_addresses(work: Path) -> None:
    with pytest.raises(ValueError, match=f"^{FAR}: an address"):
        local_path(Path(FAR))
    for write in (atomic_folder, new_folder):
        with pytest.raises(ValueError, match=f"^{FAR}: an address"), write(Path(FAR)):
            pass
    with pytest.raises(ValueError, match=f"^{FAR}: an address"):
        open_file(FAR)
    with pytest.raises(ValueError, match=f"^{FAR}: an address"):
        encode_shards(work / "shards", FAR, None, None)  # type: ignore[arg-type]
    no_local_folder()


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> object:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", fails)
    with pytest.raises(ValueError, match=r"s3://b/x/manifest.json: .*s3fs.*multimodal\[s3\]"):
        Shards("s3://b/x")
