"""Read a source as samples: a folder, a table, annotations, or webdataset shards.

The readers yield every sample: a ``SourceSample``, or a ``RejectedSample`` with its name and the
reason. So the caller can count all of them.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from multimodal.data.builder.folders import read_folder
from multimodal.data.builder.records import (
    ReadOptions,
    RejectedSample,
    SourceItem,
    SourceSample,
    held_out,
)
from multimodal.data.builder.salvage import (
    TAR_SUFFIXES,
    LostSample,
    Members,
    is_tar,
    salvage,
    unpacked,
)
from multimodal.data.builder.tables import TABLE_SUFFIXES, read_table
from multimodal.data.documents import check_content, image_suffixes, is_plain_text
from multimodal.data.samples import (
    IMAGE_SUFFIXES,
    RECORD_MEMBERS,
    has_text,
    record_of,
)
from multimodal.data.shards import read_index
from multimodal.files import open_file
from multimodal.terminal import shown


def read_source(
    source: Path,
    options: ReadOptions,
    *,
    outside: Path | None = None,
    workspace: Path | None = None,
) -> Iterator[SourceItem]:
    """Read all samples of a source, in an order that depends on its content only.

    Shards and Parquet tables that contain images keep their order. All other sources are shuffled
    by a hash of the name: they tend to be sorted by kind, and training mixes the samples within a
    shard better than samples of different shards.

    Args:
        source: a folder of images with .txt or .json beside them, or with a metadata table; a
            folder of tables; a folder of tars, packed or not, or one of them; a table; a .jsonl of
            documents; a .json of annotations.
        options: how to read.
        outside: a folder inside the source to leave out.
        workspace: where packed tars (.tar.gz) are unpacked.

    Raises:
        ValueError: if the source is none of these.
    """
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if not source.is_dir():
        open_file(source).close()  # a pipe or a device is refused before it is read
    if source.is_dir():
        tars = sorted(path for path in source.iterdir() if is_tar(path) and path.is_file())
        items = (
            _read_shards(tars, options, workspace)
            if tars
            else read_folder(source, outside, options)
        )
    elif is_tar(source):
        items = _read_shards([source], options, workspace)
    elif source.suffix.lower() in TABLE_SUFFIXES:
        items = read_table(source, options)
    else:
        raise ValueError(
            f"{source}: not a folder, shards ({', '.join(TAR_SUFFIXES)}), "
            f"a table or annotations ({', '.join(TABLE_SUFFIXES)})"
        )
    for item in items:
        if isinstance(item, SourceSample) and options.need_text and not has_text(item.record):
            yield item.rejected("no text")
        else:
            yield item


def expected_samples(source: Path) -> int | None:
    """About how many samples a source has, for a progress bar. None if counting would take long."""
    suffix = source.suffix.lower()
    try:
        if source.is_dir() and (tars := sorted(source.glob("*.tar"))):
            return sum(len(read_index(tar)) for tar in tars)
        if source.is_dir():
            names = (name for _, _, files in os.walk(source, followlinks=True) for name in files)
            return sum(name.lower().endswith(IMAGE_SUFFIXES) for name in names) or None
        open_file(source).close()
        if suffix == ".parquet":
            import pyarrow.parquet as pq

            return int(pq.ParquetFile(source).metadata.num_rows)
        if suffix in TABLE_SUFFIXES and suffix != ".json":
            with open_file(source) as file:
                return sum(1 for line in file if line.strip()) - (suffix != ".jsonl")
    except (ValueError, OSError, ImportError):
        pass  # reading the source reports the error
    return None


def _read_shards(
    tars: list[Path], options: ReadOptions, workspace: Path | None
) -> Iterator[SourceItem]:
    for tar in tars:
        split = held_out(tar.name.partition(".")[0])
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
                identity=f"{shown(tar.name)}/{item.key}",
                images=slices,
                record=record,
                split=split,
                document=document,
            )
