"""``/v1/chat/completions``: texts, and images if they are asked for, after messages."""

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import Tensor

from multimodal.inference.json_schema import Schema
from multimodal.inference.mixed import MixedRow, Output, OutputKind, check_prompt
from multimodal.options import TextOptions
from multimodal.schemas import Between
from multimodal.serve.endpoints.bodies import Ignored, asked, read_body
from multimodal.serve.endpoints.bridge import Piece, Result, events, result_of
from multimodal.serve.endpoints.noting import Note, digest_of, note_of
from multimodal.serve.endpoints.screening import CODE, Screening
from multimodal.serve.endpoints.streams import event_stream, server_sent
from multimodal.serve.engine.engine import Engine, Engines
from multimodal.serve.engine.errors import ApiError
from multimodal.serve.engine.messages import Message, Template, message_parts
from multimodal.serve.engine.pictures import read_image_url, to_base64
from multimodal.serve.engine.scheduler import Decoding, Steps

MAX_SCHEMA = 1 << 16  # characters
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
    template: Template = "question"
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatRow(MixedRow):
    """A reply that keeps what its tokens are, and in which errors end nothing but itself.

    Attributes:
        tokens: (id, log probability, likeliest ids) of each token.
        error: what went wrong.
        filtered: whether a rule refused it, or what it answers.
    """

    def __init__(self, *arguments: Any, alternatives: int = 0, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.alternatives = alternatives
        self.tokens: list[tuple[int, float, Sequence[tuple[int, float]]]] = []
        self.error: Exception | None = None
        self.filtered = False

    def refuse(self, answer: str) -> None:
        """Put another text in the place of the reply."""
        self.reply.parts, self.tokens = [answer] if answer else [], []
        self.filtered = True

    def allowed(self) -> Tensor | None:
        try:
            return super().allowed()
        except Exception as error:
            self.error = error
            return self.grammar.text_only if self.kind == "text" else self.grammar.text

    def take(self, token: int, log_probability: float) -> list[Output]:  # type: ignore[override]
        if self.error is None:
            try:
                self.tokens.append((token, log_probability, self.likeliest))
                return list(super().take(token, log_probability))
            except Exception as error:
                self.error = error
        self.done = True
        return []


@dataclass(frozen=True)
class Chat:
    """A request that has been checked, and its images read. engine: of the model it names."""

    engine: Engine
    request: ChatRequest
    parts: list[str | Tensor]
    kind: OutputKind
    options: TextOptions
    schema: Schema | None
    id: str
    created: int
    screen: Screening

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.request.model,
            "system_fingerprint": self.engine.fingerprint,
        }


async def read_chat(request: Request, engines: Engines) -> Chat:
    """Raises ``ApiError`` for what cannot be done."""
    chat = asked(ChatRequest, await read_body(request))
    engine = engines.named(chat.model)
    settings, model = engine.settings, engine.model
    parts = message_parts(chat.messages, chat.template, model.config.templates)
    images = sum(not isinstance(part, str) for part in parts)
    if images > settings.max_images:
        raise ApiError(400, f"messages: {images} images, over the limit of {settings.max_images}")
    if (chat.n or 1) > settings.max_choices:
        raise ApiError(400, f"n={chat.n}: at most {settings.max_choices}", param="n")
    wanted = set(chat.modalities or ("text",))
    kind: OutputKind = "text" if wanted == {"text"} else "any" if "text" in wanted else "image"
    most = chat.max_completion_tokens or chat.max_tokens or settings.default_tokens
    if most > settings.max_tokens:
        raise ApiError(400, f"max_tokens={most}: at most {settings.max_tokens}", param="max_tokens")
    stop = (chat.stop,) if isinstance(chat.stop, str) else chat.stop or ()
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
        stop=stop,
        seed=seed,
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
    )
    schema = await _schema(chat.response_format, kind, stop, engine)
    read: list[str | Tensor] = []
    screen = Screening(engine.filters, note_of(request))
    for part in parts:
        if not isinstance(part, str):
            image = await engine.in_thread(read_image_url, part.url, settings)
            await engine.in_thread(screen.image, image, "prompt")
            read.append(engine.pixels(image))
        else:
            read.append(screen.text(part, "prompt"))
    name = f"chatcmpl-{secrets.token_hex(12)}"
    return Chat(engine, chat, read, kind, options, schema, name, int(time.time()), screen)


