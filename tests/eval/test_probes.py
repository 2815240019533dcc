"""Classes by name, choices, few-shot prompts, rough handling: what is measured is what is meant."""

import random
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

import multimodal.eval.tasks.presence as presence
import multimodal.eval.tasks.probes as probes
from multimodal import load
from multimodal.cli import main
from multimodal.data.samples import Sample
from multimodal.data.shards import Shards
from multimodal.eval.evaluator import Subject, evaluate
from multimodal.eval.tasks.evaluators import Answers
from multimodal.eval.tasks.presence import Presence
from multimodal.eval.tasks.probes import (
    HANDLED,
    Choices,
    Classification,
    FewShot,
    Robustness,
    zero_shot_classifier,
)
from multimodal.inference.batch import DecodeBatch
from multimodal.inference.embedding import embed_texts
from multimodal.inference.likelihoods import choice_likelihoods
from multimodal.model.sequences import describe_prompt


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("probes") / "scenes"
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
    found = zero_shot_classifier(model, names, templates)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_classes_are_found_by_who_knows_them(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["ant", "bee", "cat"]
    for number, sample in enumerate(subject.samples):
        members = {**sample.members, "json": b'{"label": "%s"}' % names[number % 3].encode()}
        subject.samples[number] = Sample(sample.key, members)
    knows = torch.eye(3)[[n % 3 for n in range(len(subject.samples))]]
    rows = iter(knows)
    monkeypatch.setattr(
        probes, "embed_codes", lambda _, codes: torch.stack([next(rows) for _ in codes])
    )
    monkeypatch.setattr(
        probes, "embed_texts",
        lambda _, texts: torch.stack([
            torch.eye(3)[next(i for i, name in enumerate(names) if name in text)] for text in texts
        ]),
    )  # fmt: skip
    assert all(map(Classification().fits, subject.samples))
    found = evaluate(Classification(), subject)
    assert found["top1"]["value"] == 1 and found["chance"]["value"] == pytest.approx(1 / 3)
    assert not Classification().fits(Sample("x", {"json": b'{"label": "true"}'}))


def test_likelihoods_of_answers_are_sums_over_their_tokens(subject: Subject) -> None:
    model = subject.model
    prompts, choices = ["Which? Answer:", "What now?"], [["a red bus", "dogs", "on"], ["x", "the"]]
    found = choice_likelihoods(model, subject.codes[:2], prompts, choices)
    v, encode = model.vocabulary, model.text_tokenizer.encode
    assert [len(one) for one in found] == [3, 2]
    for row in range(2):
        image = (subject.codes[row] + v.image_start).tolist()
        for text, likely in zip(choices[row], found[row].tolist(), strict=True):
            total, said = 0.0, [*encode(f" {text}"), v.eos]
            batch = DecodeBatch(
                model.network, [describe_prompt(v, image) + encode(prompts[row])], len(said)
            )
            for token in said:
                total += batch.logits().log_softmax(-1)[0, token].item()
                batch.step(torch.tensor([token]))
            assert likely == pytest.approx(total, abs=1e-3)


def test_the_likeliest_choice_counts_and_a_tie_does_not(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = evaluate(Choices(), subject)["chance"]["value"]
    assert 0.1 < chance < 0.9

    def likely(_: Any, codes: Tensor, prompts: list[str], choices: list[list[str]]) -> list[Tensor]:
        # the right one is the first of its prompt
        return [torch.tensor([good] + [0.0] * (len(several) - 1)) for several in choices]

    monkeypatch.setattr(probes, "choice_likelihoods", likely)
    good = 1.0
    assert evaluate(Choices(), subject)["accuracy"]["value"] > 0.95
    good = 0.0
    assert evaluate(Choices(), subject)["accuracy"]["value"] < 0.2


def test_few_shot_prompts_hold_others_and_never_the_answer(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = subject.model, list[list[list[int]]]()

    def look(_: Any, prompts: list[list[int]], room: int) -> list[list[int]]:
        seen.append(prompts)
        return [model.text_tokenizer.encode("two dogs run") for _ in prompts]

    monkeypatch.setattr(probes, "generate_ids", look)
    found = evaluate(FewShot(), subject)
    assert [*found] == ["CIDEr_0", "CIDEr_1", "CIDEr_2", "CIDEr_4"]
    v = model.vocabulary
    prompts = [prompt for batch in seen for prompt in batch]
    assert [prompt.count(v.boi) for prompt in prompts] == [
        shots + 1 for shots in (0, 1, 2, 4) for _ in subject.samples
    ]
    images = (subject.codes + v.image_start).tolist()
    two = prompts[2 * len(subject.samples)]
    said = [model.text_tokenizer.encode(s.record["captions"][0]) for s in subject.samples]
    assert two == [
        v.bos, v.boi, *images[1], v.eoi, *said[1], v.boi, *images[2], v.eoi, *said[2],
        v.boi, *images[0], v.eoi,
    ]  # fmt: skip


def test_rough_handling_changes_images_the_same_each_time(subject: Subject) -> None:
    for name, handle in HANDLED.items():
        for image in subject.images[:2]:
            once, again, other = handle(image, 1), handle(image, 1), handle(image, 2)
            assert once.size == image.size and once.mode == "RGB", name
            assert once.tobytes() == again.tobytes() != image.tobytes(), name
            assert (name in ("noise", "occlusion")) == (once.tobytes() != other.tobytes()), name
    found = evaluate(Robustness(), subject)
    plain = evaluate(Answers(), subject)["accuracy"]["value"]
    assert found["plain"]["value"] == pytest.approx(plain)
    assert {"spread of wordings", *HANDLED} <= found.keys()


def test_presence_asks_as_much_about_what_is_not_there(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def eager(_: Any, codes: Tensor, prompts: list[str], choices: list[Any]) -> list[Tensor]:
        seen.extend(prompts)
        return [torch.tensor([1.0, 0.0]) for _ in choices]  # yes to all

    monkeypatch.setattr(presence, "choice_likelihoods", eager)
    usable = [sample for sample in subject.samples if Presence().fits(sample)]
    found = evaluate(Presence(), Subject(subject.model, usable, 5))
    for name in ("random", "popular", "adversarial"):
        assert found[f"{name}_accuracy"]["value"] == pytest.approx(0.5)
        assert found[f"{name}_says_yes"]["value"] == 1
        assert found[f"{name}_f1"]["value"] == pytest.approx(2 / 3)
    assert all("is there a" in prompt for prompt in seen)
    there = [presence.things_of(sample) for sample in usable]
    others = presence.negatives(there, random.Random(0))
    for some, *sets in zip(there, *others.values(), strict=True):
        assert all(not some & set(names) for names in sets)
    # What is there and beside it: a ball is thrown at dogs, and cats sit on sofas.
    made = presence.negatives(
        [{"dog", "ball"}, {"dog", "ball"}, {"cat", "sofa"}, {"dog"}, {"man"}, {"man"}, {"man"}],
        random.Random(0),
    )
    assert made["adversarial"][3][0] == "ball" and made["popular"][3][0] == "man"
