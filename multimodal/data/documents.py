"""Interleaved documents in shards: texts and images in the order of the document.

``KEY.json`` has ``{"content": [{"image": "0"}, {"text": "..."}]}``, where ``{"image": "0"}`` refers
to the member ``KEY.0.jpg``.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from multimodal.data.samples import CODES, IMAGE_SUFFIXES, Sample, parts_of
from multimodal.files import UnreadableText

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def content_parts(row: Mapping[str, Any]) -> tuple[list[str], list[dict[str, str]]]:
    """The images and the content of a document.

    Args:
        row: has ``content``, or the two lists ``images`` and ``texts``, or only ``text``.

    Returns:
        The paths of the images, and the content with the number of each image instead of its path.

    Raises:
        UnreadableText: if the row is not a document.
    """
    parts = row.get("content")
    if parts is None and not {"images", "texts"} & {*row}:
        parts = [{"text": row.get("text")}]
    if parts is None:
        images, texts = row.get("images"), row.get("texts")
        if not (isinstance(images, list) and isinstance(texts, list) and len(images) == len(texts)):
            raise UnreadableText("neither content, nor images and texts of one length")
        parts = [
            {"image": image} if text is None else {"text": text}
            for image, text in zip(images, texts, strict=True)
            if image is not None or text is not None
        ]
    paths: list[str] = []
    content: list[dict[str, str]] = []
    for part in parts if isinstance(parts, list) else [None]:
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


def image_suffixes(members: Iterable[str], kinds: tuple[str, ...] = IMAGE_SUFFIXES) -> list[str]:
    """The suffixes of the images of a sample, in order.

    Args:
        members: the suffixes of all members.
        kinds: suffixes of images.

    Returns:
        One suffix for a pair of image and text. For a document ``0.jpg``, ``1.png`` and so on.
        Empty if a number is missing or occurs twice.
    """
    members = list(members)
    if single := next((suffix for suffix in kinds if suffix in members), None):
        return [single]
    numbered = [name.partition(".") for name in members]
    images = [(n, kind) for n, _, kind in numbered if n.isdecimal() and kind in kinds]
    images.sort(key=lambda image: int(image[0]))
    if [n for n, _ in images] != [str(number) for number in range(len(images))]:
        return []
    return [f"{n}.{kind}" for n, kind in images]


def is_plain_text(record: Mapping[str, Any]) -> bool:
    """Whether a record is a document of texts without images."""
    parts = parts_of(record)
    return bool(parts) and all("text" in part for part in parts)


def images_in(sample: Sample) -> list[bytes]:
    """The image files of a sample, in order: one, or those of a document, or none for plain text.

    Raises:
        ValueError: if there are none, and the sample is not plain text.
    """
    suffixes = image_suffixes(sample.members)
    if not suffixes and is_plain_text(sample.record):
        return []
    return [sample.members[suffix] for suffix in suffixes] or [sample.image]


def codes_in(sample: Sample) -> "list[NDArray[np.int64]]":
    """The codes of the images of a sample, in order: int64[A, n] each. As ``images_in``."""
    suffixes = image_suffixes(sample.members, (CODES,))
    if not suffixes and is_plain_text(sample.record):
        return []
    return [sample.codes_of(suffix) for suffix in suffixes] or [sample.codes]


def document_of(sample: Sample) -> list[str | None]:
    """The parts of a document in order: a string for a text, None for an image.

    Returns:
        An empty list for a pair of image and text.

    Raises:
        ValueError: if the content does not match the images of the sample.
    """
    suffixes = image_suffixes(sample.members, (*IMAGE_SUFFIXES, CODES))
    if not (suffixes[0][0].isdecimal() if suffixes else is_plain_text(sample.record)):
        return []
    content = check_content(sample.record.get("content"), len(suffixes))
    return [part.get("text") for part in content]


def check_content(content: Any, images: int) -> list[dict[str, str]]:
    """The content of a document in a shard, checked.

    Args:
        content: the list in its record.
        images: number of images of the sample.

    Raises:
        UnreadableText: if the images in the content are not 0, 1, ..., images - 1, in this order.
    """
    numbers, checked = content_parts({"content": content})
    if numbers != [str(number) for number in range(images)]:
        raise UnreadableText(f"its content names the images {numbers}, and it has {images}")
    return checked