async def _schema(
    given: Mapping[str, Any] | None, kind: OutputKind, stop: Sequence[str], engine: Engine
) -> Schema | None:
    """What ``response_format`` asks for."""
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
    if kind != "text" or stop:
        raise ApiError(
            400, "response_format: JSON is for texts, and without stop", param="response_format"
        )
    if len(str(schema)) > MAX_SCHEMA:
        raise ApiError(400, "response_format: the schema is too long", param="response_format")
    return await engine.in_thread(engine.schema, schema)


def chat_steps(chat: Chat, streams: bool) -> Steps:
    """The work of a chat: images to codes, then its rows. Returns the rows."""
    engine, request = chat.engine, chat.request
    model = engine.model
    refused = chat.screen.refused
    parts = chat.parts if refused is None else []
    ids = yield from engine.prompt(parts)
    try:
        check_prompt(model, ids, chat.kind, chat.options)
    except ValueError as error:
        raise ApiError(400, str(error), param="messages", code="context_length_exceeded") from error
    rows = [
        ChatRow(
            model,
            number,
            ids,
            chat.kind,
            chat.options,
            engine.grammar,
            streams=streams,
            state=chat.schema.start() if chat.schema else None,
            alternatives=request.top_logprobs or 0,
        )
        for number in range(request.n or 1)
    ]
    if refused is not None:
        for row in rows:
            row.refuse(refused.answer)
        return rows
    scored = bool(request.logprobs or engine.settings.record)
    penalty, long = chat.options.repetition_penalty, chat.kind != "text"
    yield Decoding(model.network, rows, chat.options, penalty, scored, long)
    for row in rows:
        if row.error is not None:
            raise row.error
    return rows


async def chat_completions(request: Request, engines: Engines) -> Response:
    chat, note = await read_chat(request, engines), note_of(request)
    engine = chat.engine
    images = [digest_of(part) for part in chat.parts if not isinstance(part, str)]
    note.asked(chat.request, engine.fingerprint, images, id=chat.id, seed=chat.options.seed)
    note.texts["prompt"] = "\n".join(part for part in chat.parts if isinstance(part, str))
    steps = chat_steps(chat, bool(chat.request.stream))
    if chat.request.stream:
        return await event_stream(_chunks(chat, steps, note), note)
    rows: list[ChatRow] = await result_of(request, engine.scheduler, steps)
    await _screen(rows, engine, note)
    choices = [
        {
            "index": row.number,
            "message": _message(row.reply.parts),
            "logprobs": _logprobs(engine, row.tokens) if chat.request.logprobs else None,
            "finish_reason": finish_reason(row),
        }
        for row in rows
    ]
    head = chat.head("chat.completion")
    usage = _noted(note, rows, engine)
    return JSONResponse({**head, "choices": choices, "usage": usage})


async def _screen(rows: Sequence[ChatRow], engine: Engine, note: Note) -> None:
    """Apply the rules about replies."""
    for row in rows if engine.filters.has("reply") else ():
        if row.filtered:
            continue
        screen, before = Screening(engine.filters, note), row.reply.parts
        shown = await engine.in_thread(screen.parts, before, "reply")
        if screen.refused is not None:
            row.refuse(screen.refused.answer)
        elif any(one is not other for one, other in zip(shown, before, strict=True)):
            row.reply.parts, row.tokens = shown, []  # its tokens would show what is masked


def _noted(note: Note, rows: Sequence[ChatRow], engine: Engine) -> dict[str, int]:
    """The usage, after the replies were noted."""
    usage = engine.count_usage(rows)
    parts = [part for row in rows for part in row.reply.parts]
    reply = "\n".join(part for part in parts if isinstance(part, str))
    drawn = [digest_of(part.tobytes()) for part in parts if not isinstance(part, str)]
    reasons = [finish_reason(row) for row in rows]
    empty = not reply.strip() and not drawn
    likelihood = sum(row.reply.log_probability for row in rows) / max(1, usage["completion_tokens"])
    note.answered(
        usage, reply, finish_reasons=reasons, drawn=drawn, empty=empty, likelihood=likelihood
    )
    return usage


