"""What a chat asks for: the fields of a request, checked, with its images read."""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal, Self

from starlette.requests import Request
from torch import Tensor

from multimodal.inference.json_schema import Schema
from multimodal.inference.mixed import OutputKind
from multimodal.options import TextOptions
from multimodal.schemas import Between
from multimodal.serve.endpoints.bodies import Ignored, read_body
from multimodal.serve.endpoints.bridge import unless_left
from multimodal.serve.endpoints.noting import Note, note_of
from multimodal.serve.endpoints.screening import Screening, screened, screened_pixels
from multimodal.serve.engine.engine import Engine, Engines
from multimodal.serve.engine.errors import ApiError
from multimodal.serve.engine.messages import ImageUrl, Message, Template, message_parts
from multimodal.serve.engine.pictures import Credentials

MAX_SCHEMA = 1 << 16  # characters
MAX_STOPS = 16
MAX_STOP = 256  # characters: each token of a reply is compared with all of them
Nothing = Annotated[float, Between(0, 0)]


@dataclass(frozen=True)
class StreamOptions:
    include_usage: bool = False
    include_obfuscation: bool = False


@dataclass(frozen=True, kw_only=True)
class ChatRequest(Ignored):
    """What may be asked. Beyond OpenAI's: top_k, min_p, repetition_penalty, template, and images by
    ``modalities: ["text", "image"]`` (what the model chooses) or ``["image"]`` (one image).
    """

    model: str
    messages: tuple[Message, ...]
    max_tokens: Annotated[int, Between(1, 2**31)] | None = None
    max_completion_tokens: Annotated[int, Between(1, 2**31)] | None = None
    n: Annotated[int, Between(1, 1024)] | None = None
    stop: str | tuple[str, ...] | None = None
    seed: Annotated[int, Between(-(2**63), 2**63 - 1)] | None = None
    temperature: Annotated[float, Between(0, 100)] | None = None
    top_p: Annotated[float, Between(0, 1)] | None = None
    top_k: Annotated[int, Between(0, 2**31)] | None = None
    min_p: Annotated[float, Between(0, 1)] | None = None
    repetition_penalty: Annotated[float, Between(0.01, 100)] | None = None
    frequency_penalty: Nothing | None = None
    presence_penalty: Nothing | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Between(0, 20)] | None = None
    response_format: Mapping[str, Any] | None = None
    modalities: tuple[Literal["text", "image"], ...] | None = None
    template: Template | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def most_tokens(self) -> int | None:
        """Tokens of a reply at most, under the name of today or that of before."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()


@dataclass(frozen=True)
class Chat:
    """A request that has been checked.

    Attributes:
        engine: of the model that answers.
        images: those of the messages in their order, as the fallback reads them, if there is one.
        parts: of the prompt, as this model reads them.
        screen: what the rules said about the prompt.
        written: the rows that each model has begun to write for it (``ChatRow``).
    """

    engine: Engine
    request: ChatRequest
    images: Sequence[Tensor]
    parts: Sequence[str | Tensor]
    kind: OutputKind
    options: TextOptions
    schema: Schema | None
    id: str
    created: int
    screen: Screening
    written: list[Sequence[Any]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many replies are asked for."""
        return self.request.n or 1

    @property
    def credentials(self) -> Credentials | None:
        """Those of images that its model draws."""
        return self.engine.credentials("\n".join(x for x in self.parts if isinstance(x, str)))

    async def asked_of(self, engine: Engine) -> Self:
        """The same for another model, which has other templates and sizes of images."""
        screen = Screening(engine.filters, Note())  # it has been noted
        parts = await _prompt(self.request, self.images, engine, screen)
        schema = await _schema(self.request, self.kind, engine)
        return replace(self, engine=engine, parts=parts, schema=schema)

    def head(self, kind: str) -> dict[str, Any]:
        """What each object of a reply begins with."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.request.model,
            "system_fingerprint": self.engine.fingerprint,
        }


async def read_chat(request: Request, engines: Engines) -> Chat:
    """Read and check it.

    Raises:
        ApiError: for what cannot be done.
        Disconnected: if the client leaves while its images are fetched and read.
    """
    chat = await read_body(request, ChatRequest)
    engine = engines.named(chat.model)
    settings = engine.settings
    urls = [part for part in _parts(chat, engine) if isinstance(part, ImageUrl)]
    if len(chat.stops) > MAX_STOPS or any(len(stop) > MAX_STOP for stop in chat.stops):
        raise ApiError(
            400, f"stop: at most {MAX_STOPS} texts of {MAX_STOP} characters each", param="stop"
        )
    if len(urls) > settings.max_images:
        raise ApiError(
            400, f"messages: {len(urls)} images, over the limit of {settings.max_images}"
        )
    if (chat.n or 1) > settings.max_choices:
        raise ApiError(400, f"n={chat.n}: at most {settings.max_choices}", param="n")
    wanted = set(chat.modalities or ("text",))
    kind: OutputKind = "text" if wanted == {"text"} else "any" if "text" in wanted else "image"
    most = chat.most_tokens or min(settings.default_tokens, settings.max_tokens)
    if most > settings.max_tokens:
        raise ApiError(400, f"max_tokens={most}: at most {settings.max_tokens}", param="max_tokens")
    given = {
        "temperature": chat.temperature,
        "top_p": chat.top_p,
        "top_k": chat.top_k,
        "min_p": chat.min_p,
        "repetition_penalty": chat.repetition_penalty,
    }
    seed = secrets.randbits(31) if chat.seed is None else chat.seed % 2**63
    options = TextOptions(
        max_tokens=most,
        stop=chat.stops,
        seed=seed,
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
    )
    schema = await _schema(chat, kind, engine)
    screen = Screening(engine.filters, note_of(request))
    models = [engine] if engines.fallback is None else [engine, engines.fallback]
    links = [url.url for url in urls]
    read = await unless_left(request, screened_pixels(links, screen, models)) if links else []
    parts = await _prompt(chat, [each[0] for each in read], engine, screen)
    images = [each[1] for each in read if engines.fallback is not None]
    name, now = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
    return Chat(engine, chat, images, parts, kind, options, schema, name, now, screen)


def _parts(
    request: ChatRequest, engine: Engine, shown: Callable[[str], str] = str
) -> list[str | ImageUrl]:
    model = engine.model
    talks = model.text_tokenizer.chat is not None
    return message_parts(request.messages, request.template, model.config.templates, shown, talks)


async def _prompt(
    request: ChatRequest, pixels: Sequence[Tensor], engine: Engine, screen: Screening
) -> list[str | Tensor]:
    """The texts in a model's templates, as far as they may be read, and the images.

    Raises:
        ApiError: if the texts are too long in any case.
    """
    texts = [part for part in _parts(request, engine) if isinstance(part, str)]
    engine.check_characters(sum(map(len, texts)), "messages")
    left = iter(pixels)
    shown = partial(screen.text, when="prompt")
    parts = await screened(engine, _parts, request, engine, shown)
    return [part if isinstance(part, str) else next(left) for part in parts]


async def _schema(request: ChatRequest, kind: OutputKind, engine: Engine) -> Schema | None:
    """What ``response_format`` asks for."""
    given = request.response_format
    if given is None or given.get("type") == "text":
        return None
    if given.get("type") == "json_object":
        schema: Any = {"type": "object"}
    elif given.get("type") == "json_schema" and isinstance(given.get("json_schema"), Mapping):
        schema = given["json_schema"].get("schema")
    else:
        schema = None
    if not isinstance(schema, dict):
        raise ApiError(
            400,
            "response_format: expected type 'text', 'json_object', or 'json_schema' with a schema",
            param="response_format",
        )
    if kind != "text" or request.stops:
        raise ApiError(
            400, "response_format: JSON is for texts, and without stop", param="response_format"
        )
    if len(str(schema)) > MAX_SCHEMA:
        raise ApiError(400, "response_format: the schema is too long", param="response_format")
    return await engine.in_thread(engine.schema, schema)
