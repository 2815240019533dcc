"""LoRA over weights of 8 or 4 bits: the gradients of its floats, runs, and what loads where."""

import json
import re
import warnings
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from torch import Tensor

from multimodal.adapters.lora import LoraConfig, inject
from multimodal.api import load
from multimodal.cli import main
from multimodal.export.quantize import quantize_model, quantized_network
from multimodal.model.checkpoint import ModelParts
from multimodal.model.layers import quantization
from multimodal.model.layers.quantization import dequantized
from multimodal.model.network import MultimodalLM
from multimodal.model.objectives import ObjectivesConfig
from multimodal.scenes.dataset import write_scenes
from multimodal.train.joint import JointModule
from tests.launches import logged
from tests.train.test_lora import configuration, fit

IDS = torch.arange(48).view(2, 24) * 5


def logits_of(network: MultimodalLM) -> Tensor:
    transformer = network.transformer
    positions = torch.arange(IDS.shape[1]).expand(len(IDS), -1)
    mask = torch.ones(1, 1, IDS.shape[1], IDS.shape[1], dtype=torch.bool).tril()
    return transformer(IDS, positions, mask) @ transformer.head.T


def gradients(network: MultimodalLM) -> dict[str, Tensor]:
    """Of the adapter, of a loss over all logits."""
    found = logits_of(network)
    torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    trained = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained)
    return {name: gradient for name, gradient in trained.items() if gradient is not None}


