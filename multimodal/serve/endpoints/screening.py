"""The rules of a server about one request: what they decide is noted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image
from torch import Tensor

from multimodal.filters.rules import Decision, Filters, When, refusal
from multimodal.serve.endpoints.noting import Note
from multimodal.serve.engine.engine import Engine
from multimodal.serve.engine.errors import ApiError
from multimodal.serve.engine.pictures import read_image_url

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


async def screened_pixels(url: str, screen: Screening, engines: Sequence[Engine]) -> list[Tensor]:
    """An image of a prompt, as each of these models takes it.

    All of it is done in one call: the image itself may be large, and is not kept while others wait.
    """

    def read() -> list[Tensor]:
        image = read_image_url(url, engines[0].settings)
        screen.image(image, "prompt")
        return [engine.pixels(image) for engine in engines]

    return await engines[0].in_thread(read)
