"""Texts in pieces of whole sentences: what is embedded, and what goes into a prompt."""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

MOST_LETTERS = 32  # of a token, about
LINE_BREAK = re.compile("\r\n?|\n")
# After . ! ? … and what closes a quotation, or after the full stops of Chinese and Japanese.
SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’»)\]]*\s+|(?<=[。！？])[」』”’）]*\s*")


@dataclass(frozen=True)
class Piece:
    """Some sentences. first, last: their lines in the text, from 1."""

    text: str
    first: int
    last: int


@dataclass(frozen=True)
class _Sentence:
    piece: Piece
    tokens: int
    ends_paragraph: bool


def cut(text: str, length: Callable[[str], int], size: int) -> list[Piece]:
    """Cut a text into pieces of sentences.

    A piece ends before a sentence that does not fit, or at the end of a paragraph if it is half
    full. After the first, the next piece begins with the last sentence again, if that is no longer
    than half a piece: what is said over two sentences is whole in one of the two.

    Args:
        length: of a text in tokens.
        size: tokens of a piece, at most (but for what the tokenizer does at the seams). A longer
            sentence is cut between words, and a longer word between characters.

    Returns:
        The pieces in order. A text without letters has none.
    """
    pieces: list[Piece] = []
    current: list[_Sentence] = []
    repeated = 0  # sentences of ``current`` that the piece before has, too

    def close(overlap: bool) -> None:
        nonlocal current, repeated
        if len(current) > repeated:
            texts = [each.piece for each in current]
            joined = " ".join(each.text for each in texts)
            pieces.append(Piece(joined, texts[0].first, texts[-1].last))
        last = current[-1:] if overlap else []
        current = [each for each in last if 2 * each.tokens <= size]
        repeated = len(current)

    for sentence in _sentences(text, length, size):
        if current and _tokens(current) + sentence.tokens > size:
            close(overlap=True)
        if current and _tokens(current) + sentence.tokens > size:  # even after one sentence
            close(overlap=False)
        current.append(sentence)
        if sentence.ends_paragraph and 2 * _tokens(current) >= size:
            close(overlap=False)
    close(overlap=False)
    return pieces


def _tokens(sentences: list[_Sentence]) -> int:
    return sum(each.tokens for each in sentences)


def _sentences(text: str, length: Callable[[str], int], size: int) -> Iterator[_Sentence]:
    paragraph: list[str] = []
    for number, line in enumerate([*LINE_BREAK.split(text), ""], start=1):
        if line.strip():
            paragraph.append(line.strip())
        elif paragraph:
            yield from _in_paragraph(paragraph, number - len(paragraph), length, size)
            paragraph = []


def _in_paragraph(
    lines: list[str], first: int, length: Callable[[str], int], size: int
) -> Iterator[_Sentence]:
    """The sentences of lines that follow one another. first: the number of the first line."""
    starts = list(accumulate((len(line) + 1 for line in lines[:-1]), initial=0))
    text = " ".join(lines)
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    spans = [
        span
        for start, end in zip([0, *ends], [*ends, len(text)], strict=True)
        for span in _fitting(text, start, end, length, size)
        if any(letter.isalnum() for letter in text[slice(*span)])
    ]
    for start, end in spans:
        sentence = text[start:end].strip()
        on = [first + bisect_right(starts, place) - 1 for place in (start, end - 1)]
        yield _Sentence(Piece(sentence, *on), length(sentence), (start, end) == spans[-1])


def _fitting(
    text: str, start: int, end: int, length: Callable[[str], int], size: int
) -> Iterator[tuple[int, int]]:
    """A span, or its halves and theirs until they fit, cut at a space if there is one."""
    while end > start and text[end - 1].isspace():
        end -= 1
    may_fit = end - start <= MOST_LETTERS * size  # tokens of a very long text would take long
    if end - start < 2 or (may_fit and length(text[start:end]) <= size):
        yield start, end
        return
    middle = (start + end) // 2
    space = text.rfind(" ", start + 1, middle)
    middle = space + 1 if space > 0 else middle
    yield from _fitting(text, start, middle, length, size)
    yield from _fitting(text, middle, end, length, size)
