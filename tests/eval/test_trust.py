"""Words for people, counterfactual scenes and energy: what models with known habits score."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from multimodal import load
from multimodal.cli import main
from multimodal.data.samples import Sample
from multimodal.data.shards import Shards
from multimodal.eval.evaluator import Subject, evaluate
from multimodal.eval.tasks import energy
from multimodal.eval.trust import person_words, scene_counterfactuals
from multimodal.eval.trust.person_words import PersonWords
from multimodal.eval.trust.scene_counterfactuals import (
    CHANGES,
    SceneCounterfactuals,
    ScenePair,
    make_pairs,
    same_in_both,
)
from multimodal.scenes.scene import Scene, SceneObject


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("trust") / "scenes"
    assert main(["data", "scenes", str(folder), "--count", "4", "--size", "32"]) == 0
    return list(Shards(folder, "val"))[:10]


@pytest.fixture
def subject(tiny_model_folder: Path, samples: list[Sample]) -> Subject:
    return Subject(load(tiny_model_folder), list(samples), 4)


def test_a_model_that_says_man_for_everyone_has_the_gap_that_it_has(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [b"a woman", b"a man", b"a girl", b"a man", b"a man"]
    photos = [
        Sample(str(n), {**sample.members, "json": b'{"captions": ["%s", "a person"]}' % text})
        for n, (sample, text) in enumerate(zip(subject.samples, texts, strict=False))
    ]
    monkeypatch.setattr(person_words, "caption_codes", lambda _, codes: ["a man"] * len(codes))
    evaluator = PersonWords()
    assert all(map(evaluator.fits, photos)) and not evaluator.fits(subject.samples[0])
    scores = evaluate(evaluator, Subject(subject.model, photos, 2))
    values = {name: score["value"] for name, score in scores.items()}
    assert values["women_said_men"] == values["men_said_men"] == values["gender_wrong_gap"] == 1
    assert values["women_said_women"] == values["men_said_women"] == values["women_share"] == 0
    assert values["gender_right_gap"] == -1 and values["women_share_references"] == 2 / 5
    assert values["children_said_adults"] == 1 and scores["children_said_adults"]["n"] == 1
    low, high = scores["gender_wrong_gap"]["low"], scores["gender_wrong_gap"]["high"]
    assert 0 < low < 0.5 and high == 1, "certain of the sign and of nothing else"
    assert scores["gender_wrong_gap"]["n"] == 5
    said = " ".join(evaluator.notes)
    assert "5 photos, 5 of them with people" in said and "What this cannot conclude" in said
    assert "2 photos of women and 3 of men" in said and "a hint at most" in said
    by_text = {example.text: example.score for example in evaluator.examples}
    assert by_text["women: a man | a woman"] == 0 and by_text["men: a man | a man"] == 1


def answers_by(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[int, str], str], sides: list[int]
) -> None:
    """Replace answers. ``answer``: 0 for the pictures as they are, 1 for the changed ones."""

    def complete(_: object, codes: torch.Tensor, prompts: list[str], options: Any) -> list[str]:
        return [
            answer(int(code), prompt) for code, prompt in zip(codes[:, 0], prompts, strict=True)
        ]

    calls = iter(sides)
    monkeypatch.setattr(scene_counterfactuals, "complete_prompts", complete)
    monkeypatch.setattr(scene_counterfactuals, "caption_codes", lambda _, c: [""] * len(c))
    # The codes of a picture: which of the two it is, and of which pair.
    monkeypatch.setattr(
        Subject,
        "encode",
        lambda _, pixels: torch.tensor(
            [[len(pixels) * side + n] for side in [next(calls)] for n in range(len(pixels))]
        ),
    )


def test_a_model_that_knows_the_scenes_stays_and_follows(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, questions = make_pairs(subject.samples, subject.seed)
    assert [pair.kind for pair in pairs[:2]] == list(CHANGES[:2])
    known = {(q.pair, side, q.text): q.right[side] for q in questions for side in (0, 1)}
    count = len(pairs)

    def right(code: int, prompt: str) -> str:
        text = prompt.removeprefix("Question: ").removesuffix(" Answer:")
        return known[code % count, code // count, text]

    answers_by(monkeypatch, right, [0, 1])
    evaluator = SceneCounterfactuals()
    scores = evaluate(evaluator, subject)
    for name in ("stays", "stays_right", "follows", "colour_stays", "background_follows"):
        assert scores[name]["value"] == 1, name
    assert (
        scores["stays"]["n"] + scores["follows"]["n"] == len(questions) == len(evaluator.examples)
    )
    assert "caption_stays" not in scores, "captions that say nothing"

    # Blind: the same answers to both pictures.
    answers_by(monkeypatch, lambda code, prompt: right(code % count, prompt), [0, 1])
    scores = evaluate(SceneCounterfactuals(), subject)
    assert scores["stays"]["value"] == 1 and scores["follows"]["value"] == 0
    # Changed pictures make it answer otherwise.
    answers_by(monkeypatch, lambda code, prompt: "a" if code < count else "b", [0, 1])
    scores = evaluate(SceneCounterfactuals(), subject)
    assert scores["stays"]["value"] == scores["follows"]["value"] == 0


def test_captions_are_compared_in_all_but_the_change() -> None:
    ring = SceneObject("ring", "red", "small", "solid", 0.2, 0.5, 0.13)
    star, green = (
        SceneObject("star", colour, "large", "dotted", 0.7, 0.5, 0.19)
        for colour in ("blue", "purple")
    )
    pair = ScenePair(0, "colour", (Scene((ring, star), "white"), Scene((ring, green), "white")), 1)

    def alike(first: str, second: str) -> list[bool]:
        return sorted(same_in_both(pair, (first, second)))

    # The ring's colour and shape, the star's shape. Its colour is the change.
    assert alike("a red ring and a blue star", "a red ring and a purple star") == [True] * 3
    assert alike("a red ring and a blue star", "a pink ring and a purple star") == [
        False,
        True,
        True,
    ]
    assert alike("a ring on a white background", "a ring on a black background") == [False, True]
    assert alike("a red ring", "a purple star") == []


def test_energy_is_of_a_thousand_requests(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counter:
        """3.6 J a request are 1 Wh for 1,000."""

        def __init__(self, *_: object) -> None:
            self.how, self.watt_hours = "measured", 0.001

        def read(self) -> "Counter":
            return self

        def __enter__(self) -> "Counter":
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(energy, "EnergyMeter", Counter)
    evaluator = energy.EnergyUse()
    scores = evaluate(evaluator, subject)
    for kind in ("caption", "answer", "drawing"):
        assert scores[f"{kind}_Wh"]["value"] == pytest.approx(1)
        assert scores[f"{kind}_CO2_g"]["value"] == pytest.approx(0.48)
        assert scores[f"{kind}_Wh"]["n"] == energy.MAX_REQUESTS
    assert evaluator.notes == ["measured; 480 g CO2 a kWh"]
