"""Trainings of benchmarks: what is done is kept, and nothing else passes for it."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from multimodal.data.shards import index_shard, write_manifest, write_tar

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark of adapters, whose commands write ``results.json`` and are noted."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = import_module("adapters")
    ran = list[str]()

    def run(*arguments: str) -> float:
        ran.append(arguments[0])
        output = Path(arguments[arguments.index("--output") + 1])
        if "killed" in arguments:
            (output / "model").mkdir(exist_ok=True)
            raise KeyboardInterrupt
        if arguments[0] == "eval":
            scores = {"CIDEr": {"value": len(ran)}, "BLEU": {"value": 0}}
            output.write_text(json.dumps({"results": [{"scores": scores}]}))
        return 7.0

    monkeypatch.setattr(module, "multimodal", run)
    monkeypatch.setattr(module, "ran", ran, raising=False)
    return module


def test_a_run_is_done_once_it_has_ended_and_not_with_other_arguments(
    adapters: Any, tmp_path: Path
) -> None:
    assert [adapters.fit_once(tmp_path / "run", "--seed", "1") for _ in range(2)] == [7.0, 7.0]
    assert adapters.ran == ["fit"]
    with pytest.raises(SystemExit, match="a run of other arguments"):
        adapters.fit_once(tmp_path / "run", "--seed", "2")
    for _ in range(2):  # half a run has a model, too
        with pytest.raises(KeyboardInterrupt):
            adapters.fit_once(tmp_path / "half", "killed")
    assert adapters.ran == ["fit"] * 3
    (tmp_path / "older/model").mkdir(parents=True)
    with pytest.raises(SystemExit, match="give another --out"):
        adapters.fit_once(tmp_path / "older")


def test_a_score_is_that_of_its_model_and_data(adapters: Any, tmp_path: Path) -> None:
    first = adapters.cider(tmp_path, "data/a", "--model", "starter")
    assert first == {"CIDEr": {"value": 1}}
    assert adapters.cider(tmp_path, "data/a", "--model", "starter") == first
    assert adapters.cider(tmp_path, "data/b", "--model", "starter") == {"CIDEr": {"value": 2}}
    assert adapters.cider(tmp_path, "data/a", "--model", "other") == {"CIDEr": {"value": 3}}


def test_students_differ_in_the_weight_of_their_teacher_alone(
    adapters: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, given = import_module("distillation"), list[tuple[str, ...]]()

    def fit_once(folder: Path, *arguments: str) -> float:
        folder.mkdir()
        given.append(arguments)
        return 7.0

    monkeypatch.setattr(module, "cider", adapters.cider)
    monkeypatch.setattr(module, "fit_once", fit_once)
    monkeypatch.setattr(module, "parameters", lambda name: 1)
    command = ["distillation.py", "--data", "a", "--out", str(tmp_path), "--", "--model.dropout=0"]
    monkeypatch.setattr(sys, "argv", command)
    module.main()
    taught, alone = given
    differing = {pair for pair in zip(taught, alone, strict=True) if len({*pair}) > 1}
    assert differing == {("0.5", "0")}
    assert taught[taught.index("0.5") - 1] == "--model.teacher_weight"
    assert "--model.dropout=0" in taught


def test_a_step_that_is_not_timed_is_not_enough() -> None:
    command = [sys.executable, str(BENCHMARKS / "lora_memory.py"), "--steps", "1"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 2 and "--steps 1: expected 2 or more" in done.stderr


def test_what_is_gained_is_of_the_same_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = import_module("preferences")

    def figures(*right: float) -> dict[str, Any]:
        """Of three scenes with two objects each."""
        cases = [list(right), [0, 0, 1, 1, 2, 2]]
        return {"captions": {"perfect": sum(right)}, "3": {"objects": cases, "extra": [[], []]}}

    before, after = figures(1, 0, 0, 0, 1, 1), figures(1, 1, 1, 0, 1, 0)
    found = module.summary(after, before, [3.0])
    assert found["captions"] == {"perfect": 4} and found["guidance 3"]["objects"] == 4 / 6
    gained = found["guidance 3"]["objects_gained"]
    assert gained["value"] == pytest.approx(1 / 6)
    # The differences of the scenes are 1, 1 and -1 objects of two.
    assert gained["low"] == -0.5 and gained["high"] == 0.5
    same = module.summary(before, before, [3.0])["guidance 3"]["objects_gained"]
    assert same == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_invented_objects_are_a_share_of_all_that_captions_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = import_module("invented_objects")
    references = [["a dog runs after a ball"], ["a cat"], ["two men with hats"]]
    values = module.values_of(["a dog with a ball on a horse", "a car", "rain"], references)
    assert values["named"] == [3, 1, 0] and values["right"] == [2, 0, 0]
    assert values["captions_with"] == [1, 1, 0] and values["words"] == [8, 2, 1]
    assert values["CIDEr"][0] > 0 == values["CIDEr"][2]
    assert module.means(values)["invented"] == 2 / 4
    better = {**values, "right": [3, 1, 0]}
    row = module.summary(better, values)
    assert row["invented"]["value"] == 0 and row["invented"]["change"] == -0.5
    assert -1 <= row["invented"]["low"] <= -1 / 3 and row["invented"]["high"] <= 0
    assert row["CIDEr"]["change"] == row["CIDEr"]["low"] == row["CIDEr"]["high"] == 0


def test_lists_of_objects_are_of_photos_whose_captions_name_some(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = import_module("few_shot")
    captions = {"a": ["two dogs", "a dog and a ball"], "b": ["rain"], "c": ["A cat ."]}
    members = [(k, {"json": json.dumps({"captions": c}).encode()}) for k, c in captions.items()]
    write_tar(tmp_path / "val-0000.tar", members)
    write_manifest(tmp_path, [index_shard(tmp_path / "val-0000.tar")])
    found = {s.key: s.record["captions"] for s in module.new_photos(str(tmp_path))}
    assert found == {"a": ["list of 2 : ball ; dog ; end"], "c": ["list of 1 : cat ; end"]}
    first, again = (list(module.new_scenes("chalk", 2)) for _ in range(2))
    assert [s.members for s in first] == [s.members for s in again]
    assert all(s.record["captions"][0].startswith("list of ") for s in first)
