"""LoRA of the autoencoder of images: what it changes, how it resumes, peft, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from multimodal.api import load
from multimodal.cli import main
from multimodal.tokenizers.image import ImageTokenizer, load_image_tokenizer
from tests.launches import logged


@pytest.fixture(scope="module")
def adapted(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on the tokenizer of ``work``: decoder/ of its decoder, both/ of all. Only read."""
    folder, threads = tmp_path_factory.mktemp("images"), torch.get_num_threads()
    torch.set_num_threads(1)
    config = yaml.safe_load((work / "tokenizer.yaml").read_text())
    config["model"]["init_args"] |= {"lora": {"r": 2, "dropout": 0.1}, "learning_rate": 0.02}
    del config["output"]
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    start = ["--init_from", str(work / "tokenizer/model"), "--trainer.max_steps", "6"]
    assert main(fit(folder, "both", *start)) == 0
    assert main(fit(folder, "decoder", *start, "--model.decoder_only", "true")) == 0
    torch.set_num_threads(threads)
    return folder


def fit(folder: Path, run: str | Path, *more: str) -> list[str]:
    return ["fit", "--config", str(folder / "run.yaml"), "--output", str(folder / run), *more]


def merged(adapter: Path, source: Path, out: Path) -> ImageTokenizer:
    assert main(["export", "model", str(source), str(out), "--adapter", str(adapter)]) == 0
    return load_image_tokenizer(out)


def pictures(seed: int = 0) -> Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_an_adapter_of_the_decoder_keeps_all_codes_and_draws_otherwise(
    adapted: Path, work: Path, tmp_path: Path
) -> None:
    adapter, before = adapted / "decoder/adapter", load_image_tokenizer(work / "tokenizer/model")
    after = merged(adapter, work / "tokenizer/model", tmp_path / "after")
    assert after.codes_fingerprint == before.codes_fingerprint
    assert after.fingerprint != before.fingerprint
    assert "is merged into these weights" in (tmp_path / "after/README.md").read_text()
    codes = before.encode(pictures())
    assert torch.equal(after.encode(pictures()), codes)
    difference = (after.decode(codes) - before.decode(codes)).abs().max()
    assert difference > 0.01
    # A model that knows the codes draws with it, loaded or exported.
    model = load(work / "joint/model", adapter=adapter)
    command = ["export", "model", str(work / "joint/model"), str(tmp_path / "model")]
    assert main([*command, "--adapter", str(adapter)]) == 0
    for each in (model, load(tmp_path / "model")):
        assert each.image_tokenizer.fingerprint == after.fingerprint
    plain = load(work / "joint/model").network.state_dict()
    assert all(torch.equal(w, plain[name]) for name, w in model.network.state_dict().items())
    losses = [float(loss) for loss in logged(adapted / "decoder", "train/l1").values()]
    assert len(losses) == 6


def test_an_adapter_of_the_encoder_makes_other_codes_and_models_of_the_old_ones_refuse_it(
    adapted: Path, work: Path, tmp_path: Path
) -> None:
    adapter, before = adapted / "both/adapter", load_image_tokenizer(work / "tokenizer/model")
    layers = {name.split(".")[2] for name in load_file(adapter / "adapter_model.safetensors")}
    assert layers == {"encoder", "decoder"}
    after = merged(adapter, work / "tokenizer/model", tmp_path / "after")
    assert after.codes_fingerprint != before.codes_fingerprint
    assert (after.encode(pictures()) != before.encode(pictures())).any()
    assert after.detail is not None and before.detail is not None
    kept, ours = before.detail.state_dict(), after.detail.state_dict()
    changed = {name for name, weight in ours.items() if not torch.equal(weight, kept[name])}
    assert changed and all(name.endswith(".weight") for name in changed), "no statistics"
    with pytest.raises(ValueError, match="adapts the encoder of images, so their codes") as refused:
        load(work / "joint/model", adapter=adapter)
    assert "\n" not in str(refused.value)


