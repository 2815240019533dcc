"""Copies of checkpoints at an address: a run goes on where its machine does not come back.

Below the address, ``step=N.ckpt`` is a checkpoint as in the folder of the run. ``step=N.json`` has
the size and CRC-32 of its files, and is written after them: without it, there is no checkpoint.
``last.json`` and ``best.json`` name one.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from multimodal.files import atomic_file, temporary_path
from multimodal.terminal import print_status
from multimodal.train.run.damage import checksum, saved_steps, step_of
from multimodal.train.run.folder import link, remove

EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}  # of pyproject.toml
Files = dict[str, dict[str, int]]  # path below the address -> bytes and crc32


@dataclass(frozen=True, eq=False)
class _Copy:
    """What is copied.

    Attributes:
        path: ``step=N.ckpt`` in the folder of the run.
        source: its files under another name, for the run may replace or remove it meanwhile.
        best: it is that of the best validation.
        kept: the checkpoints that the folder has with it.
    """

    path: Path
    source: Path
    best: bool
    kept: set[str]


class CheckpointCopies:
    """The checkpoints of one run at an address.

    Args:
        address: of a folder, as fsspec takes it: ``s3://bucket/run``, ``file:///mnt/run``.

    Raises:
        ValueError: for an address that cannot be used.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self._lock, self._copying, self._count = Lock(), False, 0
        self._thread: Thread | None = None
        self._waiting: list[_Copy] = []
        try:
            from fsspec.core import url_to_fs

            # Other processes write here too, so listings must not be remembered.
            self.files, self.root = url_to_fs(self.address, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            extra = EXTRAS.get(self.address.partition(":")[0])
            hint = f"; pip install 'multimodal[{extra}]'" if extra else ""
            raise ValueError(f"{self.address}: cannot be used ({error}{hint})") from error

    # --- writing ----------------------------------------------------------------------------------

    def put(self, path: Path, best: bool) -> None:
        """Begin to copy a complete checkpoint, and return at once: no rank waits for a network.

        Afterwards those are removed that the folder does not keep now. While another copy goes on,
        this one waits. It replaces one that waits, but not the best one.

        A copy that fails is a line on stderr: the training goes on, and the next one is tried.

        Args:
            path: ``step=N.ckpt`` in the folder of the run.
            best: it is that of the best validation.
        """
        self._count += 1
        source = path.with_name(f".{path.name}.copy{self._count}")
        try:
            link_files(path, source)
        except OSError as error:
            return self._say_failed(path, error)
        copy = _Copy(path, source, best, {p.name for p in saved_steps(path.parent)})
        with self._lock:
            skipped = [each for each in self._waiting if best or not each.best]
            self._waiting = [*(each for each in self._waiting if each not in skipped), copy]
            if not self._copying:
                self._copying = True
                # A daemon: a copy that hangs does not keep a run that has ended.
                self._thread = Thread(target=self._copy_waiting, daemon=True)
                self._thread.start()
        for each in skipped:
            remove(each.source)
            if each.path != path:
                print_status(f"{each.path}: is not copied, as the copy before it still goes on")

    def wait(self, seconds: float | None = None) -> None:
        """Wait until all is copied. A copy that takes longer than so many seconds is given up."""
        if self._thread is None:
            return
        self._thread.join(1.0)
        if self._thread.is_alive():
            print_status(f"waiting for the last copies to {self.address}")
            self._thread.join(seconds)
        if self._thread.is_alive():
            print_status(f"the last copies to {self.address} take too long, and are not complete")

    def _copy_waiting(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._copying = False
                    return
                copy = self._waiting.pop(0)
            try:
                try:
                    self._put(copy)
                finally:
                    remove(copy.source)
            except Exception as error:  # each file system of fsspec has its own errors
                self._say_failed(copy.path, error)

    def _say_failed(self, path: Path, error: Exception) -> None:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print_status(f"{path}: could not be copied to {self.address} ({reason})")

    def _put(self, copy: "_Copy") -> None:
        path, source = copy.path, copy.source
        paths = [p for p in (source, *sorted(source.rglob("*"))) if p.is_file()]
        names = {p: (Path(path.name) / p.relative_to(source)).as_posix() for p in paths}
        manifest = path.with_suffix(".json").name
        if self.files.exists(f"{self.root}/{manifest}"):  # it would be true of other bytes
            self.files.rm_file(f"{self.root}/{manifest}")
        for local, name in names.items():
            target = f"{self.root}/{name}"
            self.files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self.files.put_file(str(local), target)
        facts = {n: {"bytes": p.stat().st_size, "crc32": checksum(p)} for p, n in names.items()}
        self._write_json(manifest, {"checkpoint": path.name, "files": facts})
        for name in ("last", *(["best"] if copy.best else [])):
            self._write_json(f"{name}.json", {"checkpoint": path.name})
        kept = copy.kept | {self._named("best")}
        older = [n for n in self._names() - kept if step_of(Path(n)) <= step_of(path)]
        for name in older:  # a run that went back keeps later ones
            for unwanted in (Path(name).with_suffix(".json").name, name):  # a manifest first
                if self.files.exists(f"{self.root}/{unwanted}"):
                    self.files.rm(f"{self.root}/{unwanted}", recursive=True)

    def _write_json(self, name: str, value: object) -> None:
        self.files.pipe_file(f"{self.root}/{name}", json.dumps(value).encode())

    # --- reading ----------------------------------------------------------------------------------

    def _names(self) -> set[str]:
        """The checkpoints that have a manifest."""
        found = self.files.glob(f"{self.root}/step=*.json")
        return {Path(str(name)).with_suffix(".ckpt").name for name in found}

    def _named(self, name: str) -> str | None:
        """The checkpoint that ``last`` or ``best`` names."""
        record = self._read_json(f"{name}.json")
        return str(record["checkpoint"]) if record else None

    def _read_json(self, name: str) -> dict[str, Any] | None:
        """None: there is no such file, or half of it."""
        try:
            record = json.loads(self.files.cat_file(f"{self.root}/{name}"))
        except (FileNotFoundError, ValueError):
            return None
        return record if isinstance(record, dict) else None

    def _resolve(self, name: str) -> str | None:
        """The name ``step=N.ckpt`` of a checkpoint that is complete; name: last, best, step=N."""
        names = self._names()
        found = self._named(name) if name in ("last", "best") else f"{name}.ckpt"
        if found not in names and name == "last" and names:  # that one is being written again
            found = max(names, key=lambda n: int(Path(n).stem.removeprefix("step=")))
        return found if found in names else None

    @property
    def has_any(self) -> bool:
        """Whether there is a checkpoint to go on with."""
        return bool(self._names())

    def fetch(self, name: str, folder: Path) -> Path:
        """Bring a checkpoint into the folder of a run. The processes of a machine may all call.

        Args:
            name: ``last``, which brings the best one too, ``best``, or ``step=N``.
            folder: ``checkpoints`` of the run.

        Returns:
            The checkpoint there. All of its bytes are those of the manifest.

        Raises:
            ValueError: if there is none, if it is damaged, or if the folder has other ones.
        """
        with alone(folder):
            if (found := self._resolve(name)) is None:
                raise ValueError(f"{self.address}/{name}.ckpt: no complete checkpoint there")
            others = {p.name for p in saved_steps(folder)} - self._names()
            if others:
                raise ValueError(
                    f"{folder}: has {', '.join(sorted(others))}, which {self.address} has not: "
                    "resume with --ckpt_path last, or give another --output"
                )
            path = self._fetch(found, folder)
            if name in ("last", "best"):
                link(folder / f"{name}.ckpt", path)
            if name == "last" and (best := self._resolve("best")) is not None:
                link(folder / "best.ckpt", self._fetch(best, folder))
        return path

    def _fetch(self, name: str, folder: Path) -> Path:
        path = folder / name
        manifest = self._read_json(path.with_suffix(".json").name) or {}
        files: Files = manifest.get("files", {})
        if path.exists() and all(_is_same(folder / file, facts) for file, facts in files.items()):
            return path
        print_status(f"{self.address}/{name}: copying it to {folder}")
        if set(files) == {name}:
            with atomic_file(path, sync=True) as part:
                self._download(name, part, files[name])
            return path
        part = temporary_path(path)
        shutil.rmtree(part, ignore_errors=True)
        for file, facts in files.items():
            inside = Path(file).relative_to(name)  # ValueError for a path that leads elsewhere
            if ".." in inside.parts:
                raise ValueError(f"{self.address}/{file}: a path that leads out of its folder")
            (part / inside).parent.mkdir(parents=True, exist_ok=True)
            self._download(file, part / inside, facts)
        if path.exists():
            remove(path)
        part.rename(path)
        return path

    def _download(self, name: str, target: Path, facts: dict[str, int]) -> None:
        self.files.get_file(f"{self.root}/{name}", str(target))
        if not _is_same(target, facts):
            raise ValueError(f"{self.address}/{name}: the checkpoint is damaged (its CRC-32)")


def link_files(path: Path, target: Path) -> None:
    """Give the files of a checkpoint another name. It takes no room, where a disk has hard links.

    Files of checkpoints are replaced, never changed. ``clear_unfinished`` removes what a killed run
    leaves.
    """

    def link_file(source: Any, other: Any) -> None:
        try:
            os.link(source, other)
        except OSError:
            shutil.copy2(source, other)

    if path.is_dir():
        shutil.copytree(path, target, copy_function=link_file)
    else:
        link_file(path, target)


def _is_same(path: Path, facts: dict[str, int]) -> bool:
    return (
        path.is_file()
        and path.stat().st_size == facts["bytes"]
        and checksum(path) == facts["crc32"]
    )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process of a machine after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".fetching", "w", encoding="utf-8") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):  # Windows, or a file system without locks
            pass
        yield
