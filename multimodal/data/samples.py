"""One sample: an image as bytes or as codes, and its record.

``record_of`` is the only reader of records. Training from shards and ``data build`` both use it, so
they find the same captions.
"""

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from multimodal.data.formats.folders import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from multimodal.files import UnreadableText, decode_text, parse_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RECORD_MEMBERS = ("json", "txt", "cls")  # what a record is made of
CAPTION_FIELDS = ("captions", "caption", "text")
CONVERSATION_FIELDS = ("conversations", "messages", "texts")
IMAGE_PLACE = "<image>"  # stands for the image in the questions of LLaVA
CODES = "codes.npy"  # replaces the image: see multimodal/data/encode.py

EMPTY_PAIRS = "questions or answers without text"
CAPTION_LINES = ".txt of several lines: each line is a caption"
Note = Callable[[str], object]  # is told what a reader left out, or how it read an unclear case


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
        """The record. Errors as ``read_record``."""
        return self.read_record()

    def read_record(self, note: Note = lambda what: None) -> dict[str, Any]:
        """The record, see ``record_of``.

        Raises:
            ValueError: with the key, if it cannot be read.
        """
        try:
            return record_of(self.members, note=note)
        except UnreadableText as error:
            raise ValueError(f"sample {self.key}: its text is not readable ({error})") from error


def readable(samples: Iterable[Sample], on_problem: Callable[[str], object]) -> Iterator[Sample]:
    """The samples whose record can be read. ``on_problem`` is told the others, one line each."""
    for sample in samples:
        try:
            sample.read_record()
        except ValueError as error:
            on_problem(f"left out: {error}")
        else:
            yield sample


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


def record_of(
    members: Mapping[str, bytes], *, whole_text: bool = False, note: Note = lambda what: None
) -> dict[str, Any]:
    """The record in the files of a sample.

    Args:
        members: ``json`` is an object (see ``normalise``) or a list of captions. ``txt`` holds the
            captions if the json has none, one a line. ``cls`` is the label if the json has none.
            Other members are not read.
        whole_text: the txt is one caption, whatever its lines.
        note: is told EMPTY_PAIRS and CAPTION_LINES.

    Raises:
        UnreadableText: if one of them is not text, or captions or questions have another type.
    """
    fields: Any = parse_json(members["json"]) if "json" in members else {}
    if isinstance(fields, list):
        fields = {"captions": fields}
    if not isinstance(fields, dict):
        raise UnreadableText("its json is not an object")
    record = normalise(fields, note)
    if "txt" in members and not record["captions"]:
        text = decode_text(members["txt"])
        lines = [text] if whole_text else re.split("\r\n?|\n", text)
        record["captions"] = [line.strip() for line in lines if line.strip()]
        if len(record["captions"]) > 1:
            note(CAPTION_LINES)
    if "cls" in members and record.get("label") is None:
        record["label"] = decode_text(members["cls"]).strip()
    return record


def normalise(fields: Mapping[str, Any], note: Note = lambda what: None) -> dict[str, Any]:
    """Bring the fields of a source into the form of a record.

    Args:
        fields: captions are a string or a list in ``captions``, ``caption`` or ``text``. The first
            of these that is present counts. Questions are in ``qa``, in ``question`` and
            ``answer``, or in ``conversations`` as in LLaVA.
        note: is told EMPTY_PAIRS for each question without an answer, and the reverse.

    Returns:
        ``{"captions": [str], "qa": [[question, answer]], ...}`` without empty texts. Other fields
        are not changed.

    Raises:
        UnreadableText: if captions or questions have another type.
    """
    rest = dict(fields)
    captions: Any = next(
        (rest.pop(name) for name in CAPTION_FIELDS if rest.get(name) is not None), []
    )
    rest.pop("captions", None)  # null
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list):
        raise UnreadableText("captions are not a string or a list of strings")
    captions = [text for text in captions if text is not None]  # a missing value of Parquet
    pairs: Any = rest.pop("qa", None)
    pairs = [] if pairs is None else pairs
    if not isinstance(pairs, list):
        raise UnreadableText("qa is not a list of [question, answer]")
    if (
        isinstance(rest.get("question"), str)
        and (answer := _answer(rest.get("answer"))) is not None
    ):
        pairs = [*pairs, [rest.pop("question"), answer]]
        del rest["answer"]
    for name in CONVERSATION_FIELDS:
        if (turns := _turns(rest.get(name))) is not None:
            del rest[name]
            pairs = [*pairs, *turns]
    record: dict[str, Any] = {"captions": [_text(text, "a caption") for text in captions]}
    qa = []
    for pair in pairs:
        if isinstance(pair, dict) and pair.keys() >= {"question", "answer"}:
            pair = [pair["question"], _answer(pair["answer"])]
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UnreadableText("qa is not a list of [question, answer]")
        question, answer = _text(pair[0], "a question"), _text(pair[1], "an answer")
        if question == IMAGE_PLACE and answer:  # LLaVA: an answer to nothing but the image
            record["captions"].append(answer)
            continue
        question = question.replace(IMAGE_PLACE, "").strip()
        if question and answer:
            qa.append([question, answer])
        else:
            note(EMPTY_PAIRS)
    record["captions"] = [text for text in record["captions"] if text]
    if qa:
        record["qa"] = qa
    return record | rest


def _text(value: Any, what: str) -> str:
    """A text without spaces around it. Lone surrogates are no text: no file can hold them."""
    if not isinstance(value, str):
        raise UnreadableText(f"{what} is not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UnreadableText(f"{what} is not UTF-8 ({error})") from error
    return value.strip()


def _answer(value: Any) -> str | None:
    """An answer as text. Of several, the one that most people gave, and the first of those."""
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return Counter(value).most_common(1)[0][0]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else None


def _turns(turns: Any) -> list[list[str]] | None:
    """Questions, each with the answer after it, of a conversation. None: it is no conversation.

    A turn is ``{"from", "value"}`` as in LLaVA (arXiv:2304.08485), ``{"role", "content"}``, or both
    turns in one, ``{"user", "assistant"}``.
    """
    if not isinstance(turns, list):
        return None
    said: list[tuple[str, str]] = []
    for turn in turns:
        if not isinstance(turn, dict):
            return None
        spoken: list[tuple[Any, Any]]
        if turn.keys() >= {"user", "assistant"}:
            spoken = [("user", turn["user"]), ("assistant", turn["assistant"])]
        else:
            spoken = [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content")))]
        for speaker, text in spoken:
            if isinstance(text, list):  # parts, some of which are images
                parts = [part.get("text") for part in text if isinstance(part, dict)]
                text = "\n".join(part for part in parts if isinstance(part, str))
            if not isinstance(speaker, str) or not isinstance(text, str):
                return None
            said.append((speaker, text))
    return [
        [question, answer]
        for (asking, question), (answering, answer) in zip(said, said[1:], strict=False)
        if asking in ("human", "user") and answering in ("gpt", "assistant")
    ]


def plain(value: Any, depth: int = 64) -> Any:
    """A value as JSON can hold it. It loses what JSON has no form for.

    Dates and decimals become text. Numbers that are not finite, bytes and what is nested deeper
    than ``depth`` become None.
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, bytes | bytearray | memoryview) or not depth:
        return None
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item, depth - 1) for item in value]
    return plain(str(value))


def has_text(record: Mapping[str, Any]) -> bool:
    """Whether a record has a caption, a question, a preference, a label or a document's text."""
    texts = record.get("captions") or record.get("qa") or record.get("preferences")
    labelled = record.get("label") not in (None, "")
    return bool(texts) or labelled or any("text" in part for part in parts_of(record))


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
