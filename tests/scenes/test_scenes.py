"""Synthetic scenes: captions and answers are true, false claims are detected, bytes repeat."""

import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from multimodal.data.shards import Shards
from multimodal.data.verify import check
from multimodal.eval.metrics.scene_captions import score_scene_captions
from multimodal.scenes.captions import captions
from multimodal.scenes.checking import check_caption
from multimodal.scenes.claims import parse_caption
from multimodal.scenes.dataset import make_sample, write_scenes
from multimodal.scenes.questions import draw_questions
from multimodal.scenes.rendering import render
from multimodal.scenes.scene import (
    COLOURS,
    HELD_OUT,
    JITTER,
    SHAPES,
    SIZES,
    TRAINING_PAIRS,
    Scene,
    SceneObject,
    sample_scene,
)
from multimodal.scenes.wordings import TRAINING_WORDINGS

SCENES = [sample_scene(random.Random(f"test {k}"), held_out=k % 5 == 0) for k in range(300)]
WRITTEN = [(scene, captions(scene, random.Random(k), 6)) for k, scene in enumerate(SCENES)]
# Each number word and a wrong one. No scene has five objects.
NUMBER_SWAPS = {"one": "five", "two": "three", "three": "four", "four": "five"}


def held_out_words(text: str) -> list[str]:
    """The held-out pairs that a text names ("green stars", "striped green star")."""
    return [f"{c} {s}" for c, s in HELD_OUT if re.search(rf"\b{c} {s}(s|es)?\b", text)]


def make(shape: str, colour: str, x: float, y: float, size: str = "small") -> SceneObject:
    return SceneObject(shape, colour, size, "solid", x, y, SIZES[size][0])


ROW = Scene(
    (
        make("circle", "red", 0.2, 0.5),
        make("star", "blue", 0.5, 0.5, "large"),
        make("circle", "red", 0.8, 0.5),
    ),
    "white",
)


def test_every_caption_is_parsed_fully_is_true_and_names_every_object() -> None:
    for scene, texts in WRITTEN:
        assert len(set(texts)) == 6
        for text in texts:
            score = check_caption(text, scene)
            assert [claim for claim, true in score.results if not true] == [], text
            assert score.recall == 1 and score.mentioned == len(scene.objects), text
            assert text == text.lower() and len(text.split()) <= 32


def test_captions_use_every_kind_of_claim() -> None:
    kinds = {claim.kind for _, texts in WRITTEN for text in texts for claim in parse_caption(text)}
    assert kinds == {
        *("colour", "shape", "size", "texture", "count", "position", "relation", "background")
    }
    values = {c.value for _, ts in WRITTEN for t in ts for c in parse_caption(t)}
    assert {"left of", "right of", "above", "below", "between", "larger than"} <= values


def swaps(text: str, scene: Scene) -> list[str]:
    """All captions that differ in one word and must be false."""
    absent_colour = next(c for c in COLOURS if c not in {o.colour for o in scene.objects})
    absent_shape = next(s for s in SHAPES if s not in {o.shape for o in scene.objects})
    turned = {"left": "right", "right": "left", "above": "below", "below": "above"}
    turned |= {"under": "above", "top": "bottom", "bottom": "top", "larger": "smaller"}
    turned |= {"bigger": "smaller", "smaller": "larger", "white": "black", "grey": "cream"}
    turned |= {"black": "white", "cream": "grey"}
    turned |= {"small": "large", "tiny": "large", "large": "small", "big": "small"}
    plurals = {s + ("es" if s == "cross" else "s"): s for s in SHAPES}
    changed = []
    words = list(re.finditer(r"[a-z]+", text))
    for word in words:
        old = word.group()
        new = turned.get(old) or NUMBER_SWAPS.get(old)
        if old in COLOURS:
            new = absent_colour
        elif old in SHAPES:
            new = absent_shape
        elif old in plurals:
            new = absent_shape + "s" * (absent_shape != "cross") + "es" * (absent_shape == "cross")
        if new:
            changed.append(text[: word.start()] + new + text[word.end() :])
    return changed


