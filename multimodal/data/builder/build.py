"""Turn images and text into verified webdataset shards.

Images are made ready in parts (multimodal/data/builder/image_parts.py), by as many processes as
wanted; the shards are put
together from them in the order of the source. So the same source gives the same bytes, however
many there were, and a build that was killed goes on when it is started again. All is written in
``OUT/.building`` and moved in place at the end, the manifest last: what was interrupted leaves
nothing that could be taken for a result. What could not be used is named, with the reason, in
``OUT/rejected.jsonl``.
"""

import hashlib
import json
import re
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, get_args

from multimodal.data.builder.cleaning import Cleaning
from multimodal.data.builder.image_parts import (
    BadImage,
    ImageFile,
    ImagePart,
    ImageSettings,
    make_part,
    read_part,
)
from multimodal.data.builder.records import RejectedSample, SourceSample, has_text
from multimodal.data.builder.sources import read_source
from multimodal.data.images import Fit
from multimodal.data.near_duplicates import CopyIndex
from multimodal.data.parallel import Engine, exclusive_lock, map_units
from multimodal.data.shards import MANIFEST, index_shard, write_manifest
from multimodal.torchrun import rank_and_world_size

REJECTED = "rejected.jsonl"
STAGING = ".building"
PARTS, LOCK = "parts", "lock"
MOVING = "moving"  # from when on what is in OUT is this build's
PART_SIZE = 128  # samples in a part: seconds of work, and what a killed process has to do again
_SAFE_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
_OWN_FILE = re.compile(r"[a-z]+-\d{4,}\.(tar|index\.json)")


@dataclass(frozen=True)
class Report:
    """What a build did. ``kept + rejected == total``; ``ignored`` counts what is no sample,
    ``changed`` what cleaning changed."""

    total: int
    kept: int
    rejected: int
    reasons: dict[str, int]
    splits: dict[str, int]
    ignored: dict[str, int]
    changed: dict[str, int]


