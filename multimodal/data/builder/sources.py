"""What people have, as samples: folders of images, tables, annotations, or webdataset shards.

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

_JPEG_NAMES = ("jfif", "jpe")
_OTHER_IMAGES = ("gif", "bmp", "tif", "tiff", "heic", "heif", "avif", "jxl", "jp2", "svg", "ico")
TEXTS = ("json", "txt", "cls")
# A source that holds samples out by such a name must not find them in training.
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
) -> Iterator[SourceSample | RejectedSample]:
    """Everything in a source, in an order that depends on its content only.

    Shards, and Parquet with the files in it, keep their order; all else is shuffled (by a hash of
    the name), because it tends to be sorted by kind, and training mixes samples within a shard
    better than between them.

    Args:
        source: a folder of images with .txt or .json beside them, a .csv, .tsv, .jsonl or .parquet
            table, a .jsonl of documents, a folder of .tar shards or one
            of them, a .json file of COCO captions or VQA questions.
        ignored: counts what is passed over: files of other kinds, further members of a sample.
        image_column, text_column: of a table; guessed from its header if not given.
        need_text: a sample without captions, questions or label is rejected.
        outside: a folder to leave out, where it lies in the source.
        images: the folder of the images of a table or of annotations, by default that of the file.
        answers: of VQA questions, the file of their answers.
    Errors: ``ValueError`` for a source that is none of these.
    """
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
    """About how many samples a source has, for a progress bar; None where that takes long."""
    suffix = source.suffix.lower()
    try:
        if source.is_dir() and (tars := sorted(source.glob("*.tar"))):
            return sum(len(read_index(tar)) for tar in tars)
        if source.is_dir():
            names = (name for _, _, files in os.walk(source, followlinks=True) for name in files)
            return sum(name.lower().endswith(IMAGE_SUFFIXES) for name in names)
        if suffix == ".parquet":
            import pyarrow.parquet as pq

            return int(pq.ParquetFile(source).metadata.num_rows)
        if suffix in TABLE_SUFFIXES:
            with open(source, "rb") as file:
                return sum(1 for line in file if line.strip()) - (suffix != ".jsonl")
    except (ValueError, OSError, ImportError):
        pass  # what is wrong with it is said when it is read
    return None


def _record(json_bytes: bytes | None, txt_bytes: bytes | None) -> dict[str, Any]:
    """A record from the file or files beside an image; a .txt is one caption."""
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
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is the former
        raise UnreadableText(f"not readable as JSON ({error})") from error
    return record


def _read_folder(
    folder: Path, ignored: "Counter[str]", outside: Path | None
) -> Iterator[SourceSample | RejectedSample]:
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
            elif suffix in (*IMAGE_SUFFIXES, *_JPEG_NAMES):
                images[relative] = path
            elif suffix in ("txt", "json"):
                texts.setdefault(relative[: -len(suffix) - 1], {})[suffix] = path
            elif suffix in _OTHER_IMAGES:
                yield RejectedSample(shown(path), "not JPEG, PNG or WebP", f"a .{suffix} file")
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
            contents = {kind: path.read_bytes() for kind, path in texts.get(stem, {}).items()}
            record = _record(contents.get("json"), contents.get("txt"))
        except (OSError, UnreadableText) as error:
            yield RejectedSample(shown(images[name]), "unreadable text", str(error))
        else:
            yield SourceSample(
                shown(images[name]), shown(stem), shown(name), (images[name],), record
            )


def _read_shards(
    tars: list[Path], ignored: "Counter[str]"
) -> Iterator[SourceSample | RejectedSample]:
    for tar in tars:
        split = split_of(tar.name)
        for item in salvage(tar):
            if isinstance(item, LostSample):
                yield RejectedSample(item.name, "damaged shard", item.reason)
                continue
            assert isinstance(item.members, Members)
            name, places = f"{tar}: {item.key}", dict(item.members.places)
            images, members = image_suffixes(places), ", ".join(sorted(places))
            slices = tuple(places.pop(suffix) for suffix in images)
            texts = {kind: places.pop(kind).read() for kind in TEXTS if kind in places}
            label = texts.get("cls")
            try:
                record = _record(texts.get("json"), texts.get("txt"))
                if label is not None:
                    record.setdefault("label", label.decode("utf-8").strip())
                document = images[0][0].isdecimal() if images else is_plain_text(record)
                if not images and not document:
                    yield RejectedSample(name, "no image", f"its members are {members}")
                    continue
                if document:
                    record["content"] = check_content(record.get("content"), len(slices))
            except ValueError as error:
                yield RejectedSample(name, "unreadable text", str(error))
                continue
            ignored.update(f"members .{other}" for other in places)
            held_out = split if split in _HELD_OUT else None
            yield SourceSample(name, item.key, f"{tar.name}/{item.key}", slices, record, held_out,
                        document)  # fmt: skip


def _read_annotated(
    source: Path, root: Path, answers: Path | None
) -> Iterator[SourceSample | RejectedSample]:
    """Images in the order of a hash of their names, as in folders."""
    found: dict[str, dict[str, Any]] = {}
    for one in read_annotations(source, answers):
        if one.record is None:
            yield RejectedSample(one.name, "unreadable annotation", one.problem)
            continue
        file = os.path.normpath(one.file)
        if not encodable(file):
            yield RejectedSample(one.name, "no image", "its file name is not Unicode")
        elif file.startswith("..") or os.path.isabs(file):
            yield RejectedSample(
                one.name, "image outside the folder", file
            )  # it may be someone's own
        elif file in found:
            yield RejectedSample(one.name, "image named twice", file)
        else:
            try:
                found[file] = normalise(one.record)
            except UnreadableText as error:
                yield RejectedSample(one.name, "unreadable text", str(error))
    for file in shuffled(list(found)):
        path = root / file
        yield SourceSample(
            shown(path), shown(os.path.splitext(file)[0]), shown(file), (path,), found[file]
        )
