"""How damage of a checkpoint is noticed: by the CRC-32 of each record, or each file of a folder."""

import struct
import zipfile
import zlib
from pathlib import Path

import torch

from multimodal.files import read_json, write_json
from multimodal.terminal import print_status

CHECKSUMS = "checksums.json"  # of the files of a sharded checkpoint, which is a folder


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step="))


def saved_steps(folder: Path) -> list[Path]:
    """The checkpoints ``step=N.ckpt`` of a folder, by N."""
    paths = [p for p in folder.glob("step=*.ckpt") if p.stem.removeprefix("step=").isdecimal()]
    return sorted(paths, key=step_of)


def check_checkpoint(path: Path) -> None:
    """Compare every byte of a checkpoint with its checksums, before it is used.

    A checkpoint is a zip file of records, and torch writes the CRC-32 of each record. A sharded one
    is a folder of such files, with ``checksums.json`` beside them.

    Raises:
        ValueError: if it does not exist or is damaged. It names another checkpoint of the folder.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such checkpoint")
    if not (path.is_dir() or path.is_file()):
        raise ValueError(f"{path}: not a file")
    reason = _damage(path)
    if reason is None:
        return
    others = [
        other
        for other in reversed(saved_steps(path.resolve().parent))
        if other.resolve() != path.resolve() and not _damage(other)
    ]
    name = f"{path} ({path.resolve().name})" if path.is_symlink() else str(path)
    another = f"resume from {others[0]}" if others else "there is no other checkpoint beside it"
    raise ValueError(f"{name}: the checkpoint is damaged ({reason}); {another}")


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    return _damage_of_folder(path) if path.is_dir() else _damage_of_file(path)


def _damage_of_file(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as records:
            bad = records.testzip()
        torch._C.PyTorchFileReader(str(path))  # it reads the directory more strictly
    except (OSError, EOFError, ValueError, RuntimeError, KeyError, struct.error) as error:
        return str(error) or type(error).__name__
    except (zipfile.BadZipFile, zlib.error) as error:
        return str(error).lower()
    return None if bad is None else f"the checksum of {bad} is wrong"


def _damage_of_folder(path: Path) -> str | None:
    if not (path / CHECKSUMS).exists():
        print_status(f"{path}: has no {CHECKSUMS}, so damage would not be noticed")
        return None
    try:
        expected = dict(read_json(path / CHECKSUMS))
    except (ValueError, TypeError):
        return f"{CHECKSUMS} is not JSON"
    found = _checksums(path)
    wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    return f"{', '.join(wrong)}: missing or changed" if wrong else None


def write_checksums(folder: Path) -> None:
    """Write the CRC-32 of every file of a sharded checkpoint."""
    write_json(folder / CHECKSUMS, _checksums(folder))


def renew_checksum(folder: Path, name: str) -> None:
    """Write that of a file of a sharded checkpoint which has been replaced."""
    write_json(folder / CHECKSUMS, {**read_json(folder / CHECKSUMS), name: checksum(folder / name)})


def _checksums(folder: Path) -> dict[str, int]:
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != CHECKSUMS]
    return {path.relative_to(folder).as_posix(): checksum(path) for path in paths}


def checksum(path: Path) -> int:
    """The CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc
