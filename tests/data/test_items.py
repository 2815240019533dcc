"""Shards from what a program has: torch Datasets, iterables, Datasets of Hugging Face, the Hub."""

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset

import multimodal
from multimodal.cli import main
from multimodal.data.builder.build import Report
from multimodal.data.builder.items import ItemSource
from multimodal.data.builder.sources import open_source
from multimodal.data.images import open_image
from multimodal.data.samples import Sample
from multimodal.hub.address import HubName
from tests.photos import hashes, picture, samples

datasets = pytest.importorskip("datasets")


def built(source: Any, out: Path, **options: Any) -> tuple[dict[str, Sample], Report]:
    """The samples by their first caption or label, and the report."""
    report = multimodal.build_shards(source, out, **options)
    assert report is not None and report.total == report.kept + report.rejected
    found = samples(out).values()
    by_text = {(s.record["captions"] or [s.record.get("label")])[0]: s for s in found}
    assert len(by_text) == report.kept
    return by_text, report


def problems(out: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    return {line["sample"]: f"{line['reason']}: {line['detail']}" for line in lines}


class Photos(Dataset[Any]):
    """A torch Dataset with some items that fail in different ways. It has no __iter__."""

    classes = ["cat", "dog"]

    def __len__(self) -> int:
        return 9

    def __getitem__(self, number: int) -> Any:
        data = picture(number)
        match number:
            case 3:
                raise OSError("disk gone")
            case 4:
                return data[:60], "a cut file"
            case 5:
                return data
            case 6:
                return torch.rand(5, 8, 8), "five channels"
            case 7:
                return data, [3]
            case 8:
                return data, 1
        return data, f"text {number}"


def test_a_torch_dataset_whose_bad_items_are_named_and_left_out(tmp_path: Path) -> None:
    found, report = built(Photos(), tmp_path / "out")
    assert set(found) == {"text 0", "text 1", "text 2", "dog"}, "a number is a class"
    assert all(found[f"text {n}"].image == picture(n) for n in range(3)), "bytes as they are"
    said = problems(tmp_path / "out")
    assert set(said) == {f"item {n}" for n in (3, 4, 5, 6, 7)}
    assert said["item 3"] == "unreadable item: OSError: disk gone"
    assert said["item 4"].startswith("unreadable image: truncated PNG")
    assert said["item 5"] == "no image: a bytes; expected (image, texts), or a mapping"
    assert "with 1 to 4 channels" in said["item 6"]
    assert said["item 7"] == "unreadable text: a caption is not a string"
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["source"].endswith("test_items.Photos")
    part, _ = built(Subset(Photos(), [8, 2]), tmp_path / "part")
    assert set(part) == {"dog", "text 2"}, "a Subset has the classes of its Dataset"


def test_any_number_of_processes_gives_the_same_shards(tmp_path: Path) -> None:
    for workers in (1, 2):
        built(Photos(), tmp_path / str(workers), workers=workers, image_size=8)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")


@pytest.mark.parametrize("kind", ["path", "str", "pillow", "numpy", "torch", "float", "file", "hf"])
def test_pixels_come_through_unchanged(kind: str, tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/a.png").write_bytes(picture(5))
    pixels = np.asarray(open_image(picture(5)))
    image = {
        "path": tmp_path / "dir/a.png",
        "str": "a.png",
        "pillow": Image.fromarray(pixels),
        "numpy": pixels,
        "torch": torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        "float": torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255,
        "file": bytearray(picture(5)),
        "hf": {"bytes": None, "path": "a.png"},
    }[kind]
    found, _ = built([(image, "it")], tmp_path / "out", images=tmp_path / "dir")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(found["it"].image))), pixels)
    assert found["it"].key == ("a" if kind in ("path", "str", "hf") else "00000000")


def test_an_item_may_have_all_fields_of_a_record(tmp_path: Path) -> None:
    item = {
        "img": picture(0),
        "sentence": "one",
        "qa": [["how many?", "two"]],
        "label": np.int64(7),
        "box": torch.tensor([1, 2]),
        "mask": np.zeros((4, 4)),
    }
    texts = {"captions": ["two", "three"], "license": "CC0"}
    found, report = built([item, (picture(1), texts), (picture(2), ("a", "b"))], tmp_path / "out")
    assert found["one"].record == {
        "captions": ["one"],
        "qa": [["how many?", "two"]],
        "label": 7,
        "box": [1, 2],
    }
    assert report.ignored == {"fields mask (ndarray)": 1}, "no megabytes in a record"
    assert found["two"].record == texts and found["a"].record == {"captions": ["a", "b"]}
    named = [{"a": picture(0), "b": "text"}]
    assert "text" in built(named, tmp_path / "x", image_column="a", text_column="b")[0]


