"""What people have, as a stream of samples: a folder of images, a table, or webdataset shards.

Everything found is yielded, either as ``Found`` or as ``Rejected`` with its name: the caller can
count.
"""

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multimodal.annotations import read_annotations
from multimodal.salvage import Lost, salvage
from multimodal.shards import IMAGE_SUFFIXES, split_of

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_path", "image_file", "filename",
                 "file_name", "file", "path", "img")  # fmt: skip
TEXT_COLUMNS = ("captions", "caption", "text", "title", "description", "prompt", "alt")
_JPEG_NAMES = ("jfif", "jpe")
_OTHER_IMAGES = ("gif", "bmp", "tif", "tiff", "heic", "heif", "avif", "jxl", "jp2", "svg", "ico")
# A source that holds samples out by such a name must not find them in training.
_HELD_OUT = ("val", "valid", "validation", "dev", "test", "eval", "heldout", "holdout")


@dataclass(frozen=True)
class Found:
    """One image with its record.

    ``hint`` is what its key should be, ``identity`` tells it from every other sample of the source,
    ``name`` is what to call it in messages; ``split`` is given where the source held it out.
    """

    name: str
    hint: str
    identity: str
    image: Path | bytes
    record: dict[str, Any]
    split: str | None = None


@dataclass(frozen=True)
class Rejected:
    """Something found that cannot be used: ``reason`` is of a small set, to be counted."""

    name: str
    reason: str
    detail: str = ""


class _UnreadableText(ValueError):
    pass


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
) -> Iterator[Found | Rejected]:
    """Everything in a source, in an order that depends on its content only.

    Shards keep their order; folders and tables are shuffled (by a hash of the name), because they
    tend to be sorted by kind, and training mixes samples within a shard better than between them.

    Args:
        source: a folder of images with .txt or .json beside them, a .csv, .tsv or .jsonl file, a
            folder of .tar shards or one of them, a .json file of COCO captions or VQA questions.
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
        items = _read_table(source, root, ignored, image_column, text_column, need_text)
    elif source.suffix.lower() == ".json":
        items = _read_annotated(source, images or source.parent, answers)
    else:
        raise ValueError(
            f"{source}: not a folder, a .tar shard, a table ({', '.join(TABLE_SUFFIXES)}), or "
            "annotations (.json)"
        )
    for item in items:
        if isinstance(item, Found) and need_text and not _has_text(item.record):
            yield Rejected(item.name, "no text")
        else:
            yield item


def shown(path: str | Path) -> str:
    """A path as text that can be printed: bytes that are no UTF-8 become ``\\\\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _shuffled(names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: (hashlib.sha256(os.fsencode(name)).digest(), name))


def _has_text(record: Mapping[str, Any]) -> bool:
    return bool(record["captions"] or record.get("qa")) or "label" in record


def _record(json_bytes: bytes | None, txt_bytes: bytes | None) -> dict[str, Any]:
    """A record from the file or files beside an image; a .txt is one caption."""
    value: Any = {}
    try:
        if json_bytes is not None:
            value = json.loads(json_bytes.decode("utf-8-sig"))
        if isinstance(value, list):
            value = {"captions": value}
        if not isinstance(value, dict):
            raise _UnreadableText("its json is not an object")
        record = normalise(value)
        if txt_bytes is not None and not record["captions"]:
            record["captions"] = normalise({"text": txt_bytes.decode("utf-8-sig")})["captions"]
    except UnicodeDecodeError as error:
        raise _UnreadableText(f"not UTF-8 ({error})") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise _UnreadableText(f"not readable as JSON ({error})") from error
    return record


