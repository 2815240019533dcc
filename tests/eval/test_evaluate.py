"""``multimodal eval``: numbers that can be believed, with how they came about."""

import json
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest
import torch

import multimodal.eval.tasks.evaluators as evaluators
from multimodal import load
from multimodal.cli import main
from multimodal.data.samples import Sample
from multimodal.data.shards import Shards
from multimodal.eval.evaluate import TASKS
from multimodal.eval.evaluator import Example, Subject, Value, evaluate, interval
from multimodal.eval.metrics.answering import same_answer
from multimodal.eval.metrics.objects import objects_said
from multimodal.eval.tasks.evaluators import (
    Answers,
    Captioning,
    Drawing,
    Likelihood,
    Reconstruction,
    Retrieval,
    shapes_said,
)
from multimodal.eval.tasks.registry import EVALUATORS
from multimodal.inference.likelihoods import text_likelihoods
from multimodal.model.lessons import questions_of
from multimodal.model.templates import Templates


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "scenes"
    assert main(["data", "scenes", str(folder), "--count", "4", "--size", "32"]) == 0
    return folder


@pytest.fixture(scope="module")
def samples(scenes: Path) -> list[Sample]:
    return list(Shards(scenes, "val"))[:12]


@pytest.fixture
def subject(tiny_model_folder: Path, samples: list[Sample]) -> Subject:
    return Subject(load(tiny_model_folder), samples, batch_size=5)


