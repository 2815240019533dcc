"""Adapters in folders: merged as peft merges them, chosen by name, and refused with a reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from multimodal.adapters.folder import PREFIX, Adapter, AdapterBase, write_adapter
from multimodal.adapters.lora import LoraConfig, inject, without_adapter
from multimodal.api import Model, load
from multimodal.cli import main
from multimodal.inference.text import generate_ids
from multimodal.model.layers.attention import KVCache
from multimodal.model.layers.compiled import CompiledForward
from multimodal.model.layers.experts import ExpertsConfig
from multimodal.model.layers.transformer import Transformer
from multimodal.options import TextOptions
from multimodal.provenance import Provenance
from tests.prompts import prompts_of

peft = pytest.importorskip("peft")
LICENCE = "A licence of the data"


def adapted(model: Model, config: LoraConfig, seed: int = 1) -> Transformer:
    """The transformer of a model with an adapter that changes something."""
    transformer = model.network.transformer
    inject(transformer, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if ".lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return transformer.eval()


@pytest.fixture(scope="module")
def folders(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters a/ and b/ of the tiny model: other layers, ranks and values. Tests only read."""
    folder = tmp_path_factory.mktemp("adapters")
    configs = {"a": LoraConfig(4), "b": LoraConfig(2, 8, target=("q_proj", "up_proj"))}
    for seed, (name, config) in enumerate(configs.items()):
        model = load(tiny_model_folder)
        base = AdapterBase("tiny", model.fingerprint)
        transformer = adapted(model, config, seed)
        provenance = Provenance((LICENCE,), ({"kind": "data", "name": name},))
        weights = transformer.state_dict()
        write_adapter(folder / name, transformer, weights, base, provenance, "# A card")
    return folder


@pytest.fixture
def copied(folders: Path, tmp_path: Path) -> Path:
    """A copy of a/ to damage."""
    return Path(shutil.copytree(folders / "a", tmp_path / "copy"))


def states(transformer: Transformer, ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    with torch.no_grad():
        return transformer(ids, positions, mask)


def weights_of(model: Model) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.network.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


IDS = torch.arange(48).view(2, 24) * 5


def test_a_merged_adapter_computes_what_the_layers_of_peft_compute(
    tiny_model_folder: Path, folders: Path
) -> None:
    separate = adapted(load(tiny_model_folder), LoraConfig(4), seed=0)
    merged = load(tiny_model_folder, adapter=folders / "a").network.transformer
    base = load(tiny_model_folder).network.transformer
    torch.testing.assert_close(states(merged, IDS), states(separate, IDS), atol=5e-5, rtol=1e-5)
    assert (states(merged, IDS) - states(base, IDS)).abs().max() > 0.1
    with without_adapter(separate):
        assert torch.equal(states(separate, IDS), states(base, IDS))
    torch.testing.assert_close(states(merged, IDS), states(separate, IDS), atol=5e-5, rtol=1e-5)


def test_one_token_at_a_time_goes_through_the_adapter(tiny_model_folder: Path) -> None:
    transformer = adapted(load(tiny_model_folder), LoraConfig(4))
    expected = states(transformer, IDS)
    cache: KVCache = transformer.empty_cache(2, 24)
    with torch.no_grad():
        for n in range(24):
            mask = (torch.arange(24) <= n).expand(2, 1, 1, -1)
            found = transformer.forward_token(
                IDS[:, n], torch.full((2, 1), n), mask, cache.keys, cache.values, torch.tensor([n])
            )
            torch.testing.assert_close(found, expected[:, n], atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 3, "lora_alpha": 5},
        {"r": 8, "lora_alpha": 4, "use_rslora": True, "lora_dropout": 0.2},
        {"r": 2, "init_lora_weights": "gaussian", "layers_to_transform": [1]},
        {"r": 2, "target_modules": r".*layers\.0\.mlp\..*_proj"},
    ],
    ids=["plain", "rslora", "one layer", "a pattern"],
)
def test_an_adapter_of_peft_is_merged_as_peft_merges_it(
    tiny_model_folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    from multimodal.export.hf import export_hf

    transformers = pytest.importorskip("transformers")
    export_hf(tiny_model_folder, tmp_path / "stock")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    config = peft.LoraConfig(**{"target_modules": ["k_proj", "down_proj"], **settings})
    theirs = peft.get_peft_model(stock, config)
    for name, weight in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = theirs.merge_and_unload().state_dict()
    ours = load(tiny_model_folder, adapter=tmp_path / "adapter").network.transformer
    for name, weight in ours.stock_state_dict().items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-6)


def test_merged_weights_are_rounded_once(tiny_model_folder: Path, folders: Path) -> None:
    exact, rounded = (
        load(tiny_model_folder, dtype=dtype, adapter=folders / "a").network.transformer
        for dtype in ("float32", "bfloat16")
    )
    for name, weight in rounded.state_dict().items():
        assert torch.equal(weight, exact.state_dict()[name].bfloat16()), name


