"""Reads a caption of a scene into claims and checks every one of them against the ground truth.

The reader takes any text. It scans for the longest known phrases (objects, relations, positions,
backgrounds); whatever it cannot place becomes an ``unparsed`` claim, which is always false. Objects
that a caption mentions are numbered ("slots"): "two red squares" are two of them. The slots are
matched to the scene's objects so that the most colours, shapes, sizes and textures come out true
(then the most positions and relations); no object is used twice, so naming one twice costs.

"the circle" means an object mentioned before, if one fits; "a circle" is always a further object.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

from multimodal.scenes.scene import Scene, SceneObject, in_region, is_between, relation_holds
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
MAX_CHARACTERS = 2000  # what follows is not read, and counts as one unparsed clause
MAX_SLOTS = 8  # twice what a scene can hold; further slots are matched to nothing


@cache
def _phrases() -> dict[tuple[str, ...], tuple[str, str]]:
    """words -> (kind of element, what it says)."""
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

    kind: of ``KINDS``; value: a name, a number in digits, or for "unparsed" the words not read.
    subject: the slots it is about (none: the whole picture); others: for a relation, its objects.
    """

    kind: str
    value: str
    subject: tuple[int, ...] = ()
    others: tuple[tuple[int, ...], ...] = ()


@dataclass
class _Phrase:
    """An object phrase as read: "two small red squares"."""

    attributes: dict[str, str]
    count: int
    counted: bool  # a number was said
    definite: bool
    slots: tuple[int, ...] = ()


@dataclass
class _Element:
    kind: (
        str  # "object", "relation", "position", "background", "link", "opening", "stop", "unparsed"
    )
    value: str
    phrase: _Phrase | None = None


def _object_phrase(words: list[str], start: int) -> tuple[_Element, list[str], int] | None:
    """Read one object phrase: the element, words in it that contradict, and where it ends."""
    at, count, counted, definite = start, 0, False, False
    if words[at] in ARTICLES:
        count, definite = ARTICLES[words[at]], words[at] == "the"
        counted = count > 0
        at += 1
        if definite and at < len(words) and ARTICLES.get(words[at]):  # "the two squares"
            count = ARTICLES[words[at]]
            at += 1
    attributes: dict[str, str] = {}
    doubled = []
    while at < len(words) and words[at] in ADJECTIVES:
        kind, value = ADJECTIVES[words[at]]
        if kind in attributes:
            doubled.append(words[at])
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
            doubled.append(words[at + 1])
        attributes.setdefault("texture", texture)
        at += 2
    if not count:
        count = 1 if article else number
    phrase = _Phrase(attributes, count, counted, definite)
    return _Element("object", " ".join(words[start:at]), phrase), doubled, at


def _elements(words: list[str]) -> list[_Element]:
    """Cut the words into elements, always the longest that fits; unknown runs become one each."""
    table, found, at = _phrases(), [], 0
    while at < len(words):
        for length in range(6, 0, -1):
            entry = table.get(tuple(words[at : at + length]))
            if entry is not None:
                found.append(_Element(*entry))
                at += length
                break
        else:
            read = _object_phrase(words, at)
            if read is not None:
                element, doubled, at = read
                found += [element, *(_Element("unparsed", word) for word in doubled)]
            else:
                if not (found and found[-1].kind == "unparsed"):
                    found.append(_Element("unparsed", ""))
                found[-1].value = f"{found[-1].value} {words[at]}".strip()
                at += 1
    return found