def values(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    return {name: score["value"] for name, score in scores.items()}


def test_a_cheat_that_copies_the_reference_gets_all(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = cycle([sample.record for sample in subject.samples])
    monkeypatch.setattr(
        evaluators, "caption_codes",
        lambda _, codes, **__: [next(records)["captions"][0] for _ in codes],
    )  # fmt: skip
    found = values(evaluate(Captioning(), subject))
    assert found["Bleu_4"] == pytest.approx(1, abs=1e-6) and found["ROUGE_L"] == pytest.approx(1)
    assert found["scene_attribute_precision"] == 1 and found["hallucinated"] == 0
    truth = iter([pair[1] for sample in subject.samples for pair in sample.record["qa"]])

    def knows(_: object, codes: torch.Tensor, prompts: list[str], max_tokens: int) -> list[str]:
        grey = len(codes) > 1 and bool((codes == codes[0]).all()) and codes.stride()[0] == 0
        return ["nothing"] * len(prompts) if grey else [f" {next(truth)}." for _ in prompts]

    monkeypatch.setattr(evaluators, "complete_prompts", knows)
    found = values(evaluate(Answers(), Subject(subject.model, subject.samples, 10_000)))
    assert found["accuracy"] == found["open"] == found["closed"] == 1
    assert found["blind_accuracy"] == 0 and found["says_yes"] == found["yes_is_right"]
    # embeddings that know which image a text is of
    owners = [n for n, sample in enumerate(subject.samples) for _ in sample.record["captions"]]
    one_hot = torch.eye(len(subject.samples))
    images, texts = iter(one_hot), iter(one_hot[owners])
    monkeypatch.setattr(
        evaluators, "embed_codes", lambda _, codes: torch.stack([next(images) for _ in codes])
    )
    monkeypatch.setattr(
        evaluators, "embed_texts", lambda _, some: torch.stack([next(texts) for _ in some])
    )
    found = values(evaluate(Retrieval(), subject))
    assert found["text_to_image@1"] == found["image_to_text@1"] == 1
    assert found["text_to_image_median_rank"] == 1


@pytest.mark.parametrize(
    ("expected", "found", "same"),
    [
        ("yes", " Yes.", True), ("a red circle", "the red circle", True), ("three", "3", True),
        ("top left", "top-left", False), ("red, blue", "red blue", True), ("none", "0", True),
        ("dog's", "dogs", False), ("", "a", False), ("a", "", False), ("red", "dark red", False),
        ("left", "", False), ("Größe", "größe", True),
    ],
)  # fmt: skip
def test_answers_are_compared_as_by_vqa(expected: str, found: str, same: bool) -> None:
    assert same_answer(expected, found) == same == same_answer(found, expected)


def test_likelihoods_are_those_of_the_model(subject: Subject) -> None:
    found = evaluate(Likelihood(), subject)
    captions = [sample.record["captions"][0] for sample in subject.samples]
    nats = -text_likelihoods(subject.model, subject.codes, captions)
    each = [n / 0.6931472 / (len(c.encode()) + 1) for n, c in zip(nats.tolist(), captions,
                                                                  strict=True)]  # fmt: skip
    assert found["caption_bits_per_byte"]["value"] == pytest.approx(sum(each) / len(each), rel=1e-5)
    low, high = (found["caption_bits_per_byte"][name] for name in ("low", "high"))
    assert low < found["caption_bits_per_byte"]["value"] < high
    # a model that knows nothing: about the logarithm of what it may say
    assert 5 < found["image_nats_per_code"]["value"] < 9


def test_drawings_and_reconstructions_have_a_score_and_a_picture_each(subject: Subject) -> None:
    for evaluator in (Drawing(), Reconstruction()):
        usable = [sample for sample in subject.samples if evaluator.fits(sample)]
        scores = evaluate(evaluator, Subject(subject.model, usable, 5))
        assert len(evaluator.examples) == len(usable) > 5
        side = subject.model.image_tokenizer.config.image_size
        assert {one.image.size for one in evaluator.examples} == {(side, side)}
        assert all(score["value"] == score["value"] for score in scores.values()), "no NaN"


def test_the_interval_is_that_of_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for round in range(100):
        low, high = interval(torch.randn(60, generator=generator).tolist(), seed=round)
        assert high - low == pytest.approx(4 * 60**-0.5, rel=0.4)
        inside += low < 0 < high
    assert 87 <= inside <= 100
    assert interval([1.0, 1.0]) == (1, 1)
    # six answers about each image, all right or all wrong: as uncertain as one each
    each = torch.rand(100, generator=generator).round()
    alone = interval(each.tolist())
    six = interval(
        each.repeat_interleave(6).tolist(), owners=[n for n in range(100) for _ in "123456"]
    )
    assert six == pytest.approx(alone)


def test_what_is_left_out_is_not_invented() -> None:
    assert shapes_said("a circle") == shapes_said("two circles") == {"circle"}
    assert shapes_said("a green object left of a large red heart") == {"heart"}


def test_a_class_beside_captions_makes_no_statement_of_them(subject: Subject) -> None:
    record = {
        "captions": ["a dog on grass", "is it? yes"],
        "qa": [["is it?", "yes"]],
        "label": "dog",
    }
    sample = Sample("a", {"json": json.dumps(record).encode()})
    assert Captioning().fits(sample) and Retrieval().fits(sample)
    assert questions_of(record, Templates()) == [("Question: is it? Answer:", "is it?", "yes")]
    statement = Sample("b", {"json": b'{"captions": ["it is", "so"], "label": "false"}'})
    assert not Captioning().fits(statement) and Answers().fits(statement)
    assert len(questions_of(statement.record, Templates())) == 2


def test_photos_are_held_to_what_references_name(subject: Subject) -> None:
    assert objects_said("Two men and a dog on the beach.") == {"person", "dog", "beach"}
    assert objects_said("a couple of ponies by two boxes") == {"horse"}
    assert objects_said("two players and a couple") == {"person"}
    assert objects_said("a man-eating shark") == {"person"} and not objects_said("")
    photos = [
        Sample(s.key, {**s.members, "json": b'{"captions": ["two dogs run", "by a lake"]}'})
        for s in subject.samples
    ]
    model = subject.model
    texts = iter(["a dog by a man", *["a dog"] * (len(photos) - 1)] * 2)
    with pytest.MonkeyPatch.context() as patch:
        said = lambda _, codes, **__: [next(texts) for _ in codes]  # noqa: E731
        patch.setattr(evaluators, "caption_codes", said)
        found = values(evaluate(Captioning(), Subject(model, photos, 5)))
    assert found["hallucinated"] == pytest.approx(1 / len(photos))
    assert found["hallucinated_objects"] == pytest.approx(1 / (len(photos) + 1))


def test_drawings_depend_on_the_seed_and_not_on_the_batch(subject: Subject) -> None:
    usable = [sample for sample in subject.samples if Drawing().fits(sample)]

    def drawn(batch: int, seed: int) -> list[bytes]:
        evaluator = Drawing()
        evaluate(evaluator, Subject(subject.model, usable, batch, seed))
        return [one.image.tobytes() for one in evaluator.examples]

    assert drawn(2, 0) == drawn(5, 0) != drawn(5, 1)


def test_the_command(
    scenes: Path, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["eval", "all", "--model", str(tiny_model_folder), "--data", str(scenes), "--limit", "6"]
    reports = []
    for name in ("one", "two"):
        out, page = tmp_path / f"{name}.json", tmp_path / f"{name}.html"
        assert main([*line, "--output", str(out), "--page", str(page)]) == 0
        reports.append(json.loads(out.read_text()))
    said = capsys.readouterr().out
    assert "CIDEr" in said and "blind_accuracy" in said
    first, second = reports
    assert [result["task"] for result in first["results"]] == [
        task
        for task in TASKS
        if task != "classification"  # scenes have no classes
    ]
    assert list(TASKS) == list(EVALUATORS)
    for one, other in zip(first["results"], second["results"], strict=True):
        assert one["scores"] == other["scores"], "the same seed, the same numbers"
        assert one["cost"]["seconds"] > 0 and one["protocol"] and one["n"] > 0
        read = one["cost"]["tokens"]
        assert read == other["cost"]["tokens"] and (read > 0) == (one["task"] != "reconstruction")
    about = first["protocol"]
    assert about["fingerprint"] == load(tiny_model_folder).fingerprint
    assert {"seed", "split", "image_size", "fit", "commit", "versions"} <= about.keys()
    html = page.read_text()
    assert html.count("<figure>") > 50 and "best" in html and "worst" in html


def test_what_cannot_be_measured(
    scenes: Path, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from multimodal.data.shards import index_shard, write_manifest, write_tar

    (sample, *_) = Shards(scenes, "val")
    folder = tmp_path / "silent"
    folder.mkdir()
    write_tar(folder / "val-0000.tar", [("a", {"png": sample.image, "json": b"{}"})])
    write_manifest(folder, [index_shard(folder / "val-0000.tar")])
    line = ["eval", "answers", "--model", str(tiny_model_folder), "--data"]
    for more, said in (
        ([str(folder)], "no sample of"),
        ([str(scenes), "--split", "test"], "no split 'test'"),
        ([str(scenes), "--limit", "0"], "expected at least 1"),
        ([str(scenes), "--output", str(tmp_path / "x.txt")], ".json"),
    ):
        assert main([*line, *more]) == 1
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "nonsense", "--data", str(scenes)])


def test_an_evaluator_of_ones_own(subject: Subject) -> None:
    class Colours:
        name, protocol = "colours", "mean of the pixels"

        def __init__(self) -> None:
            self.examples: list[Example] = []

        def fits(self, sample: Sample) -> bool:
            return True

        def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
            yield "brightness", subject.pixels.mean((1, 2, 3)).tolist()

    found = evaluate(Colours(), subject)
    assert found["brightness"]["n"] == 12


def test_shuffled_images_give_chance(tmp_path: Path) -> None:
    """The starter finds scenes by their captions, and hears what they show: of the right ones."""
    assert main(["data", "scenes", str(tmp_path / "scenes"), "--count", "40"]) == 0
    own = list(Shards(tmp_path / "scenes", "val"))[:40]
    others = [
        Sample(one.key, {**one.members, "png": other.image})
        for one, other in zip(own, own[7:] + own[:7], strict=True)
    ]
    model = load("starter")
    found, shuffled = (
        {
            **values(evaluate(Retrieval(), Subject(model, samples))),
            **values(evaluate(Captioning(), Subject(model, samples))),
        }
        for samples in (own, others)
    )
    assert found["text_to_image@1"] > 0.5 and shuffled["text_to_image@1"] < 0.1
    assert found["text_to_image_median_rank"] <= 2 and shuffled["text_to_image_median_rank"] > 8
    assert found["scene_attribute_precision"] > 0.85 > 0.6 > shuffled["scene_attribute_precision"]
    assert found["CIDEr"] > 4 * shuffled["CIDEr"]