def finish_reason(row: ChatRow) -> str:
    if row.filtered:
        return CODE
    return "length" if row.reply.ended == "length" else "stop"


def _message(parts: Sequence[str | Image.Image]) -> dict[str, Any]:
    texts = [part for part in parts if isinstance(part, str)]
    images = [_image(part) for part in parts if not isinstance(part, str)]
    message = {"role": "assistant", "content": "\n".join(texts), "refusal": None}
    return {**message, "images": images} if images else message


def _image(image: Image.Image) -> dict[str, Any]:
    url = f"data:image/png;base64,{to_base64(image)}"
    return {"type": "image_url", "image_url": {"url": url}}


def _logprobs(
    engine: Engine, tokens: Sequence[tuple[int, float, Sequence[tuple[int, float]]]]
) -> dict[str, Any]:
    def entry(token: int, score: float) -> dict[str, Any]:
        data = engine.token_bytes[token]
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": max(score, -9999.0), "bytes": list(data)}

    content = [
        {**entry(token, score), "top_logprobs": [entry(*each) for each in likeliest]}
        for token, score, likeliest in tokens
        if token < engine.model.vocabulary.text_size
    ]
    return {"content": content, "refusal": None}


class _Edges:
    """Texts in pieces, without white space before the first and after the last character."""

    def __init__(self) -> None:
        self.held, self.begun = "", False

    def __call__(self, piece: str) -> str:
        text = self.held + piece
        text = text if self.begun else text.lstrip()
        shown = text.rstrip()
        self.held, self.begun = text[len(shown) :], self.begun or bool(shown)
        return shown


async def _chunks(chat: Chat, steps: Steps, note: Note) -> AsyncIterator[bytes]:
    """Server-sent events of a chat. If there are rules about replies, they come at its end."""
    engine = chat.engine
    held = engine.filters.has("reply") or chat.screen.refused is not None
    usage = bool(chat.request.stream_options and chat.request.stream_options.include_usage)
    head = chat.head("chat.completion.chunk")
    edges: dict[int, _Edges] = {}
    scored: dict[int, int] = {}

    def chunk(number: int, delta: dict[str, Any], ended: str | None, logprobs: Any) -> bytes:
        choice = {
            "index": number, "delta": delta, "finish_reason": ended, "logprobs": logprobs
        }  # fmt: skip
        return server_sent({**head, "choices": [choice], **({"usage": None} if usage else {})})

    def new_logprobs(row: ChatRow) -> Any:
        if not chat.request.logprobs:
            return None
        start = scored.get(row.number, 0)
        scored[row.number] = len(row.tokens)
        return _logprobs(engine, row.tokens[start : scored[row.number]])

    def begin(number: int) -> list[bytes]:
        if number in edges:
            return []
        edges[number] = _Edges()
        return [chunk(number, {"role": "assistant", "content": ""}, None, None)]

    async with aclosing(events(engine.scheduler, steps)) as stream:  # type: ignore[type-var]
        async for event in stream:
            if isinstance(event, Piece) and isinstance(event.row, ChatRow):
                number, piece = event.row.number, event.piece
                for first in begin(number):
                    yield first
                if held:
                    continue
                if isinstance(piece, Image.Image):
                    yield chunk(number, {"images": [_image(piece)]}, None, None)
                elif isinstance(piece, str) and (text := edges[number](piece)):
                    yield chunk(number, {"content": text}, None, new_logprobs(event.row))
            elif isinstance(event, Result):
                rows: list[ChatRow] = event.value
                await _screen(rows, engine, note)
                for row in rows:
                    for first in begin(row.number):
                        yield first
                    if held:
                        message = _message(row.reply.parts)
                        whole = {
                            key: message[key] for key in ("content", "images") if message.get(key)
                        }
                        yield chunk(row.number, whole, None, new_logprobs(row))
                    yield chunk(row.number, {}, finish_reason(row), new_logprobs(row))
                counts = _noted(note, rows, engine)
                if usage:
                    yield server_sent({**head, "choices": [], "usage": counts})
    yield b"data: [DONE]\n\n"
