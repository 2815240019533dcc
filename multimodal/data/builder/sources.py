"""Read a source as samples: a folder, a table, annotations, webdataset shards, or items of Python.

The readers yield every sample: a ``SourceSample``, or a ``RejectedSample`` with its name and the
reason. So the caller can count all of them.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from multimodal.data.builder.folders import (
    find_files,
    read_folder,
    read_table_of,
    refuse_images,
    saved_tables,
)
from multimodal.data.builder.items import (
    Items,
    ItemSource,
    read_items,
    source_of_hub,
    source_of_items,
)
from multimodal.data.builder.salvage import (
    TAR_SUFFIXES,
    LostSample,
    Members,
    is_tar,
    salvage,
    unpacked,
)
from multimodal.data.documents import check_content, image_suffixes, is_plain_text
from multimodal.data.formats.column_files import COLUMN_SUFFIXES, open_columns
from multimodal.data.samples import (
    IMAGE_SUFFIXES,
    RECORD_MEMBERS,
    has_text,
    record_of,
)
from multimodal.data.shards import read_index
from multimodal.data.tables.read import TABLE_SUFFIXES
from multimodal.data.tables.records import (
    ReadOptions,
    RejectedSample,
    SourceItem,
    SourceSample,
    held_out,
    held_out_folder,
)
from multimodal.files import address_of, local_path, open_file
from multimodal.terminal import shown

Source: TypeAlias = Path | ItemSource
AnySource: TypeAlias = str | Source | Items | Mapping[str, Items]


def open_source(source: AnySource) -> Source:
    """What a person gives as a source: a path, an address of a data set of the Hub, or items.

    Raises:
        ValueError: if it is none of these, or if the Hub does not give it.
    """
    if isinstance(source, ItemSource):
        return source
    if not isinstance(source, str | Path):
        return source_of_items(source)
    address = address_of(source)
    of_hub = source_of_hub(address) if address else None
    return local_path(source) if of_hub is None else of_hub


def read_source(
    source: Source,
    options: ReadOptions,
    *,
    outside: Path | None = None,
    workspace: Path | None = None,
) -> Iterator[SourceItem]:
    """Read all samples of a source, in an order that depends on its content only.

    Shards, streams, and Parquet and Arrow that contain images keep their order. All other sources
    are shuffled by a hash of the name: they tend to be sorted by kind, and training mixes the
    samples within a shard better than samples of different shards.

    Args:
        source: a folder of images with .txt or .json beside them, or with a metadata table; a
            folder of tables, or one of ``datasets.save_to_disk``; a folder of tars, packed or not
            (with its sub-folders), or one of them; a table; a .jsonl of documents; a .json of
            annotations; items.
        options: how to read.
        outside: a folder inside the source to leave out.
        workspace: where packed tars (.tar.gz) are unpacked.

    Raises:
        ValueError: if the source is none of these.
    """
    items = (
        read_items(source, options)
        if isinstance(source, ItemSource)
        else _read_path(source, options, outside, workspace)
    )
    for item in items:
        if isinstance(item, SourceSample) and options.need_text and not has_text(item.record):
            yield item.rejected("no text")
        else:
            yield item


def _read_path(
    source: Path, options: ReadOptions, outside: Path | None, workspace: Path | None
) -> Iterator[SourceItem]:
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if not source.is_dir():
        open_file(source).close()  # a pipe or a device is refused before it is read
    if source.is_dir():
        files = find_files(source, outside, options.notes)
        yield from files.rejected
        if tars := files.shards(source, options.notes):
            yield from _read_shards(tars, source, options, workspace)
        else:
            yield from read_folder(source, files, options)
    elif is_tar(source):
        yield from _read_shards([source], source.parent, options, workspace)
    elif source.suffix.lower() in TABLE_SUFFIXES:
        yield from read_table_of(source.parent, source, options)
    else:
        raise ValueError(
            f"{source}: not a folder, shards ({', '.join(TAR_SUFFIXES)}), "
            f"a table or annotations ({', '.join(TABLE_SUFFIXES)})"
        )


def expected_samples(source: Source) -> int | None:
    """About how many samples a source has, for a progress bar. None if counting would take long."""
    if isinstance(source, ItemSource):
        return source.count
    suffix = source.suffix.lower()
    try:
        if source.is_dir() and (tars := sorted(source.glob("*.tar"))):
            return sum(len(read_index(tar)) for tar in tars)
        if source.is_dir() and (tables := saved_tables(source)):
            return sum(sum(open_columns(table).sizes) for table in tables)
        if source.is_dir():
            names = (name for _, _, files in os.walk(source, followlinks=True) for name in files)
            return sum(name.lower().endswith(IMAGE_SUFFIXES) for name in names) or None
        open_file(source).close()
        if suffix in COLUMN_SUFFIXES:
            return sum(open_columns(source).sizes)
        if suffix in TABLE_SUFFIXES and suffix != ".json":
            with open_file(source) as file:
                return sum(1 for line in file if line.strip()) - (suffix != ".jsonl")
    except (ValueError, OSError, ImportError):
        pass  # reading the source reports the error
    return None


def _read_shards(
    tars: list[Path], folder: Path, options: ReadOptions, workspace: Path | None
) -> Iterator[SourceItem]:
    refuse_images(tars[0], options)
    for tar in tars:
        relative = tar.relative_to(folder)
        split = held_out(tar.name.partition(".")[0]) or held_out_folder(relative.as_posix())
        try:
            path = unpacked(tar, workspace)
        except ValueError as error:
            yield RejectedSample(shown(tar), "damaged shard", str(error))
            continue
        for item in salvage(path, options.notes.ignored):
            name = f"{shown(tar)}: {item.key}"
            if isinstance(item, LostSample):
                yield RejectedSample(name, "damaged shard", item.reason)
                continue
            assert isinstance(item.members, Members)
            members = dict(item.members.slices)
            images, suffixes = image_suffixes(members), ", ".join(sorted(members))
            slices = tuple(members.pop(suffix) for suffix in images)
            try:
                texts = {k: members.pop(k).read() for k in RECORD_MEMBERS if k in members}
                record = record_of(
                    texts, whole_text=options.whole_text, note=options.notes.of(name)
                )
                document = images[0][0].isdecimal() if images else is_plain_text(record)
                if not images and not document:
                    yield RejectedSample(name, "no image", f"its members are {suffixes}")
                    continue
                if document:
                    record["content"] = check_content(record.get("content"), len(slices))
            except ValueError as error:  # UnreadableText, or a member of many gigabytes
                yield RejectedSample(name, "unreadable text", str(error))
                continue
            options.notes.ignored.update(f"members .{suffix}" for suffix in members)
            yield SourceSample(
                name=name,
                hint=item.key,
                identity=f"{shown(relative.as_posix())}/{item.key}",
                images=slices,
                record=record,
                split=split,
                document=document,
            )
