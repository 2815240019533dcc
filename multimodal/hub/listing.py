"""Which files a repository has, and which of them are needed.

Only safetensors, JSON, README.md, LICENSE and a chat template are, and never a path that leads
outside. The list of a commit stays in the cache: without a network it tells what is missing.
"""

import hashlib
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from multimodal.files import read_json, write_json
from multimodal.hub.address import HubName

# What is fetched: files at the top of a model, and an image tokenizer, which may have levels.
TOP = (
    r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}\.json|"
    r"(model|heads|adapter_model)(-\d{1,9}-of-\d{1,9})?\.safetensors|"
    r"README\.md|LICENSE|chat_template\.jinja"
)
TOKENIZER = r"(image_tokenizer/)?((meaning|detail)/)?(config\.json|model\.safetensors)"
TERMS = r"image_tokenizer/(LICENSE|sources\.json)"
READABLE = re.compile(f"(?:{TOP})|(?:{TOKENIZER})|(?:{TERMS})")
# What is read beside a part: the levels, the licences and sources, how the model talks.
BESIDE = (
    "config.json", "LICENSE", "sources.json",
    "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
# Formats of weights that are, or may hold, pickles: opening one can run any code.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".h5", ".keras")
MAX_TEXT = 64 << 20  # bytes of a file that is not weights
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
LISTS = "multimodal"  # a folder in the cache of a repository, which other programs leave alone


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, as the Hub lists it.

    Attributes:
        path: its name in the repository.
        size: bytes.
        digest: the SHA-256 of a large file, the git hash (SHA-1) of a small one. Hex.
    """

    path: str
    size: int
    digest: str

    @classmethod
    def of(cls, entry: dict[str, Any]) -> "HubFile":
        """Of an entry of the Hub's answer."""
        if large := entry.get("lfs"):
            return cls(entry["rfilename"], large["size"], large["sha256"])
        return cls(entry["rfilename"], entry["size"], entry["blobId"])

    def hash(self) -> "hashlib._Hash":
        """An empty hash of the kind of ``digest``."""
        if len(self.digest) == 64:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)

    def is_at(self, path: Path) -> bool:
        """Whether a file of this size is there."""
        return path.is_file() and path.stat().st_size == self.size


def readable(path: str) -> bool:
    """Whether a file of this name is ever fetched, or pushed."""
    return READABLE.fullmatch(path) is not None


def check_file(name: HubName, file: HubFile) -> None:
    """Raises ``ValueError`` for a name that leads outside, and a size or a hash that is none."""
    path = file.path
    if (
        not isinstance(path, str)
        or not path
        or not path.isprintable()
        or any(part in ("", ".", "..") for part in path.split("/"))
        or "\\" in path
        or ":" in path
    ):
        raise ValueError(f"{name}: refused: its list of files has the path {path!r}")
    if not readable(path):
        return
    if not isinstance(file.size, int) or isinstance(file.size, bool) or file.size < 0:
        raise ValueError(f"{name}: refused: {path} is listed with a size of {file.size!r}")
    if not path.endswith(".safetensors") and file.size > MAX_TEXT:
        raise ValueError(
            f"{name}: refused: {path} has {file.size:,} bytes, expected 64 MiB at most"
        )
    digest = file.digest
    if not isinstance(digest, str) or not (COMMIT.fullmatch(digest) or SHA256.fullmatch(digest)):
        raise ValueError(f"{name}: refused: {path} is listed with the hash {digest!r}")


def needed_files(name: HubName, files: list[HubFile], parts: tuple[str, ...]) -> list[HubFile]:
    """The files to fetch.

    Args:
        parts: names of files or folders. Of the first one that there is, this alone is needed, and
            BESIDE. Without any: all files that can be read.

    Raises:
        ValueError: if the weights are none that can be read.
    """
    allowed = [file for file in files if readable(file.path)]
    for part in parts:
        if found := [f for f in allowed if f.path == part or f.path.startswith(f"{part}/")]:
            return found + [f for f in allowed if f.path in BESIDE]
    if not any(file.path.endswith(".safetensors") for file in allowed):
        pickles = [file.path for file in files if file.path.lower().endswith(PICKLES)]
        reason = "it has no weights in safetensors"
        if pickles:
            reason += f", but {pickles[0]}: such a file can run any code when it is opened"
        raise ValueError(f"{name}: refused: {reason}")
    return allowed


# --- the list in the cache -------------------------------------------------------------------


def store_list(storage: Path, commit: str, files: list[HubFile]) -> None:
    """Keep which files a commit has.

    Args:
        storage: of the repository, in the cache.
    """
    path = storage / LISTS / f"{commit}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, [asdict(file) for file in files if readable(file.path)], shared=True)


def stored_list(storage: Path, commit: str) -> list[HubFile] | None:
    """What ``store_list`` kept. None: nothing, another program downloaded the commit."""
    try:
        return [HubFile(**each) for each in read_json(storage / LISTS / f"{commit}.json")]
    except (ValueError, TypeError):
        return None
