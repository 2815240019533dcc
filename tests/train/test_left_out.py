"""One bad sample does not end a run: it is left out or cut, counted and named."""

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from multimodal.cli import main
from multimodal.data.shards import Shards, write_tar
from multimodal.model.lessons import check_texts
from multimodal.model.templates import Templates
from multimodal.train.examples import ShardDataset
from tests.launches import logged

pytestmark = pytest.mark.usefixtures("one_thread")


def png() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(data, "PNG")
    return data.getvalue()


def record(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


GOOD = {"png": png(), "json": record(captions=["a red square"])}
# What cannot be used, and how the reason begins to say so.
BAD: dict[str, tuple[dict[str, bytes], str]] = {
    "no-image": ({"png": b"not an image", "json": record(captions=["a"])}, "image"),
    "half": ({"png": png()[:40], "json": record(captions=["a"])}, "image"),
    "no-text": ({"png": png(), "json": record(captions=[])}, "no captions and no questions"),
    "blank": ({"png": png(), "json": record(captions=["  "])}, "no captions and no questions"),
    "empty-qa": ({"png": png(), "json": record(qa=[["", "yes"], ["a?", " "]])}, "no captions"),
    "numbers": ({"png": png(), "json": record(captions=[3])}, "a caption is not a string"),
    "no-json": ({"png": png(), "json": b"{"}, "not readable"),
    "latin": ({"png": png(), "txt": b"caf\xe9"}, "not UTF-8"),
}
LONG = {"png": png(), "json": record(captions=["a very long description " * 200])}


def shards(folder: Path, train: dict[str, dict[str, bytes]], val: int = 4) -> Path:
    folder.mkdir()
    write_tar(folder / "train-0000.tar", list(train.items()))
    write_tar(folder / "val-0000.tar", [(f"v{n}", GOOD) for n in range(val)])
    assert main(["data", "index", str(folder)]) == 0
    return folder


def dataset(folder: Path, **more: Any) -> ShardDataset:
    check: Callable[..., None] = partial(check_texts, Templates())
    return ShardDataset([Shards(folder, "train")], 16, "squash", seed=0, check=check, **more)


def test_a_bad_sample_is_replaced_by_the_one_after_it(tmp_path: Path) -> None:
    """kept + left out = given, and each is named with its reason."""
    samples = {f"{n:02}-good": GOOD for n in range(0, 40, 2)}
    samples |= {f"{2 * n + 1:02}-{name}": bad for n, (name, (bad, _)) in enumerate(BAD.items())}
    folder = shards(tmp_path / "s", dict(sorted(samples.items())))
    replaced, dropped = dataset(folder), dataset(folder, replaced=False)
    items = [(0, number) for number in range(len(replaced))]
    whole = replaced.collate([replaced[item] for item in items])
    few = dropped.collate([dropped[item] for item in items])
    assert len(whole) == len(samples) and len(few) == 20
    assert all("good" in key for key in [*whole.keys, *few.keys])
    names = {name for name, _ in BAD.items()}
    for batch in (whole, few):
        assert {note.key[3:] for note in batch.notes} == names
        assert all(BAD[note.key[3:]][1] in note.reason for note in batch.notes), batch.notes
    last = shards(tmp_path / "last", {"a": GOOD, "b": BAD["no-image"][0]})
    assert dataset(last)[(0, 1)]["key"] == "a", "the one after the last is the first"
    none = shards(tmp_path / "none", {"a": BAD["no-image"][0]})
    with pytest.raises(ValueError, match="none of 64 samples in a row can be used: .*image"):
        dataset(none)[(0, 0)]


def test_a_run_does_not_end_for_a_late_bad_sample(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The check before the first step reads 256 samples. These come later, but for one.

    Nor does it end where its card names the licences of the first samples.
    """
    samples = {f"{n:04}": GOOD for n in range(270)}
    samples["0001"] = BAD["no-json"][0]
    samples["0002"] = {**GOOD, "json": record(captions=["a red square"], license=["CC0", 1])}
    for n, (bad, _) in enumerate(BAD.values()):
        samples[f"{260 + n:04}"] = bad
    samples["0269"] = LONG
    folder, run = shards(tmp_path / "s", samples), tmp_path / "run"
    fit = ["fit", "--config", str(work / "joint.yaml"), "--output", str(run)]
    fit += ["--data.folders", f"[{folder}]", "--data.global_batch_size", "90"]
    fit += ["--trainer.limit_val_batches", "0", "--checkpoint_every", "100"]
    assert main([*fit, "--trainer.max_steps", "6"]) == 0
    assert len(logged(run)) == 6, "two epochs"
    lines = (run / "logs/left_out.jsonl").read_text("utf-8").splitlines()
    named = {line["key"]: line["reason"] for line in map(json.loads, lines)}
    assert sorted(named) == ["0001", *(f"{260 + n:04}" for n in range(len(BAD))), "0269"]
    assert "license: ['CC0', 1]" in (run / "model/README.md").read_text("utf-8")
    assert "is cut to fit row_length=192" in named["0269"] and len(lines) == len(named)
    error = capsys.readouterr().err
    assert f"{len(named)} samples were left out or cut" in error and f"{folder}: 0" in error


def test_a_folder_that_is_mostly_unusable_is_refused_before_the_first_step(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = {f"{n:02}": GOOD if n % 4 else LONG for n in range(20)}
    folder = shards(tmp_path / "s", samples)
    fit = ["fit", "--config", str(work / "joint.yaml"), "--output", str(tmp_path / "run")]
    assert main([*fit, "--data.folders", f"[{folder}]"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "5 of the first 20 samples cannot be used as they are: sample 00" in error
    assert "row_length=192" in error and not (tmp_path / "run/checkpoints").exists()
