"""Classification, choices, few-shot captioning, robustness and presence."""

import random
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from multimodal import load
from multimodal.cli import main
from multimodal.data.objects import presence_question
from multimodal.data.samples import Sample
from multimodal.data.shards import Shards
from multimodal.eval.evaluator import Subject, evaluate
from multimodal.eval.tasks import choices as choices_task
from multimodal.eval.tasks import classification, few_shot
from multimodal.eval.tasks.answers import Answers
from multimodal.eval.tasks.choices import Choices
from multimodal.eval.tasks.classification import Classification, zero_shot_classifier
from multimodal.eval.tasks.few_shot import FewShot
from multimodal.eval.trust import presence
from multimodal.eval.trust.presence import Presence, absent_objects
from multimodal.eval.trust.robustness import DEGRADATIONS, Robustness
from multimodal.eval.trust.scene_presence import ScenePresence
from multimodal.inference.batch import DecodeBatch
from multimodal.inference.embedding import embed_texts
from multimodal.inference.likelihoods import choice_likelihoods
from multimodal.model.sequences import describe_prompt


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("tasks") / "scenes"
    assert main(["data", "scenes", str(folder), "--count", "4", "--size", "32"]) == 0
    return list(Shards(folder, "val"))[:8]


@pytest.fixture
def subject(tiny_model_folder: Path, samples: list[Sample]) -> Subject:
    return Subject(load(tiny_model_folder), list(samples), 5)


def test_the_zero_shot_classifier_is_that_of_open_clip(tiny_model_folder: Path) -> None:
    model = load(tiny_model_folder)
    known: list[str] = []

    class Tower:
        def encode_text(self, texts: Tensor, normalize: bool) -> Tensor:
            assert normalize
            return embed_texts(model, [known[int(number)] for number in texts])

    def tokenizer(texts: list[str]) -> Tensor:
        known.extend(texts)
        return torch.arange(len(known) - len(texts), len(known))

    names = ["red bus", "dog", "blue circle"]
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES
    expected = open_clip.build_zero_shot_classifier(Tower(), tokenizer, names, templates)
    classifier = zero_shot_classifier(model, names, templates)
    torch.testing.assert_close(classifier, expected, atol=1e-5, rtol=1e-5)


