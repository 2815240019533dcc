"""Interleaved documents in shards: texts and images in an order of their own.

``KEY.json`` has ``{"content": [{"image": "0"}, {"text": "..."}]}``, where ``{"image": "0"}`` names
the member ``KEY.0.jpg``.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from multimodal.data.samples import CODES, IMAGE_SUFFIXES, Sample, parts_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class UnreadableText(ValueError):
    pass


def content_parts(row: Mapping[str, Any]) -> tuple[list[str], list[dict[str, str]]]:
    """The paths of the images, and the content with their numbers in their places."""
    given = row.get("content")
    if given is None and not {"images", "texts"} & {*row}:
        given = [{"text": row.get("text")}]
    if given is None:
        images, texts = row.get("images"), row.get("texts")
        if not (isinstance(images, list) and isinstance(texts, list) and len(images) == len(texts)):
            raise UnreadableText("neither content, nor images and texts of one length")
        given = [
            {"image": image} if text is None else {"text": text}
            for image, text in zip(images, texts, strict=True)
            if image is not None or text is not None
        ]
    paths: list[str] = []
    content: list[dict[str, str]] = []
    for part in given if isinstance(given, list) else [None]:
        if not isinstance(part, dict) or len({"image", "text"} & part.keys()) != 1:
            raise UnreadableText('a part is neither {"image": PATH} nor {"text": STRING}')
        value = part.get("image", part.get("text"))
        if not isinstance(value, str):
            raise UnreadableText("a part is not a string")
        if "image" in part:
            content.append({"image": str(len(paths))})
            paths.append(value)
        elif value.strip():
            content.append({"text": value})
    return paths, content


def images_of(members: Iterable[str], kinds: tuple[str, ...] = IMAGE_SUFFIXES) -> list[str]:
    """The suffixes of a sample's images in their order: one, or of a document ``0.jpg``, ``1.png``
    and so on; none where a number is missing or there twice."""
    members = list(members)
    if one := next((suffix for suffix in kinds if suffix in members), None):
        return [one]
    numbered = [name.partition(".") for name in members]
    images = [(n, kind) for n, _, kind in numbered if n.isdecimal() and kind in kinds]
    images.sort(key=lambda image: int(image[0]))
    if [n for n, _ in images] != [str(number) for number in range(len(images))]:
        return []
    return [f"{n}.{kind}" for n, kind in images]


def is_plain_text(record: Mapping[str, Any]) -> bool:
    """Whether it is a document of texts alone."""
    parts = parts_of(record)
    return bool(parts) and all("text" in part for part in parts)


def images_in(sample: Sample) -> list[bytes]:
    """The files of its images in their order: one, those of a document, or of plain text none.

    Errors: ``ValueError`` for a sample without any that is no plain text."""
    suffixes = images_of(sample.members)
    if not suffixes and is_plain_text(sample.record):
        return []
    return [sample.members[suffix] for suffix in suffixes] or [sample.image]


def codes_in(sample: Sample) -> "list[NDArray[np.int64]]":
    """``images_in`` for shards that hold codes: int64[A, h, w] each."""
    suffixes = images_of(sample.members, (CODES,))
    if not suffixes and is_plain_text(sample.record):
        return []
    return [sample.codes_of(suffix) for suffix in suffixes] or [sample.codes]


def document_of(sample: Sample) -> list[str | None]:
    """The texts of a document, with None for each of its images in turn; empty for a pair.

    Errors: ``ValueError`` where the content does not name the images that there are."""
    suffixes = images_of(sample.members, (*IMAGE_SUFFIXES, CODES))
    if not (suffixes[0][0].isdecimal() if suffixes else is_plain_text(sample.record)):
        return []
    content = check_content(sample.record.get("content"), len(suffixes))
    return [part.get("text") for part in content]


def check_content(content: Any, images: int) -> list[dict[str, str]]:
    """The content of a document in a shard. Errors: ``UnreadableText`` where it does not name its
    images 0, 1, ... in their order."""
    named, checked = content_parts({"content": content})
    if named != [str(number) for number in range(images)]:
        raise UnreadableText(f"its content names the images {named}, and it has {images}")
    return checked
