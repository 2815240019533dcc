"""Question-answer pairs about synthetic scenes, all true by construction.

Each question has exactly one answer in its scene. Yes and no are equally likely. If a scene has no
held-out pair, no question names a held-out pair. What is asked (``draw_questions``) and how it is
worded (``Question.worded``) are drawn apart.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from multimodal.scenes.positions import OPPOSITE, SPATIAL, region_of, relation_holds
from multimodal.scenes.scene import BACKGROUNDS, COLOURS, HELD_OUT, SHAPES, Scene, SceneObject
from multimodal.scenes.wordings import TRAINING_WORDINGS
from multimodal.scenes.words import NUMBERS, PLURALS, RELATION_PHRASES, with_article

CAPITALISED = 0.25  # share of the questions that begin with a capital, as people write them


@dataclass(frozen=True)
class Question:
    """A question without its wording.

    Args:
        kind: names its wordings.
        slots: what stands in the slots of its wordings. ``relation`` is the name of a relation.
        answer: the only right one.
    """

    kind: str
    slots: dict[str, str]
    answer: str

    @property
    def usual(self) -> str:
        """The question in its usual wording."""
        return self._fill(TRAINING_WORDINGS[self.kind][0], 0)

    def worded(self, wording: str, rng: random.Random) -> str:
        """The question in this wording, with one of the phrases of its relation."""
        relation = self.slots.get("relation")
        phrase = rng.randrange(len(RELATION_PHRASES[relation])) if relation else 0
        text = self._fill(wording, phrase)
        return text[0].upper() + text[1:] if rng.random() < CAPITALISED else text

    def _fill(self, wording: str, phrase: int) -> str:
        slots = dict(self.slots)
        if "relation" in slots:
            slots["relation"] = RELATION_PHRASES[slots["relation"]][phrase]
        return wording.format(**slots)


def _pair(item: SceneObject) -> str:
    return f"{item.colour} {item.shape}"


class _QuestionWriter:
    """Each public method gives a question of that kind, or None without a unique answer."""

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

    def colour(self) -> Question | None:
        shape = self.rng.choice(self.scene.objects).shape
        colours = {item.colour for item in self.scene.objects if item.shape == shape}
        several = sum(item.shape == shape for item in self.scene.objects) > 1
        if len(colours) > 1:
            return None
        noun, is_, do = (PLURALS[shape], "are", "do") if several else (shape, "is", "does")
        return Question("colour", {"noun": noun, "is": is_, "do": do}, colours.pop())

    def shape(self) -> Question | None:
        colour = self.rng.choice(self.scene.objects).colour
        shapes = [item.shape for item in self.scene.objects if item.colour == colour]
        return Question("shape", {"colour": colour}, shapes[0]) if len(shapes) == 1 else None

    def size(self) -> Question | None:
        item = self.unique_object()
        return Question("size", {"pair": _pair(item)}, item.size) if item else None

    def texture(self) -> Question | None:
        item = self.unique_object()
        return Question("texture", {"pair": _pair(item)}, item.texture) if item else None

    def count_all(self) -> Question | None:
        return Question("count_all", {}, NUMBERS[len(self.scene.objects)])

    def count(self) -> Question | None:
        """How many objects have a colour, a shape or both. Sometimes no object has it."""
        objects, rng = self.scene.objects, self.rng
        absent = rng.random() < 0.15
        chosen = rng.choice(objects)
        kind = rng.choice(("colour", "shape", "pair"))
        if kind == "pair" and not absent:
            number = sum(item.pair == chosen.pair for item in objects)
            noun = f"{chosen.colour} {PLURALS[chosen.shape]}"
        elif kind == "colour":
            colour = rng.choice(tuple(COLOURS)) if absent else chosen.colour
            number = sum(item.colour == colour for item in objects)
            noun = f"{colour} objects"
        else:
            shape = rng.choice(SHAPES) if absent else chosen.shape
            number = sum(item.shape == shape for item in objects)
            noun = PLURALS[shape]
        return Question("count", {"noun": noun}, NUMBERS[number])

    def exists(self) -> Question | None:
        """Yes or no, equally likely. Half the absent pairs mix colours and shapes of the scene."""
        rng, objects = self.rng, self.scene.objects

        def about(pair: str, answer: str) -> Question:
            article = with_article(pair).split()[0]
            return Question("exists", {"article": article, "pair": pair}, answer)

        if rng.random() < 0.5:
            return about(_pair(rng.choice(objects)), "yes")
        present = {item.pair for item in objects}
        mixed = rng.random() < 0.5
        colours = [item.colour for item in objects] if mixed else list(COLOURS)
        shapes = list(SHAPES) if rng.random() < 0.5 else [item.shape for item in objects]

        def allowed(pair: tuple[str, str]) -> bool:
            return pair not in present and (self.scene.has_held_out or pair not in HELD_OUT)

        absent = [pair for pair in product(colours, shapes) if allowed(pair)]
        # Without a mixed pair take any absent pair: "no" must stay as frequent as "yes".
        absent = absent or [pair for pair in product(COLOURS, SHAPES) if allowed(pair)]
        return about(" ".join(rng.choice(absent)), "no")

    def relation(self) -> Question | None:
        pair = self.two_unique_objects()
        if pair is None:
            return None
        a, b = pair
        yes = self.rng.random() < 0.5
        true = [r for r in SPATIAL if relation_holds(a, r, b, sure=True)]
        if not true:
            return None
        relation = true[0] if yes else OPPOSITE[true[0]]
        slots = {"a": _pair(a), "relation": relation, "b": _pair(b)}
        return Question("relation", slots, "yes" if yes else "no")

    def neighbour(self) -> Question | None:
        """Only if exactly one object has the relation, and it surely has it."""
        anchor, relation = self.unique_object(), self.rng.choice(SPATIAL)
        if anchor is None:
            return None
        near = [item for item in self.scene.objects if relation_holds(item, relation, anchor)]
        if len(near) != 1 or not relation_holds(near[0], relation, anchor, sure=True):
            return None
        slots = {"relation": relation, "pair": _pair(anchor)}
        return Question("neighbour", slots, _pair(near[0]))

    def larger(self) -> Question | None:
        pair = self.two_unique_objects()
        if pair is None or pair[0].size == pair[1].size:
            return None
        word = self.rng.choice(("larger", "smaller"))
        answer = next(i for i in pair if (i.size == "large") == (word == "larger"))
        slots = {"word": word, "a": _pair(pair[0]), "b": _pair(pair[1])}
        return Question("larger", slots, _pair(answer))

    def where(self) -> Question | None:
        item = self.unique_object()
        region = item and region_of([item])
        return Question("where", {"pair": _pair(item)}, region) if item and region else None

    def background(self) -> Question | None:
        return Question("background", {}, self.scene.background)

    def background_is(self) -> Question | None:
        true_name = self.scene.background
        yes = self.rng.random() < 0.5
        name = true_name if yes else self.rng.choice([b for b in BACKGROUNDS if b != true_name])
        return Question("background_is", {"name": name}, "yes" if yes else "no")


def questions(scene: Scene, rng: random.Random, n: int) -> list[tuple[str, str]]:
    """Different questions about a scene in the wordings of training, with their answers.

    Arguments as for ``draw_questions``.

    Returns:
        n (question, answer) pairs. Fewer only if n is far above ten.
    """
    return [
        (item.worded(rng.choice(TRAINING_WORDINGS[item.kind]), rng), item.answer)
        for item in draw_questions(scene, rng, n)
    ]


def draw_questions(scene: Scene, rng: random.Random, n: int) -> list[Question]:
    """Different questions about a scene.

    A kind of question comes again only after all kinds were tried. Duplicates are dropped, and of a
    repeated kind these are mostly the fewer questions with the answer "yes".

    Args:
        scene: ground truth.
        rng: source of all randomness.
        n: number of questions.

    Returns:
        n questions. Fewer only if n is far above ten.
    """
    writer, drawn = _QuestionWriter(scene, rng), dict[str, Question]()
    kinds: list[tuple[Callable[[], Question | None], int]] = [
        *((writer.colour, 12), (writer.shape, 12), (writer.size, 6), (writer.texture, 6)),
        *((writer.count_all, 5), (writer.count, 12), (writer.exists, 14), (writer.relation, 10)),
        *((writer.neighbour, 10), (writer.larger, 6), (writer.where, 6), (writer.background, 4)),
        (writer.background_is, 3),
    ]
    for _ in range(8):
        left = list(kinds)
        while left and len(drawn) < n:
            chosen = rng.choices(left, [weight for _, weight in left])[0]
            left.remove(chosen)
            if question := chosen[0]():
                drawn.setdefault(question.usual, question)
    return list(drawn.values())
