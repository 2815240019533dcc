"""Turn images and text into verified webdataset shards.

Images are prepared in parts, by any number of processes (multimodal/data/builder/image_parts.py).
The shards are put together from the parts in the order of the source. So the same source gives the
same bytes, whatever the number of processes, and a build that was killed goes on when it starts
again.

All files are written in ``OUT/.building`` and move to ``OUT`` at the end, the manifest last. So an
interrupted build leaves nothing that looks like a result. ``OUT/rejected.jsonl`` lists the samples
that cannot be used, with the reason.
"""

import json
import math
import re
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, TypeAlias, get_args

from multimodal.data.builder.cleaning import Cleaning
from multimodal.data.builder.image_parts import (
    BadImage,
    ImageFile,
    ImagePart,
    ImageSettings,
    make_part,
    read_part,
)
from multimodal.data.builder.sources import AnySource, open_source, read_source
from multimodal.data.builder.writer import ShardWriter
from multimodal.data.images import MAX_PIXELS, Fit
from multimodal.data.near_duplicates import CopyIndex
from multimodal.data.parallel import MAX_WORKERS, Engine, exclusive_lock, map_units
from multimodal.data.samples import has_text
from multimodal.data.shards import MANIFEST, write_manifest
from multimodal.data.tables.records import (
    Notes,
    ReadOptions,
    RejectedSample,
    SourceItem,
    SourceSample,
)
from multimodal.files import local_path
from multimodal.terminal import shown
from multimodal.torchrun import is_first_rank

REJECTED = "rejected.jsonl"
MAX_SIDE = math.isqrt(MAX_PIXELS)  # of images that are resized
STAGING = ".building"
PARTS, LOCK, UNPACKED = "parts", "lock", "unpacked"
MOVING = "moving"  # exists when this build has begun to replace files in OUT
PART_SIZE = 128  # samples: seconds of work, which a killed process has to repeat
_SHARD_FILE = re.compile(r"[a-z]+-\d{4,}\.(tar|index\.json)")

Prepared: TypeAlias = list[ImageFile] | BadImage  # the images of a sample


@dataclass(frozen=True)
class Report:
    """The counts of a build. ``kept + rejected == total``.

    Attributes:
        reasons: rejected samples by reason.
        splits: samples of each split.
        ignored: files, members and texts that were left out.
        read: what was read in a way that may surprise.
        changed: texts that cleaning changed.
    """

    total: int
    kept: int
    rejected: int
    reasons: dict[str, int]
    splits: dict[str, int]
    ignored: dict[str, int]
    read: dict[str, int]
    changed: dict[str, int]


