"""Evaluators of synthetic scenes, and that nothing else in evaluation knows scenes."""

import json
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multimodal import load
from multimodal.cli import main
from multimodal.data.samples import Sample
from multimodal.data.shards import Shards
from multimodal.eval.evaluator import Subject, evaluate, interval
from multimodal.eval.metrics.scene_captions import (
    hallucinated,
    judge_scene_captions,
    named_shapes,
)
from multimodal.eval.tasks import scene_answers, scene_captions, scene_drawings
from multimodal.eval.tasks.scene_answers import SceneAnswers
from multimodal.eval.tasks.scene_captions import SceneCaptions
from multimodal.eval.tasks.scene_drawings import SceneDrawings
from multimodal.eval.trust.scene_counterfactuals import SceneCounterfactuals
from multimodal.eval.trust.scene_presence import ScenePresence
from multimodal.scenes.scene import Scene, SceneObject
from multimodal.scenes.wordings import UNSEEN_WORDINGS

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("scene-tasks") / "scenes"
    assert main(["data", "scenes", str(folder), "--count", "4", "--size", "64"]) == 0
    return list(Shards(folder, "val"))[:12]


@pytest.fixture
def subject(tiny_model_folder: Path, samples: list[Sample]) -> Subject:
    return Subject(load(tiny_model_folder), samples, batch_size=5)


def test_only_files_of_scenes_the_demo_and_replay_import_scenes() -> None:
    importing = {
        str(path.relative_to(ROOT))
        for folder in ("eval", "train")
        for path in (ROOT / folder).rglob("*.py")
        if "multimodal.scenes" in path.read_text("utf-8") and not path.name.startswith("scene_")
    }
    assert importing == {"eval/demo.py", "train/mixing/replay.py"}


def test_samples_without_a_scene_do_not_fit(samples: list[Sample]) -> None:
    photo = Sample("a", {**samples[0].members, "json": b'{"captions": ["a red circle"]}'})
    # Fields of that name that others use.
    photos = [photo]
    for scene in ("beach", 3, None, [], ["objects"], {}, {"objects": 3}, {"objects": [{}]}):
        record = {"captions": ["a red circle"], "scene": scene}
        photos.append(Sample("b", {**samples[0].members, "json": json.dumps(record).encode()}))
    for evaluator in (
        *(SceneCaptions(), SceneAnswers(), SceneDrawings(), ScenePresence()),
        SceneCounterfactuals(),
    ):
        assert evaluator.fits(samples[0])
        assert not any(evaluator.fits(photo) for photo in photos)


