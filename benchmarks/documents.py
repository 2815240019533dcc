"""Does an index of texts help with questions whose answers a model cannot know?

    python -m benchmarks.documents [--model starter] [--facts 200] [--out docs/documents.json]

Each document is a sentence about an invented place ("The door of the house of Tarvelo is green .")
and each question asks for its colour, one of eight. Asked are: the model alone; with the three
nearest documents; with the right document and no other; and with the three nearest, of documents
whose colours have been dealt out anew, while the answer that counts stays the old one.
If an answer comes from the documents, the last is at chance. An answer is right if it holds the
colour and no other one, and wrong if it holds another one. 95 % intervals by Wilson, so none of 200
is not certainty. ``found`` is how often the right document is among the three nearest. The last
line is JSON.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multimodal.api import Model, load
from multimodal.eval.metrics.proportions import Rate
from multimodal.files import write_json
from multimodal.index.index import Index

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "brown", "pink")
QUESTION = "what colour is the door of the house of {}?"
K = 3


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
    said = [{word for word in COLOURS if word in answer.lower().split()} for answer in answers]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="starter")
    parser.add_argument("--facts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model, rng = load(arguments.model), random.Random(arguments.seed)
    names = places(arguments.facts, rng)
    facts = {name: rng.choice(COLOURS) for name in names}
    colours = list(facts.values())
    others = rng.sample(colours, len(colours))
    questions = [QUESTION.format(name) for name in names]
    asked = [model.config.templates.question.format(text=each) for each in questions]
    alone = ["".join(map(str, model.generate([each], max_tokens=8))) for each in asked]
    rows = {"alone": score(alone, colours)}
    with tempfile.TemporaryDirectory() as name:
        index = index_of(model, Path(name) / "right", facts)
        dealt = index_of(model, Path(name) / "dealt", dict(zip(names, others, strict=True)))
        nearest = [index.search(each, K) for each in questions]
        found = [
            any(hit.path.stem == name for hit in hits)
            for name, hits in zip(names, nearest, strict=True)
        ]
        for row, source in (("nearest", index), ("colours dealt anew", dealt)):
            answers = [source.answer(q, retrieve=K, max_tokens=8).text for q in questions]
            rows[row] = score(answers, colours)
        given = []
        for number, (each, colour) in enumerate(zip(names, colours, strict=True)):
            only = index_of(model, Path(name) / f"only{number}", {each: colour})
            given.append(only.answer(questions[number], retrieve=1, max_tokens=8).text)
        rows["the right document alone"] = score(given, colours)
    result = {
        "benchmark": "documents",
        "model": model.fingerprint,
        "facts": arguments.facts,
        "retrieved": K,
        "seed": arguments.seed,
        "chance": 1 / len(COLOURS),
        "found": share(found),
        "rows": rows,
    }
    print(json.dumps(result))
    if arguments.out is not None:
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
