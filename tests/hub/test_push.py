"""Models that are put on the Hub: one commit, a card that says what they are, and back again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from multimodal import load
from multimodal.cli import main
from multimodal.hub.push import push
from tests.hub.stand_in import TOKEN, StandIn


@pytest.fixture
def writable(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The Hub, and a token that may write."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def results_of(fingerprint: str) -> dict[str, Any]:
    """As ``multimodal eval`` writes them."""
    captions = {
        "CIDEr": {"value": 0.21345678, "low": 0.2, "high": 0.23, "n": 1000},
        "Bleu_1": {"value": 0.5},
        "broken": {"value": float("nan"), "low": 0.0, "high": 0.0, "n": 3},
    }
    # They stand in the table of the card, and are no results of the model.
    yardsticks = {
        f"CIDEr_{name}": {"value": 0.3, "low": 0.2, "high": 0.4, "n": 1000}
        for name in ("shuffled", "constant", "constant_of_set", "lookup", "beams_shuffled")
    }
    recall = {"text_to_image@1": {"value": 0.1}, "text_to_image@5": {"value": 0.2}}
    about = {"n": 1000, "cost": {"seconds": 1.0}, "notes": []}
    return {
        "protocol": {
            "model": "/home/me/secret/runs", "fingerprint": fingerprint, "split": "val",
            "image_size": 64, "fit": "squash", "seed": 0, "dtype": "float32",
        },
        "results": [
            {"task": "captioning", "data": "/home/me/secret/flickr8k", "protocol": "greedy | PTB",
             "scores": captions | yardsticks, **about},
            {"task": "retrieval", "data": "data/flickr8k", "protocol": "all pairs",
             "scores": recall, **about},
        ],
    }  # fmt: skip


def results_with(**wrong: Any) -> str:
    results = results_of("x")
    results["results"][0] |= wrong
    return json.dumps(results)


def metadata(card: bytes | str) -> dict[str, Any]:
    text = card.decode() if isinstance(card, bytes) else card
    return dict(yaml.safe_load(text.split("---\n")[1]))


def files_of(hub: StandIn, name: str, revision: str = "main") -> dict[str, bytes]:
    commit = hub.repositories[name].at(revision)
    assert commit is not None
    return commit.files


def test_a_model_that_was_pushed_is_loaded_by_its_name(
    writable: StandIn, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model(noise=0.1)
    address = model.push_to_hub("me/tiny", private=True, message="First")
    assert address.endswith("/me/tiny/commit/" + writable.repositories["me/tiny"].refs["main"])
    assert writable.repositories["me/tiny"].private
    again = load("me/tiny")
    assert again.fingerprint == model.fingerprint
    card = files_of(writable, "me/tiny")["README.md"].decode()
    assert metadata(card)["library_name"] == "multimodal"
    assert metadata(card)["pipeline_tag"] == "any-to-any"
    assert 'multimodal.load("me/tiny")' in card
    assert writable.cards == [card], "the Hub has validated its metadata"


def test_the_verb_pushes_a_folder_with_its_card_and_results(
    writable: StandIn, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "README.md").write_text(
        "---\nlicense: mit\nlanguage: en\npipeline_tag: text-generation\nlibrary_name: other\n"
        "tags: [mine, text-to-image]\n---\n# Mine\n\nMade by me.\n"
    )
    (folder / "LICENSE").write_text("MIT\n")
    for name in ("optimizer.pt", "notes.txt", "code.py", ".hidden.json"):
        (folder / name).write_text("not for others")
    results = tmp_path / "results.json"
    results.write_text(json.dumps(results_of(load(folder).fingerprint)))
    line = ["push", str(folder), "me/mine", "--results", str(results)]
    assert main(line) == 0
    assert "/me/mine/commit/" in capsys.readouterr().out
    files = files_of(writable, "me/mine")
    expected = {p.relative_to(tiny_model_folder).as_posix() for p in tiny_model_folder.rglob("*.*")}
    assert set(files) == expected | {"README.md", "LICENSE", "results.json", ".gitattributes"}
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    about = metadata(card)
    assert (about["license"], about["language"]) == ("mit", "en")
    assert (about["pipeline_tag"], about["library_name"]) == ("any-to-any", "multimodal")
    assert sorted(about["tags"]) == ["image-captioning", "mine", "multimodal", "text-to-image"]
    assert "Made by me." in card and "secret" not in card
    assert "| captioning | flickr8k | 1,000 | CIDEr | 0.2135 | 0.2000 to 0.2300 |" in card
    assert "Bleu_1" not in card and "broken" not in card and "greedy \\| PTB" in card
    captions, recall = about["model-index"][0]["results"]
    assert about["model-index"][0]["name"] == "mine"
    assert captions["task"]["type"] == "image-to-text"
    assert captions["dataset"] == {"name": "flickr8k", "type": "flickr8k", "split": "val"}
    assert captions["metrics"] == [
        {"type": "cider", "value": 0.213457, "name": "captioning: CIDEr"}
    ]
    assert [metric["type"] for metric in recall["metrics"]] == ["text_to_image@1"]
    assert json.loads(files["results.json"])["results"][1]["scores"]["text_to_image@5"]
    assert load("me/mine").fingerprint == load(folder).fingerprint


def test_the_card_is_one_that_the_library_reads_back(
    writable: StandIn, tiny_model_folder: Path, tmp_path: Path
) -> None:
    from huggingface_hub import ModelCard

    (tmp_path / "r.json").write_text(json.dumps(results_of(load(tiny_model_folder).fingerprint)))
    push(tiny_model_folder, "me/tiny", tmp_path / "r.json", license="apache-2.0")
    first = files_of(writable, "me/tiny")["README.md"].decode()
    card = ModelCard(first)
    assert [result.metric_value for result in card.data.eval_results] == [0.213457, 0.1]
    assert card.data.license == "apache-2.0"
    push(tiny_model_folder, "me/tiny", tmp_path / "r.json", license="apache-2.0")
    assert files_of(writable, "me/tiny")["README.md"].decode() == first
    assert len(writable.repositories["me/tiny"].commits) == 2  # of the new repository, and ours


def test_a_later_push_replaces_the_model_in_one_commit(
    writable: StandIn, tiny_model: Callable[..., Any], tiny_model_folder: Path, tmp_path: Path
) -> None:
    push(tiny_model_folder, "me/tiny")
    first = writable.repositories["me/tiny"].refs["main"]
    shutil.copytree(tiny_model_folder, tmp_path / "old")
    (tmp_path / "old/image_tokenizer/detail").mkdir()
    (tmp_path / "old/image_tokenizer/detail/config.json").write_text("{}")
    push(tmp_path / "old", "me/tiny")
    new = tiny_model(seed=3)
    new.push_to_hub("me/tiny", license="mit")
    assert "image_tokenizer/detail/config.json" not in files_of(writable, "me/tiny")
    assert ".gitattributes" in files_of(writable, "me/tiny"), "what is not of a model stays"
    assert load("me/tiny").fingerprint == new.fingerprint
    assert load(f"me/tiny@{first}").fingerprint == load(tiny_model_folder).fingerprint


def test_a_branch_is_pushed_beside_main(
    writable: StandIn, tiny_model: Callable[..., Any], tiny_model_folder: Path
) -> None:
    push(tiny_model_folder, "me/tiny")
    other = tiny_model(seed=5)
    other.push_to_hub("me/tiny@longer")
    assert load("me/tiny@longer").fingerprint == other.fingerprint
    assert load("me/tiny").fingerprint == load(tiny_model_folder).fingerprint


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{}", "not the results of multimodal eval"),
        ("[", "not readable as JSON"),
        ("[" * 20_000, "nested too deep"),
        (json.dumps(results_of("0123456789abcdef")), "the results of model 0123456789abcdef"),
        (json.dumps({**results_of("x"), "results": [{"task": 1}]}), "not the results"),
        (results_with(task={}), "not the results"),
        (results_with(data=[1]), "not the results"),
        (None, "no such file"),
    ],
)
def test_results_of_another_model_are_refused_before_anything_is_sent(
    content: str | None, reason: str, writable: StandIn, tiny_model_folder: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "r.json").write_text(content)
    with pytest.raises(ValueError, match=reason):
        push(tiny_model_folder, "me/tiny", tmp_path / "r.json")
    assert writable.requests == []


def test_without_a_token_or_a_network_the_words_say_what_to_do(
    hub: StandIn,
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from huggingface_hub import constants

    line = ["push", str(tiny_model_folder), "me/tiny"]
    assert main(line) == 1
    assert "hf auth login, or HF_TOKEN" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(line) == 1
    assert "not pushed: HF_HUB_OFFLINE is set" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.close()
    assert main(line) == 1
    assert "me/tiny: not pushed: " in capsys.readouterr().err
    assert hub.repositories == {}


@pytest.mark.parametrize("name", ["tiny", "runs/joint/model", "https://example.org/me/tiny"])
def test_a_name_that_is_none_is_refused(name: str, hub: StandIn, tiny_model_folder: Path) -> None:
    with pytest.raises(ValueError, match="user/name"):
        push(tiny_model_folder, name)


def test_a_card_with_broken_metadata_is_not_pushed(
    writable: StandIn, tiny_model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    for block in ("a: [1", "- 1", "!!python/object/apply:os.mkdir [harm]", "a: 1\na: {b: *c}"):
        (tmp_path / "model/README.md").write_text(f"---\n{block}\n---\n# Mine\n")
        with pytest.raises(ValueError, match="README.md: its metadata is not readable"):
            push(tmp_path / "model", "me/tiny")
    assert writable.requests == []


def test_a_folder_that_is_no_model_is_not_pushed(writable: StandIn, tmp_path: Path) -> None:
    for content in ("{}", "[]", "{", '{"fingerprints": 1}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match="not a model folder"):
            push(tmp_path, "me/tiny")
    assert main(["push", str(tmp_path), "me/tiny"]) == 1
    assert writable.requests == []
