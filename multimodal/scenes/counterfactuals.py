"""Pairs of scenes that differ in one attribute of one object, or in the background.

What is said of everything else must stay. Which statements that concerns is computed from both
scenes, and no one judges it.
"""

import random
from dataclasses import replace

from multimodal.scenes.claims import ATTRIBUTES
from multimodal.scenes.facts import Fact
from multimodal.scenes.questions import Question, draw_questions
from multimodal.scenes.scene import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    SceneObject,
)

CHANGES = (*ATTRIBUTES, "background")
VALUES = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "texture": TEXTURES,
    "background": tuple(BACKGROUNDS),
}
DRAWN = 24  # questions about each of the two scenes, to find those that both have


def change(scene: Scene, kind: str, rng: random.Random) -> tuple[Scene, int | None] | None:
    """The same scene with another value of one attribute.

    Everything else stays: positions, exact colours, and all other objects. A size only shrinks, so
    no object can overlap another. A scene without a held-out pair of colour and shape gets none.

    Args:
        scene: not changed.
        kind: one of ``CHANGES``.
        rng: chooses the object and the value.

    Returns:
        (the other scene, the number of the changed object; None for the background). None if the
        scene has no object that can be changed.
    """
    if kind == "background":
        name = rng.choice([each for each in BACKGROUNDS if each != scene.background])
        return replace(scene, background=name), None
    options = [
        (number, changed)
        for number, item in enumerate(scene.objects)
        for value in VALUES[kind]
        if value != getattr(item, kind)
        and (changed := _with(item, kind, value)) is not None
        and (scene.has_held_out or changed.pair not in HELD_OUT)
    ]
    if not options:
        return None
    number, changed = rng.choice(options)
    objects = (*scene.objects[:number], changed, *scene.objects[number + 1 :])
    return replace(scene, objects=objects), number


def _with(item: SceneObject, kind: str, value: str) -> SceneObject | None:
    if kind == "colour":
        return replace(item, colour=value, rgb=None)
    if kind == "size":
        return None if item.size == "small" else replace(item, size=value, radius=SIZES["small"][0])
    return replace(item, shape=value) if kind == "shape" else replace(item, texture=value)


def common_questions(
    first: Scene, second: Scene, rng: random.Random
) -> list[tuple[Question, Question]]:
    """Questions in the same words about two scenes: with the same answer, or with two.

    A question has one right answer in each of the two scenes, by construction.
    """
    about_first, about_second = (
        {question.usual: question for question in draw_questions(scene, rng, DRAWN)}
        for scene in (first, second)
    )
    return [(q, about_second[text]) for text, q in about_first.items() if text in about_second]


def concerns(fact: Fact, kind: str, number: int | None) -> bool:
    """Whether a fact about a scene is about what was changed."""
    fact_kind, objects = fact
    return fact_kind == kind and (number is None or number in objects)
