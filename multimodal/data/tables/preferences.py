"""Read preferences as TRL has them: a prompt with two answers, or with one and a label.

``prompt``, ``chosen``, ``rejected`` and ``completion`` are texts, or lists of messages ``{"role",
"content"}`` whose content is a text or a list of parts ``{"type": "text", "text"}`` and ``{"type":
"image"}``. The images are in the column ``images`` in the order of these parts, or in the parts
(``"image"``). Without a prompt, ``question`` is it, or the messages that both answers begin with.

Of texts about an image the sample is that image. Of images for a text it is a document of them.
docs/formats/samples.md says what is written.
"""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from multimodal.data.samples import IMAGE_PLACE, normalise, parts_of
from multimodal.data.tables.records import (
    Blob,
    ImagePlace,
    ReadOptions,
    RejectedSample,
    SourceItem,
    SourceSample,
    encodable,
    image_in,
)
from multimodal.data.tables.rows import Row
from multimodal.files import UnreadableText
from multimodal.terminal import shown

PAIR, LABELLED = {"chosen", "rejected"}, {"prompt", "completion", "label"}
_USED = (*PAIR, *LABELLED, "images", "image", "key")
SYSTEM = "system messages of preferences"
Part = tuple[str, Any]  # ("text", a string) or ("image", a value, or None: the next of the column)


