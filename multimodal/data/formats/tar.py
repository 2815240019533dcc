"""Read the headers of a tar of any size, without its data, whatever the headers claim.

The standard library parses the blocks of 512 bytes, and this reader walks over them. ``tarfile``
itself trusts the headers too much for files of strangers: it reads a long name of a terabyte,
follows a chain of 3,000 of them by recursion, keeps every member in memory, and takes minutes to
skip a gigabyte of zeros. Formats: ustar, pax (POSIX.1-2001) and GNU.
"""

import errno
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from multimodal.files import open_file

BLOCK = tarfile.BLOCKSIZE  # 512
MAX_LONG_HEADER = 1 << 20  # bytes of a long name or of pax fields
MAX_LONG_HEADERS = 16  # of one member; writers use one or two
_LONG_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
)
_STEP = 1 << 20


class BadTar(ValueError):
    """A header that cannot be one. ``resume``: where the next one can be."""

    def __init__(self, message: str, resume: int) -> None:
        super().__init__(message)
        self.resume = resume


@dataclass(frozen=True)
class Member:
    """A member of a tar, as its header says. Nothing says that the file is long enough.

    Attributes:
        name: with ``/`` between folders. Bytes that are not UTF-8 are surrogates.
        start: of its headers, in bytes of the file.
        offset, size: of its data.
        end: where the next header is.
        plain: whether it is a file with data, not a folder, a link, a device or a sparse file.
        folder: whether it is a folder.
    """

    name: str
    start: int
    offset: int
    size: int
    end: int
    plain: bool
    folder: bool


def read_members(path: Path, *, repair: bool = False) -> Iterator[Member]:
    """The members of a tar, in order.

    Args:
        path: a regular file, not compressed.
        repair: go on at the next good header after zeros or damage. Otherwise a block of zeros
            ends the tar.

    Raises:
        BadTar: without ``repair``, for a block that is no header.
        UnreadableFile: if the path names no file that can be read.
    """
    with open_file(path) as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        position = 0
        while position < size:
            try:
                member = _read_member(descriptor, position, size)
            except BadTar as error:
                if not repair:
                    raise
                position = error.resume
                continue
            if member is not None:
                yield member
                position = member.end
            elif repair:
                data = _next_data(descriptor, position, size)
                position = size if data == size else data // BLOCK * BLOCK
            else:
                return


def only_zeros(path: Path, start: int, stop: int) -> bool:
    """Whether all bytes of a file in [start, stop) are zero. Holes cost nothing."""
    with open_file(path) as file:
        return _next_data(file.fileno(), start, stop) == stop


def _next_data(descriptor: int, start: int, stop: int) -> int:
    """The first byte in [start, stop) that is not zero. ``stop`` if all are."""
    position = start
    while position < stop:
        if hasattr(os, "SEEK_DATA"):
            try:
                position = os.lseek(descriptor, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # a hole up to the end
                    return stop
        data = os.pread(descriptor, max(min(_STEP, stop - position), 0), position)
        if not data:
            return stop
        if rest := data.lstrip(b"\0"):
            return position + len(data) - len(rest)
        position += len(data)
    return stop


def _read_member(descriptor: int, start: int, end: int) -> Member | None:
    """The member whose headers begin at ``start``. None for a block of zeros."""
    position, name, fields = start, None, dict[str, str]()
    for _ in range(MAX_LONG_HEADERS + 1):
        block = os.pread(descriptor, BLOCK, position)
        if position == start and not block.strip(b"\0"):
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise BadTar(f"byte {position}: not a header ({error})", start + BLOCK) from error
        if header.size < 0:
            raise BadTar(f"byte {position}: {header.size} bytes of data", start + BLOCK)
        position += BLOCK
        if header.type not in _LONG_HEADERS:
            return _member(header, start, position, name, fields)
        if header.size > MAX_LONG_HEADER or position + header.size > end:
            raise BadTar(f"byte {position}: a header of {header.size:,} bytes", start + BLOCK)
        data = os.pread(descriptor, header.size, position)
        position += _padded(header.size)
        if header.type == tarfile.GNUTYPE_LONGNAME:
            name = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        elif header.type == tarfile.XGLTYPE:
            if {"path", "size"} & _pax_fields(data, start).keys():
                raise BadTar(f"byte {position}: one name or size for all", start + BLOCK)
        elif header.type != tarfile.GNUTYPE_LONGLINK:
            fields |= _pax_fields(data, start)
    raise BadTar(f"byte {start}: over {MAX_LONG_HEADERS} long headers of a member", position)


def _member(
    header: tarfile.TarInfo, start: int, offset: int, name: str | None, fields: dict[str, str]
) -> Member:
    """A member by its own header, and the long headers before it."""
    folder, size = header.isdir(), header.size
    if name is None:
        name = header.name
    elif folder:
        name = name.rstrip("/")
    if "path" in fields:
        name = fields["path"].rstrip("/")
    if "size" in fields:
        digits = fields["size"]
        if not (digits.isascii() and digits.isdecimal() and len(digits) < 20):
            raise BadTar(f"byte {start}: {name!r} has a size of {digits[:40]!r}", start + BLOCK)
        size = int(digits)
    sparse = header.type == tarfile.GNUTYPE_SPARSE or any(
        field.startswith("GNU.sparse") for field in fields
    )
    # As POSIX asks for, what is of an unknown type is skipped with its data.
    has_data = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
    end = offset + (_padded(size) if has_data else 0)
    return Member(name, start, offset, size, end, header.isreg() and not sparse, folder)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _pax_fields(data: bytes, position: int) -> dict[str, str]:
    """The fields of a pax header: records of ``LENGTH KEY=VALUE\\n``, LENGTH that of the record."""
    fields: dict[str, str] = {}
    start = 0
    while start < len(data) and data[start] != 0:
        space = data.find(b" ", start, start + 12)
        digits = data[start:space] if space > 0 else b""
        stop = start + int(digits) if digits.isdigit() else 0
        key, equals, value = data[space + 1 : stop - 1].partition(b"=")
        if not space < stop <= len(data) or not equals or data[stop - 1 : stop] != b"\n":
            raise BadTar(f"byte {position}: not the fields of pax", position + BLOCK)
        fields[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        start = stop
    return fields