class Stream(IterableDataset[Any]):
    """It has a length, and a __getitem__ that torch's class raises an error in."""

    def __init__(self, fails_at: int = -1) -> None:
        self.fails_at = fails_at

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Any]:
        for number in range(4):
            if number == self.fails_at:
                raise ConnectionError("the line is dead")
            yield picture(number), f"text {number}"


def test_a_stream_is_read_in_its_order_and_its_end_is_never_lost(tmp_path: Path) -> None:
    found, _ = built(Stream(), tmp_path / "out")
    assert list(found) == [f"text {number}" for number in range(4)]
    with pytest.raises(ValueError, match="item 2 could not be read .*the line is dead"):
        multimodal.build_shards(Stream(fails_at=2), tmp_path / "broken")
    assert not (tmp_path / "broken/manifest.json").exists()
    again, _ = built((pair for pair in Stream()), tmp_path / "broken")
    assert set(again) == set(found), "after an error the same folder can be built"


def test_splits_keep_their_names(tmp_path: Path) -> None:
    source = {"train": [(picture(0), "a")], "test": Stream(), "validation": [3]}
    _, report = built(source, tmp_path / "out")
    assert report.splits == {"train": 1, "test": 4}
    assert problems(tmp_path / "out") == {
        "validation: item 0": "no image: a int; expected (image, texts), or a mapping"
    }


@pytest.mark.parametrize("source", [3, None, b"bytes", {"train": "a.csv"}])
def test_what_is_no_source_is_refused(source: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no source: expected a path, an address, a Dataset"):
        multimodal.build_shards(source, tmp_path / "out")


# --- Hugging Face's datasets ----------------------------------------------------------------------


def of_hugging_face(count: int = 5) -> Any:
    features = datasets.Features(
        image=datasets.Image(),
        text=datasets.Value("string"),
        label=datasets.ClassLabel(names=["cat", "dog"]),
    )
    rows = {
        "image": [{"bytes": picture(n), "path": f"p{n}.png"} for n in range(count - 1)]
        + [{"bytes": picture(9)[:50], "path": "cut.png"}],
        "text": [f"text {n}" for n in range(count)],
        "label": [n % 3 - 1 for n in range(count)],  # -1: not known
    }
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    both = {"train": of_hugging_face(), "test": of_hugging_face().select([1, 2])}
    folder = tmp_path / "saved"
    datasets.DatasetDict(both).save_to_disk(folder, num_shards={"train": 2, "test": 1})
    return folder


EXPECTED = {
    "text 0": None,
    "text 1": "cat",
    "text 2": "dog",
    "text 3": None,
}


@pytest.mark.parametrize("kind", ["saved", "object", "stream", "torch format", "parquet"])
def test_all_forms_of_a_dataset_give_the_same_samples(
    kind: str, saved: Path, tmp_path: Path
) -> None:
    dataset = of_hugging_face()
    dataset.to_parquet(tmp_path / "d.parquet")
    source = {
        "saved": saved / "train",
        "object": dataset,
        "stream": dataset.to_iterable_dataset(),
        "torch format": dataset.with_format("torch"),
        "parquet": tmp_path / "d.parquet",
    }[kind]
    found, report = built(source, tmp_path / "out")
    assert {text: sample.record.get("label") for text, sample in found.items()} == EXPECTED
    assert all(sample.image == picture(int(text[-1])) for text, sample in found.items())
    assert {sample.key for sample in found.values()} == {"p0", "p1", "p2", "p3"}
    assert report.reasons == {"unreadable image": 1}


def test_a_saved_folder_of_splits_by_the_command(saved: Path, tmp_path: Path) -> None:
    next(saved.glob("train/data-*")).with_name("cache-0123.arrow").write_bytes(b"not of the data")
    assert main(["data", "build", str(saved), str(tmp_path / "out")]) == 0
    test = samples(tmp_path / "out", "test").values()
    assert [sample.record["captions"] for sample in test] == [["text 1"], ["text 2"]]
    assert len(samples(tmp_path / "out", "train")) == 4


def test_a_saved_folder_that_is_damaged(saved: Path, tmp_path: Path) -> None:
    first, second = sorted(saved.glob("train/*.arrow"))
    first.write_bytes(first.read_bytes()[:-300])
    second.unlink()
    _, report = built(saved, tmp_path / "out")
    assert report.splits == {"test": 2}, "the other split is read"
    assert report.reasons == {"unreadable row": 1, "unreadable table": 1}
    (saved / "test/state.json").write_text('{"_data_files": [{"filename": "../../etc/passwd"}]}')
    with pytest.raises(ValueError, match="state.json: _data_files: expected a list of names"):
        multimodal.build_shards(saved, tmp_path / "evil")


def test_a_split_of_a_saved_folder_that_is_missing_is_named(saved: Path, tmp_path: Path) -> None:
    (saved / "test/state.json").unlink()
    for _ in range(2):
        with pytest.raises(ValueError, match="saved/test: dataset_dict.json lists this split"):
            multimodal.build_shards(saved, tmp_path / "out")
        shutil.rmtree(saved / "test", ignore_errors=True)


def test_a_file_of_the_cache_keeps_its_split(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    for name in ("beans-train.arrow", "beans-validation-00000-of-00002.arrow"):
        shutil.copy(next(saved.glob("test/*.arrow")), tmp_path / "cache" / name)
    report = multimodal.build_shards(tmp_path / "cache", tmp_path / "out")
    assert report is not None and report.splits == {"train": 2, "validation": 2}


# --- The Hub --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("hf://datasets/user/name", (HubName("user/name"), None)),
        ("hf:/datasets/user/name/small@v1.0", (HubName("user/name", "v1.0"), "small")),
        ("hf://datasets/u/n@refs/convert/parquet", (HubName("u/n", "refs/convert/parquet"), None)),
        ("https://huggingface.co/datasets/user/name", (HubName("user/name"), None)),
        ("hf://user/name", None),
        ("s3://bucket/datasets/a", None),
    ],
)
def test_names_of_data_sets(address: str, expected: Any) -> None:
    assert HubName.parse_dataset(address) == expected


