"""Read the intact samples of a damaged shard, and name the lost ones.

A tar has no table of contents. A reader that continues after damage can join the image of one
sample with the caption of another. A reader that stops loses the rest silently. This reader does
neither.
"""

import bz2
import gzip
import hashlib
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multimodal.data.documents import image_suffixes, is_plain_text
from multimodal.data.formats.tar import only_zeros, read_members
from multimodal.data.members import MAX_PADDING, OTHER_MEMBERS, split_name
from multimodal.data.samples import RECORD_MEMBERS, Sample
from multimodal.data.shards import DamagedShard, read_index
from multimodal.data.tables.records import Slice
from multimodal.files import MAX_FILE, UnreadableFile, atomic_file, open_file

_PACKED: dict[str, Any] = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# A packed tar may be this many times as large unpacked, or MAX_FILE: images hardly shrink.
MAX_RATIO = 64
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def is_tar(path: Path) -> bool:
    """Whether a name is that of a tar, packed or not. Hidden files are none."""
    return path.name.lower().endswith(TAR_SUFFIXES) and not path.name.startswith(".")


def unpacked(tar: Path, workspace: Path | None) -> Path:
    """A tar whose members can be read in any order.

    Args:
        tar: if it is packed, it is written unpacked to the workspace, unless it is there already.
            A packed file that is cut off or damaged gives what comes before the damage.
        workspace: a folder.

    Raises:
        ValueError: if nothing can be unpacked, if it becomes far too large, or if a packed tar has
            no workspace.
    """
    opener = _PACKED.get(tar.suffix.lower())
    if opener is None:
        return tar
    if workspace is None:
        raise ValueError(f"{tar}: packed tars are read by: multimodal data build")
    stat = tar.stat()
    inputs = f"{tar.resolve()}/{stat.st_size}/{stat.st_mtime_ns}"
    target = workspace / f"{hashlib.sha256(os.fsencode(inputs)).hexdigest()[:32]}.tar"
    if not target.exists():
        workspace.mkdir(parents=True, exist_ok=True)
        with (
            atomic_file(target, shared=True) as part,
            opener(tar, "rb") as source,
            open(part, "wb") as file,
        ):
            try:
                while data := source.read1(1 << 16):  # read() would lose what is before a cut
                    file.write(data)
                    if file.tell() > max(MAX_FILE, MAX_RATIO * stat.st_size):
                        raise ValueError(
                            f"unpacked it has more than {file.tell():,} bytes, and packed "
                            f"{stat.st_size:,}: unpack it yourself, if it is not a bomb"
                        )
            except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the machine's fault: a full disk, for instance
                if not file.tell():
                    raise ValueError(f"cannot be unpacked ({error})") from error
    return target


@dataclass(frozen=True)
class LostSample:
    """A part of a shard that cannot be read: its key, or the place, and the reason."""

    key: str
    reason: str


@dataclass
class _Run:
    """Neighbouring members with the same key: (suffix, offset, size) each."""

    key: str
    members: list[tuple[str, int, int]]

    def sample(self, shard: Path) -> Sample:
        slices = {suffix: Slice(shard, offset, size) for suffix, offset, size in self.members}
        return Sample(self.key, Members(slices))

    def is_complete(self, shard: Path) -> bool:
        """Whether it has an image and a text, or is plain text."""
        suffixes = [suffix for suffix, _, _ in self.members]
        if image_suffixes(suffixes):
            return any(suffix in RECORD_MEMBERS for suffix in suffixes)
        try:
            return is_plain_text(self.sample(shard).record)
        except ValueError:
            return False


class Members(Mapping[str, bytes]):
    """The members of a sample by suffix. Their bytes are read on access."""

    def __init__(self, slices: dict[str, Slice]) -> None:
        self.slices = slices

    def __getitem__(self, suffix: str) -> bytes:
        return self.slices[suffix].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.slices)

    def __len__(self) -> int:
        return len(self.slices)


def salvage(shard: Path, ignored: Counter[str] | None = None) -> Iterator[Sample | LostSample]:
    """Read the samples of a shard in order, whether it is damaged or not.

    After a damaged header, reading goes on at the next good header. Only neighbouring members form
    a sample, so an image never gets the text of another one. A key that occurs again later is lost
    each time. The index of the shard, if there is one, gives the names of more lost samples.

    Args:
        shard: a tar.
        ignored: counts members that belong to no sample.

    Yields:
        A ``Sample``, which may lack its image or its text: the caller has to check. A
        ``LostSample`` for each sample that is not intact, and for bytes that belong to no sample.
    """
    try:
        with open_file(shard) as file:
            size = os.fstat(file.fileno()).st_size
        runs, gaps = _walk(shard, size, Counter() if ignored is None else ignored)
    except UnreadableFile as error:
        yield LostSample(str(shard), error.reason)
        return
    counts = Counter(run.key for run in runs)
    for run in runs:
        if reason := _fault(run, counts, size):
            yield LostSample(run.key or run.members[0][0], reason)
            continue
        yield run.sample(shard)
    try:
        for indexed in read_index(shard):
            if indexed["key"] not in counts:
                yield LostSample(indexed["key"], "in the index, but not in the shard")
        return  # the index names all samples, so gaps would count a loss twice
    except DamagedShard:
        pass
    for start, stop, number in gaps:
        neighbours = runs[max(0, number - 1) : number + 1]
        # An incomplete neighbour is what was lost in this gap, and it has a name.
        if any(_fault(run, counts, size) or not run.is_complete(shard) for run in neighbours):
            continue
        if not only_zeros(shard, start, stop):
            yield LostSample(f"bytes {start} to {stop}", "unreadable: a damaged header?")
        elif stop < size or stop - start > MAX_PADDING:
            yield LostSample(f"bytes {start} to {stop}", "only zeros: a hole in the file?")
        elif stop - start < 1024:
            yield LostSample(f"byte {size}", "cut off: what followed is not known")


def _walk(
    shard: Path, size: int, ignored: Counter[str]
) -> tuple[list[_Run], list[tuple[int, int, int]]]:
    """The runs of a shard, and its gaps: (first byte, last byte, number of runs before it)."""
    runs: list[_Run] = []
    gaps: list[tuple[int, int, int]] = []
    end = 0
    for member in read_members(shard, repair=True):
        if member.start > end:
            gaps.append((end, member.start, len(runs)))
        end = member.end
        if member.folder:
            continue
        name = split_name(member.name) if member.plain else ("", member.name)
        if name is None:
            ignored[OTHER_MEMBERS] += 1
            continue
        key, suffix = name
        if not runs or runs[-1].key != key or not key:
            runs.append(_Run(key, []))
        runs[-1].members.append((suffix, member.offset, member.size))
    if end <= size:
        gaps.append((end, size, len(runs)))
    return runs, gaps


def _fault(run: _Run, counts: Counter[str], size: int) -> str | None:
    """Why a run is not an intact sample, if it is not."""
    if not run.key:
        return "not a plain file"
    if counts[run.key] > 1 or len({suffix for suffix, _, _ in run.members}) < len(run.members):
        return "its key appears twice in the shard"
    if any(offset + length > size for _, offset, length in run.members):
        return "the shard is cut off inside it"
    return None
