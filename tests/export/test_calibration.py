"""4 bits with samples: what the layers read of them, and what is made of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from multimodal import load
from multimodal.api import Model
from multimodal.cli import main
from multimodal.data.encode import Encoding, encode_shards
from multimodal.data.shards import Shards, index_shard, write_manifest, write_tar
from multimodal.export.calibration import calibration_batches, input_moments
from multimodal.export.quantize import quantize_model, quantized_network
from multimodal.model.layers.experts import ExpertsConfig
from multimodal.model.training_batch import TrainingBatch


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve scenes to train on. One image is none, and one sample has no caption."""
    work = tmp_path_factory.mktemp("scenes")
    assert main(["data", "scenes", str(work / "all"), "--count", "14", "--size", "32"]) == 0
    members = [(s.key, dict(s.members)) for s in list(Shards(work / "all", "train"))[:12]]
    members[1][1]["png"] = b"no picture"
    members[2][1]["json"] = b"{}"
    (work / "some").mkdir()
    write_tar(work / "some/train-0000.tar", members)
    write_manifest(work / "some", [index_shard(work / "some/train-0000.tar")])
    return work / "some"


def batches(model: Model, folder: Path, count: int = 100) -> list[TrainingBatch]:
    return list(calibration_batches(model, Shards(folder, "train"), count, lambda problem: None))


def test_the_samples_are_the_first_that_can_be_used(
    tiny_model: Callable[..., Model], scenes: Path, tmp_path: Path
) -> None:
    model, told = tiny_model(), list[str]()
    found = list(calibration_batches(model, Shards(scenes, "train"), 100, told.append))
    assert [len(batch.image_hashes) for batch in found] == [8, 2]
    (line,) = told
    assert line.startswith("left out: ") and Shards(scenes)[1].key in line
    assert [len(batch.image_hashes) for batch in batches(model, scenes, 3)] == [3]
    (tmp_path / "good").mkdir()
    usable = [s for n, s in enumerate(Shards(scenes)) if n != 1]
    write_tar(tmp_path / "good/train-0000.tar", [(s.key, s.members) for s in usable])
    write_manifest(tmp_path / "good", [index_shard(tmp_path / "good/train-0000.tar")])
    encoding = Encoding.for_tokenizer(model.image_tokenizer)
    encode_shards(tmp_path / "good", tmp_path / "codes", model.image_tokenizer, encoding)
    for ours, theirs in zip(batches(model, tmp_path / "codes"), found, strict=True):
        assert torch.equal(ours.packed.ids, theirs.packed.ids)


def test_moments_are_of_what_a_layer_reads_and_of_no_padding(
    tiny_model: Callable[..., Model], scenes: Path
) -> None:
    model = tiny_model(noise=0.1)
    made = batches(model, scenes)
    moments = input_moments(model.network, made)
    transformer, expected = model.network.transformer, 0
    for batch in made:
        assert (batch.packed.documents == 0).any(), "no padding: the test shows nothing"
        ids = batch.packed.ids[batch.packed.documents > 0]
        with torch.inference_mode():
            read = transformer.layers[0].input_layernorm(transformer.embed_tokens(ids))
        expected += read.T @ read
    names = [f"transformer.layers.0.self_attn.{part}_proj" for part in "qkv"]
    for name in names:
        torch.testing.assert_close(moments[name], expected)
    assert moments[names[0]] is moments[names[2]]  # kept once
    assert len(moments) == 7 * len(transformer.layers)
    assert not any(layer._forward_pre_hooks for layer in model.network.modules())


def test_experts_have_moments_of_their_own_tokens(
    tiny_model: Callable[..., Model], scenes: Path
) -> None:
    network = tiny_model(experts=ExpertsConfig(4, 2)).network
    made = batches(tiny_model(), scenes)
    moments = input_moments(network, made)
    assert sum("experts" in name for name in moments) > 4
    quantized_network(network, 4, moments)


def test_what_the_samples_make_of_the_layers_changes_less(
    tiny_model_folder: Path, scenes: Path, tmp_path: Path
) -> None:
    command = ["quantize", str(tiny_model_folder), "--to", "int4"]
    assert main([*command, str(tmp_path / "plain")]) == 0
    assert main([*command, str(tmp_path / "with"), "--data", str(scenes), "--samples", "8"]) == 0
    model, lost = load(tiny_model_folder), {}
    (packed,) = (batch.packed for batch in batches(model, scenes)[1:])  # not of those 8
    with torch.inference_mode():
        right = model.network.hidden(packed)[packed.documents > 0]
        for name in ("plain", "with"):
            hidden = load(tmp_path / name).network.hidden(packed)[packed.documents > 0]
            lost[name] = float((hidden - right).norm() / right.norm())
    assert lost["with"] < 0.9 * lost["plain"]
    assert "with samples of some." in (tmp_path / "with/README.md").read_text("utf-8")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in lost]
    assert sizes[0] == sizes[1]


def test_what_cannot_be_done_is_one_sentence(
    tiny_model_folder: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="nothing is gained by samples with int8"):
        quantize_model(tiny_model_folder, tmp_path / "new", "int8", scenes)
    with pytest.raises(ValueError, match="samples=0: expected 1 or more"):
        quantize_model(tiny_model_folder, tmp_path / "new", "int4", scenes, samples=0)
    (tmp_path / "bare").mkdir()
    write_tar(tmp_path / "bare/train-0000.tar", [("a", {"json": b"{}"})])
    write_manifest(tmp_path / "bare", [index_shard(tmp_path / "bare/train-0000.tar")])
    command = ["quantize", str(tiny_model_folder), str(tmp_path / "new"), "--to", "int4", "--data"]
    assert main([*command, str(tmp_path / "bare")]) == 1
    assert "has no image with a caption to calibrate by" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
