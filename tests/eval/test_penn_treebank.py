"""Tokens of captions are those of Java's PTBTokenizer, which COCO's evaluation uses.

``ptb_tokens.tsv`` has 2,233 texts, each with the tokens that Stanford's tokenizer of CoreNLP 3.4.1
gave (the jar of pycocoevalcap 1.2, options ``-preserveLines -lowerCase``). An empty line and a line
of one word followed each text, so that no text saw the next one. The texts are made: 1,664 words
and signs in all kinds of company, and 569 sentences.
"""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from multimodal.eval.metrics.captioning import score_captions
from multimodal.eval.metrics.penn_treebank import DROPPED, LONGEST, ptb_tokenize, ptb_tokens

TABLE = Path(__file__).with_name("ptb_tokens.tsv")
PAIRS = [tuple(line.split("\t")) for line in TABLE.read_text("utf-8").split("\n") if line]
UNLIKE = ("Nn't",)  # the part of a text where we differ


def test_tokens_are_those_of_java() -> None:
    assert len(PAIRS) == 2233
    differ = [text for text, tokens in PAIRS if " ".join(ptb_tokens(text)) != tokens]
    assert [text for text in differ if not any(part in text for part in UNLIKE)] == []
    assert len(differ) <= 2


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A Man skis in open snow-packed field.", "a man skis in open snow-packed field"),
        ("The dog's toy isn't here, it's there!", "the dog 's toy is n't here it 's there"),
        ('He said: "go" (now) -- or...', "he said go -lrb- now -rrb- or"),
        ("At 3:30 the 2nd of 1,000 runs", "at 3:30 the 2nd of 1,000 runs"),
        ("black/white; R&B", "black/white r&b"),
    ],
)
def test_tokens_are_those_of_the_penn_treebank(text: str, tokens: str) -> None:
    assert ptb_tokenize(text) == tokens


def test_punctuation_is_dropped_as_by_coco() -> None:
    assert ptb_tokenize("He said: “go” (now) – or… stop!") == "he said go -lrb- now -rrb- or stop"
    assert not DROPPED & set(ptb_tokenize(" ".join(text for text, _ in PAIRS)).split(" "))


def test_the_kind_of_quote_does_not_change_a_score() -> None:
    predictions = {
        "1": "the dog's ball isn't red",
        "2": 'a man says "stop" to the crowd',
        "3": "a cat on a sofa - it can not see",
    }
    references = {
        "1": ["the dog’s ball isn’t red"],
        "2": ["a man says “stop” to the crowd"],
        "3": ["a cat on a sofa – it cannot see"],
    }
    scores = score_captions(predictions, references)
    assert scores["CIDEr"] == pytest.approx(10) and scores["Bleu_4"] == pytest.approx(1)


def test_any_text_is_read_to_its_end() -> None:
    for sign in ("a", "a.", "a,", "<a ", "'", "1-", "(", "\u3000", "\U0001f600", "\x00"):
        assert "end" in " ".join(ptb_tokens(f"{sign * LONGEST} end"))
    assert ptb_tokenize("") == ptb_tokenize(" \n ") == ""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_java_still_gives_these_tokens(tmp_path: Path) -> None:
    found = importlib.util.find_spec("pycocoevalcap")
    assert found is not None and found.submodule_search_locations
    (jar,) = Path(found.submodule_search_locations[0]).rglob("stanford-corenlp-*.jar")
    lines = tmp_path / "texts.txt"
    lines.write_text("".join(f"{text}\n\nzzz\n\n" for text, _ in PAIRS), "utf-8")
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", str(lines)]
    output = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    assert [line.rstrip() for line in output.split("\n")[: 4 * len(PAIRS) : 4]] == [
        tokens for _, tokens in PAIRS
    ]
