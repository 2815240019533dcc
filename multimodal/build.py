"""Turn images and text into verified webdataset shards.

The same source gives the same bytes. All is written in ``OUT/.building`` and moved in place at the
end, the manifest last: a run that was interrupted leaves nothing that could be taken for a result.
What could not be used is named, with the reason, in ``OUT/rejected.jsonl``.
"""

import hashlib
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from PIL import Image

from multimodal.duplicates import Fingerprint, Seen, fingerprint
from multimodal.images import Fit, fit_image, open_image, orientation, read_image_file
from multimodal.parallel import in_order
from multimodal.records import Found, Rejected
from multimodal.shards import MANIFEST, index_shard, write_manifest
from multimodal.sources import read_source

REJECTED = "rejected.jsonl"
STAGING = ".building"
_SUFFIX = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_SAFE_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
_OWN_FILE = re.compile(r"[a-z]+-\d{4,}\.(tar|index\.json)")


@dataclass(frozen=True)
class Report:
    """What a build did. ``kept + rejected == found``; ``ignored`` counts what is no sample."""

    found: int
    kept: int
    rejected: int
    reasons: dict[str, int]
    splits: dict[str, int]
    ignored: dict[str, int]


@dataclass(frozen=True)
class _Ready:
    """A sample that can be written: ``members`` maps suffixes to bytes."""

    found: Found
    members: dict[str, bytes]
    fingerprint: Fingerprint | None = None


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
    drop_copies: Literal["", "exact", "near"] = "",
    overwrite: bool = False,
    workers: int = 1,
    progress: Callable[[Iterable[Found | Rejected]], Iterable[Found | Rejected]] = iter,
) -> Report:
    """Write ``OUT/train-0000.tar`` ..., their indexes, the manifest and ``rejected.jsonl``.

    Args:
        source: see ``multimodal.sources.read_source``.
        out: a new or empty folder.
        image_size: bring images to this square size by ``fit``. ``None``: a JPEG, PNG or WebP that
            is RGB, upright and not animated is stored byte for byte (its metadata too).
        shard_size: samples in a shard.
        val_share: this share goes to the split ``val``, chosen by a hash of the key: adding samples
            moves none. What a source of shards already calls ``val`` or ``test`` stays that.
        quality: of JPEG, where an image has to be encoded again; from a PNG it stays a PNG.
        image_column, text_column: of a table; guessed if not given.
        images, answers: of tables and annotations, see ``read_source``.
        need_text: whether to reject images without captions, questions or label.
        drop_copies: reject an image whose pixels are those of another of the source (``exact``), or
            nearly (``near``, for photos: see multimodal/duplicates.py); the first is kept.
        overwrite: replace what an earlier build left in ``out``, and nothing else.
        workers: threads that decode; the result does not depend on it.
        progress: wraps the stream of samples (``tqdm``, for instance).
    Errors: ``ValueError`` if an argument, the source or ``out`` cannot be used, or if no sample
        could be; then ``out`` holds what it held, and a new ``rejected.jsonl``.
    """
    source, out = Path(source), Path(out)
    _check_arguments(image_size, fit, shard_size, val_share, quality, workers)
    if source.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{out}: the source {source} lies in it; choose another folder")
    _check_out(out, overwrite)
    staging = out / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    ignored: Counter[str] = Counter()
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

    def prepare(item: Found | Rejected) -> _Ready | Rejected:
        if isinstance(item, Rejected):
            return item
        ready = _prepare(item, image_size, fit, quality)
        if drop_copies and isinstance(ready, _Ready):
            data = next(data for kind, data in ready.members.items() if kind != "json")
            return replace(ready, fingerprint=fingerprint(data, item.name))
        return ready

    seen, names = Seen(), list[str]()

    def copy_of(ready: _Ready) -> Rejected | None:
        if ready.fingerprint is None:
            return None
        names.append(ready.found.name)
        copy = seen.add(ready.fingerprint, near=drop_copies == "near")
        if copy is None:
            return None
        detail = f"{copy.kind} copy ({copy.alike:.3f}) of {names[copy.first]}"
        return Rejected(ready.found.name, "copy", detail)

    try:
        with ExitStack() as stack:
            rejections = stack.enter_context(open(staging / REJECTED, "w", encoding="utf-8"))
            writer = stack.enter_context(_Writer(staging, shard_size))
            reasons: Counter[str] = Counter()
            found = 0
            for item in in_order(prepare, progress(items), workers):
                found += 1
                if isinstance(item, Rejected):
                    no: Rejected | None = item
                else:
                    no = copy_of(item) or writer.write(item, val_share)
                if no is not None:
                    reasons[no.reason] += 1
                    line = {"sample": no.name, "reason": no.reason, "detail": no.detail}
                    rejections.write(json.dumps(line, ensure_ascii=True) + "\n")
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
                drop_copies=drop_copies,
                rejected=found - kept,
            )
            _move(staging, out)
        else:
            (staging / REJECTED).replace(out / REJECTED)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if not kept:
        why = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common()) or "nothing found"
        raise ValueError(f"{source}: no sample could be used ({why}); see {out / REJECTED}")
    return Report(found, kept, found - kept, dict(reasons), dict(writer.splits), dict(ignored))


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
    if not overwrite:
        raise ValueError(f"{out}: not empty; choose a new folder, or --overwrite the shards in it")


