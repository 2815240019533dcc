"""Captions that need no model: fast CIDEr, the best constant, the lookup, and what is printed."""

import random
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pycocoevalcap.cider.cider import Cider
from torch import Tensor, nn

from multimodal import load
from multimodal.cli import main
from multimodal.data.samples import Sample
from multimodal.data.shards import Shards
from multimodal.eval.evaluator import Subject, evaluate, training_samples
from multimodal.eval.metrics.captioning import normalise, sentence_health
from multimodal.eval.metrics.cider import CaptionSpace, mean_similarities, similarities
from multimodal.eval.metrics.penn_treebank import ptb_tokenize
from multimodal.eval.metrics.yardsticks import Lookup, best_constant, shuffled
from multimodal.eval.tasks import captioning
from multimodal.eval.tasks.captioning import Captioning
from multimodal.tokenizers.encoder import Encoder
from multimodal.tokenizers.meaning import Meaning, MeaningConfig
from multimodal.tokenizers.weights import resize


def random_captions(count: int, seed: int) -> list[str]:
    """Captions of few words, so that words repeat within a caption and among captions."""
    rng = random.Random(seed)
    words = "a dog the runs in on red water of and".split()
    return [" ".join(rng.choices(words, k=rng.randint(0, 14))) for _ in range(count)]


def cider(captions: list[str], references: list[list[str]]) -> list[float]:
    """pycocoevalcap's CIDEr of each caption."""
    truths = {str(n): each for n, each in enumerate(references)}
    guesses = {str(n): [caption] for n, caption in enumerate(captions)}
    return [float(score) for score in Cider().compute_score(truths, guesses)[1]]


def test_sentences_that_are_broken_are_counted() -> None:
    captions = [
        "A dog runs.",
        "a dog runs",
        "A man riding a",
        "the the dog with",
        "",
        "dogs run on",
    ]
    assert sentence_health(captions) == {
        "distinct": pytest.approx(5 / 6),  # punctuation and case do not count
        "words": pytest.approx(17 / 6),
        "bad_endings": pytest.approx(4 / 6),
        "repetitions": pytest.approx(1 / 6),
    }


def test_similarities_are_the_cider_of_pycocoevalcap() -> None:
    flat = random_captions(100, 0)
    references = [flat[n * 4 : n * 4 + 4] for n in range(25)]
    captions = [*random_captions(22, 1), "dog dog dog dog", "a zebra in a zebra", ""]
    space = CaptionSpace(references)
    candidates, truths = space.vectors(captions), space.vectors(flat)
    each = similarities(candidates, truths)
    own = [each[n, n * 4 : n * 4 + 4].mean() for n in range(25)]
    np.testing.assert_allclose(own, cider(captions, references), atol=1e-12)
    shares = np.random.default_rng(0).random(100)
    np.testing.assert_allclose(mean_similarities(candidates, truths, shares), each @ shares)


def test_the_best_constant_is_the_one_with_the_highest_cider() -> None:
    flat, candidates = random_captions(60, 2), random_captions(80, 3)
    references = [flat[n * 3 : n * 3 + 3] for n in range(19)] + [flat[57:58]]
    scores = [float(np.mean(cider([text] * 20, references))) for text in candidates]
    best = best_constant(candidates, references)
    assert best == candidates[int(np.argmax(scores))] and max(scores) > 0


def test_the_lookup_takes_what_the_nearest_pictures_agree_on() -> None:
    captions = [
        ["a dog runs on grass", "a brown dog runs"],
        ["a dog runs on grass", "an animal outside"],
        ["the dog runs on the grass", "it is noon"],
        ["a boat on a lake", "a boat on a lake"],
        ["a boat on a lake", "two boats"],
        ["a plate of food", "a plate of food"],
    ]
    features = np.array([[1, 0], [1, 0.1], [1, 0.2], [0, 1], [0.1, 1], [-1, -1]])
    lookup = Lookup(features, captions, neighbours=2)
    # By the cosine, so the length of a feature does not count.
    photos = np.array([[9, 0.01], [0.001, 0.03], [1, 0.2]])
    assert lookup.nearest(photos).tolist() == [[0, 1], [3, 4], [2, 1]]
    assert lookup(photos)[:2] == ["a dog runs on grass", "a boat on a lake"]
    # One neighbour with two captions that agree equally: the first.
    assert Lookup(features, captions, neighbours=1)(photos)[0] == "a dog runs on grass"


def test_shuffled_items_are_all_in_another_place() -> None:
    for count in (2, 3, 10):
        result = shuffled(range(count), 0)
        assert sorted(result) == list(range(count))
        assert all(place != item for place, item in enumerate(result))
    assert shuffled(range(10), 0) == shuffled(range(10), 0) != shuffled(range(10), 1)
    assert shuffled(["a"], 0) == ["a"]


