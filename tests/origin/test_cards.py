"""Data cards and bills of materials: valid by the tools of their formats, and true."""

import hashlib
import json
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from multimodal.cli import main
from multimodal.data.shards import read_manifest
from multimodal.files import read_json, write_json
from multimodal.origin.bom import bill_of_materials
from multimodal.origin.data_card import data_card
from multimodal.provenance import Provenance
from multimodal.scenes.dataset import write_scenes

STARTER = Path("multimodal/starter").resolve()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, 30, 0, 32)
    return folder


def _read(card: dict[str, object], path: Path) -> object:
    """The card by MLCommons' own library, which raises for errors."""
    import mlcroissant

    write_json(path, card)
    return mlcroissant.Dataset(jsonld=path)


def test_a_data_card_is_croissant_and_says_what_the_manifest_says(
    scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "card", str(scenes)]) == 0
    card = json.loads(capsys.readouterr().out)
    dataset = _read(card, scenes / "croissant.json")
    manifest = read_manifest(scenes)
    assert dataset.metadata.name == "scenes"
    assert dataset.metadata.license == [manifest["license"]]
    records = {r["splits/split"]: r["splits/samples"] for r in dataset.records("splits")}
    expected: dict[str, int] = {}
    for shard in manifest["shards"]:
        expected[shard["split"]] = expected.get(shard["split"], 0) + shard["samples"]
    assert records == expected
    files = {each.id: each.sha256 for each in dataset.metadata.distribution}
    for name in [*(shard["name"] for shard in manifest["shards"]), "manifest.json"]:
        assert files[name] == hashlib.sha256((scenes / name).read_bytes()).hexdigest()


def test_a_card_tells_no_paths_and_invents_no_licence(scenes: Path, tmp_path: Path) -> None:
    manifest = {k: v for k, v in read_manifest(scenes).items() if k != "license"}
    shards = tmp_path / "a name with spaces"
    shards.mkdir()
    cleaning = {"min_side": 64, "copies": "", "changed": {}}
    more = {"source": "/home/someone/private/photos", "cleaning": cleaning, "rejected": {"tiny": 3}}
    write_json(shards / "manifest.json", manifest | more)
    card = data_card(shards)
    assert "license" not in card and "someone" not in json.dumps(card)
    text = card["description"]
    assert "Source: photos." in text and "min_side 64" in text and "copies" not in text
    assert "names none" in text and "3 tiny" in text
    _read(card, tmp_path / "croissant.json")
    with pytest.raises(ValueError, match=r"manifest\.json"):
        data_card(tmp_path)
    address = {"source": "https://example.org/photos"}
    write_json(shards / "manifest.json", manifest | address)
    assert data_card(shards)["isBasedOn"] == address["source"]


def _problems(bill: dict[str, object]) -> object:
    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bill))


def test_a_bill_of_materials_is_valid_and_names_all_there_is(tmp_path: Path) -> None:
    out = tmp_path / "bom.json"
    assert main(["export", "bom", "starter", str(out)]) == 0
    bill = read_json(out)
    assert _problems(bill) is None
    files = {e["name"]: e["hashes"][0]["content"] for e in bill["components"] if "hashes" in e}
    found = {p.relative_to(STARTER).as_posix(): p for p in STARTER.rglob("*") if p.is_file()}
    assert files == {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in found.items()}
    sources = [each for each in bill["components"] if each["type"] == "data"]
    told = read_json(STARTER / "sources.json")["sources"]
    said = [each for each in told if each["kind"] == "data"]
    assert [(s["name"], s["licenses"][0]["license"]["name"]) for s in sources] == [
        (each["name"], each["license"]) for each in said
    ]
    model = bill["metadata"]["component"]
    assert model["version"] == read_json(STARTER / "config.json")["fingerprints"]["model"]
    assert len(model["modelCard"]["modelParameters"]["datasets"]) == len(said)
    assert main(["export", "bom", "starter", str(out)]) == 1, "a file that exists stays"
    assert bill_of_materials(STARTER) == bill_of_materials(STARTER)


def test_a_bill_holds_for_folders_with_little_and_with_odd_sources(tmp_path: Path) -> None:
    folder = tmp_path / "mödel"
    folder.mkdir()
    (folder / "config.json").write_bytes((STARTER / "config.json").read_bytes())
    assert _problems(bill_of_materials(folder)) is None
    sources = (
        {"kind": "model", "name": "base", "fingerprint": "ab", "license": ""},
        {"kind": "data", "samples": 3, "license": "line\nbreak"},
        {},
    )
    Provenance(("Apache\n\nmore",), sources).write(folder)
    bill = bill_of_materials(folder)
    assert _problems(bill) is None
    types = [each["type"] for each in bill["components"]]
    assert types[:3] == ["machine-learning-model", "data", "data"]
    with pytest.raises(ValueError, match="not a model folder"):
        bill_of_materials(tmp_path)
