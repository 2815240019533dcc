"""What a build leaves out: steps that are off unless asked for, each counted by its name.

A step changes a record, or rejects a sample with a reason; what was done is in the manifest.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from multimodal.data.samples import parts_of, texts_of

CopyPolicy = Literal["", "exact", "near"]
PersonalData = Literal["", "mask", "drop"]

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@\w[\w-]*(?:\.[\w-]+)+")
# Groups of digits as numbers are dialled; how many digits there are in all is asked afterwards.
_DIALLED = re.compile(
    r"(?<![\w.])[+(]?\d{1,5}\)?(?:[ ./-]{0,2}\(\d{1,5}\)|[ ./-]{1,2}\d{2,8}){0,6}(?!\w)"
    r"|\+\d{9,15}"
)
DIGITS = (9, 15)  # of a telephone number; a date has 8, a card number 16
_NO_NUMBER = re.compile(r"\d{4}-\d\d-\d\d\b|\d{1,3}(?:\.\d{1,3}){3}$")  # a date, an IP address
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Cleaning:
    """Args:
    min_side: pixels of an image's shorter side, at least; max_aspect_ratio: longer side over
        shorter side, at most.
    min_words, max_words: of a caption; others are left out, and an image that has no text then.
    copies: leave out images whose pixels are those of an earlier one of the source, of any split
        (``exact``), or nearly (``near``, for photos: see multimodal/data/near_duplicates.py).
    blocklist: words; a sample in whose texts one stands is left out.
    personal_data: what happens to e-mail addresses and telephone numbers in texts: ``mask`` writes
        [e-mail] and [phone] in their place, ``drop`` leaves the sample out.
    licenses: a sample whose ``license`` is none of these is left out.
    Zero and empty: the step is off.
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
        object.__setattr__(self, "_allowed", {one.strip().casefold() for one in self.licenses})

    def described(self) -> dict[str, Any]:
        """The steps that are on, for the manifest; of the blocklist only its hash."""
        steps = {name: value for name, value in asdict(self).items() if value}
        if self.blocklist:
            digest = hashlib.sha256("\n".join(sorted(self.blocklist)).encode()).hexdigest()
            steps["blocklist"] = {"words": len(self.blocklist), "sha256": digest}
        return steps

    def fault_of_size(self, width: int, height: int) -> tuple[str, str] | None:
        """Why an image of so many pixels is left out: the reason and the figures."""
        if min(width, height) < self.min_side:
            return "smaller than min_side", f"{width} x {height} pixels"
        if self.max_aspect_ratio and max(width, height) > self.max_aspect_ratio * min(
            width, height
        ):
            return "more than max_aspect_ratio", f"{width} x {height} pixels"
        return None

    def fault_of_texts(self, record: Mapping[str, Any]) -> tuple[str, str] | None:
        """Why a sample of this record is left out, if it is."""
        if self.licenses:
            license = record.get("license")
            if not isinstance(license, str) or license.strip().casefold() not in self._allowed:  # type: ignore[attr-defined]
                return "license not allowed", str(license)
        if self._blocked is not None:  # type: ignore[attr-defined]
            for text in texts_of(record):
                if found := self._blocked.search(text):  # type: ignore[attr-defined]
                    return "word of the blocklist", found.group().casefold()
        if self.personal_data == "drop" and any(find_personal(text) for text in texts_of(record)):
            return "personal data", ""
        return None

    def cleaned(self, record: dict[str, Any], done: "Counter[str]") -> dict[str, Any]:
        """The record without what is to go; ``done`` counts it."""
        captions = record["captions"]
        if self.min_words or self.max_words:
            kept = [text for text in captions if self._right_length(text)]
            done["captions of a wrong length"] += len(captions) - len(kept)
            record = {**record, "captions": kept}
        if self.personal_data == "mask":
            asked = record.get("qa", [])
            masked = [mask_personal(text) for text in record["captions"]]
            pairs = [[mask_personal(text) for text in pair] for pair in asked]
            done["texts with personal data masked"] += sum(
                new != old for new, old in zip(masked, record["captions"], strict=True)
            ) + sum(new != list(old) for new, old in zip(pairs, asked, strict=True))
            record = {**record, "captions": masked, **({"qa": pairs} if asked else {})}
            if content := parts_of(record):
                parts = [
                    {"text": mask_personal(part["text"])} if "text" in part else part
                    for part in content
                ]
                done["texts with personal data masked"] += sum(
                    new != old for new, old in zip(parts, content, strict=True)
                )
                record["content"] = parts
        return record

    def _right_length(self, caption: str) -> bool:
        words = len(_WORD.findall(caption))
        return self.min_words <= words and (not self.max_words or words <= self.max_words)


def read_blocklist(file: Path) -> list[str]:
    """The words of a file, one a line. Raises ``ValueError`` for a file without words."""
    words = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
    if not any(words):
        raise ValueError(f"{file}: holds no words")
    return [word for word in words if word]


def find_personal(text: str) -> list[tuple[int, int, str]]:
    """Where e-mail addresses and telephone numbers stand: (start, end, kind), in order."""
    found = [(*match.span(), "e-mail") for match in _EMAIL.finditer(text)]
    rest = _EMAIL.sub(lambda match: "@" * len(match.group()), text)
    for match in _DIALLED.finditer(rest):
        digits = sum(map(str.isdigit, match.group()))
        if DIGITS[0] <= digits <= DIGITS[1] and not _NO_NUMBER.match(match.group()):
            found.append((*match.span(), "phone"))
    return sorted(found)


def mask_personal(text: str) -> str:
    """The text with [e-mail] and [phone] for what ``find_personal`` finds."""
    for start, end, kind in reversed(find_personal(text)):
        text = f"{text[:start]}[{kind}]{text[end:]}"
    return text