class _Reader:
    """Turns the elements of one caption into claims."""

    def __init__(self, elements: list[_Element]) -> None:
        self.elements = elements
        self.claims: dict[Claim, None] = {}  # ordered, each once: saying it twice gains nothing
        self.unparsed: list[Claim] = []
        self.mentions: list[_Phrase] = []
        self.slots = 0

    def kind(self, at: int) -> str:
        return self.elements[at].kind if 0 <= at < len(self.elements) else "end"

    def add(self, claim: Claim) -> None:
        self.claims[claim] = None

    def slots_of(self, at: int) -> tuple[int, ...]:
        """The slots of the object phrase at this element: old ones for "the ...", else new."""
        phrase = self.elements[at].phrase
        assert phrase is not None
        if phrase.slots:
            return phrase.slots
        known = self._mentioned(phrase) if phrase.definite else None
        if known is None:
            phrase.slots = tuple(range(self.slots, self.slots + phrase.count))
            self.slots += phrase.count
            self.mentions.append(phrase)
        else:
            phrase.slots = known.slots
            known.attributes |= phrase.attributes
        for slot in phrase.slots:
            for kind, value in phrase.attributes.items():
                self.add(Claim(kind, value, (slot,)))
        if phrase.counted and known is None:
            self.add(Claim("count", str(phrase.count), phrase.slots))
        return phrase.slots

    def _mentioned(self, phrase: _Phrase) -> _Phrase | None:
        """The earlier mention that agrees with this one in most, and contradicts it in nothing."""
        best, most = None, -1
        for mention in self.mentions:
            shared = phrase.attributes.keys() & mention.attributes.keys()
            agree = all(phrase.attributes[k] == mention.attributes[k] for k in shared)
            if agree and mention.count == phrase.count and len(shared) > most:
                best, most = mention, len(shared)
        return best

    def read(self) -> list[Claim]:
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
                    self.fail(element)  # "an object" says nothing that could be wrong
                at += 1
            elif element.kind == "background":
                self.add(Claim("background", element.value))
                at += 1
            elif element.kind in ("relation", "position"):
                at = self.place(at)
            else:
                if element.kind == "unparsed":
                    self.fail(element)
                at += 1
        return [*self.claims, *self.unparsed]

    def fail(self, element: _Element) -> None:
        self.unparsed.append(Claim("unparsed", element.value))

    def is_thing(self, at: int) -> bool:
        """Whether an object phrase that says what it means stands at this element."""
        if self.kind(at) != "object":
            return False
        phrase = self.elements[at].phrase
        return phrase is not None and bool(phrase.attributes)

    def place(self, at: int) -> int:
        """Read a relation or position with its objects; returns the element after it."""
        element = self.elements[at]
        before = at - 1
        if self.kind(before) == "link":
            before -= 1
        subject = self.slots_of(before) if self.is_thing(before) else None
        end = at + 1
        others: list[tuple[int, ...]] = []
        if element.kind == "relation":
            wanted = 2 if element.value == "between" else 1
            while len(others) < wanted and self.is_thing(end):
                slots = self.slots_of(end)
                others += [slots] if wanted == 1 or len(slots) != 2 else [(s,) for s in slots]
                end += 1
                if len(others) < wanted and self.kind(end) == "opening":
                    end += self.elements[end].value == "and"
            if len(others) != wanted:
                self.fail(element)
                return end
        if subject is None:  # "above a red star is a green heart", "on the left, there is a ring"
            after = end + (self.kind(end) == "stop")
            if self.kind(after) == "link" and self.is_thing(after + 1):
                subject, end = self.slots_of(after + 1), after + 2
        if subject is None:
            self.fail(element)
        else:
            self.add(Claim(element.kind, element.value, subject, tuple(others)))
        return end


def parse_caption(text: str) -> list[Claim]:
    """All claims of a caption; never raises. A text without any claim is one unparsed claim."""
    words = re.findall(r"[^\W\d_]+|\d+|\S", text[:MAX_CHARACTERS].lower())
    spelling = {"gray": "grey", "center": "centre"} | {str(k): w for k, w in enumerate(NUMBERS)}
    claims = _Reader(_elements([spelling.get(word, word) for word in words])).read()
    if len(text) > MAX_CHARACTERS or not claims:
        claims.append(Claim("unparsed", text[MAX_CHARACTERS:][:40]))
    return claims


