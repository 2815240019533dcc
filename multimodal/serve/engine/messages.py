"""Messages of a chat as the prompt of a model that was trained on images, captions and questions.

Texts of the system come first, as they are. A message of the user is its images, then its texts in
the model's template of questions. A message of the assistant follows as it is, as an answer does in
training, behind the images that were drawn for it. Images without a text ask for a caption.

A language model that was taught to talk reads texts alone in its chat template.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from multimodal.model.templates import Templates
from multimodal.serve.engine.errors import ApiError

Template = Literal["question", "statement", "none", "chat"]


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        content: a text, or parts of type ``text`` and ``image_url``.
        images: those of a reply, as it was sent.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[Mapping[str, Any], ...] | None = None
    name: str | None = None
    refusal: str | None = None
    images: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True)
class ImageUrl:
    """An image in a message."""

    url: str


class Conversation(str):
    """What is said in a chat, a text like any other for all that reads texts.

    Attributes:
        messages: ``role`` and ``content`` of each.
    """

    messages: tuple[Mapping[str, str], ...]

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, str]]) -> "Conversation":
        made = cls("\n".join(message["content"] for message in messages))
        made.messages = tuple(messages)
        return made


def message_parts(
    messages: Sequence[Message],
    template: Template | None,
    templates: Templates,
    shown: Callable[[str], str] = str,
    talks: bool = False,
) -> list[str | ImageUrl]:
    """The texts and images of a prompt, in order.

    Args:
        template: the words around texts of the user. ``none``: none. ``chat``: the model's own, for
            texts alone. None: ``chat`` if the model has it and there are no images, else
            ``question``.
        templates: the model's.
        shown: what the model may see of a text. A text of which nothing is left is left out.
        talks: the model has a chat template.

    Raises:
        ApiError: for no messages, or parts of other types.
    """
    if not messages:
        raise ApiError(400, "messages: expected at least one", param="messages")
    contents = [_content(each, f"messages.{n}") for n, each in enumerate(messages)]
    if not any(images or text.strip() for images, text in contents):
        raise ApiError(400, "messages: all of them are empty", param="messages")
    has_images = any(images for images, _ in contents)
    template = template or ("chat" if talks and not has_images else "question")
    if template == "chat" and (has_images or not talks):
        reason = "is for texts alone" if talks else "is what this model lacks"
        raise ApiError(400, f"template: a chat template {reason}", param="template")
    ask = {"question": templates.ask, "statement": templates.judge}.get(template, str)
    parts: list[str | ImageUrl] = []
    said: list[dict[str, str]] = []
    for message, (images, text) in zip(messages, contents, strict=True):
        parts += images
        text = shown(text) if text.strip() else ""
        if not text.strip():
            continue
        role = "system" if message.role == "developer" else message.role
        said.append({"role": role, "content": text.strip()})
        parts.append(ask(text) if role == "user" else text.strip())
    return [Conversation.of(said)] if template == "chat" and said else parts


def _content(message: Message, name: str) -> tuple[list[ImageUrl], str]:
    """The images and the text of a message."""
    images, text = _images_and_text(message.content or "", f"{name}.content")
    if message.role != "user" and images:
        raise _wrong(f"{name}.content", "only messages of the user have images")
    drawn, _ = _images_and_text(message.images or (), f"{name}.images")
    if message.role != "assistant" and drawn:
        raise _wrong(f"{name}.images", "only messages of the assistant have images that were drawn")
    return images + drawn, text


def _images_and_text(
    content: str | Sequence[Mapping[str, Any]], name: str
) -> tuple[list[ImageUrl], str]:
    if isinstance(content, str):
        return [], content
    images, texts = [], []
    for number, part in enumerate(content):
        where, kind = f"{name}.{number}", part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, Mapping) else url
            if not isinstance(url, str):
                raise _wrong(where, "expected image_url with the text url")
            images.append(ImageUrl(url))
        else:
            raise _wrong(where, "expected a part of type 'text' or 'image_url'")
    return images, "\n".join(texts)


def _wrong(where: str, reason: str) -> ApiError:
    return ApiError(400, f"{where}: {reason}", param=where, code="invalid_value")
