"""Captions of synthetic scenes, all true by construction.

Every caption names every object with its colour and shape, usually from left to right. Objects of
the same colour and shape form one group: "two red squares". Sizes and textures are often added.
Many forms also state a relation, a position, a count or the background. Positions and relations are
true with a margin (``sure`` in ``multimodal.scenes.positions``).
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

from multimodal.scenes.positions import SPATIAL, is_between, region_of, relation_holds
from multimodal.scenes.scene import Scene, SceneObject
from multimodal.scenes.words import (
    NUMBERS,
    PLURALS,
    POSITION_PHRASES,
    RELATION_PHRASES,
    with_article,
)

MAX_WORDS = 32
OPENING_PHRASES = (
    *("the picture shows", "the image shows", "a picture of", "an image of", "a drawing of"),
    *("this picture has", "we see"),
)


@dataclass(frozen=True)
class _Group:
    """The objects of one colour and shape. An attribute that differs among them is None."""

    items: tuple[SceneObject, ...]

    @property
    def first(self) -> SceneObject:
        return self.items[0]

    @property
    def size(self) -> str | None:
        return self.first.size if len({item.size for item in self.items}) == 1 else None

    @property
    def texture(self) -> str | None:
        return self.first.texture if len({item.texture for item in self.items}) == 1 else None

    @property
    def noun(self) -> str:
        return PLURALS[self.first.shape] if len(self.items) > 1 else self.first.shape


def _groups(scene: Scene) -> list[_Group]:
    pairs = dict.fromkeys(item.pair for item in scene.objects)
    return [_Group(tuple(item for item in scene.objects if item.pair == pair)) for pair in pairs]


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _related(a: _Group, relation: str, b: _Group) -> bool:
    return all(relation_holds(x, relation, y, sure=True) for x in a.items for y in b.items)


class _Captioner:
    """Writes one caption. The style is sampled once, so each caption needs a new instance."""

    def __init__(self, scene: Scene, rng: random.Random) -> None:
        self.scene, self.rng = scene, rng
        self.groups = _groups(scene)
        if rng.random() < 0.1:
            rng.shuffle(self.groups)
        # The probability to mention a size or texture, the same for all objects of the caption.
        self.detail = rng.choices((1.0, 0.5, 0.0), (50, 25, 25))[0]
        self.swapped = rng.random() < 0.12  # "striped small" instead of "small striped"

    def pick(self, forms: tuple[str, ...]) -> str:
        """One of the forms. The first one is as frequent as all others together."""
        if len(forms) == 1 or self.rng.random() < 0.5:
            return forms[0]
        return self.rng.choice(forms[1:])

    def name(self, group: _Group) -> str:
        """ "a small striped blue square", "two red stars with dots"."""
        rng, words, after = self.rng, [], ""
        if group.size and rng.random() < self.detail:
            words.append(
                self.pick(
                    ("small", "little", "tiny") if group.size == "small" else ("large", "big")
                )
            )
        # "solid" is the default, so captions seldom mention it.
        plain = group.texture == "solid"
        if group.texture and rng.random() < self.detail * (0.08 if plain else 1):
            if not plain and rng.random() < 0.2:
                after = " with stripes" if group.texture == "striped" else " with dots"
            else:
                dotted = group.texture == "dotted"
                words.append(self.pick(("dotted", "spotted") if dotted else (group.texture,)))
        if self.swapped:
            words.reverse()
        words = [*words, group.first.colour, group.noun]
        text, count = " ".join(words) + after, len(group.items)
        if count > 1 or rng.random() < 0.05:
            return f"{NUMBERS[count]} {text}"
        return with_article(text)

    def back(self, group: _Group) -> str:
        """A second mention: "the red circle", or "the circle" if all circles are red."""
        count = f"{NUMBERS[len(group.items)]} " if len(group.items) > 1 else ""
        unique_shape = sum(other.first.shape == group.first.shape for other in self.groups) == 1
        if unique_shape and self.rng.random() < 0.4:
            return f"the {count}{group.noun}"
        return f"the {count}{group.first.colour} {group.noun}"

    def relation(self, a: _Group, b: _Group, kinds: tuple[str, ...] = SPATIAL) -> str | None:
        for relation in kinds:
            if _related(a, relation, b):
                return self.pick(RELATION_PHRASES[relation])
        return None

    def position(self, group: _Group) -> str | None:
        region = region_of(group.items)
        return self.pick(POSITION_PHRASES[region]) if region else None

    def background(self) -> str:
        name = self.scene.background
        if name == "sky" and self.rng.random() < 0.5:
            return self.rng.choice(("against the sky", "in the sky"))
        return f"{self.pick(('on', 'against', 'with'))} {with_article(name)} background"

    def is_are(self, group: _Group) -> str:
        return "are" if len(group.items) > 1 else "is"

    # The forms of a caption. Each returns None if the scene does not allow it.

    def listing(self) -> str:
        return _join([self.name(group) for group in self.groups])

    def counted(self) -> str | None:
        count = len(self.scene.objects)
        if count < 2 or len(self.groups) < 2:
            return None
        return f"{NUMBERS[count]} {self.rng.choice(('shapes', 'objects'))}: {self.listing()}"

    def related(self) -> str | None:
        """ "a above b", "a above b, and c", "a above b, and c to the left of d"."""
        groups = self.groups
        if len(groups) < 2:
            return None
        relation = self.relation(groups[0], groups[1])
        if relation is None:
            return None
        text = f"{self.name(groups[0])} {relation} {self.name(groups[1])}"
        if len(groups) == 2:
            return text
        last = self.relation(groups[2], groups[-1]) if len(groups) == 4 else None
        if last:
            return f"{text}, and {self.name(groups[2])} {last} {self.name(groups[3])}"
        return f"{text}, and {_join([self.name(group) for group in groups[2:]])}"

    def reversed_relation(self) -> str | None:
        """ "above a red star is a green heart"."""
        if len(self.groups) != 2:
            return None
        a, b = self.groups
        relation = self.relation(b, a)
        return relation and f"{relation} {self.name(a)} {self.is_are(b)} {self.name(b)}"

    def between(self) -> str | None:
        for a, b, c in permutations(self.scene.objects, 3):
            if b.x <= c.x and is_between(a, b, c, sure=True):
                names = {group.first.pair: group for group in self.groups}
                if len(names) == 3 and len(self.scene.objects) == 3:
                    middle, first, second = (self.name(names[item.pair]) for item in (a, b, c))
                    return f"{middle} between {first} and {second}"
                if len(names) == 2 and b.pair == c.pair != a.pair and len(self.scene.objects) == 3:
                    return f"{self.name(names[a.pair])} between {self.name(names[b.pair])}"
        return None

    def placed(self) -> str | None:
        """ "a on the left and b in the top right corner"."""
        positions = [self.position(group) for group in self.groups]
        if None in positions or len(positions) > 3:
            return None
        return _join([f"{self.name(g)} {p}" for g, p in zip(self.groups, positions, strict=True)])

    def located(self) -> str | None:
        """ "on the left there is a, and on the right there is b"."""
        positions = [self.position(group) for group in self.groups]
        if None in positions or len(positions) > 2:
            return None
        link = self.rng.choice(("there ", ""))
        return " and ".join(
            f"{position} {link}{self.is_are(group)} {self.name(group)}"
            for group, position in zip(self.groups, positions, strict=True)
        )

    def tail(self) -> str:
        """A statement about objects that were already named, or an empty string."""
        pairs = [(a, b) for a in self.groups for b in self.groups if a is not b]
        if self.rng.random() < 0.25:
            group = self.rng.choice(self.groups)
            position = self.position(group)
            if position and len(self.groups) > 1:
                return f", with {self.back(group)} {position}"
        if self.rng.random() < 0.2:
            for a, b in pairs:
                if phrase := self.relation(a, b, ("larger than", "smaller than")):
                    return f"; {self.back(a)} {self.is_are(a)} {phrase} {self.back(b)}"
        # Again from left to right: the first pair with a clear relation.
        for a, b in pairs:
            if phrase := self.relation(a, b):
                if self.rng.random() < 0.6:
                    return f", with {self.back(a)} {phrase} {self.back(b)}"
                return f"; {self.back(a)} {self.is_are(a)} {phrase} {self.back(b)}"
        return ""

    def write(self) -> str:
        """One caption in a random form, with a random opening and ending."""
        rng = self.rng
        forms: list[tuple[Callable[[], str | None], int]] = [
            (self.listing, 40),
            (self.counted, 10),
            (self.related, 25),
            (self.reversed_relation, 6),
            (self.between, 20),
            (self.placed, 8),
            (self.located, 5),
        ]
        text = None
        while text is None:
            form = rng.choices([f for f, _ in forms], [weight for _, weight in forms])[0]
            text = form()
        inverted = form in (self.reversed_relation, self.located)
        opening = rng.random()
        if not inverted:
            if opening < 0.2:
                many = text.split()[0] in NUMBERS[2:]
                text = f"there {'are' if many else 'is'} {text}"
            elif opening < 0.45:
                text = f"{rng.choice(OPENING_PHRASES)} {text}"
        ending = rng.random()
        if form in (self.listing, self.counted) and ending < 0.4:
            return text + self.tail()
        if ending < 0.6:
            return f"{text} {self.background()}"
        if ending < 0.66 and not text.startswith(("a picture", "an image", "a drawing")):
            return f"on {with_article(self.scene.background)} background, {text}"
        if ending < 0.7:
            return f"{text}. the background is {self.scene.background}"
        return text


def captions(scene: Scene, rng: random.Random, n: int) -> list[str]:
    """Different captions of a scene. All their claims are true.

    Args:
        scene: ground truth.
        rng: source of all randomness.
        n: number of captions, 0 to 12.

    Returns:
        n captions in lower case, at most ``MAX_WORDS`` words each.

    Raises:
        ValueError: if ``n`` is out of range.
    """
    if not 0 <= n <= 12:
        raise ValueError(f"{n} captions requested, expected 0 to 12")
    texts: dict[str, None] = {}
    while len(texts) < n:
        text = _Captioner(scene, rng).write()
        if len(text.split()) <= MAX_WORDS:
            texts[text] = None
    return list(texts)