@dataclass
class CaptionScore:
    """What a caption says and how much of it is so.

    results: every claim with its truth. mentioned: objects the caption speaks of; found: how many
    of them the scene has with that colour and shape, none used twice; objects: how many it has.
    """

    results: list[tuple[Claim, bool]] = field(default_factory=list)
    mentioned: int = 0
    found: int = 0
    objects: int = 0

    @property
    def precision(self) -> float:
        """The share of the claims that is true, in [0, 1]."""
        return sum(true for _, true in self.results) / len(self.results)

    @property
    def recall(self) -> float:
        """The share of the scene's objects mentioned with the right colour and shape, in [0, 1]."""
        return self.found / self.objects

    @property
    def unparsed(self) -> int:
        """How many clauses could not be read."""
        return sum(claim.kind == "unparsed" for claim, _ in self.results)


def _assignments(
    scores: list[list[int]], slot: int = 0, used: int = 0
) -> Iterator[tuple[int, dict[int, int]]]:
    """Every matching of slots to objects (no object twice, nothing in common: no match)."""
    if slot == len(scores):
        yield 0, {}
        return
    yield from _assignments(scores, slot + 1, used)
    for item, score in enumerate(scores[slot]):
        if score and not used >> item & 1:
            for total, rest in _assignments(scores, slot + 1, used | 1 << item):
                yield total + score, {slot: item, **rest}


def _holds(claim: Claim, items: dict[int, SceneObject]) -> bool:
    """Whether a position or relation holds of all its objects, as matched."""
    slots = [*claim.subject, *(slot for group in claim.others for slot in group)]
    if any(slot not in items for slot in slots):
        return False
    subjects = [items[slot] for slot in claim.subject]
    if claim.kind == "position":
        return all(in_region(item, claim.value) for item in subjects)
    others = [[items[slot] for slot in group] for group in claim.others]
    if claim.value == "between":
        first, second = others
        return all(is_between(a, b, c) for a in subjects for b in first for c in second)
    return all(relation_holds(a, claim.value, b) for a in subjects for b in others[0])


def check_caption(text: str, scene: Scene) -> CaptionScore:
    """Read a caption and check each of its claims against the scene; never raises."""
    claims = parse_caption(text)
    said: dict[int, dict[str, str]] = {}
    for claim in claims:
        for slot in claim.subject:
            said.setdefault(slot, {})
        if claim.kind in ATTRIBUTES:
            said[claim.subject[0]][claim.kind] = claim.value

    def agreeing(attributes: dict[str, str], item: SceneObject) -> int:
        return sum(getattr(item, kind) == value for kind, value in attributes.items())

    scores = [
        [agreeing(said[slot], item) for item in scene.objects] for slot in sorted(said)[:MAX_SLOTS]
    ]
    placed = [claim for claim in claims if claim.kind in ("position", "relation")]
    matchings = list(_assignments(scores))
    most = max(total for total, _ in matchings)
    options = [
        {slot: scene.objects[item] for slot, item in matching.items()}
        for total, matching in matchings
        if total == most
    ]
    items = max(options, key=lambda option: sum(_holds(claim, option) for claim in placed))
    score = CaptionScore(mentioned=len(said), objects=len(scene.objects))
    for claim in claims:
        if claim.kind in ATTRIBUTES:
            item = items.get(claim.subject[0])
            true = item is not None and getattr(item, claim.kind) == claim.value
        elif claim.kind == "count":
            wanted = said[claim.subject[0]] if claim.subject else {}
            matching_items = sum(agreeing(wanted, o) == len(wanted) for o in scene.objects)
            true = str(matching_items) == claim.value
        elif claim.kind == "background":
            true = claim.value == scene.background
        else:
            true = claim.kind != "unparsed" and _holds(claim, items)
        score.results.append((claim, true))
    pairs = Counter((s.get("colour"), s.get("shape")) for s in said.values())
    real: Counter[tuple[str | None, str | None]] = Counter(item.pair for item in scene.objects)
    score.found = (pairs & real).total()
    return score