def test_the_lookup_sees_pixels_as_the_level_of_meaning_does() -> None:
    """Another level, which draws, may have larger images."""
    encoder = Encoder("timm:test_efficientnet", pretrained=False)
    sizes = MeaningConfig(encoder.name, (), 64, grid=2, groups=2, codebook_size=16, channels=8)
    meaning = Meaning(sizes, encoder)
    model: Any = SimpleNamespace(image_tokenizer=SimpleNamespace(meaning=meaning))
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = captioning.meaning_encoder(model)
    assert seen is not None
    with torch.no_grad():
        found, expected = seen(images), encoder(resize(images, 64))
        assert torch.equal(found, expected) and found.shape != encoder(images).shape


class MeanColours(nn.Module):
    """An encoder with the API of pretrained ones: [B, 3, H, W] -> [B, h, w, D]."""

    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.avg_pool2d(images, 8).permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captioning") / "scenes"
    assert main(["data", "scenes", str(folder), "--count", "40", "--size", "32"]) == 0
    return folder


def make_subject(model_folder: Path, scenes: Path, cache: Path | None = None) -> Subject:
    training = training_samples(scenes, "val")
    samples = list(Shards(scenes, "val"))[:12]
    return Subject(load(model_folder), samples, 5, training=training, cache=cache)


def test_yardsticks_are_measured_beside_the_model(
    scenes: Path, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = MeanColours()
    monkeypatch.setattr(captioning, "meaning_encoder", lambda _: encoder)
    subject = make_subject(tiny_model_folder, scenes, tmp_path / "cache")
    records = cycle([sample.record for sample in subject.samples])
    monkeypatch.setattr(
        captioning,
        "caption_codes",
        lambda _, codes, *__: [next(records)["captions"][0] for _ in codes],
    )
    evaluator = Captioning()
    scores = evaluate(evaluator, subject)
    for name in (
        *("CIDEr", "CIDEr_beams", "CIDEr_shuffled", "CIDEr_beams_shuffled"),
        *("CIDEr_constant", "CIDEr_constant_of_set", "CIDEr_lookup"),
    ):
        assert scores[name]["n"] == 12 and scores[name]["low"] <= scores[name]["value"]
    assert scores["CIDEr"]["value"] > 5 * scores["CIDEr_shuffled"]["value"]
    assert scores["CIDEr_constant_of_set"]["value"] >= scores["CIDEr_constant"]["value"]
    assert 2 < scores["distinct_captions"]["value"] <= 12
    named = dict(note.split(": ", 1) for note in evaluator.notes)
    assert len(named) == 2, "the best constants themselves"
    training, own = (
        [[ptb_tokenize(text) for text in sample.record["captions"]] for sample in samples]
        for samples in (subject.training, subject.samples)
    )
    assert named["CIDEr_constant"] in sum(training, [])
    every = {*sum(training, []), *sum(own, [])}
    best = max(float(np.mean(cider([text] * 12, own))) for text in every)
    assert scores["CIDEr_constant_of_set"]["value"] == pytest.approx(best, abs=1e-6)

    # The features of the same pictures are read from the cache, those of others are not.
    calls = encoder.calls
    assert calls == 8 + 3
    assert evaluate(Captioning(), subject)["CIDEr_lookup"] == scores["CIDEr_lookup"]
    assert encoder.calls == calls
    fewer = replace(subject, samples=subject.samples[:-1])
    assert evaluate(Captioning(), fewer)["CIDEr_lookup"]["n"] == 11
    assert encoder.calls == calls + 3


def test_the_lookup_describes_a_copy_by_its_own_captions(
    scenes: Path, tiny_model_folder: Path
) -> None:
    """Pictures of training are their own nearest ones, and only they have their captions."""
    samples = list(Shards(scenes, "train"))[:12]
    subject = Subject(load(tiny_model_folder), samples, 5, training=samples)
    features = captioning.encoder_features(subject, MeanColours(), samples, range(12))
    expected = torch.stack([image.mean((1, 2)) for image in subject.pixels])
    torch.testing.assert_close(features, expected)
    lookup = Lookup(features.numpy(), [s.record["captions"] for s in samples], 1)
    texts = lookup(features.numpy())
    assert all(text in s.record["captions"] for text, s in zip(texts, samples, strict=True))


def test_what_is_left_out_is_said(scenes: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    subject = make_subject(tiny_model_folder, scenes)
    assert training_samples(scenes, "train") == ()
    evaluator = Captioning()
    scores = evaluate(evaluator, subject)
    assert "CIDEr_constant" in scores and "CIDEr_lookup" not in scores
    assert evaluator.notes[2:] == ["the image tokenizer has no pretrained encoder: lookup left out"]
    alone, evaluator = Subject(subject.model, subject.samples[:1], 5), Captioning()
    scores = evaluate(evaluator, alone)
    assert not any(word in name for name in scores for word in ("shuffled", "constant", "lookup"))
    assert evaluator.notes == ["no training split with captions: best constants, lookup left out"]
    labelled = Sample("a", {**subject.samples[0].members, "json": b'{"label": "true"}'})
    evaluate(evaluator := Captioning(), replace(alone, training=[labelled]))
    assert len(evaluator.notes) == 1 and "no training split with captions" in evaluator.notes[0]


def test_normalise() -> None:
    assert normalise("  A man's Hat, (red)! ") == "a mans hat red"
