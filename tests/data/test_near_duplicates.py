"""Copies are found, and pictures that are only similar are not."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from multimodal.cli import main
from multimodal.data.near_duplicates import CopyIndex, find_copies, hash_image
from multimodal.data.shards import Shards, index_shard, read_manifest, write_manifest, write_tar

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "motorcycle_left")


def photo(name: str) -> Image.Image:
    import skimage.data

    load = getattr(skimage.data, name, None)
    pixels = load() if load else skimage.data.stereo_motorcycle()[0]
    return Image.fromarray(pixels).convert("RGB")


def encoded(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def crop(image: Image.Image, share: float, x: float, y: float) -> Image.Image:
    """A crop that leaves out ``share`` of each side."""
    width, height = image.size
    left, top = share * width * x, share * height * y
    return image.crop(
        (int(left), int(top), int(left + width * (1 - share)), int(top + height * (1 - share)))
    )


CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "encoded again": lambda image: encoded(image, "JPEG", quality=35),
    "another format": lambda image: encoded(image, "WEBP", quality=80),
    "half the size": lambda image: encoded(image.resize((image.width // 2, image.height // 2))),
    "cropped by 5 %": lambda image: encoded(crop(image, 0.05, 0.2, 0.9), "JPEG", quality=80),
    "cropped by 10 %": lambda image: encoded(crop(image, 0.1, 0.7, 0.3), "JPEG", quality=80),
    "brighter": lambda image: encoded(Image.eval(image, lambda v: min(255, int(1.1 * v + 5)))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_changed_copies_are_found(change: str) -> None:
    originals = [photo(name) for name in PHOTOS]
    files = [encoded(image) for image in originals] + [CHANGES[change](i) for i in originals]
    copies = find_copies([hash_image(data) for data in files])
    assert [(c.first, c.second) for c in copies] == [(n, n + len(PHOTOS)) for n in range(5)]
    assert all(c.kind == "near" and c.similarity > 0.935 for c in copies)


def test_the_same_pixels_in_different_files_are_an_exact_copy() -> None:
    image = photo("coffee")
    files = [encoded(image), encoded(image, "PNG", compress_level=0), encoded(photo("rocket"))]
    files.append(encoded(image, "WEBP", lossless=True))
    copies = find_copies([hash_image(data) for data in files])
    assert [(c.first, c.second, c.kind) for c in copies] == [(0, 1, "exact"), (0, 3, "exact")]


def test_similar_pictures_are_not_copies() -> None:
    image = photo("astronaut")
    width, height = image.size
    others = [
        image.crop((0, 0, width // 2, height // 2)),  # a part is another picture
        image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        Image.new("RGB", (64, 64), "white"),
        Image.new("RGB", (64, 64), "black"),
    ]
    for colour in ("red", "blue", "green"):
        others.append(Image.new("RGB", (64, 64), "white"))
        ImageDraw.Draw(others[-1]).ellipse((10, 10, 50, 50), fill=colour)
    rng = np.random.default_rng(0)
    others += [Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(3)]
    assert find_copies([hash_image(encoded(picture)) for picture in [image, *others]]) == []
    assert find_copies([]) == []


def test_the_command_reports_copies_between_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = photo("coffee")
    splits = {
        "train": {"a": encoded(image), "b": encoded(photo("rocket")), "x": b"no image"},
        "val": {"c": CHANGES["cropped by 5 %"](image), "d": encoded(photo("chelsea"))},
    }
    folder = tmp_path / "data"
    folder.mkdir()
    entries = []
    for split, samples in splits.items():
        shard = folder / f"{split}-0000.tar"
        write_tar(shard, [(key, {"png": data}) for key, data in samples.items()])
        entries.append(index_shard(shard))
    write_manifest(folder, entries)
    out = tmp_path / "pairs.jsonl"
    assert main(["data", "duplicates", str(folder), "--output", str(out)]) == 1
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    assert line.startswith("near\t0.9") and line.endswith(f"\t{folder}:train:a\t{folder}:val:c")
    assert "4 images: 0 exact copies, 1 near, 1 of them between" in captured.err
    assert "1 could not be read" in captured.err
    (pair,) = map(json.loads, out.read_text().splitlines())
    assert pair["first"] == {"folder": str(folder), "split": "train", "key": "a"}
    # Without the copy in val, nothing is printed.
    (folder / "val-0000.tar").unlink()
    (folder / "val-0000.index.json").unlink()
    write_manifest(folder, entries[:1])
    assert main(["data", "duplicates", str(folder)]) == 0
    assert capsys.readouterr().out == ""


def test_a_build_drops_copies_and_names_the_image_that_it_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "photos"
    source.mkdir()
    for name in PHOTOS:
        image = photo(name)
        files = {f"{name}-1": encoded(image), f"{name}-2": CHANGES["cropped by 5 %"](image)}
        for stem, data in (files | {f"{name}-3": encoded(image)}).items():
            suffix = "png" if data.startswith(b"\x89PNG") else "jpg"
            (source / f"{stem}.{suffix}").write_bytes(data)
            (source / f"{stem}.txt").write_text(f"a picture of {name}")
    kept = []
    for workers in ("1", "3"):
        out = tmp_path / f"out{workers}"
        command = ["data", "build", str(source), str(out), "--drop-copies", "near"]
        command += ["--workers", workers]
        assert main(command) == 0
        kept.append([sample.key for sample in Shards(out)])
        rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
        assert {line["reason"] for line in rejected} == {"copy"} and len(rejected) == 10
        for line in rejected:
            stem = Path(line["sample"]).stem.rpartition("-")[0]
            assert f"/{stem}-" in line["detail"] and " copy (" in line["detail"]
        assert read_manifest(out)["cleaning"]["copies"] == "near"
    assert kept[0] == kept[1]
    command = ["data", "build", str(source), str(tmp_path / "exact"), "--drop-copies", "exact"]
    assert main(command) == 0
    assert len(Shards(tmp_path / "exact")) == 10, "the cropped images stay"
    assert sorted(key.rpartition("-")[0] for key in kept[0]) == sorted(PHOTOS)
    capsys.readouterr()


def test_an_index_finds_the_same_copies_in_a_stream() -> None:
    originals = [photo(name) for name in PHOTOS]
    files = [encoded(image) for image in originals]
    files += [change(image) for image in originals for change in CHANGES.values()]
    images, index = [hash_image(data) for data in files], CopyIndex()
    one_by_one = {c.second: c.first for image in images if (c := index.add(image)) is not None}
    together: dict[int, int] = {}
    for copy in find_copies(images):
        together.setdefault(copy.second, copy.first)
    assert one_by_one == together and len(together) == 30
