"""Write indexes and a manifest for the shards of a folder that exist already."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from multimodal.data.shards import (
    MANIFEST,
    DamagedShard,
    file_sha256,
    index_shard,
    read_manifest,
    write_manifest,
)
from multimodal.files import local_path
from multimodal.terminal import shown


def index_folder(
    folder: Path,
    out: Path | None = None,
    *,
    ignored: Counter[str] | None = None,
    on_problem: Callable[[str], object] = lambda problem: None,
    progress: Callable[[Iterable[Path]], Iterable[Path]] = iter,
) -> list[dict[str, Any]]:
    """Index every shard of a folder, and write the manifest.

    Args:
        folder: a folder of .tar shards.
        out: where indexes, manifest and links to the shards go. By default ``folder`` itself.
        ignored: counts members that belong to no sample.
        on_problem: is called with one line for each shard that is damaged or missing.
        progress: wraps the list of shards (``tqdm``, for instance).

    Returns:
        The entries of the manifest, one for each shard.

    Raises:
        ValueError: if the folder has no shards or cannot be written to, or if a shard is damaged or
            missing. Then no manifest is written.
    """
    folder, out = local_path(folder), None if out is None else local_path(out)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        others = Counter("".join(path.suffixes[-2:]) for path in folder.iterdir() if path.is_file())
        found = ", ".join(
            f"{count} {suffix or 'without a suffix'}" for suffix, count in others.most_common(3)
        )
        raise ValueError(
            f"{folder}: no .tar files in it"
            + (
                f" (it has {found}); try: multimodal data build {folder} NEW_FOLDER"
                if found
                else ""
            )
        )
    target = out or folder
    in_place = target.resolve() == folder.resolve()
    if in_place and not (os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222):
        # Root may write to any folder, so the mode counts too.
        raise ValueError(
            f"{folder}: cannot write here; run: multimodal data index {folder} --out NEW_FOLDER "
            "(links to the tars, nothing is copied)"
        )
    earlier = _earlier_hashes(folder) | _earlier_hashes(target)
    known = [tar for tar in tars if tar.name in earlier]
    missing = sorted(earlier.keys() - {tar.name for tar in known})
    problems = [f"{folder / name}: in {earlier[name][1]}, but not there" for name in missing]
    for tar in progress(known) if known else ():
        sha256, manifest = earlier[tar.name]
        if file_sha256(tar) != sha256:
            problems.append(
                f"{tar}: differs from {manifest}; if it was changed on purpose, delete that file "
                "first"
            )
    entries: list[dict[str, Any]] = []
    if not problems:
        if not in_place:
            _link(tars, target)
        # New shards come first: if one is damaged, the earlier manifest still fits its indexes.
        for tar in progress(sorted(tars, key=lambda tar: tar.name in earlier)):
            if problems and tar.name in earlier:
                break
            try:
                entries.append(index_shard(target / tar.name, ignored))
            except DamagedShard as error:
                problems.append(str(error))
    for problem in problems:
        on_problem(problem)
    if problems:
        raise ValueError(
            f"{folder}: {len(problems)} of {len(tars) + len(missing)} shards are damaged or "
            "missing, so no manifest is written; to keep the good samples run: "
            f"multimodal data build {folder} NEW_FOLDER"
        )
    write_manifest(target, entries, **({"source": shown(folder)} | _earlier_fields(folder)))
    return entries


def _link(tars: list[Path], target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for tar in tars:
        link = target / tar.name
        if link.is_symlink():
            link.unlink()
        elif link.exists():
            raise ValueError(f"{link}: exists and is not a link; choose another --out")
        link.symlink_to(tar.resolve())


def _earlier_hashes(folder: Path) -> dict[str, tuple[str, Path]]:
    """The hash of each shard in an earlier manifest, and that manifest.

    Damage since then must not get a new valid hash.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    return {entry["name"]: (entry["sha256"], path) for entry in read_manifest(folder)["shards"]}


def _earlier_fields(folder: Path) -> dict[str, Any]:
    """The other fields of an earlier manifest: image tokenizer of the codes, licence, source."""
    if not (folder / MANIFEST).is_file():
        return {}
    manifest = read_manifest(folder)
    return {k: v for k, v in manifest.items() if k not in ("format", "version", "shards")}
