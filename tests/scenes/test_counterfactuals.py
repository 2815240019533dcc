"""Counterfactual scenes: one thing changes, and what is asked of both is right in both."""

import random

import numpy as np
import pytest

from multimodal.scenes.counterfactuals import CHANGES, change, common_questions, concerns
from multimodal.scenes.facts import facts_of
from multimodal.scenes.rendering import render
from multimodal.scenes.scene import GAP, HELD_OUT, Scene, SceneObject, sample_scene

RED = SceneObject("circle", "red", "large", "solid", 0.25, 0.5, 0.19, (220, 30, 30))
BLUE = SceneObject("square", "blue", "small", "striped", 0.75, 0.5, 0.13)


def fields(item: SceneObject) -> dict[str, object]:
    return {name: getattr(item, name) for name in ("colour", "shape", "size", "texture", "x", "y")}


@pytest.mark.parametrize("kind", CHANGES)
def test_one_thing_changes_and_the_scene_stays_a_scene(kind: str) -> None:
    rng, changed = random.Random(0), 0
    for _ in range(100):
        scene = sample_scene(rng)
        found = change(scene, kind, rng)
        if found is None:
            assert kind == "size" and all(item.size == "small" for item in scene.objects)
            continue
        changed += 1
        other, number = found
        differing = [
            (i, name)
            for i, (a, b) in enumerate(zip(scene.objects, other.objects, strict=True))
            for name, value in fields(a).items()
            if fields(b)[name] != value
        ]
        if kind == "background":
            assert number is None and differing == [] and other.background != scene.background
        else:
            assert differing == [(number, kind)] and other.background == scene.background
        assert not other.has_held_out, "as rare a pair as in training"
        for a in other.objects:
            for b in other.objects:
                if a is not b:
                    distance = float(np.hypot(a.x - b.x, a.y - b.y))
                    assert distance > a.radius + b.radius + GAP - 1e-9
        assert Scene.from_json(other.to_json()) == other
    assert changed > 50


def test_pixels_change_only_where_the_object_is() -> None:
    scene = Scene((RED, BLUE), "white")
    for kind in ("colour", "shape", "size", "texture"):
        found = change(scene, kind, random.Random(3))
        assert found is not None
        other, number = found
        assert number is not None
        before, after = (np.asarray(render(each, 64)).astype(int) for each in (scene, other))
        columns = np.flatnonzero((before != after).any((0, 2))) / 64
        item = scene.objects[number]
        assert len(columns) and columns.min() >= item.x - item.radius * 1.1 - 0.02
        assert columns.max() <= item.x + item.radius * 1.1 + 0.02


def test_questions_about_both_scenes_have_the_right_answer_in_each() -> None:
    """Answers that must stay and must change, told from the scenes in words of their own."""
    blue_circle = SceneObject("circle", "blue", "large", "solid", 0.25, 0.5, 0.19)
    first, second = Scene((RED, BLUE), "white"), Scene((blue_circle, BLUE), "white")
    answers = {
        a.usual: (a.answer, b.answer)
        for seed in range(20)
        for a, b in common_questions(first, second, random.Random(seed))
    }
    expected = {
        "what colour is the circle?": ("red", "blue"),
        "what colour is the square?": ("blue", "blue"),
        "how many blue objects are there?": ("one", "two"),
        "how many objects are there?": ("two", "two"),
        "is the blue square small or large?": ("small", "small"),
        "what is the background?": ("white", "white"),
    }
    assert expected.items() <= answers.items()
    assert "what shape is the blue object?" not in answers, "two of them are blue in the second"


def test_facts_about_the_change_are_told_from_all_others() -> None:
    facts = facts_of(Scene((RED, BLUE), "white"))
    assert {f for f in facts if concerns(f, "colour", 0)} == {("colour", frozenset({0}))}
    assert {f for f in facts if concerns(f, "background", None)} == {("background", frozenset())}


def test_held_out_pairs_appear_only_where_there_are_some() -> None:
    rng = random.Random(1)
    scenes = [sample_scene(rng, held_out=True) for _ in range(60)]
    pairs = {
        item.pair
        for scene in scenes
        if (found := change(scene, "colour", rng))
        for item in found[0].objects
    }
    assert pairs & set(HELD_OUT)