def test_one_wrong_word_is_always_detected() -> None:
    tried = 0
    for scene, texts in WRITTEN:
        for text in texts[:3]:
            for changed in swaps(text, scene):
                assert check_caption(changed, scene).precision < 1, (text, changed, scene)
                tried += 1
    assert tried > 5000


def test_matching_is_the_best_one_and_uses_no_object_twice() -> None:
    def truths(text: str) -> tuple[int, int]:
        results = check_caption(text, ROW).results
        return sum(true for _, true in results), len(results)

    assert truths("a red circle and a blue star") == (4, 4)
    assert truths("a red circle, a red circle and a red circle") == (4, 6)
    assert truths("two red circles") == (5, 5)
    assert truths("three red circles") == (4, 7)
    assert truths("one red circle") == (2, 3)
    # Only the circle on the right makes the relation true, so it must be matched.
    assert truths("a red circle to the right of a blue star") == (5, 5)
    assert truths("a blue star between two red circles") == (8, 8)
    assert truths("a red circle between a red circle and a blue star") == (6, 7)
    assert truths("a green heart left of a blue star") == (2, 5)
    assert truths("a blue circle") == (1, 2)
    # "the" refers to an earlier object and adds no claim. "a" is a new object.
    assert truths("a blue star; the star is larger than a red circle") == (5, 5)
    assert truths("a blue star; the small star is in the middle") == (3, 4)
    assert truths("three objects on a black background") == (1, 2)


def test_the_parser_takes_any_text() -> None:
    rng = random.Random(0)
    words = " ".join(" ".join(texts) for _, texts in WRITTEN[:50]).split()
    marks = [",", ".", ";", "\n", "\0", "é", "🙂", "zzz", "2", "between", "the", "no", "<pad>"]
    for length in range(300):
        text = " ".join(rng.choice(words + marks * 20) for _ in range(length % 60))
        score = check_caption(text, SCENES[length])
        assert 0 <= score.precision <= 1 and 0 <= score.matched <= score.mentioned
    for text in ("", " ", "red", "an object", "hello there", "between", "of left the"):
        assert [claim.kind for claim in parse_caption(text)] == ["unparsed"]
        assert check_caption(text, ROW).precision == 0
    endless = check_caption("a red circle and " * 10_000, ROW)
    assert endless.matched == 2 and endless.unparsed >= 1 and endless.precision < 0.1


def test_unknown_words_lower_the_precision() -> None:
    known, unknown = "a red circle and a blue star", "a red circle beside a blue star"
    assert check_caption(known, ROW).precision == 1
    assert check_caption(unknown, ROW).unparsed == 1
    assert check_caption(unknown, ROW).precision == pytest.approx(4 / 5)
    assert check_caption("a red blue star", ROW).unparsed == 1


def facts(scene: Scene, words: str) -> list[SceneObject]:
    """The objects that all the words describe ("red circles", "blue objects")."""
    return [
        item
        for item in scene.objects
        if all(
            word in ("object", "objects")
            or {word, word.removesuffix("s"), word.removesuffix("es")} & {item.shape, item.colour}
            for word in words.split()
        )
    ]


