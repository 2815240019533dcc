"""Objects are read off the pixels: nearly all on true scenes, fewer on blurred ones."""

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter

from multimodal.eval.metrics.scene_captions import claims_score
from multimodal.eval.metrics.scene_drawings import (
    drawing_score,
    named_objects,
    score_drawn_claims,
    score_scene_drawings,
)
from multimodal.eval.metrics.scene_pixels import detect_objects, detect_scene
from multimodal.scenes.captions import captions as captions_of
from multimodal.scenes.rendering import render
from multimodal.scenes.scene import COLOURS, SHAPES, Scene, SceneObject, sample_scene


def scene_of(*objects: tuple[str, str], background: str = "white", size: str = "large") -> Scene:
    places = ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))
    radius = 0.19 if size == "large" else 0.13
    items = (
        SceneObject(shape, colour, size, "solid", *place, radius)
        for (colour, shape), place in zip(objects, places, strict=False)
    )
    return Scene(tuple(items), background)


@pytest.mark.parametrize("size", [64, 128, 96])
def test_nearly_all_objects_of_true_scenes_are_detected(size: int) -> None:
    rng = random.Random(1)
    scenes = [sample_scene(rng) for _ in range(60)]
    expected = found = drawn = 0
    for scene in scenes:
        detected = detect_objects(render(scene, size))
        pairs = Counter(item.pair for item in scene.objects)
        expected, drawn = expected + pairs.total(), drawn + len(detected)
        found += (pairs & Counter((d.colour, d.shape or "") for d in detected)).total()
    assert found >= 0.98 * expected
    assert drawn == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("background", ["white", "black", "grey", "cream", "sky"])
def test_every_shape_and_colour_is_detected_on_every_background(
    shape: str, background: str
) -> None:
    for colours in (list(COLOURS)[:4], list(COLOURS)[4:]):
        scene = scene_of(*((colour, shape) for colour in colours), background=background)
        detected = detect_objects(render(scene, 64))
        pairs = sorted((d.colour, d.shape) for d in detected)
        assert pairs == sorted((colour, shape) for colour in colours)


def test_boxes_are_where_the_objects_are() -> None:
    (first, second) = detect_objects(render(scene_of(("red", "circle"), ("blue", "star")), 64))
    assert (first.colour, second.colour) == ("red", "blue")
    assert first.box == pytest.approx((4, 4, 28, 28), abs=1)
    assert second.box[0] > 32 > second.box[3]


def test_an_empty_picture_has_no_objects() -> None:
    for rgb in ((255, 255, 255), (12, 12, 14), (150, 150, 150)):
        assert detect_objects(Image.new("RGB", (64, 64), rgb)) == []


def test_a_blur_hides_shapes_before_colours() -> None:
    rng = random.Random(2)
    scenes = [sample_scene(rng) for _ in range(40)]
    captions = [" and ".join(f"a {o.colour} {o.shape}" for o in s.objects) for s in scenes]
    pictures = [render(scene, 64) for scene in scenes]
    blurred = [picture.filter(ImageFilter.GaussianBlur(4)) for picture in pictures]
    sharp, soft = score_scene_drawings(captions, pictures), score_scene_drawings(captions, blurred)
    assert sharp["objects"] > 0.98 and sharp["extra"] < 0.02
    assert soft["objects"] < 0.6 * sharp["objects"]
    assert soft["colours"] > soft["objects"]


def test_shapes_are_detected_in_slightly_blurred_pictures() -> None:
    """People still see every shape after a blur of 0.8 pixels. So must the program."""
    rng = random.Random(5)
    blur = ImageFilter.GaussianBlur(0.8)
    expected, found = Counter[str](), Counter[str]()
    for scene in (sample_scene(rng) for _ in range(100)):
        detected = detect_objects(render(scene, 64).filter(blur))
        left = Counter((d.colour, d.shape) for d in detected)
        for item in scene.objects:
            expected[item.shape] += 1
            found[item.shape] += left[(item.colour, item.shape)] > 0
            left[(item.colour, item.shape)] -= 1
    assert found.total() >= 0.9 * expected.total()
    assert all(found[shape] >= 0.85 * expected[shape] for shape in SHAPES), (found, expected)


def test_scores_of_a_wrong_drawing() -> None:
    drawing = render(scene_of(("red", "circle"), ("blue", "square"), ("green", "heart")), 64)
    caption = "a red circle and a blue star"
    score = score_scene_drawings([caption], [drawing])
    assert score == {"objects": 0.5, "colours": 1.0, "extra": pytest.approx(2 / 3), "n": 2.0}
    twice = score_scene_drawings(["two red circles"], [drawing])
    assert twice["objects"] == 0.5


def test_objects_that_a_caption_names() -> None:
    named = named_objects("two small red squares above a big dotted blue ring, and a star")
    assert named == Counter({("red", "square"): 2, ("blue", "ring"): 1})
    assert not named_objects("a dog runs through the grass")


def test_captions_without_objects_raise_an_error() -> None:
    blank = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="no caption names an object"):
        score_scene_drawings(["a dog"], [blank])


def test_claims_are_true_of_the_right_scenes_and_not_of_others() -> None:
    """Counts, positions, relations, sizes and backgrounds, read off the pixels."""
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
    assert detect_scene(nothing) is None
    empty = score_drawn_claims(texts[:8], [nothing] * 8)
    assert all(share == 0 for share, _ in empty.values())


def test_one_drawing_and_one_caption_have_a_score() -> None:
    """As judges of preferences use them: wrong, missing and invented objects cost."""
    scene = scene_of(("red", "circle"), ("blue", "star"))
    drawing, record = render(scene, 64), {"scene": scene.to_json()}
    for text, drawn, said in (
        ("a red circle and a blue star", 1.0, 1.0),
        ("a red circle", 2 / 3, 0.75),  # of what is drawn a half was asked for
        ("a red circle and a green heart", 0.5, 0.5),
        ("a green heart", 0.0, 0.0),
    ):
        assert drawing_score(text, drawing) == pytest.approx(drawn), text
        assert claims_score(text, record) == pytest.approx(said, abs=0.01), text
    for text, drawn in (
        ("a red circle to the left of a blue star", 1.0),
        ("a blue star to the left of a red circle", 0.5),
        ("a large red circle and a small blue star on a white background", 1 / 2 + 2 / 3 / 2),
    ):
        assert drawing_score(text, drawing) == pytest.approx(drawn), text
    with pytest.raises(ValueError, match="the record has none"):
        claims_score("a red circle", {})