def build_shards(
    source: AnySource,
    out: str | Path,
    *,
    image_size: int | None = None,
    fit: Fit = "squash",
    shard_size: int = 1000,
    val_share: float = 0.0,
    quality: int = 92,
    image_column: str | None = None,
    text_column: str | None = None,
    need_text: bool = True,
    whole_text: bool = False,
    images: str | Path | None = None,
    answers: str | Path | None = None,
    cleaning: Cleaning = Cleaning(),  # noqa: B008 (frozen)
    overwrite: bool = False,
    engine: Engine = "processes",
    workers: int = 1,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Report | None:
    """Write ``OUT/train-0000.tar`` ..., their indexes, the manifest and ``rejected.jsonl``.

    Args:
        source: a path (see ``multimodal.data.builder.sources.read_source``), an address
            ``hf://datasets/user/name`` of the Hugging Face Hub, or items: a torch Dataset, a
            Dataset of Hugging Face, or another iterable of ``(image, texts)`` or of mappings (see
            ``multimodal.data.builder.items``). A mapping gives the splits of items their names.
        out: a new or empty folder, or a folder where a build was interrupted.
        image_size: pixels of a side. Images are brought to this square size by ``fit``. With
            ``None``, a JPEG, PNG or WebP that is RGB, upright and not animated is stored byte for
            byte, with its metadata.
        fit: squash, crop or letterbox.
        shard_size: samples in a shard.
        val_share: share of the split ``val``, in [0, 1). A hash of the key decides, so new samples
            do not move old ones. Shards of a source that are held out by name keep their split.
        quality: of a JPEG that has to be encoded again, 1 to 100. A PNG stays a PNG.
        image_column, text_column: of a table. By default guessed from its header.
        need_text: reject images without captions, questions or label.
        whole_text, images, answers: see ``multimodal.data.tables.records.ReadOptions``.
        cleaning: what else to reject or change.
        overwrite: replace the files of an earlier build in ``out``, and nothing else.
        engine, workers: what prepares the images: processes (1: this process) or Ray tasks. Under
            torchrun, the ranks share the work. The result does not depend on it.
        progress: wraps the stream of samples (``tqdm``, for instance).

    Returns:
        The counts, or None on all ranks but the first.

    Raises:
        ValueError: if an argument, the source or ``out`` cannot be used, or if no sample can be
            used. In the last case ``out`` keeps what it had and gets a new ``rejected.jsonl``.
    """
    source, out = open_source(source), local_path(out)
    images = None if images is None else local_path(images)
    answers = None if answers is None else local_path(answers)
    _check_arguments(image_size, fit, shard_size, val_share, quality, workers)
    if isinstance(source, Path) and source.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{out}: the source {source} lies in it; choose another folder")
    staging = out / STAGING
    parts = staging / PARTS
    if is_first_rank():  # another rank may arrive after the build is complete
        _check_out(out, overwrite)
        parts.mkdir(parents=True, exist_ok=True)
    notes, changed = Notes(), Counter[str]()
    options = ReadOptions(
        notes=notes,
        images=images,
        image_column=image_column,
        text_column=text_column,
        need_text=need_text,
        whole_text=whole_text,
        answers=answers,
    )
    items = read_source(source, options, outside=out.resolve(), workspace=staging / UNPACKED)
    settings = ImageSettings(
        image_size=image_size,
        fit=fit,
        quality=quality,
        min_side=cleaning.min_side,
        max_aspect_ratio=cleaning.max_aspect_ratio,
        hash_images=bool(cleaning.copies),
    )
    clean = (_clean(item, cleaning, need_text, changed) for item in items)
    stream = _with_images(clean, parts, settings, engine, workers)
    if not is_first_rank():
        deque(stream, maxlen=0)  # prepare images only: the first rank writes the shards
        return None
    with exclusive_lock(staging, LOCK):
        for path in staging.glob("*.*"):  # files of an interrupted build; its parts stay
            path.unlink()
        try:
            with (
                open(staging / REJECTED, "w", encoding="utf-8") as rejections,
                ShardWriter(staging, shard_size, val_share) as writer,
            ):
                copies = _CopyFilter(near=cleaning.copies == "near")
                reasons = _write_samples(progress(stream), copies, writer, rejections)
        except ValueError:
            if not any(parts.iterdir()):  # no image was prepared, so nothing can go on later
                shutil.rmtree(staging)
            raise
        kept = sum(writer.splits.values())
        if kept:
            write_manifest(
                staging,
                writer.entries,
                source=shown(str(source)),
                image_size=image_size,
                fit=fit,
                quality=quality,
                val_share=val_share,
                cleaning={**cleaning.described(), "changed": dict(+changed)},
                rejected=dict(sorted(reasons.items())),
            )
            _move(staging, out)
        else:
            (staging / REJECTED).replace(out / REJECTED)
        shutil.rmtree(staging, ignore_errors=True)
    if not kept:
        why = _reasons(reasons, notes)
        is_table = isinstance(source, Path) and source.is_file() and images is None
        if reasons["unreadable image"] and is_table:
            why += f"; images are looked for beside {source}, or in the folder --images"
        raise ValueError(f"{source}: no sample could be used ({why}); see {out / REJECTED}")
    return Report(
        total=kept + reasons.total(),
        kept=kept,
        rejected=reasons.total(),
        reasons=dict(reasons),
        splits=dict(writer.splits),
        ignored=notes.described(notes.ignored),
        read=notes.described(notes.read),
        changed=dict(+changed),
    )


def _reasons(reasons: Counter[str], notes: Notes) -> str:
    """Why nothing was kept: the rejected samples, and what was left out."""
    why = [f"{count} {reason}" for reason, count in reasons.most_common()] or ["nothing found"]
    left_out = [f"{count} {what}" for what, count in notes.ignored.most_common()]
    return ", ".join(why) + (f"; left out: {', '.join(left_out)}" if left_out else "")


def _write_samples(
    stream: Iterable[tuple[SourceItem, Prepared | None]],
    copies: "_CopyFilter",
    writer: ShardWriter,
    rejections: TextIO,
) -> "Counter[str]":
    """Write each sample to a shard, or a line to ``rejections``. Returns the counts of reasons."""
    reasons = Counter[str]()
    for item, images in stream:
        rejected = _rejection(item, images) or copies.check(item, images)
        if rejected is None:
            assert isinstance(item, SourceSample) and isinstance(images, list)
            rejected = writer.write(item, images)
        if rejected is not None:
            reasons[rejected.reason] += 1
            line = {
                "sample": rejected.name,
                "reason": rejected.reason,
                "detail": rejected.detail,
                **(rejected.rows.described() if rejected.rows else {}),
            }
            rejections.write(json.dumps(line, ensure_ascii=True) + "\n")
    return reasons


def _clean(
    item: SourceItem,
    cleaning: Cleaning,
    need_text: bool,
    changed: "Counter[str]",
) -> SourceItem:
    """Apply the cleaning steps that need no image."""
    if isinstance(item, RejectedSample):
        return item
    if fault := cleaning.fault_of_texts(item.record):
        return item.rejected(*fault)
    record = cleaning.cleaned(item.record, changed)
    if need_text and not has_text(record):
        return item.rejected("no text left")
    return replace(item, record=record)


def _with_images(
    items: Iterator[SourceItem],
    folder: Path,
    settings: ImageSettings,
    engine: Engine,
    workers: int,
) -> Iterator[tuple[SourceItem, Prepared | None]]:
    """Each item with its prepared images, in order. None for samples that are rejected already."""
    batches = deque[list[SourceItem]]()

    def parts() -> Iterator[ImagePart]:
        while batch := list(islice(items, PART_SIZE)):
            if is_first_rank():
                batches.append(batch)
            samples = (replace(item, record={}) for item in batch if isinstance(item, SourceSample))
            yield ImagePart(folder, settings, tuple(samples))

    for part in map_units(make_part, parts(), engine, workers, done=ImagePart.done):
        if not is_first_rank():
            continue  # only the first rank reads the parts
        images = read_part(part)
        for item in batches.popleft():
            yield item, next(images) if isinstance(item, SourceSample) else None


class _CopyFilter:
    """Rejects samples of one image that are copies of an earlier sample.

    Images are hashed only if the cleaning asks for it. Otherwise nothing is rejected.
    """

    def __init__(self, near: bool) -> None:
        self._index, self._names, self._near = CopyIndex(), list[str](), near

    def check(self, item: SourceItem, images: Prepared | None) -> RejectedSample | None:
        if isinstance(item, RejectedSample) or not isinstance(images, list) or len(images) != 1:
            return None
        if images[0].image_hash is None:
            return None
        self._names.append(item.name)
        copy = self._index.add(images[0].image_hash, near=self._near)
        if copy is None:
            return None
        detail = f"{copy.kind} copy ({copy.similarity:.3f}) of {self._names[copy.first]}"
        return item.rejected("copy", detail)


def _rejection(item: SourceItem, images: Prepared | None) -> RejectedSample | None:
    if isinstance(item, RejectedSample):
        return item
    if isinstance(images, BadImage):
        return item.rejected(images.reason, images.detail)
    return None


def _check_arguments(
    image_size: int | None, fit: str, shard_size: int, val_share: float, quality: int, workers: int
) -> None:
    if image_size is not None and not 1 <= image_size <= MAX_SIDE:
        raise ValueError(f"image_size must be 1 to {MAX_SIDE:,}, not {image_size}")
    if fit not in get_args(Fit):
        raise ValueError(f"fit must be one of {', '.join(get_args(Fit))}, not {fit!r}")
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, not {shard_size}")
    if not 1 <= workers <= MAX_WORKERS:
        raise ValueError(f"workers must be 1 to {MAX_WORKERS:,}, not {workers}")
    if not 0 <= val_share < 1:
        raise ValueError(f"val_share must be in [0, 1), not {val_share}")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality must be in 1..100, not {quality}")


def _check_out(out: Path, overwrite: bool) -> None:
    """Raise for a folder with files that this build must not replace."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out}: is a file, not a folder")
    names = {path.name for path in out.iterdir()} - {STAGING}
    if names <= {REJECTED}:
        return  # empty, or left by a build without usable samples
    others = {name for name in names - {REJECTED, MANIFEST} if not _SHARD_FILE.fullmatch(name)}
    if others:
        raise ValueError(f"{out}: not empty, holds {min(others)}; choose a new folder")
    interrupted = (out / STAGING / MOVING).exists() and not (out / MANIFEST).exists()
    if not overwrite and not interrupted:
        raise ValueError(f"{out}: not empty; choose a new folder, or --overwrite the shards in it")


def _move(staging: Path, out: Path) -> None:
    """Replace the old files by the new ones. The manifest is deleted first and comes last."""
    (staging / MOVING).touch()
    (out / MANIFEST).unlink(missing_ok=True)
    for path in sorted(out.iterdir()):
        if path.name == REJECTED or _SHARD_FILE.fullmatch(path.name):
            path.unlink()
    written = [
        path for path in staging.iterdir() if path.name not in (PARTS, LOCK, MOVING, UNPACKED)
    ]
    for path in sorted(written, key=lambda path: (path.name == MANIFEST, path.name)):
        path.replace(out / path.name)
