"""Cleaning steps of a build. All are off by default.

A step changes a record, or rejects a sample with a reason. The manifest counts both.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from multimodal.data.samples import parts_of, texts_of
from multimodal.files import read_text

CopyPolicy = Literal["", "exact", "near"]
PersonalData = Literal["", "mask", "drop"]

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@\w[\w-]*(?:\.[\w-]+)+")
# Groups of digits, as telephone numbers are written. The number of digits is checked separately.
_PHONE = re.compile(
    r"(?<![\w.])[+(]?\d{1,5}\)?(?:[ ./-]{0,2}\(\d{1,5}\)|[ ./-]{1,2}\d{2,8}){0,6}(?!\w)"
    r"|\+\d{9,15}"
)
DIGITS = (9, 15)  # of a telephone number. A date has 8, a card number 16.
_NO_PHONE = re.compile(r"\d{4}-\d\d-\d\d\b|\d{1,3}(?:\.\d{1,3}){3}$")  # a date, an IP address
# Chinese and Japanese have no spaces: each character counts as a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+")


@dataclass(frozen=True)
class Cleaning:
    """Which samples a build rejects or changes. With 0 or an empty value, a step is off.

    Attributes:
        min_side: least number of pixels of the shorter side.
        max_aspect_ratio: greatest ratio of the longer to the shorter side, at least 1.
        min_words, max_words: of a caption. Other captions are removed. A sample without any text
            left is rejected.
        copies: reject images that are copies of an earlier image of the source, in any split.
            ``exact``: the same pixels. ``near``: almost the same, for photos (see
            multimodal/data/near_duplicates.py).
        blocklist: words. A sample with one of them in its texts is rejected.
        personal_data: e-mail addresses and telephone numbers in texts. ``mask`` replaces them by
            [e-mail] and [phone], ``drop`` rejects the sample.
        licenses: a sample with another ``license``, or none, is rejected.

    Raises:
        ValueError: if a value is out of range.
    """

    min_side: int = 0
    max_aspect_ratio: float = 0.0
    min_words: int = 0
    max_words: int = 0
    copies: CopyPolicy = ""
    blocklist: Sequence[str] = ()
    personal_data: PersonalData = ""
    licenses: Sequence[str] = ()

    def __post_init__(self) -> None:
        if min(self.min_side, self.min_words, self.max_words) < 0:
            raise ValueError("min_side, min_words and max_words: expected 0 (off) or more")
        if self.max_words and self.max_words < self.min_words:
            raise ValueError(f"max_words={self.max_words} is less than min_words={self.min_words}")
        if self.max_aspect_ratio and not self.max_aspect_ratio >= 1:
            raise ValueError(f"max_aspect_ratio={self.max_aspect_ratio}: expected at least 1")
        for name, choice, kinds in (
            ("copies", self.copies, CopyPolicy),
            ("personal_data", self.personal_data, PersonalData),
        ):
            if choice not in get_args(kinds):
                raise ValueError(f"{name}={choice!r}: expected {' or '.join(get_args(kinds)[1:])}")
        words = "|".join(map(re.escape, self.blocklist))
        blocked = re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE) if words else None
        object.__setattr__(self, "_blocked", blocked)
        object.__setattr__(self, "_allowed", {name.strip().casefold() for name in self.licenses})

    def described(self) -> dict[str, Any]:
        """The steps that are on, for the manifest. The blocklist is given by its hash."""
        steps = {name: value for name, value in asdict(self).items() if value}
        if self.blocklist:
            digest = hashlib.sha256("\n".join(sorted(self.blocklist)).encode()).hexdigest()
            steps["blocklist"] = {"words": len(self.blocklist), "sha256": digest}
        return steps

    def fault_of_size(self, width: int, height: int) -> tuple[str, str] | None:
        """(reason, detail) if an image of this size in pixels is rejected."""
        if min(width, height) < self.min_side:
            return "smaller than min_side", f"{width} x {height} pixels"
        if self.max_aspect_ratio and max(width, height) > self.max_aspect_ratio * min(
            width, height
        ):
            return "more than max_aspect_ratio", f"{width} x {height} pixels"
        return None

    def fault_of_texts(self, record: Mapping[str, Any]) -> tuple[str, str] | None:
        """(reason, detail) if a sample with this record is rejected."""
        if self.licenses:
            license = record.get("license")
            if not isinstance(license, str) or license.strip().casefold() not in self._allowed:  # type: ignore[attr-defined]
                return "license not allowed", str(license)
        if self._blocked is not None:  # type: ignore[attr-defined]
            for text in _all_texts(record):
                if match := self._blocked.search(text):  # type: ignore[attr-defined]
                    return "word of the blocklist", match.group().casefold()
        if self.personal_data == "drop" and any(map(find_personal, _all_texts(record))):
            return "personal data", ""
        return None

    def cleaned(self, record: dict[str, Any], changed: "Counter[str]") -> dict[str, Any]:
        """The record after the steps that change it. ``changed`` counts the changes."""
        captions = record["captions"]
        if self.min_words or self.max_words:
            selected = [text for text in captions if self._has_right_length(text)]
            changed["captions of a wrong length"] += len(captions) - len(selected)
            record = {**record, "captions": selected}
        if self.personal_data == "mask":
            questions = record.get("qa", [])
            masked = [mask_personal(text) for text in record["captions"]]
            pairs = [[mask_personal(text) for text in pair] for pair in questions]
            changed["texts with personal data masked"] += sum(
                new != old for new, old in zip(masked, record["captions"], strict=True)
            ) + sum(new != list(old) for new, old in zip(pairs, questions, strict=True))
            record = {**record, "captions": masked, **({"qa": pairs} if questions else {})}
            if content := parts_of(record):
                record["content"] = _masked(content, changed)
            if preferences := _preferences_of(record):
                different = [
                    entry
                    for entry in _masked(preferences, changed)
                    if "chosen" not in entry or entry["chosen"] != entry.get("rejected")
                ]
                changed["preferences without a difference"] += len(preferences) - len(different)
                record["preferences"] = different
                if not different:
                    del record["preferences"]
        return record

    def _has_right_length(self, caption: str) -> bool:
        words = len(_WORD.findall(caption))
        return self.min_words <= words and (not self.max_words or words <= self.max_words)


def _preferences_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The preferences of a record. Empty if it has none, or another field of that name."""
    entries = record.get("preferences")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return []
    return entries


