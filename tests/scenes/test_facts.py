"""Which facts of a scene a caption says."""

import random

from multimodal.eval.metrics.scene_captions import CHECKED_KINDS, score_scene_captions
from multimodal.scenes.captions import captions
from multimodal.scenes.checking import check_caption
from multimodal.scenes.facts import Fact, facts_of, facts_said
from multimodal.scenes.scene import Scene, SceneObject, sample_scene


def item(colour: str, shape: str, x: float, y: float, texture: str = "solid") -> SceneObject:
    return SceneObject(shape, colour, "small", texture, x, y, 0.13)


# Two equal red circles above each other on the left, a dotted blue star on the right.
SCENE = Scene(
    (
        item("red", "circle", 0.2, 0.2),
        item("red", "circle", 0.2, 0.8),
        item("blue", "star", 0.8, 0.2, "dotted"),
    ),
    "cream",
)


def fact(kind: str, *objects: int) -> Fact:
    return kind, frozenset(objects)


def said(caption: str) -> set[Fact]:
    """The facts that a caption says, but colours and shapes."""
    facts = facts_said(check_caption(caption, SCENE), SCENE)
    return {each for each in facts if each[0] not in ("colour", "shape")}


def test_the_facts_of_a_scene() -> None:
    each = {fact(kind, n) for kind in ("colour", "shape", "size", "position") for n in range(3)}
    assert facts_of(SCENE) == each | {
        fact("texture", 2),
        fact("count", 0, 1),
        fact("count", 0, 1, 2),
        # Not of the two circles: no words tell one from the other. The third pair is diagonal.
        fact("relation", 0, 2),
        fact("background"),
    }


def test_true_claims_say_facts_and_false_ones_do_not() -> None:
    assert said("two red circles and a blue star") == {fact("count", 0, 1)}
    assert said("three objects: two red circles and a star") == {
        fact("count", 0, 1),
        fact("count", 0, 1, 2),
    }
    assert said("three red circles") == said("a red circle and a blue star") == set()
    assert said("a dotted blue star on a cream background") == {
        fact("texture", 2),
        fact("background"),
    }
    assert said("a striped blue star on a black background") == set()
    assert said("a solid red circle") == set(), "solid is what nobody mentions"
    assert said("a red circle to the left of a blue star") == {fact("relation", 0, 2)}
    assert said("a blue star to the right of a red circle") == {fact("relation", 0, 2)}
    assert said("a blue star to the left of a red circle") == set()
    assert said("two small red circles on the left") == {
        *(fact("count", 0, 1), fact("size", 0), fact("size", 1)),
        *(fact("position", 0), fact("position", 1)),
    }
    assert said("a blue star in the top right corner") == {fact("position", 2)}


def test_a_caption_of_another_object_says_nothing_of_this_one() -> None:
    facts = facts_said(check_caption("a green heart", SCENE), SCENE)
    assert facts == set()
    assert facts_said(check_caption("", SCENE), SCENE) == set()


def test_recall_grows_with_what_a_caption_says() -> None:
    scenes = {str(k): sample_scene(random.Random(f"facts {k}")) for k in range(200)}
    short = {
        k: " and ".join(f"a {o.colour} {o.shape}" for o in s.objects) for k, s in scenes.items()
    }
    long = {key: f"{text} on a {scenes[key].background} background" for key, text in short.items()}
    few, more = score_scene_captions(short, scenes), score_scene_captions(long, scenes)
    assert few["recall_colour"] == few["recall_shape"] == more["recall_background"] == 1
    assert few["recall_background"] == few["said_background"] == few["recall_size"] == 0
    assert more["said_background"] == 1
    written = {k: captions(s, random.Random(k), 1)[0] for k, s in scenes.items()}
    scores = score_scene_captions(written, scenes)
    for kind in CHECKED_KINDS:
        assert scores[f"precision_{kind}"] == 1 and 0 < scores[f"recall_{kind}"] <= 1
    assert scores["said_shape"] == sum(len(s.objects) for s in scenes.values()) / len(scenes)
