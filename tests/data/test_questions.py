"""Questions about presence, from captions."""

import json
from collections import Counter
from pathlib import Path

import pytest

from multimodal.cli import main
from multimodal.data.objects import named_objects, presence_question
from multimodal.data.questions import WORDINGS
from multimodal.data.shards import Shards, index_shard, write_manifest, write_tar
from multimodal.data.verify import check

CAPTIONS = (
    "A dog runs over the grass.",
    "A boy with a hat and his dog on the beach.",
    "Two horses.",
    "Nothing that the list knows.",
)


@pytest.fixture()
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    samples = [
        (f"{number:04d}", {"jpg": b"x", "json": json.dumps({"captions": [text]}).encode()})
        for number, text in enumerate(CAPTIONS * 40)
    ]
    write_tar(folder / "train-0000.tar", samples)
    write_manifest(folder, [index_shard(folder / "train-0000.tar")], license="none")
    return folder


def test_questions_are_balanced_and_true(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "asked"
    assert main(["data", "questions", str(shards), str(out), "--pairs", "2"]) == 0
    assert list(check(out)) == []
    asked = Counter[tuple[str, str]]()
    for before, after in zip(Shards(shards), Shards(out), strict=True):
        assert after.image == before.image and after.key == before.key
        present = named_objects(" ".join(after.record["captions"]))
        questions = after.record.get("qa", [])
        assert len(questions) == 2 * min(2, len(present))
        for question, answer in questions:
            (name,) = [
                name
                for name in ("dog", "grass", "person", "hat", "beach", "horse")
                if question in {presence_question(name, wording) for wording in WORDINGS}
            ]
            assert answer == ("yes" if name in present else "no")
            asked[name, answer] += 1
    assert str(sum(asked.values())) in capsys.readouterr().out
    yes = sum(count for (_, answer), count in asked.items() if answer == "yes")
    assert yes * 2 == sum(asked.values())
    # What is often there is often asked for where it is not: "dog" alone is no hint.
    assert 0.25 < asked["dog", "yes"] / (asked["dog", "yes"] + asked["dog", "no"]) < 0.9


def test_captions_without_known_objects_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    record = json.dumps({"captions": ["abstract art"]}).encode()
    write_tar(folder / "train-0000.tar", [("0", {"jpg": b"x", "json": record})])
    write_manifest(folder, [index_shard(folder / "train-0000.tar")])
    assert main(["data", "questions", str(folder), str(tmp_path / "out")]) == 1
    assert "no caption names an object" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_fields_of_a_record_become_valid_json(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    record = {"captions": ["a dog"], "name": "\ud800", "similarity": float("inf")}
    write_tar(
        folder / "train-0000.tar", [("0", {"jpg": b"x", "json": json.dumps(record).encode()})]
    )
    write_manifest(folder, [index_shard(folder / "train-0000.tar")])
    assert main(["data", "questions", str(folder), str(tmp_path / "out")]) == 0
    (sample,) = Shards(tmp_path / "out")
    assert sample.record["name"] == "\\ud800" and sample.record["similarity"] is None
    assert sample.record["qa"] and b"Infinity" not in sample.members["json"]
