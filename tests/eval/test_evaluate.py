"""``multimodal eval``: scores are right, and the report has their protocol."""

import json
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from multimodal import load
from multimodal.cli import main
from multimodal.data.objects import named_objects
from multimodal.data.samples import Sample
from multimodal.data.shards import Shards
from multimodal.eval.evaluate import TASKS
from multimodal.eval.evaluator import Example, Subject, Value, evaluate, interval
from multimodal.eval.tasks import answers, captioning, choices, retrieval
from multimodal.eval.tasks.answers import Answers
from multimodal.eval.tasks.captioning import Captioning
from multimodal.eval.tasks.choices import Choices
from multimodal.eval.tasks.drawing import Drawing
from multimodal.eval.tasks.likelihood import Likelihood
from multimodal.eval.tasks.reconstruction import Reconstruction
from multimodal.eval.tasks.registry import EVALUATORS, find_evaluator
from multimodal.eval.tasks.retrieval import Retrieval
from multimodal.eval.tasks.scene_captions import SceneCaptions
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


def test_captions_equal_to_a_reference_have_the_best_scores(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = cycle([sample.record for sample in subject.samples])
    monkeypatch.setattr(
        captioning,
        "caption_codes",
        lambda _, codes, *__: [next(records)["captions"][0] for _ in codes],
    )
    scores = values(evaluate(Captioning(), subject))
    assert scores["Bleu_4"] == pytest.approx(1, abs=1e-6) and scores["ROUGE_L"] == pytest.approx(1)
    assert "hallucinated" not in scores, "captions of scenes name no object of the list"


def test_right_answers_have_the_best_scores(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = iter([pair[1] for sample in subject.samples for pair in sample.record["qa"]])

    def answer(_: object, codes: torch.Tensor, prompts: list[str], options: Any) -> list[str]:
        grey = len(codes) > 1 and bool((codes == codes[0]).all()) and codes.stride()[0] == 0
        return ["nothing"] * len(prompts) if grey else [f" {next(truth)}." for _ in prompts]

    monkeypatch.setattr(answers, "complete_prompts", answer)
    scores = values(evaluate(Answers(), Subject(subject.model, subject.samples, 10_000)))
    assert scores["accuracy"] == scores["open"] == scores["closed"] == 1
    assert scores["blind_accuracy"] == 0 and scores["says_yes"] == scores["yes_is_right"]


def test_a_statement_is_asked_whether_it_is_true(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in NLVR. A model that says yes or no where true or false is asked is always wrong."""
    samples = [
        Sample(s.key, {**s.members, "json": b'{"captions": ["it is"], "label": "%s"}' % label})
        for s, label in zip(subject.samples, cycle((b"true", b"true", b"false")), strict=False)
    ]
    prompts: list[str] = []

    def always(word: str) -> dict[str, float]:
        def answer(_: object, codes: torch.Tensor, asked: list[str], options: Any) -> list[str]:
            prompts.extend(asked)
            return [word for _ in asked]

        monkeypatch.setattr(answers, "complete_prompts", answer)
        monkeypatch.setattr(choices, "complete_prompts", answer)
        labelled = Subject(subject.model, samples, 5)
        by_choice = values(evaluate(Choices(), labelled))
        scores = values(evaluate(Answers(), labelled))
        assert by_choice["chance"] == 0.5 and by_choice["free_accuracy"] == scores["accuracy"]
        return scores

    said = always(" True.")
    assert said["accuracy"] == said["closed"] == pytest.approx(2 / 3)
    assert said["closed_in_form"] == said["says_true"] == 1
    assert said["true_is_right"] == pytest.approx(2 / 3)
    said = always("yes")
    assert said["accuracy"] == said["closed_in_form"] == said["says_true"] == 0
    assert set(prompts) == {"True or false? it is Answer:"}


def test_embeddings_of_the_right_image_have_the_best_recall(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_of_text = [n for n, s in enumerate(subject.samples) for _ in s.record["captions"]]
    one_hot = torch.eye(len(subject.samples))
    images, texts = iter(one_hot), iter(one_hot[image_of_text])
    monkeypatch.setattr(
        retrieval, "embed_codes", lambda _, codes: torch.stack([next(images) for _ in codes])
    )
    monkeypatch.setattr(
        retrieval, "embed_texts", lambda _, batch: torch.stack([next(texts) for _ in batch])
    )
    scores = values(evaluate(Retrieval(), subject))
    assert scores["text_to_image@1"] == scores["image_to_text@1"] == 1
    assert scores["text_to_image_median_rank"] == 1


def test_likelihoods_are_those_of_the_model(subject: Subject) -> None:
    scores = evaluate(Likelihood(), subject)
    captions = [sample.record["captions"][0] for sample in subject.samples]
    nats = -text_likelihoods(subject.model, subject.codes, captions)
    each = [
        n / 0.6931472 / (len(caption.encode()) + 1)
        for n, caption in zip(nats.tolist(), captions, strict=True)
    ]
    bits = scores["caption_bits_per_byte"]
    assert bits["value"] == pytest.approx(sum(each) / len(each), rel=1e-5)
    assert bits["low"] < bits["value"] < bits["high"]
    # An untrained model: about the logarithm of the vocabulary size.
    assert 5 < scores["image_nats_per_code"]["value"] < 9


def test_each_drawing_and_reconstruction_has_a_score_and_a_picture(subject: Subject) -> None:
    for evaluator in (Drawing(), Reconstruction()):
        usable = [sample for sample in subject.samples if evaluator.fits(sample)]
        scores = evaluate(evaluator, Subject(subject.model, usable, 5))
        assert len(evaluator.examples) == len(usable) > 5
        side = subject.model.image_tokenizer.image_size
        assert {example.image.size for example in evaluator.examples} == {(side, side)}
        assert all(score["value"] == score["value"] for score in scores.values()), "no NaN"


def test_the_interval_contains_the_mean_in_95_percent() -> None:
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for round in range(100):
        low, high = interval(torch.randn(60, generator=generator).tolist(), seed=round)
        assert high - low == pytest.approx(4 * 60**-0.5, rel=0.4)
        inside += low < 0 < high
    assert 87 <= inside <= 100
    assert interval([1.0, 1.0]) == (1, 1)
    # Six equal answers about each image are as uncertain as one answer about each.
    each = torch.rand(100, generator=generator).round()
    single = interval(each.tolist())
    six = interval(
        each.repeat_interleave(6).tolist(), groups=[n for n in range(100) for _ in "123456"]
    )
    assert six == pytest.approx(single)


def test_a_class_does_not_turn_captions_into_statements(subject: Subject) -> None:
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


def test_hallucinated_objects_are_those_that_no_reference_names(subject: Subject) -> None:
    assert named_objects("Two men and a dog on the beach.") == {"person", "dog", "beach"}
    assert named_objects("a couple of ponies by two boxes") == {"horse"}
    assert named_objects("two players and a couple") == {"person"}
    assert named_objects("a man-eating shark") == {"person"} and not named_objects("")
    photos = [
        Sample(s.key, {**s.members, "json": b'{"captions": ["two dogs run", "by a lake"]}'})
        for s in subject.samples
    ]
    model = subject.model
    texts = iter(["a dog by a man", *["a dog"] * (len(photos) - 1)] * 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            captioning, "caption_codes", lambda _, codes, *__: [next(texts) for _ in codes]
        )
        scores = values(evaluate(Captioning(), Subject(model, photos, 5)))
    assert scores["hallucinated"] == pytest.approx(1 / len(photos))
    assert scores["hallucinated_objects"] == pytest.approx(1 / (len(photos) + 1))


def test_drawings_depend_on_the_seed_but_not_on_the_batch_size(subject: Subject) -> None:
    usable = [sample for sample in subject.samples if Drawing().fits(sample)]

    def drawn(batch: int, seed: int) -> list[bytes]:
        evaluator = Drawing()
        evaluate(evaluator, Subject(subject.model, usable, batch, seed))
        return [example.image.tobytes() for example in evaluator.examples]

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
    printed = capsys.readouterr().out
    assert "CIDEr" in printed and "blind_accuracy" in printed
    first, second = reports
    # Scenes have no classes, and their captions name no object of the list.
    not_for_scenes = ("classification", "presence", "person_words")
    assert [result["task"] for result in first["results"]] == [
        task for task in TASKS if task not in not_for_scenes
    ]
    assert [find_evaluator(task).name for task in EVALUATORS] == list(EVALUATORS)  # type: ignore[attr-defined]
    for result, other in zip(first["results"], second["results"], strict=True):
        if result["task"] != "energy":
            assert result["scores"] == other["scores"], "same seed, same numbers"
        assert result["cost"]["watt_hours"] > 0 and result["cost"]["energy"]
        assert result["cost"]["seconds"] > 0 and result["protocol"] and result["n"] > 0
        tokens = result["cost"]["tokens"]
        assert tokens == other["cost"]["tokens"]
        assert (tokens > 0) == (result["task"] != "reconstruction")
    about = first["protocol"]
    assert about["fingerprint"] == load(tiny_model_folder).fingerprint
    assert {"seed", "split", "image_size", "fit", "commit", "versions"} <= about.keys()
    html = page.read_text()
    assert html.count("<figure>") > 50 and "best" in html and "worst" in html


def test_wrong_arguments_give_an_error(
    scenes: Path, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from multimodal.data.shards import index_shard, write_manifest, write_tar

    (sample, *_) = Shards(scenes, "val")
    folder = tmp_path / "silent"
    folder.mkdir()
    write_tar(folder / "val-0000.tar", [("a", {"png": sample.image, "json": b"{}"})])
    write_manifest(folder, [index_shard(folder / "val-0000.tar")])
    line = ["eval", "answers", "--model", str(tiny_model_folder), "--data"]
    for more, message in (
        ([str(folder)], "no sample of"),
        ([str(scenes), "--split", "test"], "no split 'test'"),
        ([str(scenes), "--limit", "0"], "expected at least 1"),
        ([str(scenes), "--output", str(tmp_path / "x.txt")], ".json"),
    ):
        assert main([*line, *more]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "nonsense", "--data", str(scenes)])


def test_any_class_with_the_protocol_is_an_evaluator(subject: Subject) -> None:
    class Colours:
        name, protocol = "colours", "mean of the pixels"

        def __init__(self) -> None:
            self.examples: list[Example] = []

        def fits(self, sample: Sample) -> bool:
            return True

        def measure(self, subject: Subject) -> Iterator[tuple[str, Value]]:
            yield "brightness", subject.pixels.mean((1, 2, 3)).tolist()

    assert evaluate(Colours(), subject)["brightness"]["n"] == 12


def test_shuffled_images_have_scores_near_chance(tmp_path: Path) -> None:
    """The starter has good scores on scenes, but only with the right image for each record."""
    assert main(["data", "scenes", str(tmp_path / "scenes"), "--count", "40"]) == 0
    samples = list(Shards(tmp_path / "scenes", "val"))[:40]
    shuffled_samples = [
        Sample(sample.key, {**sample.members, "png": other.image})
        for sample, other in zip(samples, samples[7:] + samples[:7], strict=True)
    ]
    model = load("starter")
    right, shuffled = (
        {
            **values(evaluate(Retrieval(), Subject(model, some))),
            **values(evaluate(Captioning(), Subject(model, some))),
            **values(evaluate(SceneCaptions(), Subject(model, some))),
        }
        for some in (samples, shuffled_samples)
    )
    assert right["text_to_image@1"] > 0.5 and shuffled["text_to_image@1"] < 0.1
    assert right["text_to_image_median_rank"] <= 2 and shuffled["text_to_image_median_rank"] > 8
    assert right["attribute_precision"] > 0.85 > 0.6 > shuffled["attribute_precision"]
    assert right["CIDEr"] > 4 * shuffled["CIDEr"]
