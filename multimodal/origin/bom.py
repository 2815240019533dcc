"""A bill of materials: which files, data and models a model folder consists of and comes from.

Format: CycloneDX 1.6 (ECMA-424), https://cyclonedx.org/docs/1.6/json/. Its model card is filled
with what the folder says; what it does not say is not invented.
"""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from multimodal import __version__
from multimodal.data.shards import file_sha256
from multimodal.model.checkpoint import StoredModel, read_config
from multimodal.provenance import Provenance, Source


def bill_of_materials(folder: Path, name: str = "") -> dict[str, Any]:
    """The bill of a model folder, as JSON. The same folder has the same bill.

    Args:
        name: of the model; by default that of the folder.

    Raises:
        ValueError: if it is no model folder.
    """
    stored, provenance = read_config(folder), Provenance.read(folder)
    name = name or folder.resolve().name
    sources = list(_sources(provenance))
    files = list(_files(folder))
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": name,
        "version": stored.fingerprints.model,
        "licenses": [_license(text.split("\n\n")[0]) for text in provenance.licenses],
        "modelCard": _card(stored, sources),
        "properties": [
            {"name": "multimodal:fingerprint", "value": stored.fingerprints.model},
            {
                "name": "multimodal:image_tokenizer:fingerprint",
                "value": stored.fingerprints.image_tokenizer,
            },
        ],
    }
    components = [*sources, *files]
    references = [each["bom-ref"] for each in components]
    contents = "\n".join(each["hashes"][0]["content"] for each in files)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, contents)}",
        "version": 1,
        "metadata": {
            "tools": {
                "components": [
                    {"type": "application", "name": "multimodal", "version": __version__}
                ]
            },
            "component": {key: value for key, value in model.items() if value != []},
        },
        "components": components,
        "dependencies": [
            {"ref": "model", "dependsOn": references},
            *({"ref": reference} for reference in references),
        ],
    }


def _card(stored: StoredModel, sources: list[dict[str, Any]]) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "task": "text and images to text and images",
        "architectureFamily": "transformer",
        "modelArchitecture": "one decoder over the ids of texts and images",
        "inputs": [{"format": "text"}, {"format": "image"}],
        "outputs": [{"format": "text"}, {"format": "image"}],
    }
    data = [{"ref": each["bom-ref"]} for each in sources if each["type"] == "data"]
    if data:
        parameters["datasets"] = data
    sizes = stored.transformer
    shape = {
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.num_hidden_layers,
        "max_position_embeddings": sizes.max_position_embeddings,
        "vocab_size": sizes.vocab_size,
    }
    properties = [{"name": f"multimodal:{k}", "value": str(v)} for k, v in shape.items()]
    return {"modelParameters": parameters, "properties": properties}


def _sources(provenance: Provenance) -> Iterator[dict[str, Any]]:
    """The data and the models that it was made of."""
    for number, source in enumerate(provenance.sources):
        is_model = source.get("kind") == "model"
        component: dict[str, Any] = {
            "type": "machine-learning-model" if is_model else "data",
            "bom-ref": f"source-{number}",
            "name": str(source.get("name") or "?"),
        }
        if license := str(source.get("license") or ""):
            component["licenses"] = [_license(license)]
        if not is_model:
            component["data"] = [{"type": "dataset", "name": component["name"]}]
        component["properties"] = _properties(source)
        yield component


def _properties(source: Source) -> list[dict[str, str]]:
    """What CycloneDX has no field for: samples, fingerprints."""
    return [
        {"name": f"multimodal:{name}", "value": str(value)}
        for name, value in source.items()
        if name not in ("kind", "name", "license")
    ]


def _files(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        yield {
            "type": "file",
            "bom-ref": f"file:{name}",
            "name": name,
            "hashes": [{"alg": "SHA-256", "content": file_sha256(path)}],
            "properties": [{"name": "multimodal:bytes", "value": str(path.stat().st_size)}],
        }


def _license(text: str) -> dict[str, Any]:
    """A licence by its name. Sources say it in words, so it is no SPDX id that tools may trust."""
    return {"license": {"name": " ".join(text.split())}}
