"""The samples of a training step: their order, their crops, and the lesson of each."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

import multimodal.train.sample_order as train_order
from multimodal.api import Model
from multimodal.cli import main
from multimodal.model.lessons import MAX_TURNS, Lesson, lesson_of
from multimodal.model.sequences import NO_LOSS, OBJECTIVES
from multimodal.model.templates import Templates
from multimodal.model.training_batch import TrainingSample
from multimodal.train.callbacks import Mixture
from multimodal.train.data import GlobalBatchLoader, ShardData
from multimodal.train.examples import ShardDataset
from multimodal.train.joint import JointModule
from multimodal.train.sample_order import GlobalBatches, Order
from multimodal.train.tokenizers.semantic import texts_about

TEMPLATES = Templates()
DRAWN = {"image", "reconstruct"}


def test_only_the_augmented_folders_are_cropped(tmp_path: Path) -> None:
    for name, seed in (("photos", "1"), ("scenes", "2")):
        arguments = ["data", "scenes", str(tmp_path / name), "--count", "4", "--size", "16"]
        assert main([*arguments, "--seed", seed]) == 0
    folders = [str(tmp_path / "photos"), str(tmp_path / "scenes")]
    shards = ShardData(folders).shards("train")

    def images(epoch: int, augmented: list[bool]) -> list[list[int]]:
        dataset = ShardDataset(shards, 16, "squash", 0, 0.5, True, augmented)
        return [dataset[epoch, number]["images"][0].ravel().tolist() for number in range(8)]

    plain, cropped = images(0, [False] * 2), images(0, [True, False])
    later = images(1, [True, False])
    assert all(a != b for a, b in zip(plain[:4], cropped[:4], strict=True))
    assert all(a != b for a, b in zip(later[:4], cropped[:4], strict=True))
    assert plain[4:] == cropped[4:] == later[4:]
    with pytest.raises(ValueError, match="augmented has .*'elsewhere'.*some of data.folders"):
        ShardData(folders, augmented=["elsewhere"])


def test_plain_texts_alone_have_no_codes(work: Path) -> None:
    module = JointModule(**yaml.safe_load((work / "joint.yaml").read_text())["model"]["init_args"])
    text: dict[str, Any] = {"key": "t", "images": [], "record": {}, "seed": 0, "source": 0}
    text |= {"document": ["a text"], "drawn": True, "notes": []}
    batch = ShardDataset([], 16, "squash", seed=0).collate([text, text])
    assert [codes.shape for codes in module.codes(batch)] == [(0, module.model.codes_per_image)] * 2


def test_images_of_the_drawn_folders_alone_are_learned_to_be_drawn(
    tmp_path: Path, tiny_model: Callable[..., Model]
) -> None:
    model = tiny_model(reconstruct_share=0.5, next_token_share=0.5)
    for name in ("photos", "scenes"):
        arguments = ["data", "scenes", str(tmp_path / name), "--count", "4", "--size", "16"]
        assert main(arguments) == 0
    photos, scenes = str(tmp_path / "photos"), str(tmp_path / "scenes")
    data = ShardData([photos, scenes], drawn=[scenes])
    shards = data.shards("train")
    drawn = [source.folder in data.drawn_folders for source in shards]
    dataset = ShardDataset(shards, 16, "squash", 0, drawn=drawn)
    batch = dataset.collate([dataset[0, number] for number in range(8)])
    assert batch.drawn == [False] * 4 + [True] * 4
    builder = model.batch_builder(160)
    codes = np.zeros((1, builder.layout.codes_per_image), np.int64)
    learned = []
    for record, seed, of_image in zip(batch.records, batch.seeds, batch.drawn, strict=True):
        sample = TrainingSample("a", record, codes, seed, drawn=of_image)
        objectives = {*builder.pair(sample).draw.objectives.tolist()} - {NO_LOSS}
        learned.append({OBJECTIVES[number] for number in objectives} - {"text"})
        possible = {
            int(number) for sequence in builder.possible(sample) for number in sequence.objectives
        }
        assert bool(possible & {OBJECTIVES.index(name) for name in DRAWN}) == of_image
    assert learned[:4] == [set()] * 4
    assert all(names and names <= DRAWN for names in learned[4:])
    with pytest.raises(ValueError, match="drawn has .*'elsewhere'.*some of data.folders"):
        ShardData([photos], drawn=["elsewhere"])


def test_a_folder_named_twice_is_seen_twice_and_measured_once(tmp_path: Path) -> None:
    """The second time it has other crops and another caption."""
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
        assert (first["images"][0] != again["images"][0]).any()


def test_the_manifest_of_a_folder_is_fetched_as_often_with_more_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def local_folder(folder: str) -> Path:
        asked.append(folder)
        return Path(folder)

    monkeypatch.setattr("multimodal.train.data.local_folder", local_folder)
    folders = [str(tmp_path / name) for name in "abc"]
    for folder in folders:
        assert main(["data", "scenes", folder, "--count", "8", "--size", "16"]) == 0
    counts = []
    for some in (folders[:1], folders):
        data = ShardData(some, hold_out=0.0, global_batch_size=4)
        module = SimpleNamespace(preprocessing=(16, "squash"), expected_codes=None)
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            lightning_module=module, global_rank=0, world_size=1, overfit_batches=0
        )
        data.train_dataloader()
        counts.append(len(asked))
        asked.clear()
    assert counts[1] == 3 * counts[0] > 0


# --- the order of the samples ---------------------------------------------------------------------


def order(epoch: int, rank: int = 0, ranks: int = 1, **options: Any) -> list[list[int]]:
    batches = GlobalBatches(Order([[20, 30]], **options), 8, rank=rank, world_size=ranks)
    batches.set_epoch(epoch)
    drawn = list(batches)
    assert {e for batch in drawn for e, _ in batch} == {epoch} and len(drawn) == len(batches)
    return [[number for _, number in batch] for batch in drawn]


def test_order_is_a_function_of_seed_and_epoch() -> None:
    assert order(1, seed=3) == order(1, seed=3)
    orders = [order(epoch, seed=seed) for epoch, seed in itertools.product(range(3), range(3))]
    assert len({str(batches) for batches in orders}) == 9
    for batches in orders:
        flat = [number for batch in batches for number in batch]
        assert len(flat) == len(set(flat)) == 48 and set(flat) <= set(range(50))


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_number_of_ranks_sees_the_same_global_batches(ranks: int) -> None:
    shares = [order(2, seed=1, rank=rank, ranks=ranks) for rank in range(ranks)]
    global_batches = [sorted(sum(parts, [])) for parts in zip(*shares, strict=True)]
    assert global_batches == [sorted(batch) for batch in order(2, seed=1)]
    assert {len(batch) for share in shares for batch in share} == {8 // ranks}


def test_validation_sees_every_sample_once_in_order() -> None:
    flat = sum(order(0, shuffle=False), [])
    assert flat == list(range(50))


def test_validation_is_the_same_at_every_epoch() -> None:
    batches = GlobalBatches(Order([[50]], shuffle=False), 8)
    first = list(batches)
    batches.set_epoch(7)  # the epoch seeds the choice of captions and masks
    assert list(batches) == first


@pytest.mark.parametrize("block", [10, 64, 10_000])
def test_many_shards_are_shuffled_block_by_block(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_order, "BLOCK", block)
    sizes = np.random.default_rng(0).integers(1, 9, 40)
    shard_of = np.repeat(np.arange(40), sizes)
    shuffled = train_order.Shuffled(sizes, seed=5)
    numbers = shuffled.numbers(3, 0, len(shuffled))
    assert sorted(numbers) == list(range(len(shuffled))), "each sample once"
    for start, stop in ((0, 1), (7, 50), (len(shuffled) - 3, len(shuffled)), (20, 20)):
        fresh = train_order.Shuffled(sizes, seed=5).numbers(3, start, stop)
        assert fresh.tolist() == numbers[start:stop].tolist(), "from any position"
    assert (numbers != shuffled.numbers(4, 0, len(shuffled))).any()
    # The distance, in samples, from the first to the last sample of each shard.
    spans = [np.ptp(np.flatnonzero(shard_of[numbers] == shard)) for shard in range(40)]
    assert max(spans) < 2 * block + 9
    _, _, ends = shuffled._blocks(3)
    blocks = np.diff(ends, prepend=0)
    assert min(blocks) >= min(block, len(shuffled)) and ends[-1] == len(shuffled)
    if block == 10:
        assert len(blocks) > 8 and max(blocks) < 2 * block + 9
    huge = train_order.Shuffled([10, 200_000, 10, 10, 90_000], seed=0)
    assert min(np.diff(huge._blocks(0)[2], prepend=0)) >= block


def test_weights_hold_to_the_sample_and_no_sample_repeats_within_a_pass() -> None:
    sizes = [[3, 4], [50], [13]]
    mixed = Order(sizes, seed=1, weights=[1, 1, 2])
    assert len(mixed) == 70 and sum(mixed.counts) == 70 and mixed.shares == [18 / 70, 17 / 70, 0.5]
    drawn = [item for epoch in range(6) for item in mixed.items(epoch, 0, 70)]
    source = np.searchsorted([7, 57], [number for _, number in drawn], side="right")
    assert np.bincount(source).tolist() == [6 * 18, 6 * 17, 6 * 35]
    for which, size in enumerate((7, 50, 13)):
        items = [item for item, number in zip(drawn, source, strict=True) if number == which]
        assert len(set(items)) == len(items)
        for start in range(0, len(items) - size, size):
            passes, numbers = zip(*items[start : start + size], strict=True)
            assert len(set(numbers)) == size and len(set(passes)) == 1
    again = Order(sizes, seed=1, weights=[1, 1, 2])
    assert again.items(4, 33, 61) == drawn[4 * 70 + 33 : 4 * 70 + 61]
    for wrong in ([1, 2], [1, 0, 1], [1, -1, 1], [1, float("nan"), 1]):
        with pytest.raises(ValueError, match="3 positive numbers"):
            Order(sizes, weights=wrong)
    with pytest.raises(ValueError, match="2 weights for 1 folders"):
        ShardData(["a"], weights=[1, 2])


def test_ranks_get_equal_shares_of_a_validation() -> None:
    with pytest.warns(
        UserWarning, match="the last 1 of 9 samples cannot be shared equally by 2 ranks"
    ):
        batches = [
            GlobalBatches(Order([[9]], shuffle=False), 4, rank=rank, world_size=2)
            for rank in range(2)
        ]
    shares = [[len(part) for part in rank] for rank in batches]
    assert shares == [[2, 2], [2, 2]]
    with pytest.raises(ValueError, match="too few for 2 ranks"):
        GlobalBatches(Order([[1]], shuffle=False), 4, world_size=2)


def test_the_actual_mixture_is_logged() -> None:
    logged: dict[str, float] = {}
    module: Any = SimpleNamespace(log_dict=logged.update)
    trainer: Any = SimpleNamespace(
        datamodule=SimpleNamespace(folders=["a/photos", "b/scenes", "c/scenes", "a/photos"])
    )
    mixture = Mixture()
    for sources in ([0, 1, 1, 2], [3, 3, 2, 0]):
        batch = SimpleNamespace(sources=sources)
        mixture.on_train_batch_end(trainer, module, None, batch, 0)
    assert logged == {
        "data/share/photos": 4 / 8,
        "data/share/b_scenes": 2 / 8,
        "data/share/c_scenes": 2 / 8,
    }


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "2")):
        line = ["data", "scenes", str(tmp_path / name), "--count", "16", "--size", "16"]
        assert main([*line, "--seed", seed]) == 0

    def loader(name: str, seed: int = 0, batch: int = 4, workers: int = 0) -> GlobalBatchLoader:
        shards = ShardData([str(tmp_path / name)]).shards("train")
        order = Order([source.sizes for source in shards], seed)
        dataset = ShardDataset(shards, 16, "squash", seed)
        return GlobalBatchLoader(dataset, GlobalBatches(order, batch), workers)

    first = loader("a")
    batches = [batch.keys for batch in first]
    state = {**first.state_dict(), "batches": 3}
    resumed = loader("a")
    resumed.load_state_dict(state)
    assert [batch.keys for batch in resumed] == batches[3:]
    older = {name: value for name, value in state.items() if name != "order_of"}
    with pytest.raises(ValueError, match="--init_from"):
        loader("a").load_state_dict(older)
    for other, message in (
        (loader("b"), "shards"),
        (loader("a", seed=1), "seed 0 -> 1"),
        (loader("a", batch=8), "global_batch_size 4 -> 8"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)


def test_a_sample_without_a_text_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="sample owl has no captions and no questions"):
        lesson_of("owl", {"label": "true"}, 1, TEMPLATES)
    with pytest.raises(ValueError, match="sample owl has no captions and no questions"):
        texts_about("owl", {"captions": []})


def test_a_lesson_is_drawn_by_its_seed() -> None:
    record = {"captions": ["a", "b", "c"], "qa": [["what?", "an owl"], ["where?", "a tree"]]}
    lessons = [lesson_of("owl", record, seed, TEMPLATES, 0.5) for seed in range(200)]
    assert {lesson.captions for lesson in lessons} == {("a",), ("b",), ("c",)}
    what = ("Question: what? Answer:", " an owl")
    where = ("Question: where? Answer:", " a tree")
    exchanges_of_lessons = [lesson.exchanges for lesson in lessons if lesson.exchanges]
    assert set(exchanges_of_lessons) == {(what, where), (where, what)}
    assert 60 < len(exchanges_of_lessons) < 140
    assert lessons[7] == lesson_of("owl", record, 7, TEMPLATES, 0.5)
    record["qa"] *= 10
    many = [lesson_of("owl", record, seed, TEMPLATES).exchanges for seed in range(9)]
    assert {len(exchanges) for exchanges in many} == {MAX_TURNS}


def test_a_statement_and_a_repeated_question_are_no_descriptions() -> None:
    """A false caption would teach a lie, and "what colour is it? red" describes nothing."""
    statement = {"captions": ["it is blue"], "label": "false"}
    assert lesson_of("a", statement, 0, TEMPLATES) == Lesson(
        (), (("True or false? it is blue Answer:", " false"),)
    )
    repeated = {"captions": ["what colour is it? red"], "qa": [["what colour is it?", "red"]]}
    lesson = lesson_of("a", repeated, 0, TEMPLATES, question_share=0)
    assert lesson == Lesson((), (("Question: what colour is it? Answer:", " red"),))
    assert texts_about("a", {"qa": [["how many?", "two"]]}) == ["how many? two"]


def test_impossible_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="7 samples are fewer than one global batch of 8"):
        GlobalBatches(Order([[7]]), 8)
    with pytest.raises(ValueError, match="not a multiple of 3 ranks"):
        GlobalBatches(Order([[50]]), 8, world_size=3)
