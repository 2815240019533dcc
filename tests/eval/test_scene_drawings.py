"""What a program sees in a drawing: on true scenes nearly all, on spoilt ones less."""

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter

from multimodal.eval.metrics.scene_drawings import (
    objects_asked,
    objects_seen,
    scene_seen,
    score_drawn_claims,
    score_scene_drawings,
)
from multimodal.scenes.captions import captions as captions_of
from multimodal.scenes.scene import COLOURS, SHAPES, Scene, SceneObject, render, sample_scene


def scene_of(*objects: tuple[str, str], background: str = "white", size: str = "large") -> Scene:
    places = ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))
    radius = 0.19 if size == "large" else 0.13
    items = (
        SceneObject(shape, colour, size, "solid", *place, radius)
        for (colour, shape), place in zip(objects, places, strict=False)
    )
    return Scene(tuple(items), background)


@pytest.mark.parametrize("size", [64, 128, 96])
def test_true_scenes_are_read_almost_without_fault(size: int) -> None:
    rng = random.Random(1)
    scenes = [sample_scene(rng) for _ in range(60)]
    wanted = found = drawn = 0
    for scene in scenes:
        seen = objects_seen(render(scene, size))
        pairs = Counter(item.pair for item in scene.objects)
        wanted, drawn = wanted + pairs.total(), drawn + len(seen)
        found += (pairs & Counter((s.colour, s.shape or "") for s in seen)).total()
    assert found >= 0.98 * wanted
    assert drawn == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("background", ["white", "black", "grey", "cream", "sky"])
def test_every_shape_and_colour_on_every_background(shape: str, background: str) -> None:
    for colours in (list(COLOURS)[:4], list(COLOURS)[4:]):
        scene = scene_of(*((colour, shape) for colour in colours), background=background)
        seen = objects_seen(render(scene, 64))
        assert sorted((s.colour, s.shape) for s in seen) == sorted((c, shape) for c in colours)


def test_boxes_are_where_the_objects_are() -> None:
    (first, second) = objects_seen(render(scene_of(("red", "circle"), ("blue", "star")), 64))
    assert (first.colour, second.colour) == ("red", "blue")
    assert first.box == pytest.approx((4, 4, 28, 28), abs=1)
    assert second.box[0] > 32 > second.box[3]


def test_what_is_not_there_is_not_seen() -> None:
    for rgb in ((255, 255, 255), (12, 12, 14), (150, 150, 150)):
        assert objects_seen(Image.new("RGB", (64, 64), rgb)) == []


def test_a_blur_costs_the_shapes_before_the_colours() -> None:
    rng = random.Random(2)
    scenes = [sample_scene(rng) for _ in range(40)]
    captions = [" and ".join(f"a {o.colour} {o.shape}" for o in s.objects) for s in scenes]
    pictures = [render(scene, 64) for scene in scenes]
    blurred = [picture.filter(ImageFilter.GaussianBlur(4)) for picture in pictures]
    sharp, soft = score_scene_drawings(captions, pictures), score_scene_drawings(captions, blurred)
    assert sharp["objects"] > 0.98 and sharp["extra"] < 0.02
    assert soft["objects"] < 0.6 * sharp["objects"]
    assert soft["colours"] > soft["objects"]


def test_soft_pictures_are_read_as_eyes_read_them() -> None:
    """A blur of 0.8 pixels hides no shape of a large object from anyone: not from the program."""
    rng = random.Random(5)
    blur = ImageFilter.GaussianBlur(0.8)
    wanted, found = Counter[str](), Counter[str]()
    for scene in (sample_scene(rng) for _ in range(100)):
        seen = Counter((s.colour, s.shape) for s in objects_seen(render(scene, 64).filter(blur)))
        for item in scene.objects:
            wanted[item.shape] += 1
            found[item.shape] += seen[(item.colour, item.shape)] > 0
            seen[(item.colour, item.shape)] -= 1
    assert found.total() >= 0.9 * wanted.total()
    assert all(found[shape] >= 0.85 * wanted[shape] for shape in SHAPES), (found, wanted)


def test_scores_of_a_wrong_drawing() -> None:
    drawing = render(scene_of(("red", "circle"), ("blue", "square"), ("green", "heart")), 64)
    caption = "a red circle and a blue star"
    score = score_scene_drawings([caption], [drawing])
    assert score == {"objects": 0.5, "colours": 1.0, "extra": pytest.approx(2 / 3), "n": 2.0}
    twice = score_scene_drawings(["two red circles"], [drawing])
    assert twice["objects"] == 0.5


def test_what_a_caption_asks_for() -> None:
    asked = objects_asked("two small red squares above a big dotted blue ring, and a star")
    assert asked == Counter({("red", "square"): 2, ("blue", "ring"): 1})
    assert not objects_asked("a dog runs through the grass")


def test_captions_that_ask_for_nothing_are_no_score() -> None:
    blank = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="no caption names an object"):
        score_scene_drawings(["a dog"], [blank])


def test_what_captions_claim_is_true_of_their_own_scenes_and_not_of_others() -> None:
    """Counts, places, relations, sizes and backgrounds, read off the pixels."""
    rng = random.Random(3)
    scenes = [sample_scene(rng) for _ in range(60)]
    pictures = [render(scene) for scene in scenes]
    texts = [text for scene in scenes for text in captions_of(scene, rng, 4)]
    own = [picture for picture in pictures for _ in range(4)]
    true = score_drawn_claims(texts, own)
    assert set(true) == {"count", "position", "relation", "size", "background"}
    assert all(share > 0.95 for share, _ in true.values()), true
    others = score_drawn_claims(texts, own[40:] + own[:40])
    assert others["relation"][0] < 0.5 and others["count"][0] < 0.6, others
    nothing = Image.new("RGB", (64, 64), (150, 150, 150))
    assert scene_seen(nothing) is None
    empty = score_drawn_claims(texts[:8], [nothing] * 8)
    assert all(share == 0 for share, _ in empty.values())
