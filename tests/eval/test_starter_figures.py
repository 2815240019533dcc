"""What makes the starter's JSON files in docs/: merged reports, captions to read, copies."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from docs.reporting import captions, copies
from docs.reporting.merge import merged
from multimodal import load
from multimodal.cli import main
from multimodal.data.near_duplicates import hash_image
from multimodal.data.samples import Sample
from multimodal.data.shards import Shards
from multimodal.eval.demo import photo


def report(commit: str, *results: tuple[str, str, float]) -> dict[str, Any]:
    return {
        "protocol": {"fingerprint": "f", "split": "val", "seed": 0, "commit": commit},
        "results": [
            {"task": task, "data": data, "scores": {"x": {"value": value}}}
            for task, data, value in results
        ],
    }


def test_later_results_replace_those_of_the_same_task_and_folder() -> None:
    old = report("a", ("answers", "data/one", 1), ("answers", "data/two", 2))
    new = report("b", ("answers", "one", 3), ("choices", "one", 4), ("energy", "three", 5))
    before = json.dumps([old, new])
    found = merged(old, new)
    assert json.dumps([old, new]) == before
    assert [
        (each["task"], each["data"], each["scores"]["x"]["value"], each.get("run"))
        for each in found["results"]
    ] == [
        ("answers", "one", 3, {"commit": "b"}),
        ("choices", "one", 4, {"commit": "b"}),
        ("answers", "data/two", 2, None),
        ("energy", "three", 5, {"commit": "b"}),
    ]
    assert found["protocol"] == old["protocol"]
    assert "run" not in merged(old, report("a", ("answers", "one", 3)))["results"][0]


@pytest.mark.parametrize("name", ["fingerprint", "split", "seed"])
def test_results_of_another_model_split_or_seed_are_refused(name: str) -> None:
    other = report("b", ("answers", "one", 3))
    other["protocol"][name] = "other"
    with pytest.raises(ValueError, match=f"{name}: .* in the report, other in the new results"):
        merged(report("a"), other)


def test_captions_to_read_are_the_first_with_their_references(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    assert main(["data", "scenes", str(tmp_path / "s"), "--count", "1", "--size", "32"]) == 0
    model = load(tiny_model_folder)
    made = captions.read(model, tmp_path / "s", "val", 3)
    samples = [Shards(tmp_path / "s", "val")[n] for n in range(3)]
    assert [row["photo"] for row in made["captions"]] == [sample.key for sample in samples]
    assert [row["references"] for row in made["captions"]] == [
        sample.record["captions"] for sample in samples
    ]
    pictures = [Image.open(io.BytesIO(sample.image)) for sample in samples]
    assert [row["caption"] for row in made["captions"]] == [
        text.strip() for text in model.caption(pictures)
    ]
    assert made["protocol"]["fingerprint"] == model.fingerprint and made["protocol"]["n"] == 3


def file_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def pictures(features: torch.Tensor, **images: Image.Image) -> copies.Pictures:
    hashes = [hash_image(file_of(image)) for image in images.values()]
    return copies.Pictures(list(images), hashes, torch.nn.functional.normalize(features))


def test_copies_are_found_by_hash_or_by_features_and_other_photos_are_none() -> None:
    cat, coffee, rocket = (photo(name) for name in ("chelsea", "coffee", "rocket"))
    width, height = coffee.size
    crop = coffee.crop((0, 0, int(0.88 * width), int(0.88 * height)))
    axes = torch.eye(3)
    shown = pictures(axes, cat=cat, coffee=coffee, rocket=rocket)
    training = pictures(
        # the features of the crop are those of the coffee; the cat's are unreadable
        torch.stack([axes[1], torch.full((3,), torch.nan), axes[0] + axes[2]]),
        crop=crop,
        small_cat=cat.resize((100, 70)),
        astronaut=photo("astronaut"),
    )
    found = {row["photo"]: row for row in copies.compare(shown, training)}
    assert found["cat"]["is_copy"] and found["cat"]["with"] == "small_cat"
    assert found["coffee"]["is_copy"] and found["coffee"]["with"] == "crop"
    assert found["coffee"]["nearest_by_features"] == "crop" and found["coffee"]["cosine"] == 1
    assert not found["rocket"]["is_copy"] and found["rocket"]["correlation"] < 0.9
    total = copies.summary(list(found.values()))
    assert (total["n"], total["copies"]) == (3, 2) and len(total["most_alike"]) == 3
    assert total["most_alike"][-1]["photo"] == "rocket"


def test_distances_of_hashes_take_the_views_of_either_picture() -> None:
    cat = photo("chelsea")
    width, height = cat.size
    whole = hash_image(file_of(cat))
    corner = hash_image(file_of(cat.crop((0, 0, int(0.9 * width), int(0.9 * height)))))
    there = copies.hash_distances(whole, corner.views[None])
    back = copies.hash_distances(corner, whole.views[None])
    assert there.tolist() == back.tolist() and there[0] <= 4
    apart = int(np.bitwise_count(whole.views[0] ^ corner.views[0]))
    assert apart > there[0]


def test_pictures_that_cannot_be_read_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    good = file_of(photo("coffee"))
    samples = [
        Sample("bad", {"png": good[:100], "json": b"{}"}),
        Sample("good", {"png": good, "json": b"{}"}),
    ]
    read = copies.read_pictures("x", samples, lambda _, rows: torch.ones(len(rows), 2))
    assert read.names == ["x:good"] and len(read.hashes) == len(read.features) == 1
    assert "left out" in capsys.readouterr().err
