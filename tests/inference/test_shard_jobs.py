"""Captions and embeddings of shard folders: those of the images, whoever does them, done once."""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from multimodal import load
from multimodal.cli import main
from multimodal.data.encode import Encoding, encode_shards
from multimodal.data.shards import Shards, index_shard, write_manifest, write_tar
from multimodal.tokenizers.image import ImageTokenizer

RAY = pytest.param(("--workers", "2", "--engine", "ray"), marks=pytest.mark.slow)
ENGINES = (("--workers", "2"), RAY)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of four scenes; the second has an image that is none."""
    work = tmp_path_factory.mktemp("bulk")
    assert main(["data", "scenes", str(work / "scenes"), "--count", "12", "--size", "32"]) == 0
    samples = list(Shards(work / "scenes", "train"))
    folder = work / "source"
    folder.mkdir()
    for number in range(3):
        members = [(s.key, dict(s.members)) for s in samples[4 * number : 4 * number + 4]]
        if number == 1:
            members[2][1]["png"] = b"no picture"
        write_tar(folder / f"train-{number:04d}.tar", members)
    write_manifest(folder, [index_shard(tar) for tar in sorted(folder.glob("*.tar"))])
    return folder


def run(verb: str, model: Path, source: Path, out: Path, *options: str) -> int:
    line = [verb, "--model", str(model), "--data", str(source), "--out-dir", str(out)]
    return main([*line, "--batch-size", "3", *options])


def lines(out: Path) -> list[dict[str, object]]:
    files = sorted(out.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def hashes(out: Path) -> dict[str, str]:
    return {p.name: sha256(p.read_bytes()).hexdigest() for p in out.iterdir()}


@pytest.fixture(scope="module")
def captions(
    source: Path, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("captions") / "out"
    assert run("caption", tiny_model_folder, source, out, "--max-tokens", "6") == 1
    return out


def test_captions_are_those_of_the_images(
    captions: Path, source: Path, tiny_model_folder: Path
) -> None:
    samples, found = list(Shards(source)), lines(captions)
    assert [line["key"] for line in found] == [sample.key for sample in samples]
    assert "not an image that can be read" in str(found[6]["error"])
    images = [sample.image for number, sample in enumerate(samples) if number != 6]
    expected = load(tiny_model_folder).caption(images, max_tokens=6)
    assert [line["caption"] for line in found if "error" not in line] == expected
    assert json.loads((captions / "job.json").read_text())["max_tokens"] == 6


def test_images_are_encoded_in_batches_and_written_as_if_alone(
    source: Path, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [sample for number, sample in enumerate(Shards(source)) if number != 6]
    model = load(tiny_model_folder)
    alone = [model.caption(sample.image, max_tokens=6) for sample in samples]
    sizes, encode = list[int](), ImageTokenizer.encode

    def counted(
        self: ImageTokenizer, images: Tensor, levels: Sequence[str] | None = None
    ) -> Tensor:
        sizes.append(len(images))
        return encode(self, images, levels)

    monkeypatch.setattr(ImageTokenizer, "encode", counted)
    assert run("caption", tiny_model_folder, source, tmp_path / "out", "--max-tokens", "6") == 1
    found = [line["caption"] for line in lines(tmp_path / "out") if "error" not in line]
    assert found == alone
    assert sizes == [3, 1, 2, 1, 3, 1], "four images a shard, three at a time; one is none"


@pytest.mark.parametrize("options", ENGINES)
def test_who_does_it_changes_no_byte(
    options: tuple[str, ...], captions: Path, source: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run("caption", tiny_model_folder, source, out, "--max-tokens", "6", *options) == 1
    assert hashes(out) == hashes(captions)


@pytest.mark.parametrize("options", ENGINES)
def test_embeddings_have_the_same_bytes_from_any_number_of_workers(
    options: tuple[str, ...], source: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    assert run("embed", tiny_model_folder, source, tmp_path / "one") == 1
    assert run("embed", tiny_model_folder, source, tmp_path / "two", *options) == 1
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_a_job_goes_on_and_is_not_mixed_with_another(
    captions: Path, source: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hashes(captions)
    done = captions / "train-0000.jsonl"
    written = done.stat().st_mtime_ns
    (captions / "train-0001.jsonl").unlink()  # what a kill would have left
    (captions / ".train-0001.jsonl.part").write_text("half")
    assert run("caption", tiny_model_folder, source, captions, "--max-tokens", "6") == 1
    assert hashes(captions) == before and done.stat().st_mtime_ns == written
    assert "11 of 12 images; 1 could not be read" in capsys.readouterr().out
    assert run("caption", tiny_model_folder, source, captions, "--max-tokens", "7") == 1
    assert "begun with other shards or options" in capsys.readouterr().err
    assert run("embed", tiny_model_folder, source, captions) == 1
    assert hashes(captions) == before


def test_embeddings_of_images_and_of_their_codes(
    source: Path, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("embed", tiny_model_folder, source, tmp_path / "rows") == 1
    model = load(tiny_model_folder)
    samples = list(Shards(source))
    found = lines(tmp_path / "rows")
    rows = {file.stem: np.load(file) for file in sorted((tmp_path / "rows").glob("*.npy"))}
    assert [len(one) for one in rows.values()] == [4, 3, 4]
    for number, (sample, line) in enumerate(zip(samples, found, strict=True)):
        if number == 6:
            assert "error" in line and "row" not in line
            continue
        mine = rows[f"train-{number // 4:04d}"][line["row"]]
        np.testing.assert_allclose(mine, model.embed([sample.image])[0], atol=1e-5)
    # the same from codes; of another tokenizer they are refused
    good = tmp_path / "good"
    good.mkdir()
    write_tar(good / "train-0000.tar", [(s.key, s.members) for s in samples[:4]])
    write_manifest(good, [index_shard(good / "train-0000.tar")])
    encoding = Encoding.for_tokenizer(model.image_tokenizer)
    encode_shards(good, tmp_path / "codes", model.image_tokenizer, encoding)
    assert run("embed", tiny_model_folder, tmp_path / "codes", tmp_path / "again") == 0
    np.testing.assert_allclose(np.load(tmp_path / "again/train-0000.npy"), rows["train-0000"])
    capsys.readouterr()
    assert run("embed", Path("starter"), tmp_path / "codes", tmp_path / "other") == 1
    assert "its codes are of another image tokenizer" in capsys.readouterr().err


def test_wrong_arguments(
    source: Path, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("caption", tiny_model_folder, source, tmp_path / "x", "--split", "val") == 1
    assert "no split 'val'; it has train" in capsys.readouterr().err
    assert main(["caption", "--data", str(source)]) == 1
    assert "give --out-dir" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").touch()
    assert run("caption", tiny_model_folder, source, tmp_path / "full") == 1
    assert "not empty" in capsys.readouterr().err
    for verb in ("caption", "embed"):
        with pytest.raises(SystemExit, match="2"):
            main([verb, "a.jpg", "--data", str(source)])
