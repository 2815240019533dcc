"""Reads from an address by fsspec, again if a request fails or stalls.

A request gets PATIENCE times as long as those before it took. The next attempt waits a random part
of a growing time first (exponential backoff with full jitter:
https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter), and has twice the
patience. So a request that stalls costs little, and a slow network still gets its answer.
"""

import hashlib
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from multimodal.data.remote.pieces import DamagedShard

Out = TypeVar("Out")
EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}  # of pyproject.toml
ATTEMPTS = 5  # at least, and until RETRY_SECONDS are over
RETRY_SECONDS = 300.0
DAMAGED_ATTEMPTS = 3  # for bytes with another checksum: a cache on the way may be old
BACKOFF, MAX_BACKOFF = 0.1, 20.0  # seconds
FIRST_PATIENCE, MIN_PATIENCE, MAX_PATIENCE = 2.0, 0.25, 120.0  # seconds
PATIENCE = 2.0  # times the slowest of the last RECENT requests
RECENT = 32
TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504, 509)
# Of S3, which answers some of these with status 200 or 400.
TRANSIENT_CODES = ("SlowDown", "InternalError", "RequestTimeout", "Throttling", "503", "500")


class NoRanges(ValueError):
    """The server sends whole files only."""


class Transport:
    """Files below one address.

    Args:
        address: of a folder, without a slash at the end.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._opened: tuple[Any, str] | None = None
        self._opening = threading.Lock()
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._is_http = address.startswith(("http:", "https:"))

    def read(
        self,
        name: str,
        start: int | None = None,
        stop: int | None = None,
        sha256: str | None = None,
        retry_seconds: float | None = None,
    ) -> bytes:
        """Bytes [start, stop) of a file, or all of it.

        Args:
            name: of a file in the folder.
            sha256: of the bytes. None: they are not compared.
            retry_seconds: attempts go on so long, and there are ATTEMPTS of them at least. By
                default RETRY_SECONDS.

        Raises:
            NoRanges: if the server sends more than was asked for.
            DamagedShard: if the bytes have another SHA-256.
            ValueError: if they cannot be read.
        """
        no_ranges = f"{self.address}/{name}: the server sends whole files only"

        def attempt(patience: float) -> bytes:
            started = time.monotonic()
            data: bytes = self._call("cat_file", name, patience, start=start, end=stop, **checked)
            if start is not None and stop is not None and len(data) > stop - start:
                raise NoRanges(no_ranges)
            if start is not None and stop is not None and len(data) < stop - start:
                raise _Damage(f"{len(data):,} bytes of {stop - start:,}")
            if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
                raise _Damage("its SHA-256 differs")
            self._seconds.append(time.monotonic() - started)
            return data

        async def refuse_whole_file(response: Any) -> None:
            if response.status == 200:  # 206 is a part of a file
                response.close()
                raise NoRanges(no_ranges)

        checked: dict[str, Any] = {}
        if start is not None and self._is_http:
            # aiohttp calls it when it has the headers. The body could fill the memory.
            checked = {"raise_for_status": refuse_whole_file}
        part = "" if start is None else f", bytes {start:,} to {stop:,}"
        return self._retry(f"{self.address}/{name}{part}", attempt, retry_seconds)

    def download(self, name: str, target: Path, size: int | None = None, sha256: str = "") -> None:
        """Write a whole file to ``target``.

        Args:
            size: bytes that may be written. None: any number.
            sha256: of the file. An empty one is not compared.

        Raises:
            ValueError: as in ``read``.
        """

        def attempt(_: float) -> None:
            # The file system itself notices a stall. How long a whole file takes is not known.
            # The parameters have other names in other file systems: the target is the second.
            self._call("get_file", name, None, str(target), callback=_at_most(size))
            if sha256:
                with open(target, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                        raise _Damage("its SHA-256 differs")

        self._retry(f"{self.address}/{name}", attempt)

    def _retry(
        self, what: str, attempt: Callable[[float], Out], retry_seconds: float | None = None
    ) -> Out:
        limit = RETRY_SECONDS if retry_seconds is None else retry_seconds
        started, number, damaged = time.monotonic(), 0, 0
        while True:
            try:
                return attempt(self._patience(number))
            except NoRanges:
                raise
            except Exception as error:  # each file system of fsspec has its own errors
                number += 1
                damaged += isinstance(error, _Damage)
                seconds = time.monotonic() - started
                if damaged >= DAMAGED_ATTEMPTS:
                    raise DamagedShard(
                        f"{what}: differs from the manifest and index ({error}), also at "
                        f"attempt {damaged}; run: multimodal data check {self.address}"
                    ) from error
                if not _is_transient(error) or (number >= ATTEMPTS and seconds > limit):
                    raise ValueError(
                        f"{what}: cannot be read ({self._reason(error)}"
                        + (f"; {number} attempts in {seconds:.0f} seconds)" if number > 1 else ")")
                    ) from error
            time.sleep(random.uniform(0, min(MAX_BACKOFF, BACKOFF * 2**number)))

    def _patience(self, number: int) -> float:
        """Seconds that attempt ``number`` may take."""
        recent = list(self._seconds)
        usual = max(MIN_PATIENCE, PATIENCE * max(recent)) if recent else FIRST_PATIENCE
        return min(MAX_PATIENCE, usual * 2 ** min(number, 10))

    def _call(
        self, method: str, name: str, patience: float | None, *more: str, **options: Any
    ) -> Any:
        """Call a method of the file system. Only an asynchronous one can be interrupted."""
        system, root = self._open()
        path = f"{root}/{quote(name) if root.startswith(('http:', 'https:')) else name}"
        if getattr(system, "async_impl", False) and patience is not None:
            from fsspec.asyn import sync

            return sync(
                system.loop, getattr(system, f"_{method}"), path, *more, timeout=patience, **options
            )
        return getattr(system, method)(path, *more, **options)

    def _open(self) -> tuple[Any, str]:
        """(file system, the folder's path in it)"""
        with self._opening:
            if self._opened is None:
                from fsspec.core import url_to_fs

                options: dict[str, Any] = {}
                if self._is_http:
                    import aiohttp

                    # By default the whole of a request may take 5 minutes, whatever arrives.
                    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=30)
                    options = {"client_kwargs": {"timeout": timeout}}
                system, root = url_to_fs(self.address, **options)
                self._opened = system, root.rstrip("/")
            return self._opened

    def _reason(self, error: Exception) -> str:
        reason = str(error) or type(error).__name__
        if isinstance(error, TimeoutError):
            reason = "no answer in time"
        extra = EXTRAS.get(self.address.partition(":")[0])
        if extra and isinstance(error, ImportError):
            reason += f"; pip install 'multimodal[{extra}]'"
        return reason


class _Damage(Exception):
    """Other bytes than expected."""


def _at_most(most: int | None) -> Any:
    """Ends a transfer that is longer than it should be."""
    from fsspec.callbacks import Callback

    def compare(size: int | None, value: int, **_: object) -> None:
        if most is not None and value > most:
            raise _Damage(f"more than {most:,} bytes")

    return Callback(hooks={"length": compare})


def _is_transient(error: BaseException) -> bool:
    """Whether another attempt may succeed."""
    if isinstance(error, _Damage | TimeoutError | ConnectionError):
        return True
    if isinstance(status := getattr(error, "status", None), int):  # of aiohttp
        return status in TRANSIENT_STATUS
    response = getattr(error, "response", None)  # of botocore
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return (
            status in TRANSIENT_STATUS or response.get("Error", {}).get("Code") in TRANSIENT_CODES
        )
    if isinstance(error, FileNotFoundError | PermissionError | ImportError | ValueError):
        return False
    if type(error).__module__.partition(".")[0] in ("aiohttp", "botocore", "aiobotocore"):
        return "Redirect" not in type(error).__name__ and "Credentials" not in type(error).__name__
    return isinstance(error, OSError)
