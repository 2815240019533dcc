"""Parses a caption of a scene into claims. ``multimodal.scenes.checking`` checks them.

The parser takes any text. It looks for the longest known phrases: objects, relations, positions,
backgrounds. Whatever it cannot parse becomes an ``unparsed`` claim, which is always false.

Each object that a caption mentions gets a number, its slot: "two red squares" take two slots.
"the circle" refers to an earlier object, if one matches. "a circle" is always a new object.
"""

import re
from dataclasses import dataclass
from functools import cache

from multimodal.scenes.words import (
    ADJECTIVES,
    AFTER_NOUN,
    ANY_NOUNS,
    ARTICLES,
    LINKS,
    NOUNS,
    NUMBERS,
    OPENINGS,
    POSITION_PHRASES,
    RELATION_PHRASES,
    background_phrases,
)

ATTRIBUTES = ("colour", "shape", "size", "texture")
KINDS = (*ATTRIBUTES, "count", "position", "relation", "background", "unparsed")
MAX_CHARACTERS = 2000  # the rest of a longer text is not parsed and counts as one unparsed clause


@cache
def _phrases() -> dict[tuple[str, ...], tuple[str, str]]:
    """The words of each known phrase -> (kind of element, its value)."""
    entries = [
        *((mark, "stop", mark) for mark in ",.;:"),
        *((form, "link", form) for form in LINKS),
        *((form, "opening", form) for form in OPENINGS),
        *((form, "background", word) for form, word in background_phrases()),
        *((form, "relation", name) for name, forms in RELATION_PHRASES.items() for form in forms),
        *((form, "position", name) for name, forms in POSITION_PHRASES.items() for form in forms),
    ]
    return {tuple(form.split()): (kind, value) for form, kind, value in entries}


@dataclass(frozen=True)
class Claim:
    """One checkable statement.

    Args:
        kind: one of ``KINDS``.
        value: a name, a number in digits, or the words that were not parsed.
        subject: slots that the claim is about. Empty: the whole picture.
        others: the other slots of a relation. Two groups for "between", else one.
    """

    kind: str
    value: str
    subject: tuple[int, ...] = ()
    others: tuple[tuple[int, ...], ...] = ()


@dataclass
class _Phrase:
    """A parsed object phrase, such as "two small red squares"."""

    attributes: dict[str, str]
    count: int
    counted: bool  # the phrase has a number
    definite: bool  # the phrase starts with "the"
    slots: tuple[int, ...] = ()


@dataclass
class _Element:
    """One element of a caption.

    kind: object, relation, position, background, link, opening, stop or unparsed.
    """

    kind: str
    value: str
    phrase: _Phrase | None = None


def _object_phrase(words: list[str], start: int) -> tuple[_Element, list[str], int] | None:
    """Parse one object phrase: (element, words that repeat an attribute, index after it)."""
    at, count, counted, definite = start, 0, False, False
    if words[at] in ARTICLES:
        count, definite = ARTICLES[words[at]], words[at] == "the"
        counted = count > 0
        at += 1
        if definite and at < len(words) and ARTICLES.get(words[at]):  # "the two squares"
            count = ARTICLES[words[at]]
            at += 1
    attributes: dict[str, str] = {}
    repeated = []
    while at < len(words) and words[at] in ADJECTIVES:
        kind, value = ADJECTIVES[words[at]]
        if kind in attributes:
            repeated.append(words[at])
        attributes.setdefault(kind, value)
        at += 1
    if at == len(words) or words[at] not in {*NOUNS, *ANY_NOUNS}:
        return None
    if words[at] in NOUNS:
        attributes["shape"], number = NOUNS[words[at]]
    else:
        number = ANY_NOUNS[words[at]]
    article = words[start] in ("a", "an", "another")
    at += 1
    if texture := AFTER_NOUN.get(" ".join(words[at : at + 2])):
        if "texture" in attributes:
            repeated.append(words[at + 1])
        attributes.setdefault("texture", texture)
        at += 2
    if not count:
        count = 1 if article else number
    phrase = _Phrase(attributes, count, counted, definite)
    return _Element("object", " ".join(words[start:at]), phrase), repeated, at


def _elements(words: list[str]) -> list[_Element]:
    """Split the words into elements, the longest match first.

    Consecutive unknown words become one unparsed element.
    """
    phrases, elements, at = _phrases(), list[_Element](), 0
    while at < len(words):
        for length in range(6, 0, -1):
            entry = phrases.get(tuple(words[at : at + length]))
            if entry is not None:
                elements.append(_Element(*entry))
                at += length
                break
        else:
            parsed = _object_phrase(words, at)
            if parsed is not None:
                element, repeated, at = parsed
                elements += [element, *(_Element("unparsed", word) for word in repeated)]
            else:
                if not (elements and elements[-1].kind == "unparsed"):
                    elements.append(_Element("unparsed", ""))
                elements[-1].value = f"{elements[-1].value} {words[at]}".strip()
                at += 1
    return elements


