"""What is noted about a request, for the record that the server keeps (multimodal/record)."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image
from starlette.requests import Request

from multimodal.serve.engine.errors import ApiError
from multimodal.serve.engine.pictures import digest_of

# Fields of requests that are texts or images, which are noted as such, and that change nothing.
NOT_SETTINGS = {
    "model", "messages", "prompt", "input", "negative_prompt", "user", "metadata", "stream_options",
    "store", "service_tier", "safety_identifier", "prompt_cache_key", "style",
}  # fmt: skip
SETTINGS_OF_TEXT = ("stop", "response_format")  # they change something, and a client writes them


@dataclass
class Note:
    """Of one request. Endpoints fill it in, and the gate writes it when the request is over.

    Attributes:
        facts: what stays in the record.
        texts: what may be taken out of it, or is not kept at all.
        status: of an error after the response had begun, which has another one.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    status: int | None = None

    def asked(
        self, request: Any, fingerprint: str, images: Sequence[str] = (), **facts: Any
    ) -> None:
        """What was asked for.

        Args:
            request: a dataclass; its fields become ``settings``.
            fingerprint: of the model.
            images: the digests of the images in the prompt.
            facts: more of them.
        """
        settings = {
            name: value
            for name, value in asdict(request).items()
            if value is not None and name not in NOT_SETTINGS
        }
        for name in SETTINGS_OF_TEXT:
            if (value := settings.pop(name, None)) is not None:
                self.texts[name] = json.dumps(value, ensure_ascii=False)
        self.facts |= {"model": request.model, "fingerprint": fingerprint, "settings": settings}
        self.facts |= {"images": list(images), **facts}

    def answered(self, usage: Mapping[str, Any], reply: str | None = None, **facts: Any) -> None:
        """What came of it. reply: its text."""
        self.facts |= {"usage": dict(usage), **facts}
        if reply is not None:
            self.texts["reply"] = reply

    def failed(self, error: ApiError) -> None:
        """The response has begun, and goes no further."""
        self.facts["code"], self.status = error.code, error.status


def note_of(request: Request) -> Note:
    """The note of a request."""
    note = request.scope.setdefault("note", Note())
    assert isinstance(note, Note)
    return note


def digests_of(images: Iterable[Image.Image]) -> list[str]:
    """Those of the pixels of each."""
    return [digest_of(image.tobytes()) for image in images]
