"""What is noted about a request, for the record that the server keeps (multimodal/record)."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from starlette.requests import Request
from torch import Tensor

# Fields of requests that are texts or images, which are noted as such, and that change nothing.
NOT_SETTINGS = {
    "model", "messages", "prompt", "input", "negative_prompt", "user", "metadata", "stream_options",
    "store", "service_tier", "safety_identifier", "prompt_cache_key",
}  # fmt: skip


@dataclass
class Note:
    """Of one request. Endpoints fill it in, and the gate writes it when the request is over.

    Attributes:
        facts: what stays in the record.
        texts: what may be taken out of it, or is not kept at all.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

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
        self.facts |= {"model": request.model, "fingerprint": fingerprint, "settings": settings}
        self.facts |= {"images": list(images), **facts}

    def answered(self, usage: Mapping[str, Any], reply: str | None = None, **facts: Any) -> None:
        """What came of it. reply: its text."""
        self.facts |= {"usage": dict(usage), **facts}
        if reply is not None:
            self.texts["reply"] = reply


def note_of(request: Request) -> Note:
    """The note of a request."""
    note = request.scope.setdefault("note", Note())
    assert isinstance(note, Note)
    return note


def digest_of(data: bytes | Tensor) -> str:
    """The SHA-256 of bytes, or of the numbers of a tensor."""
    data = data if isinstance(data, bytes) else data.numpy().tobytes()
    return hashlib.sha256(data).hexdigest()
