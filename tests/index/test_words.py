"""Texts are found by their words, against the formula of BM25."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from multimodal.index.index import Index
from multimodal.index.words import Words
from multimodal.inference import mixed
from multimodal.inference.prompt_files import Prompt
from multimodal.tokenizers.text import TextTokenizer
from tests.layouts import that_talks

TEXTS = [
    "the red bus stops near the station",
    "the blue bus",
    "the dog runs and the dog jumps over the red fence of the park",
    "the cat sleeps",
    "the tram stops",
    "the man walks",
    "the bird sings near the water",
    "the boat",
    "the horse eats",
]


def bm25(query: str, texts: list[str]) -> dict[int, float]:
    """As in Robertson and Zaragoza 2009, section 3.4, with k1 1.2 and b 0.75."""
    split = [text.split() for text in texts]
    mean = sum(map(len, split)) / len(split)
    scores = Counter[int]()
    for term in query.split():
        holders = sum(term in words for words in split)
        idf = math.log((len(texts) - holders + 0.5) / (holders + 0.5))
        for number, words in enumerate(split):
            tf = words.count(term)
            scores[number] += idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * len(words) / mean))
    return {number: score for number, score in scores.items() if score}


@pytest.mark.parametrize("query", ["red bus", "dog", "red water near bus"])
def test_scores_are_those_of_bm25(query: str) -> None:
    found = Words(enumerate(TEXTS)).search(query, 10)
    expected = bm25(query, TEXTS)
    best = max(expected.values())
    assert found == pytest.approx({n: score / best for n, score in expected.items()}, rel=1e-4)
    assert list(found) == sorted(found, key=lambda number: -expected[number])


@pytest.mark.parametrize(
    "query",
    ['"', "red AND", "red NOT bus", "NEAR(red bus", "red*", "text:red", "-red", "(", "red' OR 1"],
)
def test_a_query_is_words_only(query: str) -> None:
    found = Words(enumerate(TEXTS)).search(query, 10)
    assert (0 in found) == ("red" in query)


def test_what_people_write_differently_is_found() -> None:
    words = Words(
        enumerate(["Das Café in Zürich", "running dogs", "東京 の 塔", "", "ÉCOLE", "a", "b", "c"])
    )
    for query, number in (
        ("cafe zurich", 0), ("The Dog RAN? It runs.", 1), ("塔", 2), ("ecole", 4),
    ):  # fmt: skip
        assert list(words.search(query, 3)) == [number], query
    assert words.search("?!", 3) == words.search("unknown", 3) == words.search("", 3) == {}
    assert Words([]).search("dog", 3) == {}
    assert len(words.search("dogs " * 5000, 3)) == 1


def test_words_that_most_texts_have_count_only_alone() -> None:
    words = Words(enumerate(TEXTS))
    assert list(words.search("the boat of the", 9)) == [7, 2]
    assert len(words.search("the", 20)) == len(TEXTS)


def test_a_name_is_found_among_sentences_that_a_model_takes_for_the_same(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    names = [
        f"{first}{last}" for first in ("Tarvelo", "Mibu", "Kodo", "Sara") for last in "abcdefgh"
    ]
    (tmp_path / "notes").mkdir()
    for name in names:
        (tmp_path / "notes" / f"{name}.txt").write_text(f"The door of {name} is red .\n", "utf-8")
    index = Index.open(tmp_path / "index", tiny_model(noise=0.1), create=True)
    index.add(tmp_path / "notes")
    for name in names:
        first, *others = index.search(f"what colour is the door of {name}?", 3)
        assert first.path.stem == name
        row = index.model.embed(texts=f"what colour is the door of {name}?")
        cosine = float(row @ index.model.embed(texts=first.text))
        assert first.score == pytest.approx((1 + cosine) / 2, abs=1e-5)
        assert all(each.score < first.score for each in others)
    assert index.answer("who is in Kodoc?", retrieve=1).sources[0].path.stem == "Kodoc"
    (tmp_path / "notes" / "Kodoc.txt").write_text("Nothing .\n", "utf-8")
    (tmp_path / "notes" / "new.txt").write_text("Kodoc has moved .\n", "utf-8")
    index.add(tmp_path / "notes")
    assert index.search("Kodoc", 1)[0].path.stem == "new", "after an update"
    again = Index.open(tmp_path / "index", index.model)
    assert [h.source for h in again.search("Mibua", 5)] == [
        h.source for h in index.search("Mibua", 5)
    ]
    assert len(index.search("?!", 40)) == len(names) + 1, "without words: by the embeddings"


def test_a_model_that_talks_is_asked_in_its_chat_template(
    tiny_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(noise=0.1)
    model.text_tokenizer = that_talks(model.text_tokenizer)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("The door of Mibu is red .\n", "utf-8")
    index = Index.open(tmp_path / "index", model, create=True)
    index.add(tmp_path / "notes")
    asked, reply = list[Any](), mixed.reply

    def noted(model: Any, prompts: Any, *more: Any) -> Any:
        asked.extend(prompts)
        return reply(model, prompts, *more)

    monkeypatch.setattr(mixed, "reply", noted)
    found = "[a.txt:1-1] The door of Mibu is red .\nwhat is red?"
    assert len(index.answer("what is red?", max_tokens=4).sources) == 1
    index.answer("what is red?", prompt=Prompt("own", 1, "", "Q: {text} A:"), max_tokens=4)
    model.text_tokenizer = TextTokenizer.from_json(model.text_tokenizer.to_json())
    index.answer("what is red?", max_tokens=4)
    question, own = (found.replace("what is red?", words) for words in (
        model.config.templates.ask("what is red?"), "Q: what is red? A:",
    ))  # fmt: skip
    assert asked == [[{"role": "user", "content": found}], [own], [question]]
