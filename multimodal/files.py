"""Read only what is a file. Write a file or a folder completely, or leave what was there.

Reading: a path that a person or a stranger's table names can be a pipe, which blocks, a device,
which never ends, or a sparse file of a terabyte. ``open_file`` refuses them before it reads a byte.

Writing: the data first goes to a temporary name on the same disk, and a rename puts it in place. So
a crash or a full disk never leaves half a file under the final name.

Text is UTF-8, whatever the locale. UTF-16 and UTF-32 are read where a byte order mark says so.
Every path here is local: an address such as ``s3://...`` is refused by name (``local_path``).
"""

import codecs
import errno
import io
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

MAX_FILE = 1 << 30  # bytes of a file that is read as a whole: images, texts, JSON
MAX_SPARSE = 1 << 30  # a longer file must have 1 of SPARSENESS bytes on the disk
SPARSENESS = 64
# ``Path`` makes one slash of the two in s3://, so one counts. C:/ is no address.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.:_-]+:/")
# The machine's fault, not the file's: it may be readable later.
_OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE)


_MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    *((mark, "utf-32") for mark in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
    *((mark, "utf-16") for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
)
_JSON = json.JSONDecoder(parse_constant=lambda name: None)  # NaN and Infinity are not JSON


class UnreadableText(ValueError):
    """Bytes, a text or a record of a sample that cannot be used. Names no file."""


class UnreadableFile(ValueError):
    """A path that names no file that can be read. ``reason``: why, without the path."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


def address_of(path: str | Path) -> str | None:
    """The address that a path is: ``s3://bucket/data``, ``https://...``. None: it is local."""
    text = str(path)
    if _ADDRESS.match(text) is None:
        return None
    if isinstance(path, Path) and not text.startswith("file:"):
        return text.replace(":/", "://", 1)
    return text


def local_path(path: str | Path) -> Path:
    """A path on this machine.

    Raises:
        ValueError: for an address. Otherwise ``Path`` would make a folder ``s3:`` of it.
    """
    if (address := address_of(path)) is not None:
        raise ValueError(
            f"{address}: an address, but this has to be a path on this machine (only shard folders "
            "with a manifest are read at addresses: copy other inputs here, and outputs there)"
        )
    return Path(path)


def open_file(path: str | Path, max_bytes: int | None = None) -> io.BufferedReader:
    """Open a regular file to read its bytes.

    Args:
        path: a local path.
        max_bytes: the longest file. None: any length.

    Raises:
        UnreadableFile: for an address, a path that does not exist, a folder, a pipe, a device, a
            file that is too long, or one that is nearly all holes.
        OSError: if the machine cannot read it now: no memory, too many open files.
    """
    if (address := address_of(path)) is not None:
        raise UnreadableFile(address, "an address, not a file on this machine: copy it first")
    try:
        # A pipe without a writer would block here without O_NONBLOCK. Files do not care.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UnreadableFile(path, "no such file") from error
    except OSError as error:
        if error.errno in _OF_THE_MACHINE:
            raise
        reason = "not a regular file" if error.errno == errno.ENXIO else error.strerror or error
        raise UnreadableFile(path, f"cannot be read ({reason})") from error
    except ValueError as error:  # a NUL in the name, or a lone surrogate
        raise UnreadableFile(path, f"cannot be the name of a file ({error})") from error
    try:
        about = os.fstat(descriptor)
        size, blocks = about.st_size, getattr(about, "st_blocks", None)
        if stat.S_ISDIR(about.st_mode):
            raise UnreadableFile(path, "is a folder, not a file")
        if not stat.S_ISREG(about.st_mode):
            raise UnreadableFile(path, "not a regular file (a pipe or a device)")
        if max_bytes is not None and size > max_bytes:
            raise UnreadableFile(path, f"{size:,} bytes, over the limit of {max_bytes:,}")
        if blocks is not None and size > max(MAX_SPARSE, blocks * 512 * SPARSENESS):
            raise UnreadableFile(
                path,
                f"{size:,} bytes, of which only {blocks * 512:,} are on the disk: an unfinished "
                "download?",
            )
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | Path, max_bytes: int = MAX_FILE) -> bytes:
    """The bytes of a regular file. Errors as in ``open_file``."""
    with open_file(path, max_bytes) as file:
        try:
            return file.read()
        except OSError as error:
            if error.errno in _OF_THE_MACHINE:
                raise
            raise UnreadableFile(path, f"cannot be read ({error.strerror or error})") from error


