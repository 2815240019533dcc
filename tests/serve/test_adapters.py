"""Adapters of a server: each is a model of its own, and shares the server with the others."""

import base64
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from multimodal.adapters.folder import AdapterBase, write_adapter
from multimodal.adapters.lora import LoraConfig
from multimodal.api import Model, load
from multimodal.origin.credentials import find_credentials, make_signer
from multimodal.provenance import Provenance
from multimodal.serve.cli import named_adapters
from multimodal.serve.engine.engine import models_of
from tests.adapters.test_adapters import adapted

pytest.importorskip("peft")
NAMES = ("tiny", "photos", "scenes")


@pytest.fixture(scope="module")
def folders(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of the tiny model, of other layers."""
    folder = tmp_path_factory.mktemp("adapters")
    configs = {"photos": LoraConfig(4), "scenes": LoraConfig(2, target=("v_proj", "up_proj"))}
    for seed, (name, config) in enumerate(configs.items()):
        model = load(tiny_model_folder)
        base = AdapterBase("tiny", model.fingerprint)
        transformer = adapted(model, config, seed)
        weights = transformer.state_dict()
        write_adapter(folder / name, transformer, weights, base, Provenance(), "# A card")
    return {name: folder / name for name in configs}


@pytest.fixture(scope="module")
def adapting(
    tiny_model_folder: Path, folders: dict[str, Path], serving: Callable[..., Any]
) -> Iterator[Any]:
    with serving(load(tiny_model_folder, adapter=folders)) as server:
        yield server


def test_the_models_field_picks_an_adapter_and_results_are_those_of_it_alone(
    adapting: Any, tiny_model_folder: Path, folders: dict[str, Path]
) -> None:
    client = adapting.client()
    listed = client.models.list().data
    assert [model.id for model in listed] == list(NAMES)
    parents = [None, "tiny", "tiny"]
    assert [(model.model_extra or {}).get("parent") for model in listed] == parents
    assert client.models.retrieve("scenes").id == "scenes"

    def ask(number: int) -> str:
        found = client.chat.completions.create(
            model=NAMES[number % 3],
            messages=[{"role": "user", "content": "what is in the snow?"}],
            max_tokens=12,
            temperature=1.0,
            seed=number // 3,
            logprobs=True,
        )
        choice = found.choices[0]
        return f"{choice.message.content} {choice.logprobs} {found.system_fingerprint}"

    alone = [ask(number) for number in range(6)]
    assert len(set(alone)) == 6
    with ThreadPoolExecutor(6) as pool:  # rows of all three at once
        assert list(pool.map(ask, range(6))) == alone
    for name in ("photos", "scenes"):
        model = load(tiny_model_folder, adapter=folders[name])
        drawn = client.images.generate(model=name, prompt="a bus", extra_body={"seed": 4})
        other = client.images.generate(model="tiny", prompt="a bus", extra_body={"seed": 4})
        assert drawn.data[0].b64_json != other.data[0].b64_json
        row = client.embeddings.create(model=name, input="two dogs").data[0].embedding
        assert row == pytest.approx(model.embed(texts=["two dogs"])[0].tolist(), abs=1e-5)


def test_drawings_are_signed_as_those_of_the_adapter(
    tiny_model_folder: Path, folders: dict[str, Path], serving: Callable[..., Any], tmp_path: Path
) -> None:
    signer = make_signer(tmp_path / "keys")
    with serving(load(tiny_model_folder, adapter=folders), signer=signer) as server:
        client = server.client()
        for name in NAMES:
            adapter = folders.get(name)
            (drawn,) = client.images.generate(model=name, prompt="a bus").data
            found = find_credentials(base64.b64decode(drawn.b64_json), "image/png")
            assert found.state == "valid" and found.drawing is not None
            assert found.drawing["model"] == load(tiny_model_folder, adapter=adapter).fingerprint


def test_another_model_is_not_found(adapting: Any) -> None:
    client = adapting.client()
    with pytest.raises(openai.NotFoundError, match="there is 'tiny', 'photos', 'scenes'"):
        client.embeddings.create(model="drawings", input="a")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("drawings")


def test_names_on_the_command_line(tiny_model_folder: Path, folders: dict[str, Path]) -> None:
    assert named_adapters(["a=runs/x", "runs/b"]) == {"a": "runs/x", "b": "runs/b"}
    for wrong in (["=runs/x"], ["a="], ["a=x", "b/a"]):
        with pytest.raises(ValueError, match="each name once"):
            named_adapters(wrong)
    model: Model = load(tiny_model_folder, adapter=folders)
    with pytest.raises(ValueError, match="other than that of the model"):
        models_of(model, "photos")
