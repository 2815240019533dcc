"""The bundled starter is complete, small and licensed, and does simple tasks well."""

import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from multimodal.api import Model, load
from multimodal.cli import main
from multimodal.eval.metrics.answering import score_answers
from multimodal.eval.metrics.scene_captions import score_scene_captions
from multimodal.hub.names import find_model
from multimodal.model.checkpoint import read_config
from multimodal.scenes.captions import captions
from multimodal.scenes.questions import draw_questions
from multimodal.scenes.rendering import render
from multimodal.scenes.scene import sample_scene

FOLDER = find_model("starter")


@pytest.fixture(scope="module")
def starter() -> Model:
    return load("starter")


def test_it_is_complete_and_small(capsys: pytest.CaptureFixture[str]) -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 30e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ""}
    assert main(["info", "starter"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("(verified)") == 2 and "non-commercial research" in printed


def test_card_and_licence_name_the_training_data() -> None:
    licence, card = ((FOLDER / name).read_text("utf-8") for name in ("LICENSE", "README.md"))
    for text in (licence, card):
        for data in ("Flickr8k", "Noto Emoji", "easy-VQA", "scenes", "CC0", "non-commercial"):
            assert data in text
    fingerprints = asdict(read_config(FOLDER).fingerprints)
    for fact in (*fingerprints.values(), "recall", "seed 0", "600 scenes of val", "1,000 photos"):
        assert fact in card


def test_it_captions_and_answers_about_new_scenes(starter: Model) -> None:
    rng = random.Random("new scenes for the starter")
    scenes = {str(number): sample_scene(rng) for number in range(40)}
    pictures = [render(scene) for scene in scenes.values()]
    texts = dict(zip(scenes, starter.caption(pictures), strict=True))
    assert score_scene_captions(texts, scenes)["attribute_precision"] > 0.85
    pairs = []
    for scene, picture in zip(scenes.values(), pictures, strict=True):
        (question,) = draw_questions(scene, rng, 1)
        pairs.append((question.answer, starter.answer(picture, question.usual)))
    assert score_answers(pairs)["accuracy"] > 0.5


def test_texts_find_their_pictures(starter: Model) -> None:
    """More than half of 20 texts find their picture. Chance is one."""
    rng = random.Random("search")
    scenes = [sample_scene(rng) for _ in range(20)]
    texts = [captions(scene, rng, 1)[0] for scene in scenes]
    images = starter.embed(images=[render(scene) for scene in scenes])
    nearest = (images @ starter.embed(texts=texts).T).argmax(0).tolist()
    assert sum(n == image for n, image in enumerate(nearest)) > 10


def test_the_folder_has_the_preprocessing(starter: Model) -> None:
    stored = json.loads((FOLDER / "config.json").read_text())
    assert stored["preprocessing"]["image_size"] == starter.image_tokenizer.image_size


def test_commands_use_it_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scene.png"
    scene = sample_scene(random.Random(5))
    render(scene).save(path)
    assert main(["caption", str(path)]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed == f"{path}\t{load('starter').caption([path])[0]}"
