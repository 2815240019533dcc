"""What is held out of the data of a run, and what is replayed."""

import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import multimodal.train.mixing.replay as replay
from multimodal.cli import main
from multimodal.data.shards import Shards, index_shard, write_manifest, write_tar
from multimodal.train.data import ShardData
from multimodal.train.mixing.held_out import HeldOut, hash_below
from tests.launches import launch, logged

pytestmark = pytest.mark.usefixtures("one_thread")


def keys_of(shards: list[Shards]) -> list[str]:
    return [source.key(number) for source in shards for number in range(len(source))]


def without_split(folder: Path, out: Path) -> Path:
    """The training split of a shard folder alone."""
    out.mkdir()
    for path in folder.glob("train-*.tar"):
        shutil.copy(path, out)
    assert main(["data", "index", str(out)]) == 0
    return out


def texts_in_shards(folder: Path, keys: list[str], size: int) -> Path:
    """Samples with a caption each, in shards of some size."""
    folder.mkdir()
    entries = []
    for number, start in enumerate(range(0, len(keys), size)):
        path = folder / f"train-{number:04d}.tar"
        write_tar(path, [(key, {"json": b"{}"}) for key in keys[start : start + size]])
        entries.append(index_shard(path))
    write_manifest(folder, entries)
    return folder


# --- what is held out -----------------------------------------------------------------------------


def test_the_same_keys_are_held_out_in_any_order_and_shards(tmp_path: Path) -> None:
    keys = [f"photo-{number}" for number in range(300)]
    found = []
    for name, order, size in (("a", keys, 300), ("b", keys[::-1], 7)):
        folder = texts_in_shards(tmp_path / name, order, size)
        everything = Shards(folder, "train")
        below = hash_below(everything, 0.1)
        held, rest = (Shards(folder, "train", keep=HeldOut(below, r)) for r in (False, True))
        assert sorted(keys_of([held]) + keys_of([rest])) == sorted(keys)
        assert [rest[n].key for n in range(len(rest))] == keys_of([rest]), "each is read"
        found.append(sorted(keys_of([held])))
    assert found[0] == found[1] and len(found[0]) == 30
    more = texts_in_shards(tmp_path / "more", [*keys, *(f"new-{n}" for n in range(300))], 600)
    later = HeldOut(hash_below(Shards(more), 0.1))
    assert sum(map(later, found[0])) >= 20, "a folder that grows keeps most of them"


@pytest.mark.parametrize(("count", "expected"), [(1, 0), (2, 1), (5, 1), (20_000, 1000)])
def test_one_is_held_out_at_least_and_never_all(tmp_path: Path, count: int, expected: int) -> None:
    shards: Any = type("Keys", (), {"key": lambda self, n: str(n), "__len__": lambda self: count})()
    held_out = HeldOut(hash_below(shards, 0.1))
    assert sum(held_out(str(number)) for number in range(count)) == expected