def test_adapters_are_chosen_by_name_and_leave_no_trace(
    tiny_model_folder: Path, folders: Path
) -> None:
    several = {"photos": folders / "a", "scenes": folders / "b"}
    model = load(tiny_model_folder, adapter=several)
    alone = [load(tiny_model_folder, adapter=folder) for folder in several.values()]
    base = load(tiny_model_folder)
    one, other, nothing = (weights_of(each) for each in (*alone, base))
    assert same(weights_of(model), one)  # the first one
    for names, expected in ((("scenes",), other), ((), nothing), (("photos",), one)):
        model.use_adapter(*names)
        assert same(weights_of(model), expected), names
        beside = model.adapted(*names).network
        assert same(beside.state_dict(), weights_of(model)), "a model of its own is the same"
        kept = {id(weight) for weight in model.network.parameters()}
        assert any(id(weight) in kept for weight in beside.parameters()), "it shares the others"
    model.use_adapter("photos", "scenes")
    for name, weight in weights_of(model).items():
        summed = one[name] + other[name] - nothing[name]
        torch.testing.assert_close(weight, summed, atol=5e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="'drawings': there is no such one; there is photos, sc"):
        model.use_adapter("drawings")
    with pytest.raises(ValueError, match="no adapters were loaded by name"):
        base.use_adapter("photos")


def test_a_model_beside_a_compiled_one_computes_with_its_own_weights(
    tiny_model_folder: Path, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As of torch, a plain function: deepcopy copies methods, and keeps functions.
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *given: function(*given))
    model = load(tiny_model_folder, adapter={"photos": folders / "a", "scenes": folders / "b"})
    model.network.compiled = CompiledForward.of(model.network.transformer)
    prompts, greedy = prompts_of(model), TextOptions(max_tokens=8)
    photos, scenes = (
        generate_ids(load(tiny_model_folder, adapter=folders / name), prompts, greedy)
        for name in ("a", "b")
    )
    assert generate_ids(model.adapted("scenes"), prompts, greedy) == scenes != photos
    assert generate_ids(model, prompts, greedy) == photos


def test_a_merged_model_folder_is_the_model_with_its_adapter(
    tiny_model_folder: Path, folders: Path, tmp_path: Path
) -> None:
    command = ["export", "model", str(tiny_model_folder), str(tmp_path / "merged")]
    assert main([*command, "--adapter", str(folders / "a")]) == 0
    merged = load(tmp_path / "merged")
    expected = load(tiny_model_folder, adapter=folders / "a")
    assert same(weights_of(merged), weights_of(expected))
    assert merged.fingerprint == expected.fingerprint != load(tiny_model_folder).fingerprint
    assert LICENCE in merged.provenance.licenses
    assert {"kind": "data", "name": "a"} in merged.provenance.sources
    assert str(folders / "a") in (tmp_path / "merged/README.md").read_text()


