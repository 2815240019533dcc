"""``multimodal info``: what a folder (model, adapter, image tokenizer, shards) holds, or versions.

Fingerprints are verified: every weight is read and hashed.
"""

import json
import platform
from collections import Counter
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from multimodal import __version__
from multimodal.devices import choose_device, choose_dtype
from multimodal.files import address_of, read_json
from multimodal.provenance import Provenance
from multimodal.terminal import Parser

PACKAGES = (
    "torch",
    "torchvision",
    "lightning",
    "jsonargparse",
    "webdataset",
    "open_clip_torch",
    "timm",
    "tokenizers",
    "pillow",
    "safetensors",
    "numpy",
    "transformers",
    "pycocoevalcap",
)
EPILOG = """examples:
  multimodal info                            # versions and devices, for a bug report
  multimodal info starter                    # the bundled model, its licence too
  multimodal info runs/photos-joint/model
  multimodal info runs/photos-tokenizer/model --json
  multimodal info data/flickr8k
  multimodal info --config recipe.yaml       # what a training run will need
"""


def main(argv: list[str]) -> int:
    """Run ``multimodal info ARGV...``. The exit status is 1 if a fingerprint is wrong."""
    parser = Parser(
        prog="multimodal info",
        usage="multimodal info [-h] [--json] [MODEL]\n"
        "       multimodal info --config RECIPE [--KEY VALUE ...]",
        description="What a folder of a model, an adapter, an image tokenizer or shards holds. "
        "Without a folder: the versions of what is installed, and the devices. With --config: how "
        "long a training run will take, and how much memory.",
        epilog=EPILOG,
    )
    parser.add_argument("folder", nargs="?", type=Path, metavar="MODEL")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args(argv)
    facts = installation() if arguments.folder is None else describe(arguments.folder)
    print(json.dumps(facts) if arguments.json else "\n".join(_lines(facts)))
    return 1 if "MISMATCH" in json.dumps(facts.get("fingerprints", {})) else 0