def answer(question: str, scene: Scene) -> str | None:
    """The answer by code that is independent of the questions. None: no unique answer."""
    directions = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1)}
    directions["below"] = (0, 1)
    numbers = ("zero", "one", "two", "three", "four")

    def beyond(a: SceneObject, phrase: str, b: SceneObject) -> bool:
        dx, dy = directions[phrase]
        return (a.x - b.x) * dx + (a.y - b.y) * dy > 0

    def only(words: str, name: str) -> str | None:
        values = {str(getattr(item, name)) for item in facts(scene, words)}
        return values.pop() if len(values) == 1 else None

    places = "|".join(directions)
    if m := re.fullmatch(r"what colour (?:is|are) the (\w+)\?", question):
        return only(m[1], "colour")
    if m := re.fullmatch(r"what shape is the (\w+) object\?", question):
        return only(m[1], "shape")
    if m := re.fullmatch(r"is the (.+) small or large\?", question):
        return only(m[1], "size")
    if m := re.fullmatch(r"what texture does the (.+) have\?", question):
        return only(m[1], "texture")
    if m := re.fullmatch(r"how many (.+) are there\?", question):
        return numbers[len(facts(scene, m[1]))]
    if m := re.fullmatch(r"is there an? (.+)\?", question):
        return "yes" if facts(scene, m[1]) else "no"
    if m := re.fullmatch(rf"is the (.+) ({places}) the (.+)\?", question):
        (a,), (b,) = facts(scene, m[1]), facts(scene, m[3])
        return "yes" if beyond(a, m[2], b) else "no"
    if m := re.fullmatch(rf"what is ({places}) the (.+)\?", question):
        (b,) = facts(scene, m[2])
        near = [item for item in scene.objects if beyond(item, m[1], b)]
        across = "of" in m[1]
        far = max(near, key=lambda a: abs(a.x - b.x) if across else abs(a.y - b.y))
        return f"{far.colour} {far.shape}"
    if m := re.fullmatch(r"which is (larger|smaller), the (.+) or the (.+)\?", question):
        (a,), (b,) = facts(scene, m[2]), facts(scene, m[3])
        return m[2] if (a.radius > b.radius) == (m[1] == "larger") else m[3]
    if m := re.fullmatch(r"where is the (.+)\?", question):
        (a,) = facts(scene, m[1])
        rows = "top" if a.y < 0.35 else "bottom" if a.y > 0.65 else ""
        columns = "left" if a.x < 0.35 else "right" if a.x > 0.65 else ""
        return f"{rows} {columns}".strip() or "centre"
    if question == "what is the background?":
        return scene.background
    if m := re.fullmatch(r"is the background (\w+)\?", question):
        return "yes" if m[1] == scene.background else "no"
    raise AssertionError(f"a question of no known type: {question}")


def test_answers_are_true_and_yes_is_as_frequent_as_no() -> None:
    counts = {"yes": 0, "no": 0}
    kinds = set()
    for number, scene in enumerate(SCENES):
        drawn = draw_questions(scene, random.Random(number), 6)
        assert len({question.usual for question in drawn}) == 6
        for question in drawn:
            assert answer(question.usual, scene) == question.answer, (question, scene)
            kinds.add(question.kind)
            if question.answer in counts:
                counts[question.answer] += 1
    assert kinds == TRAINING_WORDINGS.keys()
    assert 0.42 < counts["yes"] / sum(counts.values()) < 0.58


def test_held_out_pairs_are_in_every_scene_of_heldout_and_no_other() -> None:
    assert len(TRAINING_PAIRS) == 56
    seen = set()
    for split in ("train", "val", "heldout"):
        for number in range(200):
            _, members = make_sample(split, 5, number, 16, 5, 6)
            record = json.loads(members["json"])
            scene = Scene.from_json(record["scene"])
            words = "; ".join(record["captions"] + [q + " " + a for q, a in record["qa"]])
            if split == "heldout":
                assert scene.has_held_out and held_out_words(words)
            else:
                assert not scene.has_held_out and held_out_words(words) == []
            if split == "train":
                seen |= {part for item in scene.objects for part in item.pair}
    assert seen == {*COLOURS, *SHAPES}, "training must have each colour and shape"


def test_same_arguments_give_same_bytes_and_more_scenes_keep_the_first(tmp_path: Path) -> None:
    for name, count in (("a", 30), ("b", 30), ("more", 40)):
        write_scenes(tmp_path / name, count, seed=1, size=32, shard_size=150)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert list(check(tmp_path / "a")) == []
    few, more = Shards(tmp_path / "a", "train"), Shards(tmp_path / "more", "train")
    assert [(s.key, dict(s.members)) for s in few] == [
        (more[i].key, dict(more[i].members)) for i in range(30)
    ]
    assert len(Shards(tmp_path / "a", "val")) == len(Shards(tmp_path / "a", "heldout")) == 200
    assert make_sample("train", 2, 0, 32, 5, 6)[1] != make_sample("train", 1, 0, 32, 5, 6)[1]
    with pytest.raises(ValueError, match="the folder is not empty"):
        write_scenes(tmp_path / "a", 30, seed=1)