def test_an_adapter_of_images_is_refused_where_they_get_another_tokenizer(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = load(tiny_model_folder).image_tokenizer
    images.save(tmp_path / "other")
    detail = images.detail
    assert detail is not None
    base = AdapterBase("tiny", detail.fingerprint)
    inject(detail, LoraConfig(2, target=("decoder",)))
    weights = detail.state_dict()
    write_adapter(tmp_path / "adapter", detail, weights, base, Provenance(), "# A card")
    more = ["--adapter", str(tmp_path / "adapter"), "--image-tokenizer", str(tmp_path / "other")]
    for source in (tiny_model_folder, tmp_path / "other"):
        assert main(["export", "model", str(source), str(tmp_path / "out"), *more]) == 1
        assert "give one of the two" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_commands_take_an_adapter(tiny_model_folder: Path, folders: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("a red bus\n")
    command = ["embed", "--model", str(tiny_model_folder), "--text", str(tmp_path / "texts")]
    out = tmp_path / "rows.npy"
    assert main([*command, "--adapter", str(folders / "a"), "--out", str(out)]) == 0
    rows = torch.from_numpy(np.load(out))
    adapted, base = (
        load(tiny_model_folder, adapter=adapter).embed(texts=["a red bus"])
        for adapter in (folders / "a", None)
    )
    torch.testing.assert_close(rows, adapted)
    assert (rows - base).abs().max() > 0.01


def test_info_shows_what_an_adapter_is_for_and_its_licence(
    folders: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = Adapter.read(folders / "a")
    assert main(["info", str(folders / "a"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "adapter of a model" and facts["license"] == LICENCE
    assert adapter.base is not None and facts["base"] == f"tiny ({adapter.base.fingerprint})"
    assert facts["sources"] == {"1": "data a (license: none is given)"}
    stored = load_file(folders / "a" / "adapter_model.safetensors")
    assert facts["parameters"] == sum(weight.numel() for weight in stored.values())
    (copied / "base.json").write_text("{}", "utf-8")
    assert main(["info", str(copied)]) == 1
    assert "base.json" in capsys.readouterr().err


# --- refused --------------------------------------------------------------------------------------


def rewrite(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def reweigh(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")


FIRST = f"{PREFIX}layers.0.self_attn.q_proj.lora_"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "not an adapter"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model"),
    "cut": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(
            (f / "adapter_model.safetensors").read_bytes()[:-9]
        ),
        "not readable as safetensors",
    ),
    "another value": (
        lambda f: reweigh(f, lambda w: w[f"{FIRST}A.weight"].add_(1e-6)),
        "damaged",
    ),
    "another scale": (
        lambda f: rewrite(f, "adapter_config.json", lambda c: c.update(lora_alpha=33)),
        "damaged",
    ),
    "another base": (
        lambda f: rewrite(f, "base.json", lambda c: c["base"].update(fingerprint="0" * 16)),
        r"for the model 0000000000000000 \(tiny\), and .* is ",
    ),
    "base.json of another format": (
        lambda f: rewrite(f, "base.json", lambda c: c.update(format=2)),
        "format=2: expected 1",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_another_base_or_damage_is_refused(
    tiny_model_folder: Path, copied: Path, kind: str
) -> None:
    damage, reason = DAMAGE[kind]
    damage(copied)
    with pytest.raises(ValueError, match=reason) as refused:
        load(tiny_model_folder, adapter=copied)
    assert "\n" not in str(refused.value)


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a grown vocabulary": (
        lambda f: reweigh(
            f, lambda w: w.update({f"{PREFIX}embed_tokens.weight": torch.zeros(400, 64)})
        ),
        "embed_tokens.weight' is not a weight of a plain LoRA",
    ),
    "other shapes": (
        lambda f: reweigh(f, lambda w: w.update({f"{FIRST}B.weight": torch.zeros(96, 4)})),
        "is for a layers.0.self_attn.q_proj of 96 x 64, that of the model is 64 x 64",
    ),
    "more layers": (
        lambda f: reweigh(
            f,
            lambda w: w.update(
                {k.replace("layers.0", "layers.7"): v.clone() for k, v in list(w.items())}
            ),
        ),
        "the model has no layer 'layers.7",
    ),
    "another rank": (
        lambda f: rewrite(f, "adapter_config.json", lambda c: c.update(r=5)),
        "and the rank is 5",
    ),
    "half a pair": (
        lambda f: reweigh(f, lambda w: w.pop(f"{FIRST}A.weight")),
        "has only one of its two matrices",
    ),
    "not numbers": (
        lambda f: reweigh(f, lambda w: w[f"{FIRST}A.weight"].fill_(torch.nan)),
        "has values that are not numbers",
    ),
    "DoRA": (
        lambda f: rewrite(f, "adapter_config.json", lambda c: c.update(use_dora=True)),
        "use_dora=True: only plain LoRA is read",
    ),
    "another method": (
        lambda f: rewrite(f, "adapter_config.json", lambda c: c.update(peft_type="IA3")),
        "peft_type='IA3': only plain LoRA is read",
    ),
    "a scale for one layer": (
        lambda f: rewrite(f, "adapter_config.json", lambda c: c.update(alpha_pattern={"q": 1})),
        "alpha_pattern=",
    ),
    "no rank": (
        lambda f: rewrite(f, "adapter_config.json", lambda c: c.update(r=0)),
        "r=0: expected the rank",
    ),
    "a scale beyond all numbers": (
        lambda f: rewrite(f, "adapter_config.json", lambda c: c.update(lora_alpha=10**400)),
        "lora_alpha=1000.*: expected a number",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_an_adapter_of_peft_that_does_not_fit_is_refused(
    tiny_model_folder: Path, copied: Path, kind: str
) -> None:
    (copied / "base.json").unlink()  # as peft writes it
    damage, reason = FOREIGN[kind]
    damage(copied)
    before = load(tiny_model_folder)
    with pytest.raises(ValueError, match=reason) as refused:
        load(tiny_model_folder, adapter=copied)
    assert "\n" not in str(refused.value)
    if "model" in reason:  # read well, and then it does not fit: nothing is half merged
        weights = weights_of(before)
        with pytest.raises(ValueError):
            Adapter.read(copied).merge(before.network.transformer)
        assert same(weights_of(before), weights)


def test_experts_are_not_adapted_and_wrong_layers_are_named(
    tiny_model: Callable[..., Model],
) -> None:
    sparse = tiny_model(experts=ExpertsConfig(4)).network.transformer
    assert LoraConfig().names(sparse) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    for name in ("up_proj", "gate", "lm_head", "attn"):
        with pytest.raises(ValueError, match=f"'{name}' is no layer to adapt; there is q_proj, k_"):
            LoraConfig(target=("q_proj", name)).names(sparse)
    inject(sparse, LoraConfig())
    trained = {name for name, weight in sparse.named_parameters() if weight.requires_grad}
    assert trained and all(".self_attn." in name and ".lora_" in name for name in trained)
