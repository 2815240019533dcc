"""An index follows its folder: what is searched is what is there, whatever happens in between."""

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from multimodal.api import Model
from multimodal.data.builder.build import build_shards
from multimodal.index import storage, update
from multimodal.index.hits import Hit
from multimodal.index.index import Index
from tests.photos import picture

Make = Callable[..., Model]


@pytest.fixture(scope="module")
def model(tiny_model: Make) -> Model:
    return tiny_model(noise=0.1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine images, some with captions, in names that are hard."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    names = ["a.png", "b c.png", "dög ß.png", "sub/犬.png", "sub/a.png", "e\n.png", "[x]*.png"]
    for number, name in enumerate([*names, "{text}.png", os.fsdecode(b"\xff.png")]):
        (folder / name).write_bytes(picture(number))
    (folder / "a.txt").write_text("a first caption\na second one\n", "utf-8")
    (folder / "dög ß.json").write_text('{"caption": "ein Hund 🐕"}', "utf-8")
    return folder


def check_against_folder(index: Index, folder: Path) -> None:
    """The index finds every image of the folder and nothing else, with the scores of embed."""
    paths = sorted(folder.rglob("*.png"))
    hits = index.search("a red bus", k=1000)
    assert sorted(hit.path for hit in hits) == paths and len(index) == len(paths)
    row = index.model.embed(texts="a red bus")
    for hit in hits:
        assert hit.score == pytest.approx(float(index.model.embed(images=hit.path) @ row), abs=1e-5)


def hit_of(index: Index, path: Path) -> Hit:
    """What is found of an image by itself. A random model may find others as near."""
    (hit,) = [hit for hit in index.search(path, k=1000) if hit.path == path]
    assert hit.score == pytest.approx(1)
    return hit


def test_images_with_captions(model: Model, folder: Path, tmp_path: Path) -> None:
    index = Index.open(tmp_path / "index", model, create=True)
    assert len(index) == 0 and index.search("a red bus") == []
    changes = index.add(folder)
    assert (changes.added, changes.problems) == (9, 0)
    check_against_folder(index, folder)
    assert hit_of(index, folder / "dög ß.png").captions == ("ein Hund 🐕",)
    hit = hit_of(index, folder / "a.png")
    assert hit.captions == ("a first caption", "a second one") and hit.source.endswith("a.png")
    page = index.search("a red bus", k=9)._repr_html_()
    assert page.count("<img src='data:image/png;base64,") == 9 and "ein Hund 🐕" in page
    page.encode()
    again = Index.open(tmp_path / "index", model)
    assert again.search("a red bus", 9) == index.search("a red bus", 9)
    assert "9 images" in repr(again)


def test_changes_of_a_folder_are_followed(
    model: Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, rng = Index.open(tmp_path / "index", model, create=True), random.Random(0)
    index.add(folder)
    embedded: list[int] = []
    real = update.read_images
    monkeypatch.setattr(update, "read_images", lambda *a: (embedded.append(1), real(*a))[1])
    assert index.add(folder) == update.Changes(unchanged=9) and not embedded
    for turn in range(5):
        present = sorted(set(folder.rglob("*.png")) - {folder / "a.png"})
        gone, changed = rng.sample(present, 2)
        gone.unlink()
        changed.write_bytes(picture(100 + turn))
        for n in range(3):
            (folder / f"new {turn} {n}.png").write_bytes(picture(1000 + 10 * turn + n))
        changes = index.add(folder, batch_size=rng.choice([1, 2, 32]))
        assert (changes.added, changes.replaced, changes.removed) == (3, 1, 1)
        check_against_folder(index, folder)
    assert len(embedded) == 5 * 4, "what is as before is not embedded again"
    (folder / "a.txt").write_text("another caption", "utf-8")
    assert index.add(folder).replaced == 1
    assert hit_of(index, folder / "a.png").captions == ("another caption",)
    check_against_folder(Index.open(tmp_path / "index", model), folder)
    assert len(list((tmp_path / "index").iterdir())) == 3, "no files of before are left"


def test_what_is_in_a_folder_that_cannot_be_read_now_stays(
    model: Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Index.open(tmp_path / "index", model, create=True)
    index.add(folder)
    (folder / "b c.png").unlink()
    real, problems = os.scandir, list[str]()

    def scandir(path: str) -> object:
        if Path(path) == folder / "sub":
            raise OSError(errno.ESTALE, "Stale file handle", path)
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        changes = index.add(folder, on_problem=problems.append)
    assert changes == update.Changes(removed=1, unchanged=6, problems=1)
    assert problems == [f"{folder / 'sub'}: cannot be read (Stale file handle)"]
    check_against_folder(index, folder)
    shutil.rmtree(folder / "sub")
    assert index.add(folder) == update.Changes(removed=2, unchanged=6)


def test_several_folders_in_one_index(model: Model, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for n in range(3):
        (other / f"{n}.png").write_bytes(picture(50 + n))
    index = Index.open(tmp_path / "index", model, create=True)
    index.add(folder)
    index.add(other)
    assert len(index) == 12
    (other / "0.png").unlink()
    assert index.add(other) == update.Changes(removed=1, unchanged=2) and len(index) == 11


def test_bad_items_are_named_and_left_out(model: Model, folder: Path, tmp_path: Path) -> None:
    index = Index.open(tmp_path / "index", model, create=True)
    index.add(folder)
    (folder / "a.png").write_bytes(picture(0)[:40])  # good before
    (folder / "b c.json").write_text("{")
    (folder / "cut.jpg").write_bytes(b"\xff\xd8")
    (folder / "notes.pdf").write_bytes(b"")
    os.mkfifo(folder / "pipe.png")
    problems: list[str] = []
    changes = index.add(folder, on_problem=problems.append)
    assert changes.problems == len(problems) == 5
    for name in ("a.png", "b c.png", "cut.jpg", "notes.pdf", "pipe.png"):
        assert sum(str(folder / name) in problem for problem in problems) == 1, name
    assert len(index) == 7


def test_shards(model: Model, folder: Path, tmp_path: Path) -> None:
    build_shards(folder, tmp_path / "shards")
    index = Index.open(tmp_path / "index", model, create=True)
    count = index.add(tmp_path / "shards").added
    assert count == len(index) > 0
    hits = index.search(folder / "dög ß.png", k=1000)
    (hit,) = [hit for hit in hits if hit.captions == ("ein Hund 🐕",)]
    assert hit.score == pytest.approx(1, abs=1e-3)
    assert hit.source.startswith(f"{tmp_path / 'shards'}:") and isinstance(hit.image(), bytes)
    assert index.add(tmp_path / "shards").unchanged == count
    shutil.rmtree(tmp_path / "shards")
    with pytest.raises(ValueError):
        hit.image()
    assert "ein Hund" in hit._repr_html_()


@pytest.mark.parametrize("step", range(8))
def test_an_interrupted_write_leaves_a_whole_index(
    model: Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    index = Index.open(tmp_path / "index", model, create=True)
    index.add(folder)
    before = index.search("a red bus", 100)
    (folder / "a.png").write_bytes(picture(77))
    calls = [0]

    def after(call: Callable[..., object]) -> Callable[..., object]:
        def interrupted(*args: object, **kwargs: object) -> object:
            calls[0] += 1
            if calls[0] > step:
                raise KeyboardInterrupt
            return call(*args, **kwargs)

        return interrupted

    with monkeypatch.context() as patch:
        for name in ("replace", "write_text"):
            patch.setattr(Path, name, after(getattr(Path, name)))
        patch.setattr(storage, "file_sha256", after(storage.file_sha256))
        patch.setattr(storage.Vectors, "save", after(storage.Vectors.save))
        try:
            index.add(folder)
        except KeyboardInterrupt:
            pass
    hits = Index.open(tmp_path / "index", model).search("a red bus", 100)
    assert len(hits) == 9
    if calls[0] > step:
        assert hits == before
    index.add(folder)
    check_against_folder(index, folder)


def test_work_of_a_killed_run_is_not_lost(
    model: Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Index.open(tmp_path / "index", model, create=True)
    monkeypatch.setattr(update, "SAVE_INTERVAL", 0.0)
    monkeypatch.setattr(update, "SAVE_SHARE", 1e9)
    real, count = update.embed_codes, [0]

    def killed(*args: object) -> object:
        count[0] += 1
        if count[0] > 3:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(update, "embed_codes", killed)
        with pytest.raises(KeyboardInterrupt):
            index.add(folder, batch_size=2)
    index = Index.open(tmp_path / "index", model)
    assert len(index) == 6
    assert index.add(folder) == update.Changes(added=3, unchanged=6)
    check_against_folder(index, folder)


def test_of_long_texts_only_the_one_in_work_is_lost(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(4):
        (folder / f"{n}.txt").write_text("a small blue circle and a red bus.\n\n" * 20)
    index = Index.open(tmp_path / "index", model, create=True)
    monkeypatch.setattr(update, "SAVE_INTERVAL", 0.0)
    monkeypatch.setattr(update, "SAVE_SHARE", 1e9)
    real, count = update.embed_lines, [0]

    def killed(*args: object) -> object:
        count[0] += 1
        if count[0] > 2:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(update, "embed_lines", killed)
        with pytest.raises(KeyboardInterrupt):
            index.add(folder, piece_tokens=16, batch_size=8)
    index = Index.open(tmp_path / "index", model)
    changes = index.add(folder, piece_tokens=16, batch_size=8)
    assert changes == update.Changes(added=2, unchanged=2)


def test_another_model_another_kind_and_other_folders_are_refused(
    model: Model, tiny_model: Make, folder: Path, tmp_path: Path
) -> None:
    index = Index.open(tmp_path / "index", model, create=True)
    index.add(folder)
    for create in (True, False):
        with pytest.raises(ValueError, match="an index of another model"):
            Index.open(tmp_path / "index", tiny_model(seed=3), create=create)
    with pytest.raises(ValueError, match="no index; run: multimodal index"):
        Index.open(tmp_path, model)
    with pytest.raises(ValueError, match="not empty, and no index"):
        Index.open(folder, model, create=True)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a text")
    with pytest.raises(ValueError, match="an index of images, and .* has texts"):
        index.add(tmp_path / "texts")
    with pytest.raises(ValueError, match="no images and no texts in it"):
        (tmp_path / "empty").mkdir()
        index.add(tmp_path / "empty")
    with storage.locked(tmp_path / "index"), pytest.raises(ValueError, match="another process"):
        index.add(folder)


def test_damage_is_found_before_it_is_read(model: Model, folder: Path, tmp_path: Path) -> None:
    index = Index.open(tmp_path / "index", model, create=True)
    index.add(folder)
    rng = random.Random(0)
    for path in sorted((tmp_path / "index").iterdir()):
        whole = path.read_bytes()
        damages = [whole[: len(whole) // 2], b"", whole + b"x"]
        for _ in range(10):
            place = rng.randrange(len(whole))
            damages.append(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        for damaged in damages:
            path.write_bytes(damaged)
            try:  # a name of a folder may have changed, which only the user knows
                Index.open(tmp_path / "index", model).search("a red bus", 100)
            except ValueError as error:
                assert "index" in str(error)
            else:
                assert path.name == "config.json"
        path.unlink()
        with pytest.raises(ValueError, match="no index|no such file"):
            Index.open(tmp_path / "index", model)
        path.write_bytes(whole)
    check_against_folder(Index.open(tmp_path / "index", model), folder)


ENTRY = {"root": 0, "path": "a.png", "sha256": "0"}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        "1",
        "null",
        json.dumps({**ENTRY, "path": "../../etc/passwd"}),
        json.dumps({**ENTRY, "path": "/etc/passwd"}),
        json.dumps({**ENTRY, "path": ""}),
        json.dumps({**ENTRY, "path": "a\0.png"}),
        json.dumps({**ENTRY, "root": 7}),
        json.dumps({**ENTRY, "root": -1}),
        json.dumps({**ENTRY, "root": True}),
        json.dumps({**ENTRY, "captions": "abc"}),
        json.dumps({**ENTRY, "captions": [1]}),
        json.dumps({**ENTRY, "lines": [1]}),
        json.dumps({**ENTRY, "lines": [1, -2]}),
        json.dumps({**ENTRY, "number": 1e9}),
        json.dumps({**ENTRY, "class": "os.system"}),
        "[" * 100_000,
    ],
)
def test_hostile_entries_are_refused(model: Model, folder: Path, tmp_path: Path, line: str) -> None:
    """Whoever writes the entries can write their hash, too."""
    index = Index.open(tmp_path / "index", model, create=True)
    index.add(folder)
    (path,) = (tmp_path / "index").glob("entries-*")
    lines = path.read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join([f"{line}\n", *lines[1:]]), "utf-8")
    config = json.loads((tmp_path / "index" / "config.json").read_text())
    config["entries"] |= {"bytes": path.stat().st_size, "sha256": storage.file_sha256(path)}
    (tmp_path / "index" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not an entry|not readable as JSON|nothing is known"):
        Index.open(tmp_path / "index", model).search("a red bus", 100)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "other"),
        ("version", 2),
        ("width", 0),
        ("width", "32"),
        ("kind", "sounds"),
        ("count", 10**30),
        ("count", 3),
        ("roots", "abc"),
        ("vectors", {"name": "../x", "bytes": 1, "sha256": ""}),
        ("entries", None),
        ("more", 1),
    ],
)
def test_hostile_configs_are_refused(
    model: Model, folder: Path, tmp_path: Path, key: str, value: object
) -> None:
    Index.open(tmp_path / "index", model, create=True).add(folder)
    path = tmp_path / "index" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match="index"):
        Index.open(tmp_path / "index", model).search("a red bus")
