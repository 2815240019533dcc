"""One sample of a shard: an image as bytes or as codes, and its record."""

import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from multimodal.data.formats.folders import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from multimodal.files import parse_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TEXT_SUFFIXES = ("json", "txt")
CODES = "codes.npy"  # replaces the image: see multimodal/data/encode.py


@dataclass(frozen=True)
class Sample:
    """One sample of a shard. ``members`` maps a suffix ("jpg") to the bytes of that member."""

    key: str
    members: Mapping[str, bytes]

    @property
    def image(self) -> bytes:
        """The bytes of the image file."""
        for suffix in IMAGE_SUFFIXES:
            if suffix in self.members:
                return self.members[suffix]
        if documents := [name for name in self.members if name[:1].isdigit()]:
            raise ValueError(
                f"sample {self.key} is a document of {len(documents)} images, expected one image"
            )
        raise ValueError(f"sample {self.key} has no image: members are {sorted(self.members)}")

    @property
    def codes(self) -> "NDArray[np.int64]":
        """int64[A, n], A encodings of the image, in shards that hold codes."""
        if CODES not in self.members:
            raise ValueError(f"sample {self.key} has no codes: members are {sorted(self.members)}")
        return self.codes_of(CODES)

    def codes_of(self, member: str) -> "NDArray[np.int64]":
        """int64[A, n], the codes in a member.

        Raises:
            ValueError: if the member is not such an array.
        """
        import numpy as np

        data = self.members[member]
        start = 10 + int.from_bytes(data[8:10], "little")
        try:
            shape, kind = _npy_header(data[:start])
            if math.prod(shape) * kind.itemsize != len(data) - start:
                raise ValueError("its size is not the size in its header")
            codes = np.frombuffer(data, kind, offset=start).reshape(shape)
        except Exception as error:  # numpy raises almost anything for a damaged header
            raise ValueError(f"sample {self.key}: its codes are not readable ({error})") from error
        if codes.ndim != 2 or not len(codes) or codes.dtype.kind != "u":
            raise ValueError(
                f"sample {self.key}: codes of shape {codes.shape} and type {codes.dtype}, "
                "expected unsigned [A, n]"
            )
        return codes.astype(np.int64)

    @property
    def record(self) -> dict[str, Any]:
        """The object in ``KEY.json``. Without it, the text of ``KEY.txt`` is the only caption.

        Raises:
            ValueError: if a field has the wrong type.
        """
        if "json" in self.members:
            try:
                record = parse_json(self.members["json"])
            except ValueError as error:
                raise ValueError(
                    f"sample {self.key}: its json is not readable ({error})"
                ) from error
            if not isinstance(record, dict):
                raise ValueError(f"sample {self.key}: its json is not an object")
            if not _are_texts(record.get("captions", [])):
                raise ValueError(f"sample {self.key}: its captions are not a list of strings")
            pairs = record.get("qa", [])
            if not isinstance(pairs, list) or not all(
                _are_texts(pair) and len(pair) == 2 for pair in pairs
            ):
                raise ValueError(f"sample {self.key}: its qa is not a list of pairs of strings")
            return record
        if "txt" in self.members:
            try:
                return {"captions": [self.members["txt"].decode("utf-8").strip()]}
            except ValueError as error:
                raise ValueError(f"sample {self.key}: its txt is not UTF-8 ({error})") from error
        return {}


@lru_cache(256)  # numpy evaluates each header as Python, and a folder has few different ones
def _npy_header(header: bytes) -> "tuple[tuple[int, ...], np.dtype[Any]]":
    """The shape and dtype in the header of a .npy file, format 1.0."""
    import numpy as np

    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not version 1.0 of .npy")
    shape, by_columns, kind = np.lib.format.read_array_header_1_0(file)
    if by_columns or kind.hasobject or file.tell() != len(header):
        raise ValueError("not a plain array in row order")
    return shape, kind


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def parts_of(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The content of a document. Empty if the record has none, or another field of that name."""
    content = record.get("content")
    if not isinstance(content, list) or not all(
        isinstance(part, dict)
        and len(part) == 1
        and all(key in ("image", "text") and isinstance(part[key], str) for key in part)
        for part in content
    ):
        return []
    return content


def texts_of(record: Mapping[str, Any]) -> Iterator[str]:
    """All texts of a record: captions, texts of a document, questions and answers."""
    yield from record.get("captions", [])
    yield from (part["text"] for part in parts_of(record) if "text" in part)
    for question, answer in record.get("qa", []):
        yield question
        yield answer