def test_true_captions_have_the_best_scores(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = cycle([sample.record for sample in subject.samples])
    monkeypatch.setattr(
        scene_captions,
        "caption_codes",
        lambda _, codes: [next(records)["captions"][0] for _ in codes],
    )
    evaluator = SceneCaptions()
    scores = evaluate(evaluator, subject)
    for name in ("attribute_precision", "object_recall", "object_precision", "perfect"):
        assert scores[name]["value"] == 1
    assert scores["hallucinated"]["value"] == 0 and scores["hallucinated"]["n"] == 12
    assert [example.score for example in evaluator.examples] == [1] * 12


def test_recall_of_captions_stands_beside_that_of_the_references(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        scene_captions, "caption_codes", lambda _, codes: ["a red circle" for _ in codes]
    )
    scores = evaluate(SceneCaptions(), subject)
    captions = [caption for sample in subject.samples for caption in sample.record["captions"]]
    backgrounds = sum("background" in text or "sky" in text for text in captions) / len(captions)
    assert 0 < backgrounds < 1
    assert scores["recall_background"]["value"] == scores["said_background"]["value"] == 0
    assert scores["recall_background_references"]["value"] == pytest.approx(backgrounds)
    assert scores["said_background_references"]["value"] == pytest.approx(backgrounds)
    assert scores["recall_shape_references"]["value"] == 1 > scores["recall_shape"]["value"]


def test_intervals_of_scenes_draw_the_claims_of_a_scene_together(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [
        sample.record["captions"][0] if number % 2 else "a dog"
        for number, sample in enumerate(subject.samples)
    ]
    given = iter(texts)
    monkeypatch.setattr(
        scene_captions, "caption_codes", lambda _, codes: [next(given) for _ in codes]
    )
    scores = evaluate(SceneCaptions(), subject)
    scenes = [Scene.from_json(sample.record["scene"]) for sample in subject.samples]
    claims = judge_scene_captions(texts, scenes)["attribute_precision"]
    score = scores["attribute_precision"]
    assert score["n"] == len(claims.values) > len(texts)
    assert score["value"] == sum(claims.values) / len(claims.values)
    assert (score["low"], score["high"]) == interval(claims.values, 0, claims.rows)
    assert score["high"] - score["low"] > 1.5 * np.diff(interval(claims.values, 0))[0]
    assert scores["perfect"]["n"] == 12 and scores["perfect"]["value"] == 0.5
    # References: several captions of a scene.
    rows = [n for n, sample in enumerate(subject.samples) for _ in sample.record["captions"]]
    captions = [caption for sample in subject.samples for caption in sample.record["captions"]]
    said = judge_scene_captions(captions, [scenes[row] for row in rows])["said_background"]
    score = scores["said_background_references"]
    assert score["n"] == len(captions) and said.rows == [*range(len(captions))]
    assert (score["low"], score["high"]) == interval(said.values, 0, rows)


def test_questions_are_asked_in_unseen_wordings(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def about_backgrounds(_: object, codes: Any, prompts: list[str], options: Any) -> list[str]:
        """Understands one wording: the usual one of the background."""
        asked.extend(prompts)
        return ["cream" if "what is the background?" in prompt else "" for prompt in prompts]

    monkeypatch.setattr(scene_answers, "complete_prompts", about_backgrounds)
    record = {"scene": {**subject.samples[0].record["scene"], "background": "cream"}}
    sample = Sample("a", {**subject.samples[0].members, "json": json.dumps(record).encode()})
    monkeypatch.setattr(scene_answers, "QUESTIONS_EACH", 10)
    evaluator = SceneAnswers()
    scores = evaluate(evaluator, Subject(subject.model, [sample], 5))
    unseen = UNSEEN_WORDINGS["background"]
    texts = [prompt.removeprefix("Question: ").removesuffix(" Answer:") for prompt in asked]
    assert {text for wording in unseen for text in (wording, wording[0].upper() + wording[1:])} & {
        *texts
    }
    assert scores["accuracy"]["value"] == scores["all_wordings"]["value"] == 0
    assert scores["usual"]["n"] == 10 and scores["usual"]["value"] == 1 / 10
    assert scores["accuracy"]["n"] == len(evaluator.examples) == 10 * 3


def test_hallucinated_shapes_are_those_that_the_scene_does_not_have() -> None:
    assert named_shapes("a circle") == named_shapes("two circles") == {"circle"}
    assert named_shapes("a green object left of a large red heart") == {"heart"}
    scene = Scene((SceneObject("circle", "red", "small", "solid", 0.5, 0.5, 0.13),), "white")
    assert not hallucinated("a blue circle", scene) and hallucinated("a red ring", scene)


def test_drawings_equal_to_the_pictures_have_the_best_scores(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each "code" is the number of a sample, and its decoded image is that sample's picture.
    pixels = torch.stack([Subject(subject.model, [s]).pixels[0] for s in subject.samples])
    rows = torch.arange(len(pixels))[:, None]
    subject.codes = rows
    monkeypatch.setattr(scene_drawings, "draw", lambda *_: rows)
    monkeypatch.setattr(scene_drawings, "decode_images", lambda _, codes: pixels[codes[:, 0]])
    evaluator = SceneDrawings()
    scores = evaluate(evaluator, subject)
    assert len(evaluator.examples) == len(subject.samples)
    assert scores["objects"] == scores["objects_of_reconstructions"] == scores["objects_masked"]
    assert scores["objects"]["value"] > 0.6 and scores["colours"]["value"] > 0.9
    assert scores["objects_asked"]["value"] == sum(
        len(sample.record["scene"]["objects"]) for sample in subject.samples
    )
    assert scores["objects"]["n"] == scores["objects_asked"]["value"]
    assert scores["objects"]["low"] <= scores["objects"]["value"] <= scores["objects"]["high"]
    true = [name for name in scores if name.endswith("_true")]
    assert true and all(
        scores[name]["n"] == scores[name.replace("_true", "_claims")]["value"] for name in true
    )


def test_each_drawing_has_a_score_and_a_picture(subject: Subject) -> None:
    evaluator = SceneDrawings()
    scores = evaluate(evaluator, subject)
    assert len(evaluator.examples) == len(subject.samples)
    side = subject.model.image_tokenizer.image_size
    assert {example.image.size for example in evaluator.examples} == {(side, side)}
    assert all(score["value"] == score["value"] for score in scores.values()), "no NaN"
