"""Training reads a folder over HTTP as it reads it here: the same batches, the same resume."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multimodal.cli import main
from multimodal.data.shards import Shards
from multimodal.train.data import GlobalBatchLoader
from multimodal.train.examples import ShardDataset
from multimodal.train.sample_order import GlobalBatches, Order
from tests.far import Far, failing, far
from tests.launches import launch, logged

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def address(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of the scenes, from a server that fails now and then."""
    monkeypatch.setenv("MULTIMODAL_CACHE", str(tmp_path / "cache"))
    with far(Far(work / "scenes", failing(0.1, seed=3))) as server:
        yield server.address


def batches(
    folder: str | Path, workers: int, epochs: int
) -> list[tuple[list[str], list[int], torch.Tensor]]:
    """What the epochs give: keys, seeds, images."""
    shards = [Shards(folder, "train")] * 2
    dataset = ShardDataset(shards, 32, "squash", 0, 0.5, True)
    order = Order([source.sizes for source in shards], weights=[1, 3])
    loader = GlobalBatchLoader(dataset, GlobalBatches(order, 8), workers)
    found = []
    for epoch in range(epochs):
        loader.batch_sampler.set_epoch(epoch)
        found += [(batch.keys, batch.seeds, batch.images) for batch in loader]
    return found


@pytest.mark.parametrize(("workers", "epochs"), [(0, 2), (2, 1)])
def test_batches_are_those_of_the_local_folder(
    work: Path, address: str, workers: int, epochs: int
) -> None:
    near, distant = batches(work / "scenes", 0, epochs), batches(address, workers, epochs)
    assert [each[:2] for each in near] == [each[:2] for each in distant]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(near, distant, strict=True))


def test_a_killed_run_on_a_remote_folder_resumes_bit_for_bit(
    work: Path, tmp_path: Path, address: str
) -> None:
    run = tmp_path / "run"
    fit = ["fit", "--config", str(work / "tokenizer.yaml"), "--output", str(run)]
    fit += ["--data.folders", f'["{address}"]']
    launch(fit, dies_at=7)
    assert main([*fit, "--ckpt_path", str(run / "checkpoints/last.ckpt")]) == 0
    assert logged(run) == logged(work / "tokenizer"), "as the run on the local folder"
    weights, expected = (
        load_file(each / "model/model.safetensors") for each in (run, work / "tokenizer")
    )
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
