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
    ImageWork,
    Made,
    Part,
    Unusable,
    make_part,
    read_part,
)
from multimodal.data.builder.records import Found, Rejected, has_text
from multimodal.data.builder.sources import read_source
from multimodal.data.images import Fit
from multimodal.data.near_duplicates import Seen
from multimodal.data.parallel import Engine, alone_in, ranks, units_in_order
from multimodal.data.shards import MANIFEST, index_shard, write_manifest

REJECTED = "rejected.jsonl"
STAGING = ".building"
PARTS, LOCK = "parts", "lock"
MOVING = "moving"  # from when on what is in OUT is this build's
PART_SIZE = 128  # samples in a part: seconds of work, and what a killed process has to do again
_SAFE_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
_OWN_FILE = re.compile(r"[a-z]+-\d{4,}\.(tar|index\.json)")


@dataclass(frozen=True)
class Report:
    """What a build did. ``kept + rejected == found``; ``ignored`` counts what is no sample,
    ``changed`` what cleaning changed."""

    found: int
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
    if not ranks()[0]:  # another rank may come when all is done
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
    work = ImageWork(image_size, fit, quality, cleaning.min_side, cleaning.max_aspect_ratio,
                     fingerprints=bool(cleaning.copies))  # fmt: skip
    clean = (_cleaned(item, cleaning, need_text, changed) for item in items)
    ready = _made(clean, parts, work, engine, workers)
    if ranks()[0]:
        deque(ready, maxlen=0)  # the first rank puts the shards together
        return None
    with alone_in(staging, LOCK):
        for left in staging.glob("*.*"):  # of a build that was interrupted; its parts stay
            left.unlink()
        try:
            with (
                open(staging / REJECTED, "w", encoding="utf-8") as rejections,
                _Writer(staging, shard_size) as writer,
            ):
                copies = _Copies(near=cleaning.copies == "near")
                found = 0
                for item, made in progress(ready):
                    found += 1
                    no = _refused(item, made) or copies.refuse(item, made)
                    if isinstance(item, Found) and isinstance(made, list) and no is None:
                        no = writer.write(item, made, val_share)
                    if no is not None:
                        reasons[no.reason] += 1
                        line = {"sample": no.name, "reason": no.reason, "detail": no.detail}
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
    return Report(found, kept, found - kept, dict(reasons), dict(writer.splits), dict(ignored),
                  dict(+changed))  # fmt: skip


def _cleaned(
    item: Found | Rejected, cleaning: Cleaning, need_text: bool, changed: "Counter[str]"
) -> Found | Rejected:
    """The steps that need no image."""
    if isinstance(item, Rejected):
        return item
    if fault := cleaning.fault_of_texts(item.record):
        return Rejected(item.name, *fault)
    record = cleaning.cleaned(item.record, changed)
    if need_text and not has_text(record):
        return Rejected(item.name, "no text left")
    return replace(item, record=record)


def _made(
    items: Iterator[Found | Rejected], folder: Path, work: ImageWork, engine: Engine, workers: int
) -> Iterator[tuple[Found | Rejected, list[Made] | Unusable | None]]:
    """Every item with its images, in order; None for those that were rejected before."""
    batches = deque[list[Found | Rejected]]()

    def parts() -> Iterator[Part]:
        while batch := list(islice(items, PART_SIZE)):
            if not ranks()[0]:
                batches.append(batch)
            samples = (replace(item, record={}) for item in batch if isinstance(item, Found))
            yield Part(folder, work, tuple(samples))

    for part in units_in_order(make_part, parts(), engine, workers, done=Part.done):
        if ranks()[0]:
            continue  # the first rank puts the shards together
        images = read_part(part)
        for item in batches.popleft():
            yield item, next(images) if isinstance(item, Found) else None


class _Copies:
    """Rejects copies of what came before, one image each; without fingerprints there are none."""

    def __init__(self, near: bool) -> None:
        self._seen, self._names, self._near = Seen(), list[str](), near

    def refuse(self, item: Found | Rejected, made: list[Made] | Unusable | None) -> Rejected | None:
        if not isinstance(made, list) or len(made) != 1 or made[0].fingerprint is None:
            return None
        self._names.append(item.name)
        copy = self._seen.add(made[0].fingerprint, near=self._near)
        if copy is None:
            return None
        detail = f"{copy.kind} copy ({copy.alike:.3f}) of {self._names[copy.first]}"
        return Rejected(item.name, "copy", detail)


def _refused(item: Found | Rejected, made: list[Made] | Unusable | None) -> Rejected | None:
    if isinstance(item, Rejected):
        return item
    return Rejected(item.name, made.reason, made.detail) if isinstance(made, Unusable) else None


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
    made = [path for path in staging.iterdir() if path.name not in (PARTS, LOCK, MOVING)]
    for path in sorted(made, key=lambda path: (path.name == MANIFEST, path.name)):
        path.replace(out / path.name)


def name_of(found: Found, number: int, made: Made) -> str:
    """``jpg``, or of a document ``0.jpg``, ``1.jpg`` ..."""
    return f"{number}.{made.suffix}" if found.document else made.suffix


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

    def write(self, found: Found, made: list[Made], val_share: float) -> Rejected | None:
        """Write one sample, or say why it cannot be."""
        try:
            record = json.dumps(
                found.record, ensure_ascii=False, allow_nan=False, separators=(",", ":")
            ).encode("utf-8")
        except (ValueError, TypeError, RecursionError) as error:  # a lone surrogate, a date, ...
            return Rejected(found.name, "unreadable text", str(error))
        key = make_key(found.hint, found.identity, self._keys)
        if key in self._keys:
            return Rejected(found.name, "key taken", f"another sample has the key {key}")
        self._keys.add(key)
        split = found.split or ("val" if is_held_out(key, val_share) else "train")
        if self.splits[split] % self._shard_size == 0:
            self._next(split)
        images = {name_of(found, number, one): one.data for number, one in enumerate(made)}
        self._open[split][2].write({"__key__": key, **images, "json": record})
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