def _all_texts(record: Mapping[str, Any]) -> Iterator[str]:
    """The texts of a record and of its preferences: prompts and answers."""
    yield from texts_of(record)
    for entry in _preferences_of(record):
        yield from (value for value in entry.values() if isinstance(value, str))


def _masked(entries: Sequence[Mapping[str, Any]], changed: "Counter[str]") -> list[dict[str, Any]]:
    """Parts of a document, or preferences, with their texts masked. Images stay."""
    masked = [
        {
            name: mask_personal(value) if isinstance(value, str) and name != "image" else value
            for name, value in entry.items()
        }
        for entry in entries
    ]
    changed["texts with personal data masked"] += sum(
        new != old for new, old in zip(masked, entries, strict=True)
    )
    return masked


def read_blocklist(file: Path) -> list[str]:
    """The words of a file, one a line. Raises ``ValueError`` for a file without words."""
    words = [line.strip() for line in read_text(file).splitlines()]
    if not any(words):
        raise ValueError(f"{file}: holds no words")
    return [word for word in words if word]


def find_personal(text: str) -> list[tuple[int, int, str]]:
    """E-mail addresses and telephone numbers in a text: (start, end, kind), in order.

    ``text[start:end]`` is the address or number. ``kind`` is ``e-mail`` or ``phone``.
    """
    matches = [(*match.span(), "e-mail") for match in _EMAIL.finditer(text)]
    rest = _EMAIL.sub(lambda match: "@" * len(match.group()), text)
    for match in _PHONE.finditer(rest):
        digits = sum(map(str.isdigit, match.group()))
        if DIGITS[0] <= digits <= DIGITS[1] and not _NO_PHONE.match(match.group()):
            matches.append((*match.span(), "phone"))
    return sorted(matches)


def mask_personal(text: str) -> str:
    """Replace e-mail addresses and telephone numbers by [e-mail] and [phone]."""
    for start, end, kind in reversed(find_personal(text)):
        text = f"{text[:start]}[{kind}]{text[end:]}"
    return text