def normalise(given: Mapping[str, Any]) -> dict[str, Any]:
    """``{"captions": [str], "qa": [[question, answer]], ...}`` from what people write.

    The captions are the first of ``captions``, ``caption``, ``text`` that is there, a string or a
    list; ``question`` and ``answer`` become a pair of ``qa``. All other keys are passed on.
    """
    rest = dict(given)
    captions: Any = []
    for name in ("captions", "caption", "text"):
        if rest.get(name) is not None:
            captions = rest.pop(name)
            break
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise _UnreadableText("captions are not a string or a list of strings")
    record: dict[str, Any] = {"captions": [text.strip() for text in captions if text.strip()]}
    pairs: Any = rest.pop("qa", None) or []
    if isinstance(rest.get("question"), str) and isinstance(rest.get("answer"), str):
        pairs = [*pairs, [rest.pop("question"), rest.pop("answer")]]
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(isinstance(text, str) for text in pair)
        for pair in pairs
    ):
        raise _UnreadableText("qa is not a list of [question, answer]")
    if pairs:
        record["qa"] = [list(pair) for pair in pairs]
    return record | rest


def _read_folder(
    folder: Path, ignored: "Counter[str]", outside: Path | None
) -> Iterator[Found | Rejected]:
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
                yield Rejected(shown(path), "not JPEG, PNG or WebP", f"a .{suffix} file")
            else:
                ignored[f"files .{suffix}" if suffix else "files without a suffix"] += 1
    for error in unreadable:
        yield Rejected(shown(error.filename), "unreadable folder", error.strerror or str(error))
    for stem in sorted(texts.keys() - {name.rpartition(".")[0] for name in images}):
        for path in texts[stem].values():
            yield Rejected(shown(path), "no image", "a text without an image beside it")
    for name in _shuffled(list(images)):
        stem = name.rpartition(".")[0]
        try:
            contents = {kind: path.read_bytes() for kind, path in texts.get(stem, {}).items()}
            record = _record(contents.get("json"), contents.get("txt"))
        except (OSError, _UnreadableText) as error:
            yield Rejected(shown(images[name]), "unreadable text", str(error))
        else:
            yield Found(shown(images[name]), shown(stem), shown(name), images[name], record)


def _read_shards(tars: list[Path], ignored: "Counter[str]") -> Iterator[Found | Rejected]:
    for tar in tars:
        split = split_of(tar.name)
        for item in salvage(tar):
            if isinstance(item, Lost):
                yield Rejected(item.name, "damaged shard", item.reason)
                continue
            name, members = f"{tar}: {item.key}", dict(item.members)
            suffix = next((s for s in IMAGE_SUFFIXES if s in members), None)
            if suffix is None:
                yield Rejected(name, "no image", f"its members are {', '.join(sorted(members))}")
                continue
            image = members.pop(suffix)
            label = members.pop("cls", None)
            try:
                record = _record(members.pop("json", None), members.pop("txt", None))
                if label is not None:
                    record.setdefault("label", label.decode("utf-8").strip())
            except ValueError as error:
                yield Rejected(name, "unreadable text", str(error))
                continue
            ignored.update(f"members .{other}" for other in members)
            held_out = split if split in _HELD_OUT else None
            yield Found(name, item.key, f"{tar.name}/{item.key}", image, record, held_out)