def with_adapter(network: MultimodalLM) -> MultimodalLM:
    network.requires_grad_(False)
    inject(network.transformer, LoraConfig(4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if ".lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return network.train()


@pytest.mark.parametrize("integers", [True, False], ids=["integers", "floats"])
@pytest.mark.parametrize("bits", [8, 4])
def test_an_adapter_has_the_gradients_that_it_has_over_the_weights_as_floats(
    tiny_model_folder: Path, bits: Literal[8, 4], integers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether this CPU multiplies integers or not: what trains multiplies floats."""
    monkeypatch.setattr(quantization, "INTEGER_PRODUCTS", integers)
    smaller = quantized_network(ModelParts.load(tiny_model_folder).network, bits)
    floats = MultimodalLM(smaller.config.with_bits(None))
    floats.load_state_dict(dequantized(smaller.state_dict()))
    expected, found = gradients(with_adapter(floats)), gradients(with_adapter(smaller))
    assert found.keys() == expected.keys() and len(found) == 2 * 2 * 7
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        assert (found[name] - gradient).norm() < 1e-4 * gradient.norm(), name
    with torch.no_grad():  # the reference of preferences and rewards is computed so
        ours, theirs = (logits_of(network.eval()) for network in (smaller, floats))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_backward_pass_keeps_integers(tiny_model_folder: Path) -> None:
    """Of a layer autograd saves its weights once, with a byte each."""
    layer = quantization.QuantizedLinear(64, 48)
    quantization.round_no_inputs(layer)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert sum(tensor.nbytes for tensor in saved if tensor.numel() >= 64 * 48) == 64 * 48


@pytest.fixture(scope="module")
def trained(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int8/, a quantized tiny model, and runs over it and over the tiny model. Only read."""
    folder, threads = tmp_path_factory.mktemp("bits"), torch.get_num_threads()
    torch.set_num_threads(1)
    write_scenes(folder / "scenes", 24, 0, 32)
    quantize_model(tiny_model_folder, folder / "int8", "int8")
    for name, base, bits in (("over", folder / "int8", 8), ("four", tiny_model_folder, 4)):
        lora = {"r": 4, "dropout": 0.1, "bits": bits}
        config = configuration(tiny_model_folder, folder, lora=lora)
        config["trainer"]["max_steps"] = 4
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
        assert main(fit(folder, folder / name, "--init_from", str(base))) == 0
    torch.set_num_threads(threads)
    return folder


def test_a_run_learns_and_resumes_to_the_bit(
    trained: Path, tmp_path: Path, one_thread: None
) -> None:
    for run in ("over", "four"):
        losses = [float(loss) for loss in logged(trained / run, "train/caption").values()]
        assert losses[-1] < losses[0], (run, losses)
    checkpoints = trained / "four/checkpoints"
    stored = torch.load(checkpoints / "last.ckpt", weights_only=True)["state_dict"]
    base = "network.transformer.layers.0.mlp.up_proj.base_layer.weight"
    assert stored[base].dtype == torch.int8
    half = next(path for path in checkpoints.iterdir() if "step=3." in path.name)
    assert main(fit(trained, tmp_path / "again", "--ckpt_path", str(half))) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors", "base.json"):
        paths = (run / "adapter" / name for run in (trained / "four", tmp_path / "again"))
        one, other = (path.read_bytes() for path in paths)
        assert one == other, name


def base_of(adapter: Path) -> Any:
    return json.loads((adapter / "base.json").read_text())["base"]["fingerprint"]


def test_an_adapter_is_for_the_model_that_the_run_started_from(
    trained: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    full, small = load(tiny_model_folder), load(trained / "int8")
    over, four = (trained / run / "adapter" for run in ("over", "four"))
    assert base_of(over) == small.fingerprint and base_of(four) == full.fingerprint
    assert "over weights of 4 bits" in (four / "README.md").read_text()
    for model, adapter in ((tiny_model_folder, over), (trained / "int8", four)):
        with pytest.raises(ValueError, match="this adapter is for the model") as refused:
            load(model, adapter=adapter)
        assert "\n" not in str(refused.value)
        merge = ["export", "model", str(model), str(tmp_path / "no"), "--adapter", str(adapter)]
        assert main(merge) != 0 and not (tmp_path / "no").exists()
    assert load(tiny_model_folder, adapter=four).config == full.config


def test_over_a_quantized_model_it_is_merged_into_the_floats_that_it_was_trained_on(
    trained: Path, tmp_path: Path
) -> None:
    source, adapter = trained / "int8", trained / "over/adapter"
    merge = ["export", "model", str(source), str(tmp_path / "merged"), "--adapter", str(adapter)]
    assert main(merge) == 0
    merged, adapted = load(tmp_path / "merged"), load(source, adapter=adapter)
    by_name = load(source, adapter={"mine": adapter})
    for model in (merged, adapted, by_name):
        assert model.config.transformer.weight_bits is None
    network = MultimodalLM(load(source).config)
    network.load_state_dict(load(source).network.state_dict())
    inject(network.transformer, LoraConfig(4))  # the layers of the run, with what it has learned
    stored = torch.load(trained / "over/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("network."): w for name, w in stored.items()
                             if name.startswith("network.")})  # fmt: skip
    with torch.no_grad():
        expected = logits_of(network.eval())
        for model in (merged, adapted, by_name):
            torch.testing.assert_close(logits_of(model.network), expected, rtol=1e-4, atol=1e-4)
        by_name.use_adapter()
        assert (logits_of(by_name.network) - expected).abs().max() > 0.01


HAS_BITS = (
    "int8: its weights have 8 bits: an adapter can be trained over them (lora.bits=8), all else "
    "needs floats: start from the model that it was quantized from"
)
REFUSED = {
    "a quantized model without bits": ({"lora": "{r: 4}"}, HAS_BITS),
    "other bits": ({"lora.bits": "4"}, HAS_BITS),
    "bits that there are not": ({"lora.bits": "3"}, "Expected a typing.Literal[8, 4]"),
    "no adapter": ({"lora": "null"}, HAS_BITS),
}


def test_floats_that_training_rounds_are_better_quantized_first(
    trained: Path, tiny_model_folder: Path
) -> None:
    base = str(tiny_model_folder)
    module = JointModule(
        base,
        base,
        "tiny",
        ObjectivesConfig(alignment_dim=32),
        row_length=192,
        lora=LoraConfig(4, bits=8),
    )
    reason = f"lora.bits=8: the adapter is trained over rounded weights, .*{re.escape(base)}, .*"
    with pytest.warns(UserWarning, match=f"{reason}better run `multimodal quantize` first"):
        module.init_from(base)
    with warnings.catch_warnings(action="error"):
        module.init_from(str(trained / "int8"))


def test_integers_are_not_averaged(
    trained: Path, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An average of equal integers may be one less, at each step."""
    config = yaml.safe_load((trained / "run.yaml").read_text())
    average = "lightning.pytorch.callbacks.EMAWeightAveraging"
    config["trainer"]["callbacks"] = [{"class_path": average}]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(fit(tmp_path, tmp_path / "run", "--init_from", str(tiny_model_folder))) != 0
    assert "lora.bits: integers have no average" in capsys.readouterr().err


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused_before_a_step(
    trained: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, reason = REFUSED[kind]
    more = [f"--model.{name}={value}" for name, value in settings.items()]
    more += ["--init_from", str(trained / "int8")]
    assert main(fit(trained, tmp_path / "run", *more)) != 0
    said = capsys.readouterr().err
    assert reason in said, said
    assert not (tmp_path / "run/checkpoints").exists()