def test_a_folder_without_a_split_holds_out_and_says_so(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(without_split(work / "scenes", tmp_path / "data"))
    data = ShardData([folder, folder])  # twice: both without the same samples
    first, again = data.shards("train")
    (held,) = data.shards("val")
    assert keys_of([first]) == keys_of([again]) and len(held) == 5
    assert not {*keys_of([first])} & {*keys_of([held])} and len(first) == 45
    assert ShardData([folder], hold_out=0).shards("train")[0].sizes == [50]
    both = ShardData([folder, str(work / "scenes")])  # one of them has the split: that is enough
    assert [len(shards) for shards in both.shards("train")] == [50, 50]
    for wrong in (1.0, -0.1):
        with pytest.raises(ValueError, match="expected a share of the samples in"):
            ShardData([folder], hold_out=wrong)
    run = tmp_path / "run"
    fit = ["fit", "--config", str(work / "joint.yaml"), "--output", str(run)]
    fit += ["--trainer.max_steps", "2", "--data.folders", f"[{folder}]"]
    assert main(fit) == 0
    assert "5 training samples are held out by their keys" in capsys.readouterr().err
    assert len(logged(run, "val/total")) == 1 and (run / "checkpoints/best.ckpt").exists()


# --- replay ---------------------------------------------------------------------------------------


def test_a_share_of_an_epoch_is_replayed(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenes are rendered once, at the size of the model. New samples come once an epoch."""
    monkeypatch.setenv("MULTIMODAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(replay, "COUNT", 30)
    new = str(work / "scenes")
    data = ShardData([new], replay=0.2, global_batch_size=4, crop_scale=0.5, workers=0)
    module = SimpleNamespace(preprocessing=(16, "squash"), expected_codes=None)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=module, global_rank=0, world_size=1, overfit_batches=0
    )
    data.prepare_data()
    (rendered,) = (tmp_path / "cache/scenes").iterdir()
    before = (rendered / "manifest.json").stat().st_mtime_ns
    loader = data.train_dataloader()
    assert (rendered / "manifest.json").stat().st_mtime_ns == before
    order, dataset = loader.batch_sampler.order, loader.dataset
    assert len(order) == 62 and order.counts.tolist() == [50, 12]
    drawn = Counter(order.items(0, 0, 62))
    assert max(drawn.values()) == 1 and sum(number < 50 for _, number in drawn) == 50
    assert dataset.augmented == [True, False] and dataset.drawn == [True, True]
    assert dataset[0, 50]["images"][0].shape == (16, 16, 3)
    assert keys_of(data.shards("val")) == keys_of(ShardData([new]).shards("val"))
    assert [source["name"] for source in data.sources()] == ["scenes", "scenes"]
    with pytest.raises(ValueError, match="replayed names no folder"):
        ShardData([new], replay=0.1, replayed=[])
    weighted = ShardData([new, new], weights=[3, 1], replay=0.5, replayed=[new])
    weights, length = weighted._weights([*data.shards("train")[:1]] * 3)
    assert weights == [0.375, 0.125, 0.5] and length == 200


def test_scenes_are_not_rendered_to_be_replayed_beside_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MULTIMODAL_CACHE", str(tmp_path / "cache"))
    folder = texts_in_shards(tmp_path / "codes", ["a"], 1)
    write_manifest(folder, [index_shard(folder / "train-0000.tar")], image_tokenizer={})
    reason = r"data.replay=0.1: scenes are rendered as images, and \S+/codes holds codes: make a"
    with pytest.raises(ValueError, match=reason):
        ShardData([str(folder)], replay=0.1).prepare_data()
    assert not (tmp_path / "cache").exists()
    ShardData([str(folder)], replay=0.1, replayed=[str(folder)]).prepare_data()


# --- all of it at once ----------------------------------------------------------------------------


def test_a_run_that_is_mixed_and_stops_early_resumes_bit_for_bit(
    work: Path, tmp_path: Path
) -> None:
    """Killed after its first validation. It stops at the second one, which is no better."""
    folder = without_split(work / "scenes", tmp_path / "data")
    config = yaml.safe_load((work / "joint.yaml").read_text())
    config["data"] |= {
        "folders": [str(folder)],
        "replay": 0.25,
        "replayed": [str(work / "scenes")],
        "few_shot": {"share": 0.5, "examples": 2},
    }
    stopping = {"monitor": "val/total", "patience": 1, "min_delta": 100.0}
    config["trainer"]["callbacks"] = [
        {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": stopping}
    ]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    fit, run = ["fit", "--config", str(tmp_path / "config.yaml"), "--output"], tmp_path / "run"
    assert main([*fit, str(tmp_path / "uninterrupted")]) == 0
    launch([*fit, str(run)], dies_at=7)
    assert main([*fit, str(run), "--ckpt_path", str(run / "checkpoints/last.ckpt")]) == 0
    uninterrupted, resumed = logged(tmp_path / "uninterrupted"), logged(run)
    assert len(uninterrupted) == 10 and uninterrupted == resumed
    weights = [r / "model/model.safetensors" for r in (run, tmp_path / "uninterrupted")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert (run / "checkpoints/best.ckpt").resolve().name == "step=5.ckpt"