def build(
    source: str | Path,
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
        source: see ``multimodal.data.builder.sources.read_source``.
        out: a new or empty folder, or one where a build was interrupted.
        image_size: bring images to this square size by ``fit``. ``None``: a JPEG, PNG or WebP that
            is RGB, upright and not animated is stored byte for byte (its metadata too).
        shard_size: samples in a shard.
        val_share: this share goes to the split ``val``, chosen by a hash of the key: adding samples
            moves none. What a source of shards already calls ``val`` or ``test`` stays that.
        quality: of JPEG, where an image has to be encoded again; from a PNG it stays a PNG.
        image_column, text_column: of a table; guessed if not given.
        images, answers: of tables and annotations, see ``read_source``.
        need_text: whether to reject images without captions, questions or label.
        cleaning: what else to reject or change.
        overwrite: replace what an earlier build left in ``out``, and nothing else.
        engine, workers: who prepares the images: processes (1: this one), or tasks of Ray; under
            torchrun, the ranks share the work. The result does not depend on it.
        progress: wraps the stream of samples (``tqdm``, for instance).
    Returns a report, or None on all ranks but the first.
    Errors: ``ValueError`` if an argument, the source or ``out`` cannot be used, or if no sample
        could be; then ``out`` holds what it held, and a new ``rejected.jsonl``.
    """
    source, out = Path(source), Path(out)
    _check_arguments(image_size, fit, shard_size, val_share, quality, workers)
    if source.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{out}: the source {source} lies in it; choose another folder")
    staging = out / STAGING
    parts = staging / PARTS
    if not rank_and_world_size()[0]:  # another rank may come when all is done
        _check_out(out, overwrite)
        parts.mkdir(parents=True, exist_ok=True)
    ignored, reasons, changed = Counter[str](), Counter[str](), Counter[str]()
    items = read_source(
        source,
        ignored,
        image_column=image_column,
        text_column=text_column,
        need_text=need_text,
        outside=out.resolve(),
        images=None if images is None else Path(images),
        answers=None if answers is None else Path(answers),
    )
    settings = ImageSettings(image_size, fit, quality, cleaning.min_side, cleaning.max_aspect_ratio,
                     hash_images=bool(cleaning.copies))  # fmt: skip
    clean = (_clean(item, cleaning, need_text, changed) for item in items)
    ready = _with_images(clean, parts, settings, engine, workers)
    if rank_and_world_size()[0]:
        deque(ready, maxlen=0)  # the first rank puts the shards together
        return None
    with exclusive_lock(staging, LOCK):
        for left in staging.glob("*.*"):  # of a build that was interrupted; its parts stay
            left.unlink()
        try:
            with (
                open(staging / REJECTED, "w", encoding="utf-8") as rejections,
                _Writer(staging, shard_size) as writer,
            ):
                copies = _CopyFilter(near=cleaning.copies == "near")
                total = 0
                for item, prepared in progress(ready):
                    total += 1
                    rejected = _rejection(item, prepared) or copies.check(item, prepared)
                    if rejected is None:
                        assert isinstance(item, SourceSample) and isinstance(prepared, list)
                        rejected = writer.write(item, prepared, val_share)
                    if rejected is not None:
                        reasons[rejected.reason] += 1
                        line = {
                            "sample": rejected.name,
                            "reason": rejected.reason,
                            "detail": rejected.detail,
                        }
                        rejections.write(json.dumps(line, ensure_ascii=True) + "\n")
        except ValueError:
            if not any(parts.iterdir()):  # of the arguments or the source: nothing to go on with
                shutil.rmtree(staging)
            raise
        kept = sum(writer.splits.values())
        if kept:
            write_manifest(
                staging,
                writer.entries,
                source=str(source),
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
        why = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common()) or "nothing found"
        raise ValueError(f"{source}: no sample could be used ({why}); see {out / REJECTED}")
    return Report(total, kept, total - kept, dict(reasons), dict(writer.splits), dict(ignored),
                  dict(+changed))  # fmt: skip


def _clean(
    item: SourceSample | RejectedSample,
    cleaning: Cleaning,
    need_text: bool,
    changed: "Counter[str]",
) -> SourceSample | RejectedSample:
    """The steps that need no image."""
    if isinstance(item, RejectedSample):
        return item
    if fault := cleaning.fault_of_texts(item.record):
        return RejectedSample(item.name, *fault)
    record = cleaning.cleaned(item.record, changed)
    if need_text and not has_text(record):
        return RejectedSample(item.name, "no text left")
    return replace(item, record=record)


def _with_images(
    items: Iterator[SourceSample | RejectedSample],
    folder: Path,
    settings: ImageSettings,
    engine: Engine,
    workers: int,
) -> Iterator[tuple[SourceSample | RejectedSample, list[ImageFile] | BadImage | None]]:
    """Every item with its images, in order; None for those that were rejected before."""
    batches = deque[list[SourceSample | RejectedSample]]()

    def parts() -> Iterator[ImagePart]:
        while batch := list(islice(items, PART_SIZE)):
            if not rank_and_world_size()[0]:
                batches.append(batch)
            samples = (replace(item, record={}) for item in batch if isinstance(item, SourceSample))
            yield ImagePart(folder, settings, tuple(samples))

    for part in map_units(make_part, parts(), engine, workers, done=ImagePart.done):
        if rank_and_world_size()[0]:
            continue  # the first rank puts the shards together
        images = read_part(part)
        for item in batches.popleft():
            yield item, next(images) if isinstance(item, SourceSample) else None


class _CopyFilter:
    """Rejects copies of what came before, one image each; without fingerprints there are none."""

    def __init__(self, near: bool) -> None:
        self._index, self._names, self._near = CopyIndex(), list[str](), near

    def check(
        self, item: SourceSample | RejectedSample, images: list[ImageFile] | BadImage | None
    ) -> RejectedSample | None:
        if not isinstance(images, list) or len(images) != 1 or images[0].image_hash is None:
            return None
        self._names.append(item.name)
        copy = self._index.add(images[0].image_hash, near=self._near)
        if copy is None:
            return None
        detail = f"{copy.kind} copy ({copy.similarity:.3f}) of {self._names[copy.first]}"
        return RejectedSample(item.name, "copy", detail)


def _rejection(
    item: SourceSample | RejectedSample, images: list[ImageFile] | BadImage | None
) -> RejectedSample | None:
    if isinstance(item, RejectedSample):
        return item
    return (
        RejectedSample(item.name, images.reason, images.detail)
        if isinstance(images, BadImage)
        else None
    )


def is_held_out(key: str, share: float) -> bool:
    """Whether a sample is of the validation split: a function of its key and the share alone."""
    number = int.from_bytes(hashlib.sha256(f"split/{key}".encode()).digest()[:8], "big")
    return number < share * 2**64


def make_key(hint: str, identity: str, taken: set[str]) -> str:
    """A key without dots and slashes: the hint if it will do, otherwise with a hash of identity."""
    if _SAFE_KEY.fullmatch(hint) and hint not in taken:
        return hint
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", hint)[-60:].strip("_-") or "image"
    return f"{readable}_{hashlib.sha256(identity.encode()).hexdigest()[:10]}"


def _check_arguments(
    image_size: int | None, fit: str, shard_size: int, val_share: float, quality: int, workers: int
) -> None:
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, not {image_size}")
    if fit not in get_args(Fit):
        raise ValueError(f"fit must be one of {', '.join(get_args(Fit))}, not {fit!r}")
    if shard_size < 1 or workers < 1:
        raise ValueError(f"shard_size and workers must be at least 1: {shard_size}, {workers}")
    if not 0 <= val_share < 1:
        raise ValueError(f"val_share must be in [0, 1), not {val_share}")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality must be in 1..100, not {quality}")


def _check_out(out: Path, overwrite: bool) -> None:
    """Refuse a folder with anything in it that this build may not replace."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out}: is a file, not a folder")
    there = {path.name for path in out.iterdir()} - {STAGING}
    if there <= {REJECTED}:
        return  # nothing, or what a build that kept nothing left
    strangers = {name for name in there - {REJECTED, MANIFEST} if not _OWN_FILE.fullmatch(name)}
    if strangers:
        raise ValueError(f"{out}: not empty, holds {min(strangers)}; choose a new folder")
    interrupted = (out / STAGING / MOVING).exists() and not (out / MANIFEST).exists()
    if not overwrite and not interrupted:
        raise ValueError(f"{out}: not empty; choose a new folder, or --overwrite the shards in it")