class _Parser:
    """Turns the elements of one caption into claims."""

    def __init__(self, elements: list[_Element]) -> None:
        self.elements = elements
        # An ordered set: a repeated claim counts once.
        self.claims: dict[Claim, None] = {}
        self.unparsed: list[Claim] = []
        self.mentions: list[_Phrase] = []
        self.slots = 0

    def kind(self, at: int) -> str:
        """The kind of the element at this index, or "end" outside the caption."""
        return self.elements[at].kind if 0 <= at < len(self.elements) else "end"

    def add(self, claim: Claim) -> None:
        self.claims[claim] = None

    def slots_of(self, at: int) -> tuple[int, ...]:
        """The slots of the object phrase at this index: earlier ones for "the ...", else new."""
        phrase = self.elements[at].phrase
        assert phrase is not None
        if phrase.slots:
            return phrase.slots
        earlier = self._earlier_mention(phrase) if phrase.definite else None
        if earlier is None:
            phrase.slots = tuple(range(self.slots, self.slots + phrase.count))
            self.slots += phrase.count
            self.mentions.append(phrase)
        else:
            phrase.slots = earlier.slots
            earlier.attributes |= phrase.attributes
        for slot in phrase.slots:
            for kind, value in phrase.attributes.items():
                self.add(Claim(kind, value, (slot,)))
        if phrase.counted and earlier is None:
            self.add(Claim("count", str(phrase.count), phrase.slots))
        return phrase.slots

    def _earlier_mention(self, phrase: _Phrase) -> _Phrase | None:
        """The earlier mention that shares the most attributes and contradicts none."""
        best, most = None, -1
        for mention in self.mentions:
            shared = phrase.attributes.keys() & mention.attributes.keys()
            agree = all(phrase.attributes[k] == mention.attributes[k] for k in shared)
            if agree and mention.count == phrase.count and len(shared) > most:
                best, most = mention, len(shared)
        return best

    def parse(self) -> list[Claim]:
        at = 0
        while at < len(self.elements):
            element = self.elements[at]
            if element.kind == "object":
                assert element.phrase is not None
                if element.phrase.attributes:
                    self.slots_of(at)
                elif element.phrase.counted:  # "three objects" counts the whole picture
                    self.add(Claim("count", str(element.phrase.count)))
                else:
                    self.fail(element)  # "an object" makes no claim that could be false
                at += 1
            elif element.kind == "background":
                self.add(Claim("background", element.value))
                at += 1
            elif element.kind in ("relation", "position"):
                at = self.relation_or_position(at)
            else:
                if element.kind == "unparsed":
                    self.fail(element)
                at += 1
        return [*self.claims, *self.unparsed]

    def fail(self, element: _Element) -> None:
        self.unparsed.append(Claim("unparsed", element.value))

    def is_described_object(self, at: int) -> bool:
        """Whether the element at this index is an object phrase with an attribute."""
        if self.kind(at) != "object":
            return False
        phrase = self.elements[at].phrase
        return phrase is not None and bool(phrase.attributes)

    def relation_or_position(self, at: int) -> int:
        """Parse a relation or position with its objects. Returns the index after it."""
        element = self.elements[at]
        before = at - 1
        if self.kind(before) == "link":
            before -= 1
        subject = self.slots_of(before) if self.is_described_object(before) else None
        end = at + 1
        others: list[tuple[int, ...]] = []
        if element.kind == "relation":
            expected = 2 if element.value == "between" else 1
            while len(others) < expected and self.is_described_object(end):
                slots = self.slots_of(end)
                others += [slots] if expected == 1 or len(slots) != 2 else [(s,) for s in slots]
                end += 1
                if len(others) < expected and self.kind(end) == "opening":
                    end += self.elements[end].value == "and"
            if len(others) != expected:
                self.fail(element)
                return end
        # The subject may follow: "above a star is a heart", "on the left, there is a ring".
        if subject is None:
            after = end + (self.kind(end) == "stop")
            if self.kind(after) == "link" and self.is_described_object(after + 1):
                subject, end = self.slots_of(after + 1), after + 2
        if subject is None:
            self.fail(element)
        else:
            self.add(Claim(element.kind, element.value, subject, tuple(others)))
        return end


def parse_caption(text: str) -> list[Claim]:
    """All claims of a caption. Never raises.

    A text without any claim gives one unparsed claim.
    """
    words = re.findall(r"[^\W\d_]+|\d+|\S", text[:MAX_CHARACTERS].lower())
    spelling = {"gray": "grey", "center": "centre"} | {str(k): w for k, w in enumerate(NUMBERS)}
    claims = _Parser(_elements([spelling.get(word, word) for word in words])).parse()
    if len(text) > MAX_CHARACTERS or not claims:
        claims.append(Claim("unparsed", text[MAX_CHARACTERS:][:40]))
    return claims