def test_peft_loads_it_and_gives_the_same_pictures(
    adapted: Path, work: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    base = load_image_tokenizer(work / "tokenizer/model").detail
    theirs = peft.PeftModel.from_pretrained(base, adapted / "both/adapter").eval()
    after = merged(adapted / "both/adapter", work / "tokenizer/model", tmp_path / "after").detail
    assert after is not None
    with torch.no_grad():
        (expected, codes), (found, ours) = theirs(pictures()), after(pictures())
    assert torch.equal(ours.codes, codes.codes)
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_it_resumes_to_the_bit(adapted: Path, tmp_path: Path, one_thread: None) -> None:
    checkpoints = adapted / "both/checkpoints"
    half = next(path for path in checkpoints.iterdir() if "step=5." in path.name)
    again = ["--ckpt_path", str(half), "--trainer.max_steps", "6"]
    assert main(fit(adapted, tmp_path / "again", *again)) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors", "base.json"):
        paths = (run / "adapter" / name for run in (adapted / "both", tmp_path / "again"))
        one, other = (path.read_bytes() for path in paths)
        assert one == other, name
    last = str(checkpoints / "last.ckpt")
    assert main(["export", "model", last, str(tmp_path / "exported")]) == 0


REFUSED: dict[str, tuple[dict[str, Any], bool, str]] = {
    "nothing to adapt": ({}, False, "an adapter needs a model that it adapts: give --init_from"),
    "no such layer": ({"lora.target": "[conv]"}, True, "'conv' is no layer to adapt; there is enc"),
    "a frozen encoder": (
        {"lora.target": "[encoder]", "decoder_only": "true"}, True, "decoder_only keeps the encoder"
    ),
    "a discriminator": ({"discriminator_weight": "0.1"}, True, "no discriminator_weight"),
    "bits": ({"lora.bits": "8"}, True, "no discriminator_weight, bits"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_adapted_is_refused_before_a_step(
    adapted: Path, work: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, starts, reason = REFUSED[kind]
    more = [f"--model.{name}={value}" for name, value in settings.items()]
    more += ["--init_from", str(work / "tokenizer/model")] if starts else []
    assert main(fit(adapted, tmp_path / "run", *more)) != 0
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "run/checkpoints").exists()


def test_another_tokenizer_is_refused(adapted: Path, tiny_model_folder: Path) -> None:
    adapter = adapted / "decoder/adapter"
    about = json.loads((adapter / "base.json").read_text())["base"]
    with pytest.raises(ValueError, match=f"is for the model {about['fingerprint']}") as refused:
        load(tiny_model_folder, adapter=adapter)
    assert "and the level of detail of" in str(refused.value)


def test_convolutions_are_merged_as_peft_merges_them() -> None:
    """VQGAN's are of all kinds: 3 x 3, 1 x 1, and with another size, which have no adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    from multimodal.adapters.folder import Adapter
    from multimodal.adapters.lora import LoraConfig, inject
    from multimodal.provenance import Provenance
    from multimodal.tokenizers.detail import VQTokenizer, VQTokenizerConfig

    torch.manual_seed(0)
    autoencoder = {"name": "vqgan", "channels": 32, "multipliers": [1, 1], "depth": 1}
    sizes = {"image_size": 16, "downsample": 2, "autoencoder": autoencoder}
    tokenizer = VQTokenizer(VQTokenizerConfig(**sizes)).eval()
    plain = VQTokenizer(VQTokenizerConfig(**sizes)).eval()
    plain.load_state_dict(tokenizer.state_dict())
    inject(tokenizer, LoraConfig(3))
    for name, weight in tokenizer.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.05)
    layers: Any = {n: m for n, m in tokenizer.named_modules() if isinstance(m, BaseTunerLayer)}
    kernels = {layer.get_base_layer().weight.shape[2:] for layer in layers.values()}
    assert {tuple(kernel) for kernel in kernels} == {(3, 3), (1, 1)}
    pairs = {
        name: (layer.lora_A.default.weight.data, layer.lora_B.default.weight.data)
        for name, layer in layers.items()
    }
    Adapter(Path("x"), pairs, 32 / 3, None, Provenance()).merge(plain)
    with torch.no_grad():
        vectors = torch.randn(2, 8, 8, tokenizer.quantizer.channels)
        expected = tokenizer.encoder(pictures()), tokenizer.decoder(vectors)
        found = plain.encoder(pictures()), plain.decoder(vectors)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
