"""Download a model from the Hugging Face Hub. Nothing of it is believed, and nothing is executed.

The Hub says which commit a revision is, and which files it has, with their sizes and hashes (see
multimodal/hub/listing.py). A file enters the cache when its size and its hash are those of the
list. Links to a commit are made when all its files are there, and the name of the revision last.
Without a network a commit is read if all that its list names is there. So a stopped or refused
download leaves nothing that could be read.

The cache is that of the library huggingface_hub, and has its format: a model that transformers
downloaded is not downloaded again. The library's own download is not used, because it takes names
of files from headers of the server (``ETag``), and does not compare hashes. Its settings hold:
``HF_HOME``, ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``, proxies.

Format of the cache: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urljoin, urlsplit

from multimodal import __version__
from multimodal.files import atomic_file
from multimodal.hub.address import HubName
from multimodal.hub.listing import (
    COMMIT,
    HubFile,
    check_file,
    needed_files,
    store_list,
    stored_list,
)
from multimodal.terminal import print_error

if TYPE_CHECKING:
    from httpx2 import Response

HUB_DOMAINS = ("huggingface.co", "hf.co")  # where the Hub keeps large files, too
MAX_LIST = 32 << 20  # bytes of the answer that lists the files
MAX_REDIRECTS = 5
TRIES = 8  # of a file, each goes on where the last one ended


class Unreachable(Exception):
    """The Hub does not answer, or not with what was asked for. Offline mode is this, too."""


def download(name: HubName, *parts: str) -> Path:
    """The folder of a repository in the cache, with all files that are needed.

    Without a network it is what the cache has of the revision.

    Args:
        parts: see ``needed_files``.

    Raises:
        ValueError: with the reason, if it cannot be had or is refused.
    """
    try:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name
    except ImportError as error:
        raise ValueError(
            f"{name}: no such folder; from the Hugging Face Hub it needs: "
            f"pip install multimodal[hub] ({error})"
        ) from error
    folder = repo_folder_name(repo_id=name.repository, repo_type="model")
    storage = Path(constants.HF_HUB_CACHE).expanduser() / folder
    try:
        commit, files = _list(name)
    except Unreachable as error:
        return _cached(name, storage, parts, constants.ENDPOINT, error)
    wanted = needed_files(name, files, parts)
    snapshot = storage / "snapshots" / commit
    (storage / "blobs").mkdir(parents=True, exist_ok=True)
    missing = [file for file in wanted if not file.is_at(snapshot / file.path)]
    size = sum(file.size for file in missing)
    if size > (free := shutil.disk_usage(storage).free):
        raise ValueError(
            f"{name}: needs {size / 1e9:,.1f} GB, and {storage} has {free / 1e9:,.1f} GB free"
        )
    for file in missing:
        blob = storage / "blobs" / file.digest
        if not file.is_at(blob):
            try:
                _fetch(name, commit, file, blob)
            except Unreachable as error:
                raise ValueError(f"{name}: {file.path} was not downloaded: {error}") from error
    if missing:
        store_list(storage, commit, files)
    # What other programs know a snapshot by comes last: a stopped download is none.
    for file in sorted(missing, key=lambda file: file.path == "config.json"):
        _link(storage / "blobs" / file.digest, snapshot / file.path)
    if name.revision != commit:
        reference = storage / "refs" / name.revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(reference, shared=True) as part:
            part.write_text(commit, "utf-8")
    return snapshot


def _cached(
    name: HubName, storage: Path, parts: tuple[str, ...], endpoint: str, error: Unreachable
) -> Path:
    """What the cache has of a revision, when the Hub cannot be asked.

    Args:
        parts: see ``needed_files``. A snapshot may have others only.
    """
    commit = name.revision
    if not COMMIT.fullmatch(commit):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            commit = (storage / "refs" / commit).read_text("utf-8").strip()
    snapshot = storage / "snapshots" / commit
    if not COMMIT.fullmatch(commit) or not _has(name, storage, commit, parts):
        which = "Only a part of it is" if snapshot.is_dir() else "It is not"
        raise ValueError(
            f"{name}: no such folder; and the Hub ({endpoint}) cannot be asked for a model of this "
            f"name: {error}. {which} in the cache ({storage.parent}). Give a folder, or download "
            "it where there is a network"
        ) from error
    if not _offline():
        print_error(f"{name}: the Hub cannot be asked ({error}); this is the copy in the cache")
    return snapshot


def _has(name: HubName, storage: Path, commit: str, parts: tuple[str, ...]) -> bool:
    """Whether the cache has all of a commit that is needed."""
    snapshot, listed = storage / "snapshots" / commit, stored_list(storage, commit)
    if listed is not None:
        return all(f.is_at(snapshot / f.path) for f in needed_files(name, listed, parts))
    # Another program downloaded it, and kept no list.
    whole = (snapshot / "config.json").exists() and any(snapshot.glob("*.safetensors"))
    return whole or any((snapshot / part).exists() for part in parts)


def _offline() -> bool:
    from huggingface_hub.constants import is_offline_mode

    return is_offline_mode()


# --- what there is ---------------------------------------------------------------------------


def _list(name: HubName) -> tuple[str, list[HubFile]]:
    """The commit of a revision, and all its files."""
    from huggingface_hub.constants import ENDPOINT

    revision = quote(name.revision, safe="")
    address = f"{ENDPOINT}/api/models/{name.repository}/revision/{revision}?blobs=true"
    body = bytearray()
    with _get(name, address) as response:
        for chunk in _chunks(response):
            body += chunk
            if len(body) > MAX_LIST:
                raise ValueError(f"{name}: refused: its list of files is longer than 32 MiB")
    try:
        answer = json.loads(body)
        commit, listed = answer["sha"], answer["siblings"]
        files = [HubFile.of(entry) for entry in listed]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Unreachable(f"{ENDPOINT} does not answer like a Hub: {error!r}") from error
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise ValueError(f"{name}: refused: the Hub says that its commit is {commit!r}")
    if COMMIT.fullmatch(name.revision) and commit != name.revision:
        raise ValueError(f"{name}: refused: the Hub answers with another commit, {commit}")
    for file in files:
        check_file(name, file)
    return commit, files


# --- what is fetched -------------------------------------------------------------------------


def _fetch(name: HubName, commit: str, file: HubFile, blob: Path) -> None:
    """Write ``blob`` if what comes is what the list says. An interrupted transfer goes on."""
    from huggingface_hub.constants import ENDPOINT
    from tqdm import tqdm

    address = f"{ENDPOINT}/{name.repository}/resolve/{commit}/{quote(file.path)}"
    digest, done = file.hash(), 0
    bar = tqdm(
        total=file.size, unit="B", unit_scale=True, desc=file.path, file=sys.stderr, disable=None
    )
    with atomic_file(blob, shared=True) as part, open(part, "wb") as target, bar:
        for _ in range(TRIES):
            try:
                with _get(name, address, start=done) as response:
                    if done and response.status_code != 206:  # it sends all of it again
                        digest, done = file.hash(), 0
                        target.seek(0)
                        target.truncate()
                    for chunk in _chunks(response):
                        done += len(chunk)
                        if done > file.size:
                            raise ValueError(
                                f"{name}: refused: {file.path} is longer than the {file.size:,} "
                                "bytes that the Hub lists"
                            )
                        digest.update(chunk)
                        target.write(chunk)
                        bar.update(len(chunk))
                if done == file.size:
                    break
                reason = f"it ended after {done:,} of {file.size:,} bytes"
            except Unreachable as error:
                reason = f"{error}, after {done:,} of {file.size:,} bytes"
        else:
            raise Unreachable(reason)
        if digest.hexdigest() != file.digest:
            raise ValueError(
                f"{name}: refused: {file.path} is not the file that the Hub lists (its hash is "
                f"{digest.hexdigest()}, listed is {file.digest})"
            )
        target.flush()
        os.fsync(target.fileno())


def _link(blob: Path, pointer: Path) -> None:
    """A link to a blob under the name of the file, or a copy where there are no links."""
    pointer.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(pointer, shared=True) as part:
        part.unlink(missing_ok=True)
        try:
            part.symlink_to(os.path.relpath(blob, pointer.parent))
        except OSError:
            shutil.copyfile(blob, part)


@contextlib.contextmanager
def _get(name: HubName, address: str, start: int = 0) -> "Iterator[Response]":
    """The answer to a GET, whose body is not read yet. Redirects lead only to hosts of the Hub.

    Raises:
        ValueError: for a redirect to elsewhere, and for a model that one may not, or cannot, read.
        Unreachable: for everything that another try, or the cache, may mend.
    """
    from huggingface_hub import constants, get_session, get_token

    endpoint = urlsplit(constants.ENDPOINT)
    for _ in range(MAX_REDIRECTS):
        headers = {"User-Agent": f"multimodal/{__version__}", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        at_hub = urlsplit(address)[:2] == endpoint[:2]
        if at_hub and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN and (token := get_token()):
            headers["Authorization"] = f"Bearer {token}"  # which no other host gets
        with contextlib.ExitStack() as stack:
            try:
                response = stack.enter_context(
                    get_session().stream(
                        "GET",
                        address,
                        headers=headers,
                        follow_redirects=False,
                        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                    )
                )
            except Exception as error:  # offline mode and each kind of broken network
                raise Unreachable(_words(error)) from error
            if not response.has_redirect_location:
                _check_status(name, response)
                yield response
                return
            target = urljoin(address, response.headers["Location"])
        if urlsplit(target)[:2] != endpoint[:2] and not _of_hub(target):
            raise ValueError(
                f"{name}: refused: the Hub redirects to {'://'.join(urlsplit(target)[:2])}, "
                "which is no place of the Hub"
            )
        address = target
    raise ValueError(f"{name}: refused: more than {MAX_REDIRECTS} redirects")


def _of_hub(address: str) -> bool:
    """Whether the Hub itself keeps files at this host."""
    host = urlsplit(address).hostname or ""
    known = any(host == domain or host.endswith(f".{domain}") for domain in HUB_DOMAINS)
    return known and urlsplit(address).scheme == "https"


def _check_status(name: HubName, response: "Response") -> None:
    status, code = response.status_code, response.headers.get("X-Error-Code", "")
    if status in (200, 206):
        return
    hub = urlsplit(str(response.request.url)).netloc
    if code == "RevisionNotFound":
        raise ValueError(f"{name}: {name.repository} has no revision {name.revision!r} ({hub})")
    if code == "GatedRepo" or status == 403:
        raise ValueError(
            f"{name}: accept its terms at https://{hub}/{name.repository}, then: hf auth login"
        )
    if status in (401, 404):
        raise ValueError(
            f"{name}: no such folder, and no such model at {hub} that you may read "
            "(for a private one: hf auth login)"
        )
    raise Unreachable(f"{hub} answers with status {status}")


def _chunks(response: "Response") -> Iterator[bytes]:
    try:
        yield from response.iter_bytes()
    except Exception as error:
        raise Unreachable(_words(error)) from error


def _words(error: Exception) -> str:
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set"
    return f"{type(error).__name__}: {error}".strip().rstrip(":")
