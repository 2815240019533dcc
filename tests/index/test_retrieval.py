"""What an index finds goes into prompts: what stands in them, in which order, and what is said."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from multimodal.api import Model
from multimodal.cli import main
from multimodal.data.builder.build import build_shards
from multimodal.data.encode import Encoding, encode_shards
from multimodal.index.index import Index
from multimodal.inference import mixed, text
from tests.photos import picture

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> Model:
    from multimodal import load

    return load(tiny_model_folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images. The last has no caption."""
    folder = tmp_path_factory.mktemp("photos")
    for n in range(6):
        (folder / f"{n}.png").write_bytes(picture(n))
        if n < 5:
            (folder / f"{n}.txt").write_text(f"a red bus of {n}\na second one\n")
    return folder


@pytest.fixture(scope="module")
def images(model: Model, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    index = Index.open(tmp_path_factory.mktemp("index") / "images", model, create=True)
    index.add(photos)
    return index


@pytest.fixture(scope="module")
def texts(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "ü.md").write_text("two dogs run.\n\nthe cat {text} sleeps.\n", "utf-8")
    (folder / "b.txt").write_text("a small blue circle.\na red bus.\n")
    (folder / "broken.txt").write_bytes(b"\xff\xfe\xff")
    (folder / "binary.txt").write_bytes(b"a\0b")
    (folder / "empty.txt").write_text("\n \n")
    index = Index.open(tmp_path_factory.mktemp("index") / "texts", model, create=True)
    problems: list[str] = []
    changes = index.add(folder, piece_tokens=16, on_problem=problems.append)
    assert changes.added == 2 and changes.problems == len(problems) == 3
    return index


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Every prompt that a text is written after. Texts of more than ten tokens stay empty."""
    seen: list[list[int]] = []
    write, reply = text.generate_ids, mixed.reply

    def generate_ids(model: Any, ids: Any, options: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(ids)
        few = options.max_tokens <= 10
        return write(model, ids, options, *args, **kwargs) if few else [[]] * len(ids)

    def reply_to(model: Any, parts: Any, output: Any, options: Any, *args: Any) -> Any:
        seen.extend(mixed.prompt_ids(model, each) for each in parts)
        few = options.max_tokens <= 10
        return reply(model, parts, output, options, *args) if few else [mixed.Reply()]

    monkeypatch.setattr(text, "generate_ids", generate_ids)
    monkeypatch.setattr(mixed, "reply", reply_to)
    return seen


def test_pieces_are_found_with_their_lines(texts: Index) -> None:
    hits = texts.search("a red bus", k=10)
    assert {(hit.path.name, hit.lines, hit.text) for hit in hits} == {
        ("ü.md", (1, 1), "two dogs run."),
        ("ü.md", (3, 3), "the cat {text} sleeps."),
        ("b.txt", (1, 2), "a small blue circle. a red bus."),
    }
    for hit in hits:
        cosine = float(texts.model.embed(texts=hit.text) @ texts.model.embed(texts="a red bus"))
        words = hit.path.name == "b.txt"
        assert hit.score == pytest.approx((words + cosine) / 2, abs=1e-5)
    assert "the cat {text} sleeps." in hits._repr_html_()


def test_a_changed_text_or_another_length_of_pieces_replaces_its_pieces(
    model: Model, tmp_path: Path
) -> None:
    (tmp_path / "texts").mkdir()
    path = tmp_path / "texts" / "a.txt"
    path.write_text("one. two. three.\n\nfour. five. six.\n")
    index = Index.open(tmp_path / "index", model, create=True)
    index.add(path.parent, piece_tokens=6)
    many = len(index)
    assert index.add(path.parent, piece_tokens=60).replaced == 1 and len(index) < many
    path.write_text("seven.")
    assert index.add(path.parent).replaced == 1
    assert [hit.text for hit in index.search("one")] == ["seven."]
    path.write_text("")
    assert index.add(path.parent).problems == 1 and len(index) == 0
    assert index.search("one") == []


def test_captions_follow_the_nearest_images_with_theirs(
    images: Index, photos: Path, prompts: list[list[int]]
) -> None:
    model, options = images.model, {"max_tokens": 4}
    query = [photos / "2.png", photos / "5.png"]
    found = list(images.caption_each(query, retrieve=3, **options))
    with_index = prompts[:]
    expected = []
    for path in query:
        hits = [hit for hit in images.search(path, 3) if hit.captions]
        examples = [(hit.path, hit.captions[0]) for hit in reversed(hits)]
        expected.append(model.caption(path, examples=examples, **options))
    assert found == expected and with_index == prompts[2:]
    assert all(len(prompt) > 40 for prompt in with_index)


def test_as_many_examples_as_fit(images: Index, photos: Path, prompts: list[list[int]]) -> None:
    limit = images.model.config.transformer.max_position_embeddings
    list(images.caption_each(photos / "0.png", retrieve=5, max_tokens=limit - 20))
    assert len(prompts[-1]) == 1 + 18
    list(images.caption_each(photos / "0.png", retrieve=5, max_tokens=limit - 60))
    assert 1 + 18 < len(prompts[-1]) <= 60


def test_shards_and_codes_are_examples_like_files(
    model: Model, photos: Path, tmp_path: Path, prompts: list[list[int]]
) -> None:
    build_shards(photos, tmp_path / "shards", image_size=32)
    tokenizer = model.image_tokenizer
    how = Encoding.for_tokenizer(tokenizer)
    encode_shards(tmp_path / "shards", tmp_path / "codes", tokenizer, how)
    for name in ("shards", "codes"):
        index = Index.open(tmp_path / f"{name}.index", model, create=True)
        assert index.add(tmp_path / name).added == 5, "one has no caption, and is in no shard"
        list(index.caption_each(photos / "0.png", retrieve=3, max_tokens=2))
    assert prompts[0] == prompts[1] and len(prompts[0]) > 1 + 4 * 18


def test_an_image_that_has_gone_is_no_example(model: Model, tmp_path: Path) -> None:
    for n in range(2):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
        (tmp_path / f"{n}.txt").write_text("a red bus")
    index = Index.open(tmp_path / "index", model, create=True)
    index.add(tmp_path)
    (tmp_path / "1.png").unlink()
    options = {"max_tokens": 4}
    (found,) = index.caption_each(tmp_path / "0.png", retrieve=2, **options)
    examples = [(tmp_path / "0.png", "a red bus")]
    assert found == model.caption(tmp_path / "0.png", examples=examples, **options)


def test_answers_follow_their_sources(texts: Index, photos: Path, prompts: list[list[int]]) -> None:
    model, decode = texts.model, texts.model.text_tokenizer.decode
    answer = texts.answer("a red bus?", retrieve=2, max_tokens=4)
    assert answer.sources == texts.search("a red bus?", 2)
    lines = "".join(f"[{hit.label}] {hit.text}\n" for hit in answer.sources)
    lines = lines.replace("{text}", "{ text }")
    assert {hit.label for hit in answer.sources} < {"b.txt:1-2", "ü.md:1-1", "ü.md:3-3"}
    assert decode(prompts[-1][1:]) == f"{lines}Question: a red bus? Answer:"
    assert (
        str(answer)
        == answer.text
        == "".join(
            map(str, model.generate([f"{lines}Question: a red bus? Answer:"], max_tokens=4))
        ).strip()
    )
    about = texts.answer("a red bus?", photos / "0.png", retrieve=2, max_tokens=4)
    codes = 18
    assert decode(prompts[-1][1 + codes :]) == decode(prompts[0][1:]) and about.sources
    chosen = texts.answer("red?", photos / "0.png", choices=["yes", "no"])
    assert chosen.text in ("yes", "no") and len(chosen.sources) == 3
    with pytest.raises(ValueError, match="questions about an image"):
        texts.answer("red?", choices=["yes", "no"])
    with pytest.raises(ValueError, match="question is empty"):
        texts.answer(" ")
    with pytest.raises(ValueError, match="retrieve=0"):
        texts.answer("red?", retrieve=0)


def test_a_question_about_an_image_finds_like_images(
    images: Index, photos: Path, prompts: list[list[int]]
) -> None:
    for path in (photos / "3.png", str(photos / "3.png")):
        answer = images.answer("what is it?", path, retrieve=2, max_tokens=4)
        assert answer.sources == [hit for hit in images.search(photos / "3.png", 2) if hit.captions]
        words = images.model.text_tokenizer.decode(prompts[-1][19:])
        assert all(f"[{h.label}] {'; '.join(h.captions)}\n" in words for h in answer.sources)


def test_as_many_sources_as_fit(texts: Index, prompts: list[list[int]]) -> None:
    limit = texts.model.config.transformer.max_position_embeddings
    counts = [
        len(texts.answer("red?", retrieve=3, max_tokens=limit - room).sources)
        for room in (40, 2000 if limit > 2000 else limit - 4)
    ]
    assert counts == [0, 3]


@pytest.fixture
def run(tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(verb, ...) -> (exit status, stdout, stderr), with the tiny model."""

    def run(verb: str, *arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([verb, "--model", str(tiny_model_folder), *map(str, arguments)])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return run


def test_the_verbs(run: Run, texts: Index, images: Index, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    status, printed, _ = run("index", photos, out)
    assert status == 0 and f"{out}: 6 entries; files or samples: 6 added" in printed
    assert "6 as before" in run("index", photos, out)[1]
    query = photos / "2.png"
    status, printed, _ = run("search", query, "--index", out, "-k", 2, "--json")
    lines = [json.loads(line) for line in printed.splitlines()]
    assert status == 0 and [line["path"] for line in lines] == [
        str(hit.path) for hit in images.search(query, 2)
    ]
    assert [line.get("captions", []) for line in lines] == [
        list(hit.captions) for hit in images.search(query, 2)
    ]
    status, printed, _ = run("search", "a red bus", "--index", texts.folder, "-k", 3)
    assert status == 0 and "b.txt:1-2\ta small blue circle. a red bus.\n" in printed
    asked = ("a red bus?", "--index", texts.folder, "--retrieve", 2, "--max-tokens", 4)
    status, printed, _ = run("answer", *asked, "--json")
    expected = texts.answer("a red bus?", retrieve=2, max_tokens=4)
    assert status == 0 and json.loads(printed) == {
        "image": None,
        "question": "a red bus?",
        "answer": expected.text,
        "sources": json.loads(json.dumps([hit.to_json() for hit in expected.sources])),
    }
    assert expected.sources[0].source in run("answer", *asked)[1]
    assert json.loads(run("answer", query, *asked, "--json")[1])["image"] == str(query)
    caption = ("caption", query, "--max-tokens", 4, "--index", out, "--retrieve", 2)
    (words,) = images.caption_each(query, retrieve=2, max_tokens=4)
    assert run(*caption, "--json")[1] == json.dumps({"image": str(query), "caption": words}) + "\n"
    for wrong in (
        ("search", "x"),
        ("search", "x", "--images", photos, "--index", out),
        ("caption", "--data", "d", "--out-dir", "o", "--index", out),
        ("caption", query, "--out-dir", "o"),
        ("embed", query, "--out", "o.npy", "--split", "val"),
        ("embed", "--data", "d", "--out-dir", "o", "--out", "o.npy"),
        ("answer", "only a question"),
    ):
        assert run(*wrong)[0] == 2, wrong
    for missing in (photos / "nosuch.png", "a lost dog.JPG", "s3://b/dog.png", "https://b/dog"):
        status, printed, errors = run("search", missing, "--images", photos)
        assert (status, printed) == (1, "") and errors.count("\n") == 1
        assert str(missing) in errors, "it is no text to search for"
    status, _, errors = run("search", "x", "--index", photos)
    assert status == 1 and "no index; run: multimodal index" in errors and errors.count("\n") == 1


def test_a_missing_library_is_said(
    run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "usearch", None)
    monkeypatch.setitem(__import__("sys").modules, "usearch.index", None)
    status, _, errors = run("index", photos, tmp_path / "index")
    assert status == 1 and "pip install multimodal[index]" in errors