def decode_text(data: bytes, *, lossy: bool = False) -> str:
    """Text in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Args:
        lossy: a byte that is not UTF-8 becomes a lone surrogate, and what is wrong in the others a
            replacement character.

    Raises:
        UnreadableText: without ``lossy``, if it is none of these.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8-sig")
    errors = "surrogateescape" if encoding == "utf-8-sig" else "replace"
    try:
        return data.decode(encoding, errors if lossy else "strict")
    except UnicodeDecodeError as error:
        raise UnreadableText(f"not UTF-8 ({error})") from error


def read_text(path: str | Path, max_bytes: int = MAX_FILE) -> str:
    """The text of a regular file, see ``decode_text``.

    Raises:
        UnreadableFile: as in ``open_file``, and for other encodings.
    """
    try:
        return decode_text(read_bytes(path, max_bytes))
    except UnreadableText as error:
        raise UnreadableFile(path, str(error)) from error


def lines_of(text: str) -> list[str]:
    """The lines of a text: what ends in \\n, \\r\\n or \\r.

    ``str.splitlines`` also breaks at characters within lines, such as U+2028.
    """
    return [line.removesuffix("\n") for line in io.StringIO(text, newline=None)]


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. NaN and infinite numbers become None. Bytes: see ``decode_text``.

    Raises:
        UnreadableText: for anything else. So is JSON that is nested some thousand deep, for which
            Python raises RecursionError, and a number of thousands of digits.
    """
    text = decode_text(text) if isinstance(text, bytes) else text
    try:
        return _JSON.decode(text)
    except RecursionError as error:
        raise UnreadableText("not readable as JSON (nested too deep)") from error
    except ValueError as error:
        raise UnreadableText(f"not readable as JSON ({error})") from error


def read_json(path: str | Path, max_bytes: int = MAX_FILE) -> Any:
    """The value in a JSON file, see ``parse_json``.

    Raises:
        UnreadableFile: as in ``open_file``, and for what is not JSON.
    """
    try:
        return parse_json(read_bytes(path, max_bytes))
    except UnreadableText as error:
        raise UnreadableFile(path, str(error)) from error


def read_yaml(path: str | Path, max_bytes: int = MAX_FILE) -> Any:
    """The value in a YAML file.

    Raises:
        UnreadableFile: as in ``open_file``, and for what is not YAML.
    """
    import yaml

    text = read_text(path, max_bytes)
    try:
        return yaml.safe_load(text)
    except RecursionError as error:
        raise UnreadableFile(path, "not readable as YAML (nested too deep)") from error
    # Its reader has these for values that a tag promises, such as !!int "".
    except (ValueError, yaml.YAMLError, ArithmeticError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UnreadableFile(path, f"not readable as YAML ({reason})") from error


def temporary_path(path: Path, shared: bool = False) -> Path:
    """``.NAME.part`` beside ``path``.

    Args:
        shared: ``.NAME.RANDOM.part``, another one at each call. A process id would not do: threads
            share it, and each container has a process 1.
    """
    return path.with_name(f".{path.name}.{token_hex(8)}.part" if shared else f".{path.name}.part")


@contextmanager
def atomic_file(path: Path, *, shared: bool = False, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path, and rename it to ``path`` on success.

    Args:
        path: the file to write. Its folder has to exist.
        shared: several may write this file at the same time: threads, processes, machines. Each
            then has a temporary name of its own. Otherwise a process that was killed leaves one
            temporary file at most, and the next writer replaces it.
        sync: bring the data to the disk (fsync) before the rename. It then survives a loss of
            power.

    Yields:
        The temporary path. On any error it is removed, and ``path`` keeps what it was.
    """
    part = temporary_path(local_path(path), shared)
    try:
        yield part
        if sync:
            _sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: object, *, shared: bool = False) -> None:
    """Write a JSON file (UTF-8, indented) by ``atomic_file``.

    What UTF-8 cannot hold, the bytes of a file name for instance, is escaped (``\\udcff``): that is
    JSON, and reads as it was.
    """
    with atomic_file(path, shared=shared) as part:
        text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
        part.write_text(text, "utf-8", errors="backslashreplace")


@contextmanager
def atomic_folder(folder: Path, last: str = "config.json") -> Iterator[Path]:
    """Yield a temporary folder, and move its files into ``folder`` on success.

    On an error during writing, a full disk for instance, ``folder`` keeps what it had. Files of
    other names stay. All data is on the disk before the first file moves. Files move one by one.

    Args:
        folder: is created where it does not exist.
        last: the file that moves last: the one that describes the others.

    Yields:
        An empty folder inside ``folder``, so that both are on one disk.

    Raises:
        OSError: if something could not be written.
    """
    from safetensors import SafetensorError

    folder = local_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".part"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        _set_default_permissions(temporary)
        files = [path for path in temporary.rglob("*") if path.is_file()]
        for path in files:
            _sync(path)
        for path in sorted(files, key=lambda path: (path == temporary / last, path)):
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    except SafetensorError as error:
        raise OSError(f"{folder}: could not be written ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to ``folder`` on success.

    Args:
        folder: a path that does not exist, or an empty folder.

    Yields:
        An empty folder. On any error it is removed.

    Raises:
        ValueError: if ``folder`` is a file or is not empty.
    """
    folder = local_path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty; name a new folder")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; name a new folder")
    target = folder.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    # mkdtemp makes a private folder. The one inside it gets the usual permissions.
    private = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=target.parent))
    try:
        temporary = private / "new"
        temporary.mkdir()
        yield temporary
        _set_default_permissions(temporary)
        temporary.rename(target)
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _set_default_permissions(folder: Path) -> None:
    """Give every file the permissions of a new file: safetensors lets only the owner read some."""
    new = folder / ".new"
    new.touch()
    mode = new.stat().st_mode
    new.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