def _move(staging: Path, out: Path) -> None:
    """Put the new files in place of the old ones; there is a manifest only when all are there."""
    (staging / MOVING).touch()
    (out / MANIFEST).unlink(missing_ok=True)
    for path in sorted(out.iterdir()):
        if path.name == REJECTED or _OWN_FILE.fullmatch(path.name):
            path.unlink()
    written = [path for path in staging.iterdir() if path.name not in (PARTS, LOCK, MOVING)]
    for path in sorted(written, key=lambda path: (path.name == MANIFEST, path.name)):
        path.replace(out / path.name)


def member_name(sample: SourceSample, number: int, image: ImageFile) -> str:
    """``jpg``, or of a document ``0.jpg``, ``1.jpg`` ..."""
    return f"{number}.{image.suffix}" if sample.document else image.suffix


class _Writer:
    """Writes samples to numbered shards of each split, and indexes every shard that is full."""

    def __init__(self, folder: Path, shard_size: int) -> None:
        self.entries: list[dict[str, Any]] = []
        self.splits: Counter[str] = Counter()
        self._folder, self._shard_size = folder, shard_size
        self._keys: set[str] = set()
        self._open: dict[str, tuple[Path, BinaryIO, Any]] = {}

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for split in list(self._open):
            self._close(split, index=kind is None)

    def write(
        self, sample: SourceSample, images: list[ImageFile], val_share: float
    ) -> RejectedSample | None:
        """Write one sample, or say why it cannot be."""
        try:
            record = json.dumps(
                sample.record, ensure_ascii=False, allow_nan=False, separators=(",", ":")
            ).encode("utf-8")
        except (ValueError, TypeError, RecursionError) as error:  # a lone surrogate, a date, ...
            return RejectedSample(sample.name, "unreadable text", str(error))
        key = make_key(sample.hint, sample.identity, self._keys)
        if key in self._keys:
            return RejectedSample(sample.name, "key taken", f"another sample has the key {key}")
        self._keys.add(key)
        split = sample.split or ("val" if is_held_out(key, val_share) else "train")
        if self.splits[split] % self._shard_size == 0:
            self._next(split)
        members = {
            member_name(sample, number, image): image.data for number, image in enumerate(images)
        }
        self._open[split][2].write({"__key__": key, **members, "json": record})
        self.splits[split] += 1
        return None

    def _next(self, split: str) -> None:
        import webdataset  # slow to import: it brings torch

        if split in self._open:
            self._close(split)
        path = self._folder / f"{split}-{self.splits[split] // self._shard_size:04d}.tar"
        file = open(path, "wb")
        # Its defaults are the time of writing, and to encode what is bytes already.
        self._open[split] = path, file, webdataset.TarWriter(file, mtime=0, encoder=False)

    def _close(self, split: str, index: bool = True) -> None:
        path, file, writer = self._open.pop(split)
        with file:
            writer.close()
        if index:
            self.entries.append(index_shard(path))
