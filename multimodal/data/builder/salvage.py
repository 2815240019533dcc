"""Read what can be read of a damaged shard, and name what cannot.

A tar has no table of contents, so a reader that goes on after damage can glue the image of one
sample to the caption of another, and one that stops loses what follows in silence. This one does
neither.
"""

import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from multimodal.data.builder.records import Slice
from multimodal.data.documents import image_suffixes, is_plain_text
from multimodal.data.samples import TEXT_SUFFIXES, Sample
from multimodal.data.shards import MAX_PADDING, DamagedShard, only_zeros, read_index, split_name


@dataclass(frozen=True)
class LostSample:
    """Something in a shard that could not be read whole: its name if known, and why."""

    name: str
    reason: str


@dataclass
class _Run:
    """Members that stand together and have one key: (suffix, offset, size) each."""

    key: str
    members: list[tuple[str, int, int]]

    def sample(self, shard: Path) -> Sample:
        places = {suffix: Slice(shard, offset, length) for suffix, offset, length in self.members}
        return Sample(self.key, Members(places))

    def is_whole(self, shard: Path) -> bool:
        """Whether it has an image and a text, or is plain text."""
        suffixes = [suffix for suffix, _, _ in self.members]
        if image_suffixes(suffixes):
            return any(suffix in TEXT_SUFFIXES for suffix in suffixes)
        try:
            return is_plain_text(self.sample(shard).record)
        except ValueError:
            return False


class Members(Mapping[str, bytes]):
    """The members of a sample, each read when it is asked for; ``places``: where they lie."""

    def __init__(self, places: dict[str, Slice]) -> None:
        self.places = places

    def __getitem__(self, suffix: str) -> bytes:
        return self.places[suffix].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def salvage(shard: Path) -> Iterator[Sample | LostSample]:
    """The samples of a shard in order, damaged or not; its index is used if there is one.

    Goes on after a damaged header with the next good one. Only members that stand together make a
    sample, so nothing is paired by chance: a key that comes back later is ``LostSample`` each time.
    A sample may lack its image or its text (its other half was lost): that is for the caller to
    refuse. Bytes that belong to no sample are ``LostSample`` by their place in the file.
    """
    size = shard.stat().st_size
    runs, gaps = _walk(shard, size)
    times = Counter(run.key for run in runs)
    for run in runs:
        if reason := _fault(run, times, size):
            yield LostSample(f"{shard}: {run.key or run.members[0][0]}", reason)
            continue
        yield run.sample(shard)
    try:
        for indexed in read_index(shard):
            if indexed["key"] not in times:
                yield LostSample(f"{shard}: {indexed['key']}", "in the index, but not in the shard")
        return  # the index names everything: gaps would count a loss twice
    except DamagedShard:
        pass
    for start, stop, number in gaps:
        beside = runs[max(0, number - 1) : number + 1]
        # A neighbour without its image or its text is what this gap cost, and is named already.
        if any(_fault(run, times, size) or not run.is_whole(shard) for run in beside):
            continue
        if not only_zeros(shard, start, stop):
            yield LostSample(f"{shard}: bytes {start} to {stop}", "unreadable: a damaged header?")
        elif stop < size or stop - start > MAX_PADDING:
            yield LostSample(f"{shard}: bytes {start} to {stop}", "only zeros: a hole in the file?")
        elif stop - start < 1024:
            yield LostSample(f"{shard}: byte {size}", "cut off: what followed is not known")


def _walk(shard: Path, size: int) -> tuple[list[_Run], list[tuple[int, int, int]]]:
    """The runs of a shard, and its gaps: (first byte, last byte, number of runs before it)."""
    runs: list[_Run] = []
    gaps: list[tuple[int, int, int]] = []
    end = 0
    try:
        with tarfile.open(shard, "r:", ignore_zeros=True) as tar:
            for member in tar:
                if member.offset > end:
                    gaps.append((end, member.offset, len(runs)))
                plain = member.isreg() and not member.issparse()
                end = member.offset_data + (-(-member.size // 512) * 512 if plain else 0)
                if member.isdir():
                    continue
                key, suffix = split_name(member.name) if plain else ("", "")
                if not runs or runs[-1].key != key or not key:
                    runs.append(_Run(key, []))
                runs[-1].members.append((suffix or member.name, member.offset_data, member.size))
    except (tarfile.TarError, EOFError, OverflowError, ValueError):
        pass  # what was not reached is the last gap
    if end <= size:
        gaps.append((end, size, len(runs)))
    return runs, gaps


def _fault(run: _Run, times: Counter[str], size: int) -> str | None:
    if not run.key:
        return "not a plain file of the name KEY.SUFFIX"
    if times[run.key] > 1 or len({suffix for suffix, _, _ in run.members}) < len(run.members):
        return "its key appears twice in the shard"
    if any(offset + length > size for _, offset, length in run.members):
        return "the shard is cut off inside it"
    return None