def test_json_restores_a_scene_and_wrong_json_is_an_error() -> None:
    for scene in SCENES:
        assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene
    record = ROW.to_json()
    for wrong in (
        *({}, {**record, "sky": 1}, {**record, "background": "red"}, {**record, "objects": []}),
        {**record, "objects": [{**record["objects"][0], "shape": "cube"}]},
        {**record, "objects": [{**record["objects"][0], "mass": 1}]},
        {**record, "objects": [{**record["objects"][0], "x": float("nan")}]},
        {**record, "objects": [{**record["objects"][0], "rgb": [0, 0, 256]}]},
    ):
        with pytest.raises(ValueError, match=r"scene|background|objects|shape"):
            Scene.from_json(wrong)


def test_objects_do_not_overlap_and_are_inside_the_picture() -> None:
    for scene in SCENES:
        for i, a in enumerate(scene.objects):
            low, high = SIZES[a.size]
            assert low <= a.radius <= high
            assert a.radius < min(a.x, a.y, 1 - a.x, 1 - a.y)
            for b in scene.objects[:i]:
                # 1.07: the corners of a square are outside its radius.
                assert math.hypot(a.x - b.x, a.y - b.y) > 1.07 * max(a.radius, b.radius) + min(
                    a.radius, b.radius
                )


def test_pixels_have_the_colours_of_the_objects() -> None:
    nearest = {name: np.array(rgb, float) for name, rgb in COLOURS.items()}
    for scene in SCENES[:100]:
        pixels = np.asarray(render(scene, 64), float)  # [y, x, RGB]
        assert pixels.shape == (64, 64, 3)
        for item in (item for item in scene.objects if item.texture == "solid"):
            # The middle of a ring is empty: use its band.
            y = item.y - (0.75 * item.radius if item.shape == "ring" else 0)
            row, column = int(y * 64), int(item.x * 64)
            area = pixels[row : row + 1, column - 1 : column + 2].mean((0, 1))
            name = min(nearest, key=lambda n: float(np.abs(nearest[n] - area).sum()))
            assert name == item.colour, item
            assert np.abs(area - nearest[name]).max() <= JITTER + 25, item


def test_textures_and_shapes_differ_at_64_pixels() -> None:
    def picture(shape: str, texture: str, size: str) -> NDArray[np.float64]:
        item = SceneObject(shape, "blue", size, texture, 0.5, 0.5, SIZES[size][0])
        return np.asarray(render(Scene((item,), "grey"), 64), float)

    for size in SIZES:
        kinds = [(s, t) for s in SHAPES for t in ("solid", "striped", "dotted")]
        pictures = {kind: picture(*kind, size) for kind in kinds}
        for a in kinds:
            for b in kinds:
                if a < b:
                    differing = (np.abs(pictures[a] - pictures[b]).max(-1) > 60).sum()
                    assert differing >= 6, (size, a, b)


def test_scores_of_true_shifted_and_empty_captions() -> None:
    scenes = {str(k): scene for k, (scene, _) in enumerate(WRITTEN[:50])}
    good = {str(k): texts[0] for k, (_, texts) in enumerate(WRITTEN[:50])}
    best = score_scene_captions(good, scenes)
    assert best["attribute_precision"] == best["object_recall"] == best["object_precision"] == 1
    assert best["perfect"] == 1 and best["unparsed"] == 0 and best["n"] == 50
    assert best["precision_colour"] == 1
    shifted = {str(k): good[str((k + 1) % 50)] for k in range(50)}
    assert score_scene_captions(shifted, scenes)["attribute_precision"] < 0.6
    assert score_scene_captions(shifted, scenes)["object_recall"] < 0.3
    silent = score_scene_captions(dict.fromkeys(scenes, ""), scenes)
    assert silent["attribute_precision"] == silent["object_recall"] == 0 and silent["unparsed"] == 1
    with pytest.raises(ValueError, match="same keys"):
        score_scene_captions({"0": good["0"]}, scenes)
