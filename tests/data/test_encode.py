"""Shards of codes: those the tokenizer gives, whole or resumed; refused where they do not fit."""

import csv
import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from multimodal.cli import main
from multimodal.data.encode import Encoding, codes_to_bytes, encode_shards
from multimodal.data.images import augment_image, fit_image, open_image, to_tensor
from multimodal.data.samples import Sample
from multimodal.data.shards import Shards, read_manifest
from multimodal.data.verify import check
from multimodal.scenes.dataset import write_scenes
from multimodal.seeds import sample_seed
from multimodal.tokenizers.detail import VQTokenizer, VQTokenizerConfig
from multimodal.tokenizers.image import ImageTokenizer, load_image_tokenizer
from tests.launches import run_processes, start

VIT = {"name": "vit", "dim": 32, "encoder_depth": 0, "decoder_depth": 1, "heads": 2}


def make_tokenizer(seed: int = 0) -> ImageTokenizer:
    torch.manual_seed(seed)
    config = VQTokenizerConfig(32, "squash", 8, VIT, {"name": "fsq", "levels": [4, 4, 4]})
    made = VQTokenizer(config).train()
    with torch.no_grad():
        for _ in range(20):
            made(torch.rand(16, 3, 32, 32) * 2 - 1)
    return ImageTokenizer(detail=made.eval())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codes")
    write_scenes(folder / "scenes", 24, 0, 32, shard_size=10)
    make_tokenizer().save(folder / "tokenizer")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_codes_are_those_of_the_images(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "codes"
    command = ["tokenizer", "encode", str(work / "scenes"), str(out), "--batch-size", "7"]
    assert main([*command, "--tokenizer", str(work / "tokenizer")]) == 0
    tokenizer = load_image_tokenizer(work / "tokenizer")
    assert list(check(out)) == []
    assert not (out / "encoding.json").exists()
    before, after = Shards(work / "scenes"), Shards(out)
    assert len(before) == len(after)
    for sample, encoded in zip(before, after, strict=True):
        image = to_tensor(fit_image(open_image(sample.image), 32, "squash"))
        assert encoded.key == sample.key and encoded.record == sample.record
        assert torch.equal(torch.from_numpy(encoded.codes), tokenizer.encode(image[None]))
    about = read_manifest(out)
    assert about["image_tokenizer"]["fingerprint"] == tokenizer.codes_fingerprint
    assert about["image_tokenizer"]["precision"] == "float32"
    assert about["license"] == read_manifest(work / "scenes")["license"]


def test_training_images_get_several_crops_and_others_one_encoding(
    work: Path, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    encoding = Encoding.for_tokenizer(tokenizer, encodings=3, crop_scale=0.5, mirror=True, seed=4)
    encode_shards(work / "scenes", tmp_path / "codes", tokenizer, encoding)
    sample = Shards(work / "scenes", "train")[5]
    codes = Shards(tmp_path / "codes", "train")[5].codes
    assert codes.shape == (3, 16)
    for number in range(3):
        rng = np.random.default_rng(sample_seed(4, number, sample.key))
        crop = augment_image(open_image(sample.image), 32, rng, (0.5, 1.0), flip=True)
        expected = tokenizer.encode(to_tensor(crop)[None])[0]
        assert torch.equal(torch.from_numpy(codes[number]), expected)
    assert Shards(tmp_path / "codes", "val")[0].codes.shape == (1, 16)


def test_a_stopped_run_can_go_on_and_gives_the_same_bytes(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer()
    encoding = Encoding.for_tokenizer(tokenizer)
    encode_shards(work / "scenes", tmp_path / "whole", tokenizer, encoding)
    done, encoded = 0, tokenizer.encode

    def fails(images: torch.Tensor) -> torch.Tensor:
        nonlocal done
        done += 1
        if done == 3:
            raise KeyboardInterrupt
        return encoded(images)

    out = tmp_path / "stopped"
    monkeypatch.setattr(tokenizer, "encode", fails)
    with pytest.raises(KeyboardInterrupt):
        encode_shards(work / "scenes", out, tokenizer, encoding, batch_size=10)
    left = set(files(out))
    assert "manifest.json" not in left and sum(name.endswith(".tar") for name in left) == 2
    # A kill also leaves a lock that nobody holds, half a shard, half of the settings.
    for name in (".lock", ".train-0002.tar.part", ".encoding.json.part"):
        (out / name).write_bytes(b"half")
    # Other options or other shards cannot continue the run.
    other = Encoding.for_tokenizer(tokenizer, precision="bfloat16")
    with pytest.raises(ValueError, match="was begun with other shards or options"):
        encode_shards(work / "scenes", out, tokenizer, other)
    kept = {name: (out / name).stat().st_mtime_ns for name in left if name.endswith(".tar")}
    encode_shards(work / "scenes", out, tokenizer, encoding)
    assert files(out) == files(tmp_path / "whole")
    assert kept == {name: (out / name).stat().st_mtime_ns for name in kept}, "not done twice"
    with pytest.raises(ValueError, match="it is complete"):
        encode_shards(work / "scenes", out, tokenizer, encoding)


def encode(work: Path, out: Path, *options: str) -> list[str]:
    command = ["tokenizer", "encode", str(work / "scenes"), str(out)]
    return [*command, "--tokenizer", str(work / "tokenizer"), *options]


@pytest.fixture(scope="module")
def whole(work: Path) -> dict[str, bytes]:
    """The files that one process writes."""
    threads = torch.get_num_threads()
    assert main(encode(work, work / "whole", "--threads", "1")) == 0
    torch.set_num_threads(threads)
    return files(work / "whole")


@pytest.mark.parametrize(
    "options",
    [
        ("--workers", "2"),
        pytest.param(("--workers", "2", "--engine", "ray"), marks=pytest.mark.slow),
    ],
)
def test_any_workers_give_the_same_bytes(
    work: Path, whole: dict[str, bytes], tmp_path: Path, options: tuple[str, ...], one_thread: None
) -> None:
    assert main(encode(work, tmp_path / "out", *options)) == 0
    assert files(tmp_path / "out") == whole


def test_ranks_give_the_same_bytes(work: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    ranks = [{"RANK": rank, "WORLD_SIZE": "2"} for rank in "01"]
    for started in (ranks, ranks[1:]):  # the second rank once more, when all is done
        ends = run_processes(encode(work, tmp_path / "out"), environments=started)
        assert {end.status for end in ends} == {0}, ends
    assert files(tmp_path / "out") == whole


def test_a_run_that_is_killed_three_times_gives_the_same_bytes(
    work: Path, whole: dict[str, bytes], tmp_path: Path, one_thread: None
) -> None:
    out, killed = tmp_path / "out", 0
    for shards, workers in ((1, "2"), (2, "1"), (3, "1")):
        process = start(encode(work, out, "--workers", workers))
        while process.is_alive() and len(list(out.glob("*.tar"))) < shards:
            time.sleep(0.005)
        with suppress(ProcessLookupError):  # it ended before
            os.killpg(process.pid or 0, signal.SIGKILL)
            killed += 1
        process.join()
    assert killed >= 1
    if not (out / "manifest.json").exists():  # the last kill may have come too late
        assert main(encode(work, out)) == 0
    assert files(out) == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encodings": 0}, "expected 1 to 1,000"),
        ({"crop_scale": 0.0}, r"share of the area in \(0, 1\]"),
        ({"encodings": 2}, "are for crops: give a crop_scale below 1"),
        ({"mirror": True}, "are for crops: give a crop_scale below 1"),
        ({"precision": "float16"}, "expected float32 or bfloat16"),
    ],
)
def test_invalid_options_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encoding.for_tokenizer(make_tokenizer(), **options)


def test_codes_are_stored_in_the_smallest_type() -> None:
    codes = np.arange(32).reshape(2, 16)
    for size, width in ((1 << 16, 2), (1 << 18, 4)):
        data = codes_to_bytes(codes + size - 32, size)
        assert len(data) == 128 + 32 * width
        assert (Sample("x", {"codes.npy": data}).codes == codes + size - 32).all()
    complete = codes_to_bytes(codes, 64)
    too_large = complete.replace(b"(2, 16)", b"(2, 999999999999)")
    for bad in (b"garbage", b"", complete[:-1], complete[:40], too_large, b"PK\x03\x04" + complete):
        with pytest.raises(ValueError, match="sample x: its codes are not readable"):
            Sample("x", {"codes.npy": bad}).codes  # noqa: B018
    with pytest.raises(ValueError, match="has no codes"):
        Sample("x", {"png": b""}).codes  # noqa: B018


def test_a_pickle_in_place_of_codes_is_not_run(tmp_path: Path) -> None:
    import io

    file = io.BytesIO()
    np.save(file, np.array([[[{"a": 1}]]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="not readable"):
        Sample("x", {"codes.npy": file.getvalue()}).codes  # noqa: B018


@pytest.fixture(scope="module")
def joint(work: Path) -> Path:
    """A joint configuration, and the shards as codes of its tokenizer: codes/."""
    tokenizer = make_tokenizer()
    encode_shards(work / "scenes", work / "codes", tokenizer, Encoding.for_tokenizer(tokenizer))
    text = ["--out", str(work / "text.json"), "--vocabulary-size", "320"]
    assert main(["tokenizer", "text", str(work / "scenes"), *text]) == 0
    module = {
        "class_path": "multimodal.train.joint.JointModule",
        "init_args": {
            "text_tokenizer": str(work / "text.json"),
            "image_tokenizer": str(work / "tokenizer"),
            "size": "tiny",
            "row_length": 192,
            "warmup_steps": 1,
            "captions_in_validation": 2,
            "answers_in_validation": 2,
            "drawings_in_validation": 1,
        },
    }
    trainer = {
        "max_steps": 3,
        "log_every_n_steps": 1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
    }
    data = {"folders": [str(work / "scenes")], "global_batch_size": 8, "workers": 0, "val_limit": 8}
    config = {"model": module, "data": data, "trainer": trainer}
    (work / "joint.yaml").write_text(yaml.safe_dump(config))
    return work


def test_training_on_codes_equals_training_on_their_images(joint: Path, tmp_path: Path) -> None:
    for name in ("scenes", "codes"):
        run = ["--output", str(tmp_path / name), "--data.folders", f"[{joint / name}]"]
        assert main(["fit", "--config", str(joint / "joint.yaml"), *run]) == 0
    tables = [(tmp_path / name / "logs/metrics.csv").read_text() for name in ("scenes", "codes")]
    rows = [[line.split(",") for line in table.splitlines()] for table in tables]
    cost = {rows[0][0].index(name) for name in ("tokens/s", "TFLOP/s", "memory_GB")}
    for images, codes in zip(*rows, strict=True):
        assert [x for n, x in enumerate(images) if n not in cost] == [
            x for n, x in enumerate(codes) if n not in cost
        ]


def test_documents_and_texts_train_beside_pairs_also_as_codes(joint: Path, tmp_path: Path) -> None:
    scenes = Shards(joint / "scenes")
    images = tmp_path / "images"
    images.mkdir()
    lines = list[dict[str, Any]]()
    for n in range(5):
        texts = [scenes[2 * n + i].record["captions"][0] for i in (0, 1)]
        for i in (0, 1):
            (images / f"{n}-{i}.png").write_bytes(scenes[2 * n + i].image)
        parts = [{"image": f"{n}-0.png"}, {"text": texts[0]}, {"image": f"{n}-1.png"}]
        lines += [{"content": [*parts, {"text": texts[1]}]}, {"text": " and ".join(texts)}]
    (images / "few.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["data", "build", str(images / "few.jsonl"), str(tmp_path / "docs")]) == 0
    encode = ["tokenizer", "encode", str(tmp_path / "docs"), str(tmp_path / "codes")]
    assert main([*encode, "--tokenizer", str(joint / "tokenizer")]) == 0
    assert main(["data", "check", str(tmp_path / "codes"), "--decode"]) == 0
    totals = []
    for pairs, documents in (("scenes", "docs"), ("codes", "codes")):
        folders = f"[{joint / pairs}, {tmp_path / documents}]"
        out = tmp_path / f"run-{pairs}"
        run = ["--output", str(out), "--data.folders", folders, "--data.weights", "[1, 1]"]
        fit = ["fit", "--config", str(joint / "joint.yaml"), *run]
        assert main([*fit, "--trainer.limit_val_batches", "0"]) == 0
        rows = csv.DictReader((out / "logs/metrics.csv").read_text().splitlines())
        totals.append([row["train/total"] for row in rows])
        assert {"caption", "text", "image", "alignment"} <= {
            name.removeprefix("train/") for name in rows.fieldnames or ()
        }
    assert totals[0] == totals[1] and len(totals[0]) == 3


def test_plain_texts_go_with_codes_but_no_images_among_them(joint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(next(iter(Shards(joint / "scenes", "train"))).image)
    parts: list[Any] = [{"text": "a red bus"}, {"text": "two cats"}, {"image": "a.png"}]
    rows = [{"content": content} for content in (parts[:1], parts[1:2], parts)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "build", str(tmp_path / "t.jsonl"), str(tmp_path / "texts")]) == 0
    out, folders = tmp_path / "run", f"[{joint / 'codes'}, {tmp_path / 'texts'}]"
    fit = ["fit", "--config", str(joint / "joint.yaml"), "--output", str(out)]
    run = [*fit, "--data.folders", folders, "--data.weights", "[1, 1]"]
    assert main([*run, "--trainer.limit_val_batches", "0"]) == 0
    losses = list(csv.DictReader((out / "logs/metrics.csv").read_text().splitlines()))
    assert all(float(row["train/text"]) > 0 and float(row["train/caption"]) > 0 for row in losses)
    assert "other folders have codes" in (out / "logs/left_out.jsonl").read_text()


def test_codes_that_do_not_fit_are_refused(
    joint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fit(*arguments: str) -> str:
        fit = ["fit", "--config", str(joint / "joint.yaml"), "--output", str(tmp_path / "run")]
        assert main([*fit, *arguments]) != 0
        return capsys.readouterr().err

    codes = str(joint / "codes")
    assert "encode all folders or none" in fit("--data.folders", f"[{codes}, {joint / 'scenes'}]")
    folders = ["--data.folders", f"[{codes}]"]
    assert "cannot be cropped" in fit(*folders, "--data.crop_scale", "0.5")
    make_tokenizer(seed=1).save(tmp_path / "other")
    error = fit(*folders, "--model.init_args.image_tokenizer", str(tmp_path / "other"))
    assert "its codes are of another image tokenizer" in error and "encode the shards anew" in error
    # A tokenizer that differs in its decoder only makes the same codes.
    sharper = make_tokenizer()
    with torch.no_grad():
        sharper.detail.decoder.last_layer.mul_(2)
    sharper.save(tmp_path / "sharper")
    fits = ["fit", "--config", str(joint / "joint.yaml"), "--output", str(tmp_path / "fits")]
    taken = ["--model.init_args.image_tokenizer", str(tmp_path / "sharper")]
    assert main([*fits, *folders, *taken, "--trainer.max_steps", "1"]) == 0
    # If the manifest was changed by hand, the codes do not match it.
    shutil.copytree(codes, tmp_path / "codes")
    manifest = tmp_path / "codes/manifest.json"
    about = json.loads(manifest.read_text())
    for change, message in (
        ({"codes_per_image": 5}, "the manifest says 5 of"),
        ({"codebook_size": 2}, "of 2"),
    ):
        forged = about | {"image_tokenizer": about["image_tokenizer"] | change}
        manifest.write_text(json.dumps(forged))
        assert message in fit("--data.folders", f"[{tmp_path / 'codes'}]")


def test_index_and_check_read_codes(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, out = make_tokenizer(), tmp_path / "codes"
    encode_shards(work / "scenes", out, tokenizer, Encoding.for_tokenizer(tokenizer))
    before = read_manifest(out)
    assert main(["data", "index", str(out)]) == 0
    assert read_manifest(out) == before
    assert main(["data", "check", "--decode", str(out)]) == 0
    capsys.readouterr()


def test_a_locked_folder_and_a_missing_split_are_errors(work: Path, tmp_path: Path) -> None:
    import fcntl

    tokenizer, out = make_tokenizer(), tmp_path / "codes"
    out.mkdir()
    with open(out / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is writing to it"):
            encode_shards(work / "scenes", out, tokenizer, Encoding.for_tokenizer(tokenizer))
    cropped = Encoding.for_tokenizer(tokenizer, crop_scale=0.5, train_split="all")
    with pytest.raises(ValueError, match="no split 'all' to crop; it has heldout, train, val"):
        encode_shards(work / "scenes", out, tokenizer, cropped)


def test_bfloat16_gives_similar_codes_and_is_in_the_manifest(work: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    for precision in ("float32", "bfloat16"):
        encoding = Encoding.for_tokenizer(tokenizer, precision=precision)
        encode_shards(work / "scenes", tmp_path / precision, tokenizer, encoding)
    exact, rounded = (
        np.concatenate([sample.codes for sample in Shards(tmp_path / precision)])
        for precision in ("float32", "bfloat16")
    )
    assert 0.9 < (exact == rounded).mean() < 1
    assert read_manifest(tmp_path / "bfloat16")["image_tokenizer"]["precision"] == "bfloat16"


def test_an_image_tokenizer_cannot_be_trained_on_codes(
    joint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = {
        "class_path": "multimodal.train.tokenizers.detail.DetailModule",
        "init_args": {"tokenizer": {"image_size": 32, "downsample": 8, "autoencoder": VIT}},
    }
    config = yaml.safe_load((joint / "joint.yaml").read_text()) | {"model": module}
    config["data"]["folders"] = [str(joint / "codes")]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    fit = ["fit", "--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "run")]
    assert main(fit) == 1
    assert "an image tokenizer is trained on images" in capsys.readouterr().err