def _read_rows(table: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line, row) of a table; a string in place of a row says what is wrong with it."""
    # surrogateescape: a line that is no UTF-8 fails later, by itself and by name
    with open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if table.suffix.lower() == ".jsonl":
            for line, text in enumerate(file, 1):
                if text.strip():
                    try:
                        row = json.loads(text)
                    except (ValueError, RecursionError) as error:
                        yield line, f"not readable as JSON ({error})"
                        continue
                    yield line, row if isinstance(row, dict) else "not a JSON object"
            return
        delimiter = "\t" if table.suffix.lower() == ".tsv" else ","
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            for cells in reader:
                more = None in cells
                yield reader.line_num, "more cells than columns" if more else dict(cells)
        except csv.Error as error:
            raise ValueError(f"{table}: line {reader.line_num}: {error}") from error


def _choose(table: Path, columns: list[str], given: str | None, kind: str) -> str | None:
    """The column to use: the one given, or the first of the usual names."""
    if given is not None:
        if given not in columns:
            raise ValueError(f"{table}: no column {given!r}; it has {', '.join(columns)}")
        return given
    usual = IMAGE_COLUMNS if kind == "image" else TEXT_COLUMNS
    lowered = {column.strip().lower(): column for column in reversed(columns)}
    return next((lowered[name] for name in usual if name in lowered), None)


def _read_annotated(source: Path, root: Path, answers: Path | None) -> Iterator[Found | Rejected]:
    """Images in the order of a hash of their names, as in folders."""
    found: dict[str, dict[str, Any]] = {}
    for one in read_annotations(source, answers):
        if one.record is None:
            yield Rejected(one.name, "unreadable annotation", one.problem)
        elif one.file in found:
            yield Rejected(one.name, "image named twice", one.file)
        else:
            try:
                found[one.file] = normalise(one.record)
            except _UnreadableText as error:
                yield Rejected(one.name, "unreadable text", str(error))
    for file in _shuffled(list(found)):
        path = root / file
        yield Found(shown(path), shown(os.path.splitext(file)[0]), file, path, found[file])


def _read_table(
    table: Path,
    root: Path,
    ignored: "Counter[str]",
    image_column: str | None,
    text_column: str | None,
    need_text: bool,
) -> Iterator[Found | Rejected]:
    """Rows with the same image become one sample; other columns are kept where its rows agree."""
    rows = list(_read_rows(table))
    columns = list(dict.fromkeys(c for _, row in rows if isinstance(row, dict) for c in row))
    image_column = _choose(table, columns, image_column, "image")
    text_column = _choose(table, columns, text_column, "text")
    told = text_column or {"qa", "question", "label"} & {*columns}
    for kind, missing in (("image", not image_column), ("text", need_text and not told)):
        if missing:
            raise ValueError(
                f"{table}: which column is the {kind}? It has {', '.join(columns) or 'none'}; "
                f"name it with --{kind}-column"
            )
    groups: dict[str, list[dict[str, Any]]] = {}
    paths: dict[str, Path] = {}
    for line, row in rows:
        name = f"{table}: line {line}"
        if isinstance(row, str):
            yield Rejected(name, "unreadable row", row)
            continue
        image = row.pop(str(image_column), None)
        if not isinstance(image, str) or not image.strip():
            yield Rejected(name, "no image", f"column {image_column} is empty")
            continue
        text = row.pop(text_column, None) if text_column else None
        others = {key: value for key, value in row.items() if value not in (None, "")}
        try:
            record = normalise(others | ({"captions": text} if text is not None else {}))
        except _UnreadableText as error:
            yield Rejected(name, "unreadable text", str(error))
            continue
        if need_text and not _has_text(record):
            yield Rejected(name, "no text")
            continue
        path = root / image.strip()
        relative = os.path.relpath(path, root)  # one name for a.jpg, ./a.jpg, /full/a.jpg
        paths.setdefault(relative, path)
        groups.setdefault(relative, []).append(record)
    for relative in _shuffled(list(groups)):
        record, path = _join(groups[relative], ignored), paths[relative]
        hint = shown(os.path.splitext(relative)[0])
        yield Found(shown(path), hint, shown(relative), path, record)


def _join(records: list[dict[str, Any]], ignored: "Counter[str]") -> dict[str, Any]:
    joined: dict[str, Any] = {"captions": [], "qa": []}
    for record in records:
        joined["captions"] += record["captions"]
        joined["qa"] += record.get("qa", [])
    for name in dict.fromkeys(name for record in records for name in record):
        if name not in ("captions", "qa"):
            if all(record.get(name) == records[0].get(name) for record in records):
                joined[name] = records[0][name]
            else:
                ignored[f"columns {name} (rows of one image differ)"] += 1
    if not joined["qa"]:
        del joined["qa"]
    return joined