@pytest.mark.parametrize("rest", ["", "name", "a/b/c/d", "../b", "a/b/../c", "a/b@../x", "a/b/c d"])
def test_names_of_no_data_set(rest: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        HubName.parse_dataset(f"hf://datasets/{rest}")


def test_a_data_set_of_the_hub_is_read_as_a_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        splits = {"train": of_hugging_face(), "test": of_hugging_face().select([2])}
        return datasets.IterableDatasetDict(
            {split: rows.to_iterable_dataset() for split, rows in splits.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    address = "hf://datasets/user/photos/small@v1"
    assert main(["data", "build", address, str(tmp_path / "out")]) == 0
    assert asked == [(("user/photos", "small"), {"revision": "v1", "streaming": True})]
    assert len(samples(tmp_path / "out", "train")) == 4 and len(samples(tmp_path / "out")) == 5
    assert json.loads((tmp_path / "out/manifest.json").read_text())["source"] == address

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert main(["data", "build", address, str(tmp_path / "other")]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(f"{address}: the Hub does not give it: Couldn't reach the Hub at all")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'multimodal\[datasets\]'"):
        open_source(address)


def test_images_beside_a_data_set_of_the_hub_are_fetched_and_no_other_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(address: str, mode: str) -> io.BytesIO:
        return io.BytesIO(picture(1))

    monkeypatch.setattr("fsspec.open", fetch)
    good = ["hf://datasets/u/n@main/a.png", "zip://b.png::hf://datasets/u/n@main/c.zip"]
    bad = ["http://localhost/a.png", "file:///etc/a.png", "hf://datasets/u/n::http://evil/x"]
    rows = [{"image": {"bytes": None, "path": path}, "text": path} for path in good + bad]
    found, report = built(rows, tmp_path / "out")
    assert set(found) == set(good) and report.reasons == {"no image": 3}


def test_the_number_of_items_is_known_where_they_have_one() -> None:
    for source, count in ((Photos(), 9), ({"a": Photos(), "b": [1]}, 10), (Stream(), None)):
        opened = open_source(source)  # type: ignore[arg-type]
        assert isinstance(opened, ItemSource) and opened.count == count
