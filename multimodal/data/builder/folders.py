"""Read a folder of images with texts beside them, or with a metadata table as Hugging Face has it.

A folder without images holds tables: a data set in several Parquet files, for instance, or one that
``save_to_disk`` of Hugging Face's datasets wrote.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from multimodal.data.builder.salvage import TAR_SUFFIXES, is_tar
from multimodal.data.samples import IMAGE_SUFFIXES, record_of
from multimodal.data.tables.read import TABLE_SUFFIXES, read_table
from multimodal.data.tables.records import (
    Notes,
    ReadOptions,
    RejectedSample,
    SourceItem,
    SourceSample,
    held_out,
    held_out_folder,
    shuffled,
)
from multimodal.files import read_bytes, read_json
from multimodal.terminal import shown

_OTHER_IMAGES = ("jxl", "jp2", "svg", "ico", "psd", "dng", "cr2", "nef", "arw")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # with a column file_name
_OF_SHARDS = ("manifest.json", ".index.json", "rejected.jsonl")  # beside the tars that we write
_TABLES = tuple(suffix for suffix in TABLE_SUFFIXES if suffix not in (".txt", ".json"))


@dataclass
class FolderFiles:
    """The files of a folder and its sub-folders. Names are relative to it, with slashes."""

    images: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, dict[str, Path]] = field(default_factory=dict)
    metadata: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    tars: list[Path] = field(default_factory=list)
    rejected: list[RejectedSample] = field(default_factory=list)

    def shards(self, folder: Path, notes: Notes) -> list[Path]:
        """The tars, if they are what the folder is made of. Then all else is noted as left out.

        They are, if one lies in the folder itself, or if there is nothing else in it to read.
        """
        in_folder = any(tar.parent == folder for tar in self.tars)
        if not in_folder and (self.images or self.metadata or self.tables):
            notes.ignored.update(f"files {_tar_suffix(tar)}" for tar in self.tars)
            return []
        if self.tars:
            texts = [path for each in self.texts.values() for path in each.values()]
            for path in (*self.images.values(), *texts, *self.metadata, *self.tables):
                if not path.name.endswith(_OF_SHARDS):
                    notes.ignored[f"files {path.suffix.lower()}"] += 1
        return self.tars


def _tar_suffix(tar: Path) -> str:
    return next(suffix for suffix in TAR_SUFFIXES if tar.name.lower().endswith(suffix))


def read_folder(folder: Path, files: FolderFiles, options: ReadOptions) -> Iterator[SourceItem]:
    """The samples of a folder and its sub-folders that are in no tar.

    Args:
        folder: images with .txt or .json beside them, or with a metadata table, or tables only.
        files: what is in it.
        options: how to read.

    Raises:
        ValueError: if the options name a folder of images, and the images are in this one.
    """
    if not files.images and not files.metadata and files.tables:
        for texts in files.texts.values():
            options.notes.ignored.update(f"files .{suffix}" for suffix in texts)
        for table in files.tables:
            yield from _of_table(table, folder, options)
        return
    refuse_images(folder, options)
    for table in files.tables:
        options.notes.ignored[f"files {table.suffix.lower()}"] += 1
    described: dict[str, SourceSample] = {}
    for table in files.metadata:
        for item in _of_table(table, folder, options):
            if isinstance(item, RejectedSample) or not isinstance(item.images[0], Path):
                yield item
                continue
            name = os.path.relpath(item.images[0], folder)
            if name in described:
                yield item.rejected("image named twice", f"also in {described[name].rows}")
            else:
                described[name] = item
    stems = {name.rpartition(".")[0] for name in files.images}
    for stem in sorted(files.texts.keys() - stems):
        for suffix, path in files.texts[stem].items():
            detail = "a text without an image beside it"
            if suffix == "json":
                detail += " (a file of annotations is a SOURCE itself, and has --images)"
            yield RejectedSample(shown(path), "no image", detail)
    for name in shuffled([*{**files.images, **described}]):
        if name in described:
            hint = shown(os.path.splitext(name)[0])
            split = described[name].split or held_out_folder(name)
            yield replace(described[name], hint=hint, identity=shown(name), split=split)
        else:
            texts = files.texts.get(name.rpartition(".")[0], {})
            yield _image(name, files.images[name], texts, options)


def refuse_images(source: Path, options: ReadOptions) -> None:
    """Raise ``ValueError`` if the options name a folder of images for a source that holds them."""
    if options.images is not None:
        raise ValueError(
            f"{source}: it holds its images, and --images {options.images} is for a table or "
            "annotations; give such a file as the SOURCE"
        )


def _image(name: str, path: Path, texts: dict[str, Path], options: ReadOptions) -> SourceItem:
    """An image with the texts beside it."""
    try:
        contents = {suffix: read_bytes(text) for suffix, text in texts.items()}
        record = record_of(
            contents, whole_text=options.whole_text, note=options.notes.of(shown(path))
        )
    except (OSError, ValueError) as error:
        return RejectedSample(shown(path), "unreadable text", shown(str(error)))
    stem = shown(name.rpartition(".")[0])
    return SourceSample(shown(path), stem, shown(name), (path,), record, held_out_folder(name))


def saved_tables(folder: Path) -> list[Path] | None:
    """The tables of a folder that ``datasets.save_to_disk`` wrote, in order. None: it is no such.

    It has a ``state.json`` that lists its files of Arrow, or a ``dataset_dict.json`` that lists its
    splits, each a folder with a ``state.json``. Other files in it are of caches.

    Raises:
        ValueError: if one of these lists cannot be read, or if a split is missing.
    """
    if (folder / "dataset_dict.json").is_file():
        tables: list[Path] = []
        for split in _listed(folder / "dataset_dict.json", "splits"):
            if (of_split := saved_tables(folder / split)) is None:
                raise ValueError(
                    f"{folder / split}: dataset_dict.json lists this split, but it has no "
                    "state.json and dataset_info.json; save the data set again"
                )
            tables += of_split
        return tables
    state = folder / "state.json"
    if not state.is_file() or not (folder / "dataset_info.json").is_file():
        return None
    content = read_json(state)
    if isinstance(content, dict) and content.get("_indices_data_files"):
        raise ValueError(
            f"{folder}: its rows are chosen by another file (of datasets before 2.0); save it again"
        )
    return [folder / name for name in _listed(state, "_data_files")]


def _listed(path: Path, field: str) -> list[str]:
    """Names of files or folders in a list of a JSON file. They lie beside it."""
    content = read_json(path)
    listed = content.get(field) if isinstance(content, dict) else None
    names = [
        entry.get("filename") if isinstance(entry, dict) else entry
        for entry in (listed if isinstance(listed, list) else [None])
    ]
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"{path}: {field}: expected a list of names, not {name!r:.80}")
    return [str(name) for name in names]


def read_table_of(folder: Path, table: Path, options: ReadOptions) -> Iterator[SourceItem]:
    """The samples of a table in a folder, held out if its name or the folders above it say so.

    Raises:
        ValueError: if the table as a whole cannot be read.
    """
    stem, parent = table.stem, table.parent
    if table.suffix.lower() == ".arrow":  # NAME-SPLIT, or NAME-SPLIT-00000-of-00002, in its cache
        stem = re.sub(r"^.*-(?=[a-z]+(-\d+-of-\d+)?$)", "", stem)
    start = folder.parent if table.name in METADATA else folder
    split = held_out(stem) or held_out_folder(table.relative_to(start).as_posix())
    above = f"{shown(parent.relative_to(folder).as_posix())}/" * (parent != folder)
    for item in read_table(table, options):
        if isinstance(item, SourceSample):
            yield replace(item, split=item.split or split, identity=above + item.identity)
        else:
            yield item


def _of_table(table: Path, folder: Path, options: ReadOptions) -> Iterator[SourceItem]:
    """The samples of one of several tables. One that cannot be read does not end the others."""
    try:
        yield from read_table_of(folder, table, options)
    except (ValueError, OSError) as error:
        yield RejectedSample(shown(table), "unreadable table", str(error))


def find_files(folder: Path, outside: Path | None, notes: Notes) -> FolderFiles:
    """The files of a folder and its sub-folders. Hidden ones, and what is of no use, are noted.

    Args:
        outside: a folder in it to leave out.
    """
    if (saved := saved_tables(folder)) is not None:
        return FolderFiles(tables=saved)
    files = FolderFiles()
    visited: set[str] = set()
    unreadable: list[OSError] = []
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=unreadable.append):
        if os.path.realpath(parent) in visited or (outside and Path(parent).resolve() == outside):
            folders.clear()
            continue
        visited.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            suffix = path.suffix.lower().removeprefix(".")
            relative = path.relative_to(folder).as_posix()
            if name.startswith("."):
                notes.ignored["hidden files"] += 1
            elif suffix in IMAGE_SUFFIXES:
                files.images[relative] = path
            elif suffix in _OTHER_IMAGES:
                detail, reason = f"a .{suffix} file", "image of another format"
                files.rejected.append(RejectedSample(shown(path), reason, detail))
            elif suffix in ("txt", "json"):
                files.texts.setdefault(relative[: -len(suffix) - 1], {})[suffix] = path
            elif not path.is_file():  # a pipe or a device would block, or never end
                notes.ignored["not regular files"] += 1
            elif is_tar(path):
                files.tars.append(path)
            elif name.lower() in METADATA:
                files.metadata.append(path)
            elif f".{suffix}" in _TABLES:
                files.tables.append(path)
            else:
                notes.ignored[f"files .{suffix}" if suffix else "files without a suffix"] += 1
    for error in unreadable:
        detail = error.strerror or str(error)
        files.rejected.append(RejectedSample(shown(error.filename), "unreadable folder", detail))
    files.tars.sort()
    return files
