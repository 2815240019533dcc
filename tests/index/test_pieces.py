"""Texts in pieces: nothing is lost, lines are right, no piece is too long."""

import random

import pytest

from multimodal.index.pieces import Piece, cut


def words(text: str) -> int:
    return len(text.split())


def test_pieces_end_at_sentences_and_overlap_by_one() -> None:
    text = "One two. Three four five.\nSix seven! Eight\nnine ten? Eleven."
    assert cut(text, words, 7) == [
        Piece("One two. Three four five. Six seven!", 1, 2),
        Piece("Six seven! Eight nine ten? Eleven.", 2, 3),
    ]
    assert cut(text, words, 100) == [Piece(" ".join(text.split()), 1, 3)]


def test_a_paragraph_ends_a_piece_that_is_half_full() -> None:
    text = "# Title\n\nOne two three four five.\n\n\nSix seven."
    assert cut(text, words, 8) == [
        Piece("# Title One two three four five.", 1, 3),
        Piece("Six seven.", 6, 6),
    ]


@pytest.mark.parametrize("text", ["", "\n\n", " \t ", "---\n***\n", "...", "\x0b"])
def test_a_text_without_letters_has_no_pieces(text: str) -> None:
    assert cut(text, words, 10) == []


def test_line_breaks_of_all_systems() -> None:
    for text in ("a b.\nc d.\n\ne f.", "a b.\r\nc d.\r\n\r\ne f.", "a b.\rc d.\r\re f."):
        assert [(p.first, p.last) for p in cut(text, words, 2)] == [(1, 1), (2, 2), (4, 4)]


def test_texts_without_spaces_are_cut_at_their_stops_and_then_anywhere() -> None:
    assert [p.text for p in cut("犬が走る。「猫が寝る。」鳥が", len, 8)] == [
        "犬が走る。",
        "「猫が寝る。」",
        "鳥が",
    ]
    pieces = cut("x" * 1000, len, 64)
    assert "".join(p.text for p in pieces) == "x" * 1000 and max(len(p.text) for p in pieces) <= 64


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_and_lines_are_right(seed: int) -> None:
    rng = random.Random(seed)
    marks = [" ", " ", " ", ". ", "! ", "\n", "\n", "\n\n", ".\n", '." ', "… "]
    text = "".join(f"w{n}{rng.choice(marks)}" for n in range(rng.randint(1, 300)))
    size = rng.choice([1, 2, 5, 20, 1000])
    lines = text.split("\n")
    seen: list[str] = []
    for piece in cut(text, words, size):
        assert words(piece.text) <= size
        inside = " ".join(lines[piece.first - 1 : piece.last]).split()
        here = piece.text.split()
        assert here[0] in lines[piece.first - 1].split()
        assert here[-1] in lines[piece.last - 1].split()
        assert any(inside[n : n + len(here)] == here for n in range(len(inside)))
        new = [word for word in here if word not in seen]
        assert here[len(here) - len(new) :] == new, "what is repeated comes first"
        assert 2 * (len(here) - len(new)) <= size
        seen += new
    assert seen == text.split()


def test_a_long_text_takes_time_in_proportion() -> None:
    text = "a long line without an end " * 20_000
    calls = [0, 0]

    def length(part: str) -> int:
        calls[0] += 1
        calls[1] += len(part)
        return words(part)

    assert len(cut(text, length, 64)) > 1000
    assert calls[1] < 40 * len(text)
