"""An adapter that peft wrote names the folder that it was trained on: its weights are compared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from multimodal.adapters.folder import AdapterBase, write_adapter
from multimodal.adapters.lora import LoraConfig, inject
from multimodal.api import Model, load
from multimodal.export.hf import export_hf
from multimodal.provenance import Provenance

pytest.importorskip("peft")


@pytest.fixture
def adapter(tiny_model_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """``adapter(base)`` of the tiny model, as peft writes it: with the name of a folder alone."""

    def make(base: Path) -> Path:
        transformer = load(tiny_model_folder).network.transformer
        inject(transformer, LoraConfig(2, target=("q_proj",)))
        out, weights = tmp_path / "adapter", transformer.state_dict()
        write_adapter(out, transformer, weights, AdapterBase("", ""), Provenance(), "")
        (out / "base.json").unlink()
        config: dict[str, Any] = json.loads((out / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(base)
        (out / "adapter_config.json").write_text(json.dumps(config))
        return out

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("named", [True, False], ids=["one of several", "alone"])
def test_it_is_for_the_model_of_the_export_and_no_other(
    adapter: Callable[..., Path], tiny_model: Callable[..., Model], tiny_model_folder: Path,
    tmp_path: Path, dtype: str, named: bool, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    export_hf(tiny_model_folder, tmp_path / "stock", dtype)
    tiny_model(seed=1, noise=0.1).save(tmp_path / "other")
    folder = adapter(tmp_path / "stock")
    chosen = {"mine": folder} if named else folder
    assert load(tiny_model_folder, adapter=chosen)
    assert not capsys.readouterr().err
    reason = "this adapter was trained on .+stock, and model.layers.0.+ of the model is another one"
    with pytest.raises(ValueError, match=reason):
        load(tmp_path / "other", adapter=chosen)


def test_without_its_base_names_and_shapes_are_compared_and_a_line_says_so(
    adapter: Callable[..., Path], tiny_model_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = adapter(tmp_path / "nowhere")
    assert load(tiny_model_folder, adapter=folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{folder}: is merged by names and shapes alone: it has no base.json")
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere/model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"model.safetensors: not readable as safetensors"):
        load(tiny_model_folder, adapter=folder)
