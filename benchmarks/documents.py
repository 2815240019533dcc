"""Does an index of texts help with questions whose answers a model cannot know?

    python -m benchmarks.documents [--model starter] [--facts 200] [--captions data/flickr8k]
        [--out docs/documents.json]

Each document is a sentence about an invented place ("The door of the house of Tarvelo is green .")
and each question asks for its colour, one of eight. Asked are: the model alone; with the three
nearest documents; with the right document and no other; and with the three nearest, of documents
whose colours have been dealt out anew, while the answer that counts stays the old one.
If an answer comes from the documents, the last is at chance. An answer is right if it holds the
colour and no other one, and wrong if it holds another one. 95 % intervals by Wilson, so none of 200
is not certainty. ``found`` is how often the right document is among the three nearest: by its
words, by its embedding, and by both, as an index searches. With --captions also how often the
second caption of a photo is among the first 1, 3 and 10 for its first caption, of all photos of
val. A language model with a chat template is asked in it. The last line is JSON.
"""

import argparse
import json
import random
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from multimodal.api import Model, load
from multimodal.data.shards import Shards
from multimodal.eval.metrics.proportions import Rate
from multimodal.files import write_json
from multimodal.index.hits import Hit
from multimodal.index.index import Index
from multimodal.index.vectors import as_rows

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "brown", "pink")
QUESTION = "what colour is the door of the house of {}?"
K = 3
MOST = 10
TOKENS = 24  # of an answer


def places(count: int, rng: random.Random) -> list[str]:
    """Different invented names."""
    found: dict[str, None] = {}
    while len(found) < count:
        parts = [rng.choice("bdfgklmnprstv") + rng.choice("aeiou") for _ in range(4)]
        found["".join(parts).capitalize()] = None
    return list(found)


def share(values: Sequence[bool]) -> dict[str, float]:
    """The share of those that are true, and its 95 % interval."""
    rate = Rate(sum(values), len(values))
    low, high = rate.interval
    return {"value": rate.value, "low": low, "high": high}


def score(answers: Sequence[str], colours: Sequence[str]) -> dict[str, Any]:
    said = [set(COLOURS) & set(re.findall(r"[a-z]+", answer.lower())) for answer in answers]
    pairs = list(zip(said, colours, strict=True))
    return {
        "right": share([words == {colour} for words, colour in pairs]),
        "wrong": share([bool(words - {colour}) for words, colour in pairs]),
        "examples": list(answers[:3]),
    }


def index_of(model: Model, folder: Path, facts: dict[str, str]) -> Index:
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for place, colour in facts.items():
        sentence = f"The door of the house of {place} is {colour} .\n"
        (texts / f"{place}.txt").write_text(sentence, "utf-8")
    index = Index.open(folder / "index", model, create=True)
    index.add(texts, kind="texts")
    return index


def places_found(index: Index, queries: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """By each way of searching, the place of the text that a query is for. Without it: 0."""

    def place(hits: Iterable[Hit], name: str) -> int:
        stems = [hit.path.stem for hit in hits]
        return stems.index(name) + 1 if name in stems else 0

    ways: dict[str, list[int]] = {"words": [], "embeddings": [], "both": []}
    rows = index.model.embed(texts=list(queries))
    nearest = index._vectors.search(as_rows(rows), MOST)
    for query, name, near in zip(queries, names, nearest, strict=True):
        worded = index._words.search(query, MOST).items()
        ways["words"].append(place((index._hit(*each) for each in worded), name))
        ways["embeddings"].append(place((index._hit(*each) for each in near), name))
        ways["both"].append(place(index.search(query, MOST), name))
    return ways


def recall(places: Sequence[int], k: int) -> dict[str, float]:
    return share([0 < place <= k for place in places])


def captions_found(model: Model, data: str, folder: Path) -> dict[str, Any]:
    """Recall at 1, 3 and 10 of the second caption of each photo of val by its first one."""
    texts, queries, names = folder / "captions", list[str](), list[str]()
    texts.mkdir()
    for sample in Shards(data, "val"):
        first, second, *_ = sample.record["captions"]
        names.append(f"{len(names):05}")
        queries.append(first)
        (texts / f"{names[-1]}.txt").write_text(f"{second}\n", "utf-8")
    index = Index.open(folder / "captions.index", model, create=True)
    index.add(texts, kind="texts", piece_tokens=256)
    ways = places_found(index, queries, names)
    return {
        "photos": len(names),
        **{way: {k: recall(places, k) for k in (1, 3, MOST)} for way, places in ways.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="starter")
    parser.add_argument("--facts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--captions", metavar="DATA", help="a shard folder")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model, rng = load(arguments.model), random.Random(arguments.seed)
    names = places(arguments.facts, rng)
    facts = {name: rng.choice(COLOURS) for name in names}
    colours = list(facts.values())
    others = rng.sample(colours, len(colours))
    questions, templates = [QUESTION.format(name) for name in names], model.config.templates
    talks = model.text_tokenizer.chat is not None
    ask: Any = (lambda text: {"role": "user", "content": text}) if talks else templates.ask
    alone = [
        "".join(map(str, model.generate([ask(each)], max_tokens=TOKENS))).strip()
        for each in questions
    ]
    rows = {"alone": score(alone, colours)}
    with tempfile.TemporaryDirectory() as name:
        index = index_of(model, Path(name) / "right", facts)
        dealt = index_of(model, Path(name) / "dealt", dict(zip(names, others, strict=True)))
        found = {
            way: recall(places, K) for way, places in places_found(index, questions, names).items()
        }
        captions = {}
        if arguments.captions:
            captions = {"captions": captions_found(model, arguments.captions, Path(name))}
        for row, source in (("nearest", index), ("colours dealt anew", dealt)):
            answers = [source.answer(q, retrieve=K, max_tokens=TOKENS).text for q in questions]
            rows[row] = score(answers, colours)
        given = []
        for number, (each, colour) in enumerate(zip(names, colours, strict=True)):
            only = index_of(model, Path(name) / f"only{number}", {each: colour})
            given.append(only.answer(questions[number], retrieve=1, max_tokens=TOKENS).text)
        rows["the right document alone"] = score(given, colours)
    result = {
        "benchmark": "documents",
        "model": model.fingerprint,
        "facts": arguments.facts,
        "retrieved": K,
        "seed": arguments.seed,
        "chance": 1 / len(COLOURS),
        "found": found,
        **captions,
        "rows": rows,
    }
    print(json.dumps(result))
    if arguments.out is not None:
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
