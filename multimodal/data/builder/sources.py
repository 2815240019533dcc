"""Read a source as samples: a folder of images, a table, annotations, or webdataset shards.

The readers yield every sample: a ``SourceSample``, or a ``RejectedSample`` with its name and the
reason. So the caller can count all of them.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from multimodal.data.builder.annotations import read_annotations
from multimodal.data.builder.documents import is_documents, read_documents
from multimodal.data.builder.records import (
    RejectedSample,
    SourceItem,
    SourceSample,
    encodable,
    has_text,
    normalise,
    shown,
    shuffled,
)
from multimodal.data.builder.salvage import LostSample, Members, salvage
from multimodal.data.builder.tables import TABLE_SUFFIXES, read_parquet, read_table
from multimodal.data.documents import UnreadableText, check_content, image_suffixes, is_plain_text
from multimodal.data.samples import IMAGE_SUFFIXES
from multimodal.data.shards import read_index, split_of
from multimodal.files import open_file, read_bytes

_OTHER_IMAGES = ("jxl", "jp2", "svg", "ico", "psd", "dng", "cr2", "nef", "arw")
TEXTS = ("json", "txt", "cls")
# Samples of shards with these names were held out, so they must not get into training.
_HELD_OUT = ("val", "valid", "validation", "dev", "test", "eval", "heldout", "holdout")


def read_source(
    source: Path,
    ignored: "Counter[str]",
    *,
    image_column: str | None = None,
    text_column: str | None = None,
    need_text: bool = True,
    outside: Path | None = None,
    images: Path | None = None,
    answers: Path | None = None,
) -> Iterator[SourceItem]:
    """Read all samples of a source, in an order that depends on its content only.

    Shards and Parquet tables that contain images keep their order. All other sources are shuffled
    by a hash of the name: they tend to be sorted by kind, and training mixes the samples within a
    shard better than samples of different shards.

    Args:
        source: a folder of images with .txt or .json beside them, a .csv, .tsv, .jsonl or .parquet
            table, a .jsonl of documents, a folder of .tar shards or one of them, or a .json file of
            COCO captions or VQA questions.
        ignored: counts what is skipped: files of other kinds, other members of a sample.
        image_column, text_column: of a table. By default guessed from its header.
        need_text: reject samples without captions, questions or label.
        outside: a folder inside the source to leave out.
        images: the folder of the images of a table or of annotations. By default the folder of
            the file.
        answers: the file of the answers to VQA questions.

    Raises:
        ValueError: if the source is none of these.
    """
    if source.exists() and not source.is_dir():
        open_file(source).close()  # a pipe or a device is refused before it is read
    if source.is_dir():
        tars = sorted(source.glob("*.tar"))
        items = _read_shards(tars, ignored) if tars else _read_folder(source, ignored, outside)
    elif not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    elif source.suffix.lower() == ".tar":
        items = _read_shards([source], ignored)
    elif source.suffix.lower() in TABLE_SUFFIXES:
        root = images or source.parent
        if image_column is None and is_documents(source):
            items = read_documents(source, root)
        elif source.suffix.lower() == ".parquet":
            items = read_parquet(source, root, ignored, image_column, text_column, need_text)
        else:
            items = read_table(source, root, ignored, image_column, text_column, need_text)
    elif source.suffix.lower() == ".json":
        items = _read_annotated(source, images or source.parent, answers)
    else:
        raise ValueError(
            f"{source}: not a folder, a .tar shard, a table ({', '.join(TABLE_SUFFIXES)}), or "
            "annotations (.json)"
        )
    for item in items:
        if isinstance(item, SourceSample) and need_text and not has_text(item.record):
            yield RejectedSample(item.name, "no text")
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
            return sum(name.lower().endswith(IMAGE_SUFFIXES) for name in names)
        open_file(source).close()
        if suffix == ".parquet":
            import pyarrow.parquet as pq

            return int(pq.ParquetFile(source).metadata.num_rows)
        if suffix in TABLE_SUFFIXES:
            with open_file(source) as file:
                return sum(1 for line in file if line.strip()) - (suffix != ".jsonl")
    except (ValueError, OSError, ImportError):
        pass  # reading the source reports the error
    return None


def _record(json_bytes: bytes | None, txt_bytes: bytes | None) -> dict[str, Any]:
    """The record in the files beside an image. A .txt file is one caption."""
    value: Any = {}
    try:
        if json_bytes is not None:
            value = json.loads(json_bytes.decode("utf-8-sig"))
        if isinstance(value, list):
            value = {"captions": value}
        if not isinstance(value, dict):
            raise UnreadableText("its json is not an object")
        record = normalise(value)
        if txt_bytes is not None and not record["captions"]:
            record["captions"] = normalise({"text": txt_bytes.decode("utf-8-sig")})["captions"]
    except UnicodeDecodeError as error:
        raise UnreadableText(f"not UTF-8 ({error})") from error
    except UnreadableText:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        raise UnreadableText(f"not readable as JSON ({error})") from error
    return record


def _read_folder(
    folder: Path, ignored: "Counter[str]", outside: Path | None
) -> Iterator[SourceItem]:
    images: dict[str, Path] = {}
    texts: dict[str, dict[str, Path]] = {}
    visited: set[str] = set()
    unreadable: list[OSError] = []
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=unreadable.append):
        if os.path.realpath(parent) in visited or (outside and Path(parent).resolve() == outside):
            folders.clear()
            continue
        visited.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(files):
            path = Path(parent, file)
            suffix = path.suffix.lower().removeprefix(".")
            relative = path.relative_to(folder).as_posix()
            if file.startswith("."):
                ignored["hidden files"] += 1
            elif suffix in IMAGE_SUFFIXES:
                images[relative] = path
            elif suffix in ("txt", "json"):
                texts.setdefault(relative[: -len(suffix) - 1], {})[suffix] = path
            elif suffix in _OTHER_IMAGES:
                yield RejectedSample(shown(path), "image of another format", f"a .{suffix} file")
            else:
                ignored[f"files .{suffix}" if suffix else "files without a suffix"] += 1
    for error in unreadable:
        yield RejectedSample(
            shown(error.filename), "unreadable folder", error.strerror or str(error)
        )
    for stem in sorted(texts.keys() - {name.rpartition(".")[0] for name in images}):
        for path in texts[stem].values():
            yield RejectedSample(shown(path), "no image", "a text without an image beside it")
    for name in shuffled(list(images)):
        stem = name.rpartition(".")[0]
        try:
            contents = {kind: read_bytes(path) for kind, path in texts.get(stem, {}).items()}
            record = _record(contents.get("json"), contents.get("txt"))
        except (OSError, ValueError) as error:
            yield RejectedSample(shown(images[name]), "unreadable text", shown(str(error)))
        else:
            yield SourceSample(
                shown(images[name]), shown(stem), shown(name), (images[name],), record
            )


def _read_shards(tars: list[Path], ignored: "Counter[str]") -> Iterator[SourceItem]:
    for tar in tars:
        split = split_of(tar.name)
        for item in salvage(tar):
            if isinstance(item, LostSample):
                yield RejectedSample(item.name, "damaged shard", item.reason)
                continue
            assert isinstance(item.members, Members)
            name, members = f"{tar}: {item.key}", dict(item.members.slices)
            images, suffixes = image_suffixes(members), ", ".join(sorted(members))
            slices = tuple(members.pop(suffix) for suffix in images)
            texts = {kind: members.pop(kind).read() for kind in TEXTS if kind in members}
            label = texts.get("cls")
            try:
                record = _record(texts.get("json"), texts.get("txt"))
                if label is not None:
                    record.setdefault("label", label.decode("utf-8").strip())
                document = images[0][0].isdecimal() if images else is_plain_text(record)
                if not images and not document:
                    yield RejectedSample(name, "no image", f"its members are {suffixes}")
                    continue
                if document:
                    record["content"] = check_content(record.get("content"), len(slices))
            except ValueError as error:
                yield RejectedSample(name, "unreadable text", str(error))
                continue
            ignored.update(f"members .{suffix}" for suffix in members)
            yield SourceSample(
                name=name,
                hint=item.key,
                identity=f"{tar.name}/{item.key}",
                images=slices,
                record=record,
                split=split if split in _HELD_OUT else None,
                document=document,
            )


def _read_annotated(source: Path, root: Path, answers: Path | None) -> Iterator[SourceItem]:
    """Images in the order of a hash of their names, as in folders."""
    records: dict[str, dict[str, Any]] = {}
    for image in read_annotations(source, answers):
        if image.record is None:
            yield RejectedSample(image.name, "unreadable annotation", image.problem)
            continue
        file = os.path.normpath(image.file)
        if not encodable(file):
            yield RejectedSample(image.name, "no image", "its file name is not Unicode")
        elif file.startswith("..") or os.path.isabs(file):
            # It may be a private file of the user.
            yield RejectedSample(image.name, "image outside the folder", file)
        elif file in records:
            yield RejectedSample(image.name, "image named twice", file)
        else:
            try:
                records[file] = normalise(image.record)
            except UnreadableText as error:
                yield RejectedSample(image.name, "unreadable text", str(error))
    for file in shuffled(list(records)):
        path = root / file
        yield SourceSample(
            shown(path), shown(os.path.splitext(file)[0]), shown(file), (path,), records[file]
        )
