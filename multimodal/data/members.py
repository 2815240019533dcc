"""The members of a shard: which sample each belongs to, and where its bytes are."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from multimodal.data.formats.tar import BadTar, only_zeros, read_members
from multimodal.data.remote.pieces import DamagedShard
from multimodal.files import UnreadableFile

# Tar writers pad to 10 KiB. A preallocated file that was never filled ends in more zeros.
MAX_PADDING = 1 << 16
OTHER_MEMBERS = "members that belong to no sample"  # hidden files, files without a suffix


def split_name(name: str) -> tuple[str, str] | None:
    """(key, suffix) of a member: split at the first dot after the last slash, as in webdataset.

    Bytes of the key that are not UTF-8 are escaped.

    Returns:
        None for a file that belongs to no sample: hidden (``._a.jpg`` of macOS), in ``__MACOSX``,
        or without a suffix (``README``).
    """
    name = name.encode("utf-8", "backslashreplace").decode()
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    if not (stem and suffix) or "__MACOSX" in folder.split("/"):
        return None
    return folder + slash + stem, suffix.lower()


def scan(shard: Path, ignored: Counter[str] | None = None) -> Iterator[tuple[str, str, int, int]]:
    """Read the headers of a shard.

    Args:
        shard: a tar.
        ignored: counts OTHER_MEMBERS.

    Yields:
        (key, suffix, offset, size) of each member, in order. Offset and size are in bytes.

    Raises:
        DamagedShard: if the tar is cut off, damaged, or has members that are not plain files.
    """
    try:
        end = 0
        for member in read_members(shard):
            end = member.end
            if member.folder:
                continue
            if not member.plain:
                raise DamagedShard(f"{shard}: member {member.name!r} is not a plain file")
            if (name := split_name(member.name)) is not None:
                yield *name, member.offset, member.size
            elif ignored is not None:
                ignored[OTHER_MEMBERS] += 1
    except BadTar as error:
        raise DamagedShard(f"{shard}: {error}") from error
    except UnreadableFile as error:
        raise DamagedShard(str(error)) from error
    # A block of zeros ends a tar. So the rest must be zeros, and not many.
    size = shard.stat().st_size
    if end > size:
        raise DamagedShard(f"{shard}: cut off, {size} bytes where at least {end} were expected")
    if size - end < 1024:
        raise DamagedShard(f"{shard}: cut off, the end-of-archive blocks are missing")
    if not only_zeros(shard, end, size):
        raise DamagedShard(f"{shard}: unreadable data after byte {end}: a damaged header?")
    if size - end > MAX_PADDING:
        raise DamagedShard(f"{shard}: ends in {size - end} zeros: an unfinished download?")
