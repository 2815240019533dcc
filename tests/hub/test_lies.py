"""What a hostile hub answers is refused with a reason; nothing runs, and nothing half is kept."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from multimodal import load
from multimodal.hub import download
from multimodal.hub.names import find_model, part_of
from tests.hub.stand_in import Answer, StandIn, cached, requested


class Harm:
    """Opening its pickle makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def change(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Change the entry of model.safetensors in the list of files; ``lfs__size`` is in its lfs."""

    def changed(listing: dict[str, Any]) -> dict[str, Any]:
        for entry in listing["siblings"]:
            if entry["rfilename"] == "model.safetensors":
                for name, value in fields.items():
                    inner, _, key = name.partition("__")
                    (entry[inner] if key else entry)[key or name] = value
        return listing

    return changed


@pytest.mark.parametrize(
    "path",
    [
        "../outside.json",
        "image_tokenizer/../../../outside.json",
        "/etc/outside.json",
        "a\\..\\outside.json",
        "C:/outside.json",
        "./config.json",
        "image_tokenizer//config.json",
        "",
        "con\0fig.json",
        "a\nb.json",
        None,
        7,
    ],
)
def test_a_path_that_leads_outside_is_refused(path: object, tiny: StandIn, tmp_path: Path) -> None:
    tiny.list_with = change(rfilename=path)
    with pytest.raises(ValueError, match="me/tiny: refused: its list of files has the path"):
        load("me/tiny")
    assert cached(tmp_path) == []


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (change(lfs__size=10), "is longer than the 10 bytes"),
        (change(lfs__size=10**15), "needs 1,000,000.0 GB"),
        (change(lfs__size=10**7), "model.safetensors was not downloaded: it ended after"),
        (change(lfs__size=-1), "a size of -1"),
        (change(lfs__size="12"), "a size of '12'"),
        (change(lfs__size=True), "a size of True"),
        (change(lfs__size=None), "a size of None"),
        (change(lfs__sha256="0" * 64), "is not the file that the Hub lists"),
        (change(lfs__sha256="../../../outside"), "the hash '../../../outside'"),
        (change(lfs__sha256=None), "the hash None"),
        (change(lfs=None, blobId="../x"), "the hash '../x'"),
        (change(lfs="x"), "does not answer like a Hub"),
        (lambda listing: {**listing, "sha": "../../x"}, "its commit is '../../x'"),
        (lambda listing: {**listing, "sha": None}, "its commit is None"),
        (lambda listing: {**listing, "sha": 3}, "its commit is 3"),
        (lambda listing: {"sha": listing["sha"]}, "does not answer like a Hub"),
        (lambda listing: [listing], "does not answer like a Hub"),
        (lambda listing: {**listing, "siblings": [1]}, "does not answer like a Hub"),
        (lambda _: Answer(200, {}, b"[" * 100_000), "does not answer like a Hub"),
        (lambda _: Answer(200, {}, b" " * (33 << 20)), "its list of files is longer"),
        (
            lambda _: Answer(302, {"Location": "http://169.254.169.254/latest"}),
            "redirects to http://169.254.169.254",
        ),
        (lambda _: Answer(302, {"Location": "file:///etc/passwd"}), "redirects to file://"),
        (lambda _: Answer(302, {"Location": "//evil.example/x"}), "redirects to http://evil"),
        (
            lambda _: Answer(302, {"Location": "https://huggingface.co.evil.example/x"}),
            "redirects to https://huggingface.co.evil",
        ),
        (
            lambda _: Answer(302, {"Location": "https://user@evilhf.co:1/x"}),
            "redirects to https://user@evilhf.co:1",
        ),
        (lambda _: Answer(302, {"Location": "http://hf.co/x"}), "redirects to http://hf.co"),
        (
            lambda _: Answer(302, {"Location": "/api/models/me/tiny/revision/main?blobs=true"}),
            "more than 5 redirects",
        ),
    ],
)
def test_a_list_that_lies_is_refused(
    lie: Callable[[Any], Any], reason: str, tiny: StandIn, tmp_path: Path
) -> None:
    tiny.list_with = lie
    with pytest.raises(ValueError) as error:
        load("me/tiny")
    assert reason in str(error.value)
    assert not (tmp_path / "cache/models--me--tiny/snapshots").exists()
    assert not (tmp_path / "cache/models--me--tiny/refs").exists()
    assert all(len(path.name) in (40, 64) for path in cached(tmp_path)), "whole blobs only"
    assert not (tmp_path / "outside").exists()


def test_an_answer_about_another_commit_is_refused(tiny: StandIn, tiny_model_folder: Path) -> None:
    with pytest.raises(ValueError, match="has no revision"):
        load("me/tiny@" + "a" * 40)
    tiny.repositories["me/tiny"].refs["a" * 40] = tiny.repositories["me/tiny"].refs["main"]
    with pytest.raises(ValueError, match="answers with another commit"):
        load("me/tiny@" + "a" * 40)


@pytest.mark.parametrize(
    ("serve", "reason"),
    [
        (lambda answer: Answer(200, {}, answer.body[:-1] + b"!"), "is not the file"),
        (lambda answer: Answer(200, {}, answer.body[:100]), "it ended after 100 of"),
        (lambda answer: Answer(200, {}, answer.body, cut=100), "after 100 of"),
        (lambda answer: Answer(200, {}, answer.body + b"more"), "is longer than"),
        (lambda _: Answer(200, {}, b""), "it ended after 0 of"),
        (lambda _: Answer(206, {}, b"x"), "it ended after 8 of"),
        (lambda _: Answer(500), "status 500"),
        (
            lambda _: Answer(302, {"Location": "https://evil.example/x"}),
            "redirects to https://evil",
        ),
        (lambda _: Answer(200, {"Content-Encoding": "gzip"}, b"no gzip"), "was not downloaded"),
    ],
)
def test_a_transfer_that_lies_leaves_nothing(
    serve: Callable[[Answer], Answer], reason: str, tiny: StandIn, tmp_path: Path
) -> None:
    tiny.serve_with = lambda path, answer: serve(answer) if "/large/" in path else answer
    with pytest.raises(ValueError, match=reason):
        load("me/tiny")
    assert all(len(path.name) in (40, 64) for path in cached(tmp_path)), "whole blobs only"
    assert not (tmp_path / "cache/models--me--tiny/refs").exists()
    tiny.serve_with = lambda path, answer: answer
    load("me/tiny")


def test_a_download_that_is_stopped_among_its_links_is_no_model(
    tiny: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at each link in turn. Without a network there is nothing to be read then."""
    commit, linked = tiny.repositories["me/tiny"].refs["main"], download._link
    snapshot = tmp_path / "cache/models--me--tiny/snapshots" / commit
    load("me/tiny")
    count = sum(path.is_file() for path in snapshot.rglob("*"))
    for stop in range(count):
        shutil.rmtree(snapshot, ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.setattr(
                download, "_link", mock.Mock(wraps=linked, side_effect=[mock.DEFAULT] * stop)
            )
            with pytest.raises(StopIteration):
                load("me/tiny")
        with monkeypatch.context() as patch:
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            with pytest.raises(ValueError, match="cannot be asked for a model of this name"):
                find_model(f"me/tiny@{commit}")
    assert count > 4


@pytest.mark.parametrize("part", ["text_tokenizer.json", "image_tokenizer"])
def test_a_download_that_is_stopped_after_a_part_of_it_was_there_is_no_model(
    part: str, tiny: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a part config.json is there already, by which other programs know a whole model."""
    linked = download._link
    for stop in range(4):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        part_of("me/tiny", part)
        with monkeypatch.context() as patch:
            links = mock.Mock(wraps=linked, side_effect=[mock.DEFAULT] * stop)
            patch.setattr(download, "_link", links)
            with pytest.raises(StopIteration):
                find_model("me/tiny")
        with monkeypatch.context() as patch:
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            with pytest.raises(ValueError, match="Only a part of it is in the cache"):
                find_model("me/tiny")
            assert part_of("me/tiny", part).name == part


def test_a_name_that_no_file_can_have_is_not_fetched(tiny: StandIn, tmp_path: Path) -> None:
    def add(listing: dict[str, Any]) -> dict[str, Any]:
        entry = {"rfilename": f"{'a' * 300}.json", "size": 2, "blobId": "0" * 40}
        listing["siblings"].append(entry)
        return listing

    tiny.list_with = add
    assert load("me/tiny").text_tokenizer
    assert not any("a" * 300 in path for path in requested(tiny))


def test_headers_name_no_files(tiny: StandIn, tmp_path: Path) -> None:
    """The library huggingface_hub writes a file to where its ETag says."""

    def lie(path: str, answer: Answer) -> Answer:
        outside = str(tmp_path / "outside")
        return Answer(
            answer.status,
            {**answer.headers, "ETag": f'"{outside}"', "X-Linked-Etag": f'"{outside}"'}
            | {"X-Repo-Commit": "../../../outside", "Content-Disposition": f"filename={outside}"},
            answer.body,
        )

    tiny.serve_with = lie
    load("me/tiny")
    assert not (tmp_path / "outside").exists()


def test_pickles_are_refused_and_never_fetched(tiny: StandIn, hub: StandIn, tmp_path: Path) -> None:
    harm = pickle.dumps(Harm(tmp_path / "harm"))
    hub.add("evil/pickle", {"config.json": b"{}", "pytorch_model.bin": harm})
    with pytest.raises(ValueError, match="pytorch_model.bin: such a file can run any code"):
        load("evil/pickle")
    files = dict(tiny.repositories["me/tiny"].at("main").files)  # type: ignore[union-attr]
    hub.add("evil/beside", {**files, "training.pt": harm, "__init__.py": b"raise SystemExit"})
    load("evil/beside")
    hub.add("evil/renamed", {**files, "heads.safetensors": harm})
    with pytest.raises(ValueError, match="not readable as safetensors"):
        load("evil/renamed")
    assert not (tmp_path / "harm").exists()
    assert not any(path.endswith((".bin", ".pt", ".py")) for path in requested(hub))


def test_code_of_its_own_is_refused(hub: StandIn, tmp_path: Path) -> None:
    from multimodal.model.stock import read_stock

    config = {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}
    code = f"import os; os.mkdir({str(tmp_path / 'harm')!r})"
    hub.add(
        "evil/code",
        {
            "config.json": json.dumps(config).encode(),
            "modeling.py": code.encode(),
            "model.safetensors": b"",
        },
    )
    with pytest.raises(ValueError, match="code of its own"):
        read_stock(find_model("evil/code"))
    assert not (tmp_path / "harm").exists()
    assert not any("modeling" in path for path in requested(hub))