def _move(staging: Path, out: Path) -> None:
    """Put the new files in place of the old ones; there is a manifest only when all are there."""
    (out / MANIFEST).unlink(missing_ok=True)
    for path in sorted(out.iterdir()):
        if path.name == REJECTED or _OWN_FILE.fullmatch(path.name):
            path.unlink()
    for path in sorted(staging.iterdir(), key=lambda path: (path.name == MANIFEST, path.name)):
        path.replace(out / path.name)


def _prepare(found: Found, image_size: int | None, fit: Fit, quality: int) -> _Ready | Rejected:
    try:
        record = json.dumps(
            found.record, ensure_ascii=False, allow_nan=False, separators=(",", ":")
        ).encode("utf-8")
    except (ValueError, TypeError, RecursionError) as error:  # a lone surrogate, a date, ...
        return Rejected(found.name, "unreadable text", str(error))
    try:
        data = read_image_file(found.image) if isinstance(found.image, Path) else found.image
        image = open_image(data, name=found.name)
        with Image.open(io.BytesIO(data)) as original:
            suffix = _SUFFIX.get(original.format or "", "jpg")
            plain = (
                original.format in _SUFFIX
                and original.mode == "RGB"
                and not original.has_transparency_data
                and getattr(original, "n_frames", 1) == 1
                and orientation(original) == 1
            )
    except ValueError as error:
        detail = str(error).removeprefix(f"{found.name}: ")
        return Rejected(found.name, "unreadable image", detail)
    if image_size is not None:
        image = fit_image(image, image_size, fit)
    elif plain:
        return _Ready(found, {suffix: data, "json": record})
    buffer = io.BytesIO()
    if suffix == "png":
        image.save(buffer, "PNG")
    else:
        suffix = "jpg"
        image.save(buffer, "JPEG", quality=quality)
    return _Ready(found, {suffix: buffer.getvalue(), "json": record})


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

    def write(self, sample: _Ready, val_share: float) -> Rejected | None:
        """Write one sample, or say that its key is taken."""
        found = sample.found
        key = make_key(found.hint, found.identity, self._keys)
        if key in self._keys:
            return Rejected(found.name, "key taken", f"another sample has the key {key}")
        self._keys.add(key)
        split = found.split or ("val" if is_held_out(key, val_share) else "train")
        if self.splits[split] % self._shard_size == 0:
            self._next(split)
        self._open[split][2].write({"__key__": key, **sample.members})
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