def describe(folder: Path) -> dict[str, Any]:
    """The facts about a folder of one of these kinds. Raises ``ValueError`` for others."""
    from multimodal.data.remote.folder import local_folder
    from multimodal.hub.address import HUB_ADDRESS
    from multimodal.hub.names import find_model

    shards = address_of(folder) and not HUB_ADDRESS.match(str(folder))
    folder = local_folder(folder) if shards else find_model(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if (folder / "manifest.json").is_file():
        return shard_facts(folder)
    if (folder / "adapter_config.json").is_file():
        return adapter_facts(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: neither a model folder (config.json) nor an adapter "
            "(adapter_config.json) nor a shard folder (manifest.json)"
        )
    config = read_json(folder / "config.json")
    if isinstance(config, dict) and {"quantizer", "encoder", "levels"} & set(config):
        return tokenizer_facts(folder, config)
    return model_facts(folder)


def model_facts(folder: Path) -> dict[str, Any]:
    from multimodal.model.checkpoint import ModelParts, read_config

    stored = read_config(folder)
    model = ModelParts.load(folder, verify=False)  # a wrong fingerprint is shown
    vocabulary, images = model.vocabulary, model.image_tokenizer
    claimed = stored.fingerprints
    transformer = model.network.transformer
    active = {}
    if stored.transformer.experts is not None:
        active["of which active for a token"] = transformer.active_parameters
    return {
        "kind": "model",
        "format": stored.format,
        "transformer": stored.transformer.stored(),
        "parameters": {
            "transformer": _count(transformer),
            **active,
            "of which embedding": transformer.embed_tokens.weight.numel(),
            "heads": _count(model.network.alignment),
            "image tokenizer": _count(images),
        },
        "vocabulary": {
            "text": vocabulary.text_size,
            "specials": vocabulary.image_start - vocabulary.text_size,
            "image codes": images.codebook_size,
            "size with padding": vocabulary.size,
        },
        "images": _image_facts(images),
        "objectives": asdict(stored.objectives),
        "fingerprints": {
            "model": _verified(claimed.model, model.fingerprint),
            "image tokenizer": _verified(claimed.image_tokenizer, images.fingerprint),
        },
        **_licence(model.provenance),
        **_files(folder),
    }


def _licence(provenance: Provenance) -> dict[str, Any]:
    """The first paragraph of each licence, and the sources."""
    license = provenance.license_name or "none is given: weights follow the licences of their data"
    lines = {str(number): line for number, line in enumerate(provenance.lines(), start=1)}
    return {"license": license, **({"sources": lines} if lines else {})}


def tokenizer_facts(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    from multimodal.tokenizers.image import load_image_tokenizer

    tokenizer = load_image_tokenizer(folder, verify=False)  # a wrong fingerprint is shown
    return {
        "kind": "image tokenizer",
        "config": {k: v for k, v in config.items() if k != "fingerprint"},
        "parameters": {
            f"{level}.{name}": _count(part)
            for level, parts in tokenizer.named_children()
            for name, part in parts.named_children()
        },
        "images": _image_facts(tokenizer),
        "fingerprints": {
            "image tokenizer": _verified(str(config.get("fingerprint")), tokenizer.fingerprint)
        },
        **_licence(tokenizer.provenance),
        **_files(folder),
    }


def adapter_facts(folder: Path) -> dict[str, Any]:
    from multimodal.adapters.folder import Adapter

    adapter = Adapter.read(folder)
    base = adapter.base and f"{adapter.base.name} ({adapter.base.fingerprint})"
    return {
        "kind": "adapter of an image tokenizer" if adapter.is_of_images else "adapter of a model",
        "base": base or "not said",
        "layers": len(adapter.pairs),
        "parameters": sum(a.numel() + b.numel() for a, b in adapter.pairs.values()),
        "scale": adapter.scale,
        **_licence(adapter.provenance),
        **_files(folder),
    }


def shard_facts(folder: Path) -> dict[str, Any]:
    """The facts in the manifest. `multimodal data check` reads the data, too."""
    from multimodal.data.shards import read_manifest

    manifest = read_manifest(folder)
    splits: Counter[str] = Counter()
    for entry in manifest["shards"]:
        splits[entry["split"]] += entry["samples"]
    return {
        "kind": "shards",
        "shards": len(manifest["shards"]),
        "samples": dict(splits),
        "bytes": sum(entry["bytes"] for entry in manifest["shards"]),
        "made": {k: v for k, v in manifest.items() if k not in ("format", "version", "shards")},
    }


def installation() -> dict[str, Any]:
    import torch

    packages: dict[str, str] = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    devices = {"cpu": f"{torch.get_num_threads()} threads, {platform.machine()}"}
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        memory = properties.total_memory / 2**30
        devices[f"cuda:{number}"] = f"{properties.name}, {memory:.0f} GiB"
    if torch.backends.mps.is_available():
        devices["mps"] = platform.processor()
    best = choose_device("auto")
    dtype = str(choose_dtype("auto", best)).removeprefix("torch.")
    devices["auto"] = f"{best}, {dtype}"
    return {
        "multimodal": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "devices": devices,
    }


def _count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def _image_facts(tokenizer: Any) -> dict[str, Any]:
    return {
        "size": tokenizer.image_size,
        "fit": tokenizer.fit,
        "tokens per image": tokenizer.codes_per_image,
        "levels": {
            level.name: f"{level.grid} x {level.grid} x {level.groups} of {level.codebook_size}"
            for level in tokenizer.layout.levels
        },
        "codes": tokenizer.codes_fingerprint,
    }


def _verified(claimed: str, computed: str) -> str:
    if claimed == computed:
        return f"{claimed} (verified)"
    return f"{claimed} (MISMATCH: it is {computed})"


def _files(folder: Path) -> dict[str, Any]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
    return {"files": sizes, "bytes": sum(sizes.values())}


def _lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            # Counts get grouped digits. An epsilon or a name stays what it is.
            shown = f"{value:,}" if type(value) is int else str(value)
            lines.append(f"{indent}{name}: {shown}")
    return lines
