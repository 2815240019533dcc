"""A data card: a shard folder in the words of Croissant, which data search and tools read.

All of it is in the manifest: shards with their hashes, the number of samples of each split, the
source and the licence, and what was cleaned. What a manifest does not say is not invented.

Format: Croissant 1.0 (Akhtar et al. 2024), https://docs.mlcommons.org/croissant/docs/croissant-spec.html
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from multimodal.data.remote.folder import local_folder
from multimodal.data.shards import MANIFEST, file_sha256, read_manifest

CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
HAS_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def data_card(folder: str | Path, name: str = "") -> dict[str, Any]:
    """The card of a shard folder, as JSON-LD.

    Args:
        name: of the data; by default that of the folder.

    Raises:
        ValueError: if the folder has no manifest.
    """
    folder = local_folder(folder)
    manifest = read_manifest(folder)
    shards = manifest["shards"]
    counts: Counter[str] = Counter()
    for shard in shards:
        counts[str(shard["split"])] += int(shard["samples"])
    files = [
        {
            "@type": "cr:FileObject",
            "@id": shard["name"],
            "name": shard["name"],
            "description": f"{shard['samples']:,} samples, split {shard['split']}",
            "contentUrl": shard["name"],
            "contentSize": f"{shard['bytes']} B",
            "encodingFormat": "application/x-tar",
            "sha256": shard["sha256"],
        }
        for shard in shards
    ]
    manifest_file = {
        "@type": "cr:FileObject",
        "@id": MANIFEST,
        "name": MANIFEST,
        "contentUrl": MANIFEST,
        "encodingFormat": "application/json",
        "sha256": file_sha256(folder / MANIFEST),
    }
    card: dict[str, Any] = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": name or folder.resolve().name,
        "description": _description(manifest, counts),
        "distribution": [*files, manifest_file],
        "recordSet": [_splits(counts)],
    }
    if license := manifest.get("license"):
        card["license"] = str(license)
    if HAS_SCHEME.match(source := str(manifest.get("source") or "")):
        card["isBasedOn"] = source
    return card


def _description(manifest: dict[str, Any], counts: Counter[str]) -> str:
    splits = ", ".join(f"{split} {count:,}" for split, count in sorted(counts.items()))
    sentences = [f"Images and texts in WebDataset shards: {counts.total():,} samples ({splits})."]
    source = str(manifest.get("source") or "")
    if source:  # where it lay on the disk of its maker is nobody's business
        shown = source if HAS_SCHEME.match(source) else Path(source).name
        sentences.append(f"Source: {shown}.")
    sentences.append(f"Licence: {manifest.get('license') or 'the manifest names none'}.")
    steps = manifest.get("cleaning")
    if isinstance(steps, dict) and (done := {k: v for k, v in steps.items() if v}):
        said = ", ".join(f"{key} {value}" for key, value in done.items())
        sentences.append(f"Cleaning: {said}.")
    rejected = manifest.get("rejected")
    if isinstance(rejected, dict) and rejected:
        said = ", ".join(f"{count:,} {reason}" for reason, count in sorted(rejected.items()))
        sentences.append(f"Rejected: {said}.")
    return " ".join(sentences)


def _splits(counts: Counter[str]) -> dict[str, Any]:
    """The number of samples of each split, as records in the card itself."""
    fields = (("split", "sc:Text"), ("samples", "sc:Integer"))
    return {
        "@type": "cr:RecordSet",
        "@id": "splits",
        "name": "splits",
        "description": "How many samples each split has.",
        "key": {"@id": "splits/split"},
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"splits/{name}",
                "name": name,
                "dataType": kind,
            }
            for name, kind in fields
        ],
        "data": [
            {"splits/split": split, "splits/samples": count}
            for split, count in sorted(counts.items())
        ],
    }