def test_embeddings_of_the_right_class_have_an_accuracy_of_one(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["ant", "bee", "soccer ball", "cat"]
    for number, sample in enumerate(subject.samples):
        label = ("ant", "bee", "soccer_ball")[number % 3]
        members = {**sample.members, "json": b'{"label": "%s"}' % label.encode()}
        subject.samples[number] = Sample(sample.key, members)
    # The class "cat" is in the training split only, and yet it could be said.
    subject.training = [*subject.samples, Sample("c", {"json": b'{"class": "cat"}'})]
    rows = iter(torch.eye(4)[[n % 3 for n in range(len(subject.samples))]])
    monkeypatch.setattr(
        classification, "embed_codes", lambda _, codes: torch.stack([next(rows) for _ in codes])
    )

    def embed_texts_by_name(_: Any, texts: list[str]) -> Tensor:
        return torch.eye(4)[
            [next(i for i, name in enumerate(names) if name in text) for text in texts]
        ]

    monkeypatch.setattr(classification, "embed_texts", embed_texts_by_name)
    assert all(map(Classification().fits, subject.samples))
    scores = evaluate(Classification(), subject)
    assert scores["top1"]["value"] == 1 and scores["chance"]["value"] == 1 / 4
    assert scores["top1"]["low"] == 1 and scores["classes"]["value"] == 4
    assert not Classification().fits(Sample("x", {"json": b'{"label": "true"}'}))


@pytest.mark.parametrize("label", [b"null", b'""'])
def test_a_label_that_is_null_or_empty_is_no_class(label: bytes) -> None:
    sample = Sample("x", {"json": b'{"label": %s, "class": %s}' % (label, label)})
    assert not Classification().fits(sample)
    sample = Sample("x", {"json": b'{"label": %s, "group": "red_fox"}' % label})
    assert classification.class_of(sample.record) == "red fox"


def test_likelihoods_of_answers_are_sums_over_their_tokens(subject: Subject) -> None:
    model = subject.model
    prompts, choices = ["Which? Answer:", "What now?"], [["a red bus", "dogs", "on"], ["x", "the"]]
    likelihoods = choice_likelihoods(model, subject.codes[:2], prompts, choices)
    v, encode = model.vocabulary, model.text_tokenizer.encode
    assert [len(each) for each in likelihoods] == [3, 2]
    for row in range(2):
        for text, likelihood in zip(choices[row], likelihoods[row].tolist(), strict=True):
            total, tokens = 0.0, [*encode(f" {text}"), v.eos]
            prompt = describe_prompt(v, subject.codes[row].tolist()) + encode(prompts[row])
            batch = DecodeBatch(model.network, [prompt], len(tokens))
            for token in tokens:
                total += batch.logits().log_softmax(-1)[0, token].item()
                batch.step(torch.tensor([token]))
            assert likelihood == pytest.approx(total, abs=1e-3)


def test_the_most_likely_choice_counts_and_a_tie_does_not(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = evaluate(Choices(), subject)["chance"]["value"]
    assert 0.1 < chance < 0.9

    def first_is(likelihood: float) -> Any:
        """The right choice is the first one. All others get a likelihood of 0."""

        def likelihoods(_: Any, codes: Tensor, prompts: list[str], choices: Any) -> list[Tensor]:
            return [torch.tensor([likelihood] + [0.0] * (len(each) - 1)) for each in choices]

        return likelihoods

    monkeypatch.setattr(choices_task, "choice_likelihoods", first_is(1.0))
    scores = evaluate(Choices(), subject)
    assert scores["accuracy"]["value"] > 0.95 > 0.1 > scores["free_accuracy"]["value"]
    monkeypatch.setattr(choices_task, "choice_likelihoods", first_is(0.0))
    assert evaluate(Choices(), subject)["accuracy"]["value"] < 0.2


def test_few_shot_prompts_have_other_samples_and_never_the_answer(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = subject.model, list[list[int]]()

    def record(_: Any, batch: list[list[int]]) -> list[list[int]]:
        prompts.extend(batch)
        return [model.text_tokenizer.encode("two dogs run") for _ in batch]

    monkeypatch.setattr(few_shot, "generate_ids", record)
    scores = evaluate(FewShot(), subject)
    measured = [f"CIDEr_{shots}" for shots in (0, 1, 2, 4)]
    assert [*scores] == [name + end for name in measured for end in ("", "_shuffled")]
    assert all(scores[n] == scores[f"{n}_shuffled"] for n in measured), "equal texts, moved"
    v = model.vocabulary
    assert [prompt.count(v.boi) for prompt in prompts] == [
        shots + 1 for shots in (0, 1, 2, 4) for _ in subject.samples
    ]
    images = (subject.codes + v.image_start).tolist()
    captions = [model.text_tokenizer.encode(s.record["captions"][0]) for s in subject.samples]
    assert prompts[2 * len(subject.samples)] == [
        v.bos,
        *(v.boi, *images[1], v.eoi, *captions[1]),
        *(v.boi, *images[2], v.eoi, *captions[2]),
        *(v.boi, *images[0], v.eoi),
    ]


def test_degradations_depend_only_on_the_seed(subject: Subject) -> None:
    for name, degrade in DEGRADATIONS.items():
        for image in subject.images[:2]:
            first, repeated, other = degrade(image, 1), degrade(image, 1), degrade(image, 2)
            assert first.size == image.size and first.mode == "RGB", name
            assert first.tobytes() == repeated.tobytes() != image.tobytes(), name
            assert (name in ("noise", "occlusion")) == (first.tobytes() != other.tobytes()), name
    scores = evaluate(Robustness(), subject)
    plain = evaluate(Answers(), subject)["accuracy"]["value"]
    assert scores["plain"]["value"] == pytest.approx(plain)
    assert {"spread of wordings", *DEGRADATIONS} <= scores.keys()


@pytest.mark.parametrize("evaluator", [Presence(), ScenePresence()])
def test_presence_asks_as_much_about_absent_objects(
    evaluator: Presence, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not isinstance(evaluator, ScenePresence):
        captions = ['"a man with a dog"', '"a cat on a sofa"']
        for number, sample in enumerate(subject.samples):
            record = f'{{"captions": [{captions[number % 2]}]}}'.encode()
            subject.samples[number] = Sample(sample.key, {**sample.members, "json": record})
    prompts: list[str] = []

    def always_yes(_: Any, codes: Tensor, batch: list[str], choices: list[Any]) -> list[Tensor]:
        prompts.extend(batch)
        return [torch.tensor([1.0, 0.0]) for _ in choices]

    monkeypatch.setattr(presence, "choice_likelihoods", always_yes)
    usable = [sample for sample in subject.samples if evaluator.fits(sample)]
    assert len(usable) == len(subject.samples)
    scores = evaluate(evaluator, Subject(subject.model, usable, 5))
    for name in ("random", "popular", "adversarial"):
        assert scores[f"{name}_accuracy"]["value"] == scores[f"{name}_chance"]["value"] == 0.5
        assert scores[f"{name}_says_yes"]["value"] == 1
        assert scores[f"{name}_f1"]["value"] == pytest.approx(2 / 3)
    assert all("is there a" in prompt for prompt in prompts)
    present = [evaluator.objects_of(sample) for sample in usable]
    absent = absent_objects(present, random.Random(0))
    for names, *sets in zip(present, *absent.values(), strict=True):
        assert all(not names & set(others) for others in sets)


def test_questions_about_objects_are_grammatical() -> None:
    assert presence_question("dog") == "is there a dog?" and "an airplane" in presence_question(
        "airplane"
    )
    assert presence_question("snow") == "is there snow?"
    assert presence_question("skis") == "are there skis?"


def test_absent_objects_are_ordered_by_frequency_or_by_company() -> None:
    absent = absent_objects(
        [{"dog", "ball"}, {"dog", "ball"}, {"cat", "sofa"}, {"dog"}, {"man"}, {"man"}, {"man"}],
        random.Random(0),
    )
    assert absent["adversarial"][3][0] == "ball" and absent["popular"][3][0] == "man"
