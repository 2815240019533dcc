"""Question-answer pairs about synthetic scenes, all true by construction.

Each question has exactly one answer in its scene. Yes and no are equally likely. If a scene has no
held-out pair, no question names a held-out pair.
"""

import random
from collections import Counter
from collections.abc import Callable
from itertools import product

from multimodal.scenes.positions import OPPOSITE, SPATIAL, region_of, relation_holds
from multimodal.scenes.scene import BACKGROUNDS, COLOURS, HELD_OUT, SHAPES, Scene, SceneObject
from multimodal.scenes.words import NUMBERS, PLURALS, RELATION_PHRASES, with_article


def _pair(item: SceneObject) -> str:
    return f"{item.colour} {item.shape}"


class _QuestionWriter:
    """Each public method gives (question, answer) of one kind, or None without a unique answer."""

    def __init__(self, scene: Scene, rng: random.Random) -> None:
        self.scene, self.rng = scene, rng
        pairs = Counter(item.pair for item in scene.objects)
        self.unique = [item for item in scene.objects if pairs[item.pair] == 1]

    def unique_object(self) -> SceneObject | None:
        """A random object whose colour and shape no other object has."""
        return self.rng.choice(self.unique) if self.unique else None

    def two_unique_objects(self) -> tuple[SceneObject, SceneObject] | None:
        if len(self.unique) < 2:
            return None
        a, b = self.rng.sample(self.unique, 2)
        return a, b

    def colour(self) -> tuple[str, str] | None:
        shape = self.rng.choice(self.scene.objects).shape
        colours = {item.colour for item in self.scene.objects if item.shape == shape}
        several = sum(item.shape == shape for item in self.scene.objects) > 1
        if len(colours) > 1:
            return None
        noun = f"are the {PLURALS[shape]}" if several else f"is the {shape}"
        return f"what colour {noun}?", colours.pop()

    def shape(self) -> tuple[str, str] | None:
        colour = self.rng.choice(self.scene.objects).colour
        shapes = [item.shape for item in self.scene.objects if item.colour == colour]
        return (f"what shape is the {colour} object?", shapes[0]) if len(shapes) == 1 else None

    def size(self) -> tuple[str, str] | None:
        item = self.unique_object()
        return (f"is the {_pair(item)} small or large?", item.size) if item else None

    def texture(self) -> tuple[str, str] | None:
        item = self.unique_object()
        return (f"what texture does the {_pair(item)} have?", item.texture) if item else None

    def count_all(self) -> tuple[str, str] | None:
        return "how many objects are there?", NUMBERS[len(self.scene.objects)]

    def count(self) -> tuple[str, str] | None:
        """How many objects have a colour, a shape or both. Sometimes no object has it."""
        objects, rng = self.scene.objects, self.rng
        absent = rng.random() < 0.15
        chosen = rng.choice(objects)
        kind = rng.choice(("colour", "shape", "pair"))
        if kind == "pair" and not absent:
            number = sum(item.pair == chosen.pair for item in objects)
            return f"how many {chosen.colour} {PLURALS[chosen.shape]} are there?", NUMBERS[number]
        if kind == "colour":
            colour = rng.choice(tuple(COLOURS)) if absent else chosen.colour
            number = sum(item.colour == colour for item in objects)
            return f"how many {colour} objects are there?", NUMBERS[number]
        shape = rng.choice(SHAPES) if absent else chosen.shape
        number = sum(item.shape == shape for item in objects)
        return f"how many {PLURALS[shape]} are there?", NUMBERS[number]

    def exists(self) -> tuple[str, str] | None:
        """Yes or no, equally likely. Half the absent pairs mix colours and shapes of the scene."""
        rng, objects = self.rng, self.scene.objects
        if rng.random() < 0.5:
            item = rng.choice(objects)
            return f"is there {with_article(_pair(item))}?", "yes"
        present = {item.pair for item in objects}
        mixed = rng.random() < 0.5
        colours = [item.colour for item in objects] if mixed else list(COLOURS)
        shapes = list(SHAPES) if rng.random() < 0.5 else [item.shape for item in objects]

        def allowed(pair: tuple[str, str]) -> bool:
            return pair not in present and (self.scene.has_held_out or pair not in HELD_OUT)

        absent = [pair for pair in product(colours, shapes) if allowed(pair)]
        # Without a mixed pair take any absent pair: "no" must stay as frequent as "yes".
        absent = absent or [pair for pair in product(COLOURS, SHAPES) if allowed(pair)]
        return f"is there {with_article(' '.join(rng.choice(absent)))}?", "no"

    def relation(self) -> tuple[str, str] | None:
        pair = self.two_unique_objects()
        if pair is None:
            return None
        a, b = pair
        yes = self.rng.random() < 0.5
        true = [r for r in SPATIAL if relation_holds(a, r, b, sure=True)]
        if not true:
            return None
        relation = true[0] if yes else OPPOSITE[true[0]]
        phrase = RELATION_PHRASES[relation][0]
        return f"is the {_pair(a)} {phrase} the {_pair(b)}?", "yes" if yes else "no"

    def neighbour(self) -> tuple[str, str] | None:
        """Only if exactly one object has the relation, and it surely has it."""
        anchor, relation = self.unique_object(), self.rng.choice(SPATIAL)
        if anchor is None:
            return None
        near = [item for item in self.scene.objects if relation_holds(item, relation, anchor)]
        if len(near) != 1 or not relation_holds(near[0], relation, anchor, sure=True):
            return None
        return f"what is {RELATION_PHRASES[relation][0]} the {_pair(anchor)}?", _pair(near[0])

    def larger(self) -> tuple[str, str] | None:
        pair = self.two_unique_objects()
        if pair is None or pair[0].size == pair[1].size:
            return None
        word = self.rng.choice(("larger", "smaller"))
        answer = next(i for i in pair if (i.size == "large") == (word == "larger"))
        return f"which is {word}, the {_pair(pair[0])} or the {_pair(pair[1])}?", _pair(answer)

    def where(self) -> tuple[str, str] | None:
        item = self.unique_object()
        region = item and region_of([item])
        return (f"where is the {_pair(item)}?", region) if item and region else None

    def background(self) -> tuple[str, str] | None:
        return "what is the background?", self.scene.background

    def background_is(self) -> tuple[str, str] | None:
        true_name = self.scene.background
        yes = self.rng.random() < 0.5
        name = true_name if yes else self.rng.choice([b for b in BACKGROUNDS if b != true_name])
        return f"is the background {name}?", "yes" if yes else "no"


def questions(scene: Scene, rng: random.Random, n: int) -> list[tuple[str, str]]:
    """Different questions about a scene with their answers.

    A kind of question comes again only after all kinds were tried. Duplicates are dropped, and of a
    repeated kind these are mostly the fewer questions with the answer "yes".

    Args:
        scene: ground truth.
        rng: source of all randomness.
        n: number of questions.

    Returns:
        n (question, answer) pairs. Fewer only if n is far above ten.
    """
    writer, pairs = _QuestionWriter(scene, rng), dict[str, str]()
    kinds: list[tuple[Callable[[], tuple[str, str] | None], int]] = [
        *((writer.colour, 12), (writer.shape, 12), (writer.size, 6), (writer.texture, 6)),
        *((writer.count_all, 5), (writer.count, 12), (writer.exists, 14), (writer.relation, 10)),
        *((writer.neighbour, 10), (writer.larger, 6), (writer.where, 6), (writer.background, 4)),
        (writer.background_is, 3),
    ]
    for _ in range(8):
        left = list(kinds)
        while left and len(pairs) < n:
            chosen = rng.choices(left, [weight for _, weight in left])[0]
            left.remove(chosen)
            if pair := chosen[0]():
                pairs.setdefault(*pair)
    return list(pairs.items())
