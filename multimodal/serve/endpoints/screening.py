"""The rules of a server about one request: what they decide is noted."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image
from torch import Tensor

from multimodal.filters.rules import Decision, Filters, When, refusal
from multimodal.serve.endpoints.noting import Note
from multimodal.serve.engine.engine import Engine
from multimodal.serve.engine.errors import ApiError
from multimodal.serve.engine.fetch import TIMEOUT
from multimodal.serve.engine.pictures import is_address, read_data_uri, read_image

CODE = "content_filter"
Value = TypeVar("Value")


@dataclass
class Screening:
    """Attributes: refused: the decision that refuses the request or its reply. None: none does."""

    filters: Filters
    note: Note
    refused: Decision | None = None

    def text(self, text: str, when: When) -> str:
        """The text with what is masked. Of a refused one nothing is left."""
        shown, decisions = self.filters.text(text, when)
        self._decided(decisions)
        return shown if refusal(decisions) is None else ""

    def image(self, image: Image.Image, when: When) -> None:
        self._decided(self.filters.image(image, when))

    def parts(self, parts: Sequence[str | Image.Image], when: When) -> list[str | Image.Image]:
        """Texts and images, as far as they may be seen."""
        shown: list[str | Image.Image] = []
        for part in parts:
            if isinstance(part, str):
                shown.append(self.text(part, when))
            else:
                self.image(part, when)
                shown.append(part)
        return shown

    def check(self) -> None:
        """Raises ``ApiError`` 400 if something is refused: for replies that can have no text."""
        if self.refused is not None:
            reason = f"{self.refused.rule}: {self.refused.reason}"
            raise ApiError(400, f"refused by the rule {reason}", code=CODE)

    def _decided(self, decisions: list[Decision]) -> None:
        if decisions:
            facts = self.note.facts
            facts["filters"] = [*facts.get("filters", ()), *(each.rule for each in decisions)]
            reasons = {each.rule: each.reason for each in decisions}
            facts["filter_reasons"] = {**facts.get("filter_reasons", {}), **reasons}
        self.refused = self.refused or refusal(decisions)


async def screened(engine: Engine, function: Callable[..., Value], *arguments: object) -> Value:
    """Call a function that asks the rules about a prompt. They may take long: in another thread."""
    if not engine.filters.has("prompt"):
        return function(*arguments)
    return await engine.in_thread(function, *arguments)


async def screened_pixels(
    urls: Sequence[str], screen: Screening, engines: Sequence[Engine]
) -> list[list[Tensor]]:
    """The images of a request, each as each of these models takes it.

    An image is read in one call: it may be large, and is not kept while others wait. Addresses have
    TIMEOUT seconds together, or if they are more than a chat may have, each ``max_images`` of them.
    """
    engine, settings = engines[0], engines[0].settings

    def read(data: bytes | str) -> list[Tensor]:
        image = read_image(read_data_uri(data) if isinstance(data, str) else data, settings)
        screen.image(image, "prompt")
        return [each.pixels(image) for each in engines]

    found = []
    seconds = TIMEOUT * max(1, sum(map(is_address, urls)) / settings.max_images)
    for url in urls:
        if not is_address(url):
            found.append(await engine.in_thread(read, url))
            continue
        async with engine.engines.fetching:  # until it is read: such bytes are in no limit
            start = time.monotonic()
            data = await engine.engines.fetched(url, seconds)
            seconds -= time.monotonic() - start
            found.append(await engine.in_thread(read, data))
    return found
