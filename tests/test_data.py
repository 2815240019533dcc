"""What a training step is given: which samples, in which order, and what is asked of each."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from multimodal.cli import main
from multimodal.templates import Templates
from multimodal.train.data import GlobalBatches, ShardData, ShardDataset
from multimodal.train.lessons import TURNS, Lesson, lesson_of, texts_about

TEMPLATES = Templates()


def test_only_the_augmented_folders_are_cropped(tmp_path: Path) -> None:
    for name, seed in (("photos", "1"), ("scenes", "2")):
        arguments = ["data", "scenes", str(tmp_path / name), "--count", "4", "--size", "16"]
        assert main([*arguments, "--seed", seed]) == 0
    folders = [str(tmp_path / "photos"), str(tmp_path / "scenes")]
    shards = ShardData(folders).shards("train")

    def images(epoch: int, augmented: list[bool]) -> list[list[int]]:
        dataset = ShardDataset(shards, 16, "squash", 0, 0.5, True, augmented)
        return [dataset[epoch, number]["image"].ravel().tolist() for number in range(8)]

    plain, some, later = images(0, [False] * 2), images(0, [True, False]), images(1, [True, False])
    assert all(a != b for a, b in zip(plain[:4], some[:4], strict=True))
    assert all(a != b for a, b in zip(later[:4], some[:4], strict=True))
    assert plain[4:] == some[4:] == later[4:]
    with pytest.raises(ValueError, match="augmented has .*'elsewhere'.*some of data.folders"):
        ShardData(folders, augmented=["elsewhere"])


def test_a_folder_named_twice_is_seen_twice_and_measured_once(tmp_path: Path) -> None:
    """With other crops and another caption, so that it teaches something else."""
    folder = str(tmp_path / "photos")
    assert main(["data", "scenes", folder, "--count", "30", "--size", "16"]) == 0
    data = ShardData([folder, folder])
    assert [len(data.shards(split)) for split in ("train", "val")] == [2, 1]
    once = ShardDataset(data.shards("train")[:1], 16, "squash", 0, 0.5, True)
    twice = ShardDataset(data.shards("train"), 16, "squash", 0, 0.5, True)
    assert len(twice) == 2 * len(once)
    for number in range(len(once)):
        first, again = twice[0, number], twice[0, number + len(once)]
        assert first["key"] == again["key"] and first["seed"] != again["seed"]
        assert first["seed"] == once[0, number]["seed"]
        assert (first["image"] != again["image"]).any()


# --- the order of the samples -----------------------------------------------------------------


def order(epoch: int, **options: Any) -> list[list[int]]:
    batches = GlobalBatches(50, 8, **options)
    batches.set_epoch(epoch)
    drawn = list(batches)
    assert {e for batch in drawn for e, _ in batch} == {epoch} and len(drawn) == len(batches)
    return [[number for _, number in batch] for batch in drawn]


def test_order_is_a_function_of_seed_and_epoch() -> None:
    assert order(1, seed=3) == order(1, seed=3)
    orders = [order(epoch, seed=seed) for epoch, seed in itertools.product(range(3), range(3))]
    assert len({str(one) for one in orders}) == 9
    for one in orders:
        flat = [number for batch in one for number in batch]
        assert len(flat) == len(set(flat)) == 48 and set(flat) <= set(range(50))


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_number_of_ranks_sees_the_same_global_batches(ranks: int) -> None:
    shares = [order(2, seed=1, rank=rank, world_size=ranks) for rank in range(ranks)]
    together = [sorted(sum(batch, [])) for batch in zip(*shares, strict=True)]
    assert together == [sorted(batch) for batch in order(2, seed=1)]
    assert {len(batch) for share in shares for batch in share} == {8 // ranks}


def test_validation_sees_every_sample_once_in_order() -> None:
    flat = sum(order(0, shuffle=False, drop_last=False), [])
    assert flat == list(range(50))


def test_validation_asks_the_same_at_every_epoch() -> None:
    batches = GlobalBatches(50, 8, shuffle=False, drop_last=False)
    first = list(batches)
    batches.set_epoch(7)  # the epoch seeds the choice of captions and masks
    assert list(batches) == first


def test_a_sample_without_captions_is_named_and_never_trained_on_as_silence() -> None:
    with pytest.raises(ValueError, match="sample owl has no captions and no questions"):
        lesson_of("owl", {"label": "true"}, 1, TEMPLATES)
    with pytest.raises(ValueError, match="sample owl has no captions and no questions"):
        texts_about("owl", {"captions": []})


def test_a_lesson_is_drawn_by_its_seed() -> None:
    record = {"captions": ["a", "b", "c"], "qa": [["what?", "an owl"], ["where?", "a tree"]]}
    lessons = [lesson_of("owl", record, seed, TEMPLATES, 0.5) for seed in range(200)]
    assert {lesson.caption for lesson in lessons} == {"a", "b", "c"}
    what = ("Question: what? Answer:", " an owl")
    where = ("Question: where? Answer:", " a tree")
    asked = [lesson.exchanges for lesson in lessons if lesson.exchanges]
    assert set(asked) == {(what, where), (where, what)}
    assert 60 < len(asked) < 140
    assert lessons[7] == lesson_of("owl", record, 7, TEMPLATES, 0.5)
    record["qa"] *= 10
    many = [lesson_of("owl", record, seed, TEMPLATES).exchanges for seed in range(9)]
    assert {len(exchanges) for exchanges in many} == {TURNS}


def test_a_statement_and_a_repeated_question_are_no_descriptions() -> None:
    """A false caption would teach a lie, and "what colour is it? red" describes nothing."""
    statement = {"captions": ["it is blue"], "label": "false"}
    assert lesson_of("a", statement, 0, TEMPLATES) == Lesson(
        None, (("True or false? it is blue Answer:", " false"),)
    )
    repeated = {"captions": ["what colour is it? red"], "qa": [["what colour is it?", "red"]]}
    lesson = lesson_of("a", repeated, 0, TEMPLATES, question_share=0)
    assert lesson == Lesson(None, (("Question: what colour is it? Answer:", " red"),))
    assert texts_about("a", {"qa": [["how many?", "two"]]}) == ["how many? two"]


def test_impossible_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="7 samples are fewer than one global batch of 8"):
        GlobalBatches(7, 8)
    with pytest.raises(ValueError, match="not a multiple of 3 ranks"):
        GlobalBatches(50, 8, world_size=3)