class NoPreference(ValueError):
    """A row that compares nothing, and why. There are few reasons, so that they can be counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def is_preferences(columns: Collection[str], options: ReadOptions) -> bool:
    """Whether a table with these columns holds preferences.

    With a column of texts it is read as any other table.
    """
    return options.text_column is None and (PAIR <= {*columns} or LABELLED <= {*columns})


def read_preferences(
    table: Path, rows: Iterable[Row], options: ReadOptions
) -> Iterator[SourceItem]:
    """The samples of a table, in its order: each row is one."""
    root, column = options.images or table.parent, options.image_column
    for row in rows:
        if row.problem:
            yield RejectedSample.row(row.place, "unreadable row", row.problem)
            continue
        try:
            images, record, document = preference_of(
                row.fields,
                lambda value: _place(value, root),
                options.notes.of(str(row.place)),
                column,
            )
        except NoPreference as error:
            yield RejectedSample.row(row.place, error.reason, error.detail)
            continue
        key, number = row.fields.get("key"), row.place.numbers[0]
        yield SourceSample(
            name=str(row.place),
            hint=key if isinstance(key, str) else f"{table.stem}-{number}",
            identity=f"{table.name}/{number}",
            images=images,
            record=record,
            document=document,
            rows=row.place,
        )


def _place(value: Any, root: Path) -> ImagePlace:
    """Where an image of a row is. Raises ``NoPreference`` if it is none."""
    try:
        image = image_in(value)
    except ValueError as error:
        raise NoPreference("no image", str(error)) from error
    if isinstance(image, bytes):
        return Blob(image)
    if "://" in image:
        raise NoPreference("no image", f"{image} is an address; download the images first")
    path = os.path.normpath(image)
    if path.startswith("..") or os.path.isabs(path) or not encodable(path):
        raise NoPreference("image outside the folder", shown(path))
    return root / path


def preference_of(
    fields: Mapping[str, Any],
    place_of: Callable[[Any], ImagePlace],
    note: Callable[[str], object] = lambda what: None,
    image_column: str | None = None,
) -> tuple[tuple[ImagePlace, ...], dict[str, Any], bool]:
    """The images and the record of a row, and whether it is a document.

    Args:
        place_of: where an image is, of a value of the row. May raise ``NoPreference``.
        note: is told SYSTEM.
        image_column: None: ``images`` or ``image``.

    Raises:
        NoPreference: if the row is no preference.
    """
    prompt, answers, used = _answers(fields)
    column = fields.get("images", fields.get("image"))
    if image_column is not None:
        if image_column not in fields:
            raise NoPreference("no image", f"no column {image_column!r}")
        column, used = fields[image_column], used | {image_column}
    waiting = list(column) if isinstance(column, list | tuple) else [column] * (column is not None)
    prompt_parts, *answer_parts = [
        _parts(value, name, note) for name, value in (("prompt", prompt), *answers.items())
    ]
    found: list[list[Any]] = []
    for parts in (prompt_parts, *answer_parts):
        own = [value for kind, value in parts if kind == "image"]
        if any(value is None for value in own) and len(waiting) < sum(v is None for v in own):
            raise NoPreference("no image", "fewer images than the messages name")
        found.append([waiting.pop(0) if value is None else value for value in own])
    in_prompt, *in_answers = found
    if not any(found):  # the messages do not say where the image is
        in_prompt, waiting = waiting, []
    texts = ["\n".join(text for kind, text in parts if kind == "text") for parts in answer_parts]
    text = "\n".join(text for kind, text in prompt_parts if kind == "text").strip()
    entry: dict[str, Any] = {"prompt": text}
    rest = {key: value for key, value in fields.items() if key not in used}
    drawings = any(in_answers)
    if drawings:
        if in_prompt or not text or any(map(str.strip, texts)) or waiting:
            raise NoPreference("no drawings of a text", "images of answers need a prompt of text")
        if any(len(images) != 1 for images in in_answers):
            raise NoPreference("no drawings of a text", "each answer has to be one image")
        places = tuple(place_of(images[0]) for images in in_answers)
        values: list[Any] = [{"image": str(number)} for number in range(len(places))]
        rest["content"] = [{"text": text}, *values]
    else:
        if parts_of(rest):
            raise NoPreference("texts about a document", "its content lists parts")
        if len(in_prompt) + len(waiting) != 1:
            count = len(in_prompt) + len(waiting)
            raise NoPreference("no image", f"{count} images, and answers are about one")
        places = (place_of((in_prompt or waiting)[0]),)
        values = [answer.strip() for answer in texts]
        for name, value in zip(answers, values, strict=True):
            if not value:
                raise NoPreference(f"no {name} answer")
    if len(values) == 2 and (values[0] == values[1] or drawings and places[0] == places[1]):
        raise NoPreference("equal chosen and rejected answers")
    entry |= dict(zip(answers, values, strict=True))
    if "completion" in answers:
        if not isinstance(fields.get("label"), bool):
            raise NoPreference("no label", f"{fields.get('label')!r:.80}: expected true or false")
        entry["label"] = fields["label"]
    try:
        record = normalise(rest, note)
    except UnreadableText as error:
        raise NoPreference("unreadable text", str(error)) from error
    return places, {**record, "preferences": [entry]}, drawings


def _answers(fields: Mapping[str, Any]) -> tuple[Any, dict[str, Any], set[str]]:
    """The prompt, the answers by name, and the fields that were used."""
    used = {*_USED}
    names = ("completion",) if fields.get("completion") is not None else ("chosen", "rejected")
    answers = {name: fields.get(name) for name in names}
    for name, value in answers.items():
        if value is None or value == []:
            raise NoPreference(f"no {name} answer")
    prompt = fields.get("prompt")
    if prompt is None and isinstance(fields.get("question"), str):
        prompt, used = fields["question"], used | {"question"}
    if prompt is None and len(names) == 2 and all(isinstance(a, list) for a in answers.values()):
        chosen, rejected = list(fields["chosen"]), list(fields["rejected"])
        prompt = []
        while chosen and rejected and chosen[0] == rejected[0] and len(chosen) > 1:
            prompt.append(chosen.pop(0))
            rejected.pop(0)
        answers = {"chosen": chosen, "rejected": rejected}
        if not rejected:
            raise NoPreference("equal chosen and rejected answers")
    return ("" if prompt is None else prompt), answers, used


def _parts(value: Any, name: str, note: Callable[[str], object]) -> list[Part]:
    """The texts and images of a prompt or of an answer, in their order."""
    if isinstance(value, str):
        return _split(value)
    expected = "user" if name == "prompt" else "assistant"
    if not isinstance(value, list):
        raise NoPreference("unreadable messages", f"{name}: neither a text nor a list of messages")
    parts: list[Part] = []
    turns = 0
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise NoPreference("unreadable messages", f"{name}: a message has no role")
        if message["role"] == "system":
            note(SYSTEM)
            continue
        turns += 1
        if message["role"] != expected or turns > 1:
            raise NoPreference("several turns", f"{name}: expected one message of {expected}")
        content = message.get("content")
        if isinstance(content, str):
            parts += _split(content)
            continue
        if not isinstance(content, list):
            raise NoPreference("unreadable messages", f"{name}: a message without content")
        for part in content:
            parts += _part(part, name)
    return parts


def _part(part: Any, name: str) -> list[Part]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return [("text", part["text"])]
    if kind == "image":
        given = (part.get(place) for place in ("image", "path", "bytes", "url"))
        return [("image", next((value for value in given if value is not None), None))]
    raise NoPreference("unreadable messages", f"{name}: a part is neither a text nor an image")


def _split(text: str) -> list[Part]:
    """A text in which <image> stands for an image."""
    first, *more = text.split(IMAGE_PLACE)
    parts: list[Part] = [("text", first)] if first.strip() else []
    for rest in more:
        parts += [("image", None), *([("text", rest)] if rest.strip() else [])]
    return parts
