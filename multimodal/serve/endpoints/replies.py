"""Replies of a chat in OpenAI's shape: whole, and as a stream of events."""

from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from PIL import Image

from multimodal.serve.endpoints.answering import (
    ChatRow,
    Choice,
    Scored,
    chat_steps,
    noted,
    noted_if_left,
    refuse,
    settle,
)
from multimodal.serve.endpoints.asking import Chat
from multimodal.serve.endpoints.bridge import Result, events
from multimodal.serve.endpoints.noting import Note
from multimodal.serve.endpoints.streams import server_sent
from multimodal.serve.engine.engine import Engine
from multimodal.serve.engine.pictures import Credentials, to_base64

Value = TypeVar("Value")


async def made(objects: Iterable[Value], parts: Sequence[Any], engine: Engine) -> list[Value]:
    """What is made of parts of a reply: with images among them it takes long, so in a thread."""
    if not any(isinstance(part, Image.Image) for part in parts):
        return list(objects)
    return await engine.in_thread(list, objects)


def choice_of(choice: Choice, engine: Engine, scored: bool) -> dict[str, Any]:
    """A choice of a whole reply. scored: with the log probabilities of its tokens."""
    whole = {
        "index": choice.number,
        "message": _message(choice),
        "logprobs": logprobs(choice.tokens, engine) if scored else None,
        "finish_reason": choice.reason,
    }
    return whole if choice.fallback is None else {**whole, "fallback": choice.fallback}


def _message(choice: Choice) -> dict[str, Any]:
    texts = [part for part in choice.parts if isinstance(part, str)]
    drawn = [part for part in choice.parts if not isinstance(part, str)]
    images = [_image(image, choice.credentials) for image in drawn]
    message = {"role": "assistant", "content": "\n".join(texts), "refusal": None}
    return {**message, "images": images} if images else message


def _image(image: Image.Image, credentials: Credentials | None) -> dict[str, Any]:
    url = f"data:image/png;base64,{to_base64(image, credentials=credentials)}"
    return {"type": "image_url", "image_url": {"url": url}}


def logprobs(tokens: Sequence[Scored], engine: Engine) -> dict[str, Any]:
    """The log probabilities of tokens."""

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
    """Texts in pieces, without white space before the first and after the last character.

    Texts with an image between them are lines of their own, as in a whole reply.
    """

    def __init__(self) -> None:
        self.held, self.begun, self.before = "", False, ""

    def __call__(self, piece: str) -> str:
        text = self.held + piece
        text = text if self.begun else text.lstrip()
        shown = text.rstrip()
        self.held = text[len(shown) :]
        if shown and not self.begun:
            self.begun, shown = True, self.before + shown
        return shown

    def image(self) -> None:
        """An image came: the next text is another one."""
        self.before = "\n" if self.begun or self.before else ""
        self.held, self.begun = "", False


class ChatStream:
    """The server-sent events of a chat.

    Rules about replies, and fallbacks, have to see the whole of it. With one of them everything
    comes at the end.
    """

    def __init__(self, chat: Chat) -> None:
        self.chat, self.engine = chat, chat.engine
        options = chat.request.stream_options
        self.usage = bool(options and options.include_usage)
        self.held = self.engine.engines.looks_at_replies or chat.screen.refused is not None
        self.head = chat.head("chat.completion.chunk")
        self.edges: dict[int, _Edges] = {}
        self.scored: dict[int, int] = {}

    async def events(self, note: Note) -> AsyncGenerator[bytes, None]:
        with noted_if_left(self.chat, note):
            async with aclosing(self._events(note)) as stream:
                async for one in stream:
                    yield one

    async def _events(self, note: Note) -> AsyncGenerator[bytes, None]:
        chat, engine = self.chat, self.engine
        result: Sequence[ChatRow] | Exception = []
        if chat.screen.refused is None:
            steps = chat_steps(chat, True, range(chat.count))
            try:
                async with aclosing(events(engine.scheduler, steps)) as stream:  # type: ignore[type-var]
                    async for event in stream:
                        if isinstance(event, Result):
                            result = event.value
                        elif isinstance(event.row, ChatRow):
                            pieces = self._piece(event.row, event.piece)
                            for one in await made(pieces, [event.piece], engine):
                                yield one
            except Exception as error:
                result = error
            answer = await settle(chat, result, note)
        else:
            answer = refuse(chat, note)
        for choice in answer.choices:
            for one in await made(self._end(choice), choice.parts, engine):
                yield one
        counts = noted(answer, engine, note)
        if self.usage:
            yield server_sent({**self.head, "choices": [], "usage": counts})
        yield b"data: [DONE]\n\n"

    def _piece(self, row: ChatRow, piece: Any) -> Iterator[bytes]:
        """What can be shown while a row is decoded."""
        yield from self._begin(row.number)
        if self.held:
            return
        if isinstance(piece, Image.Image):
            self.edges[row.number].image()
            yield self._chunk(row.number, {"images": [_image(piece, self.chat.credentials)]})
        elif isinstance(piece, str) and (text := self.edges[row.number](piece)):
            # With stop texts, the last tokens may be those of one. So all come at the end.
            tokens = None if self.chat.request.stops else row.tokens
            yield self._chunk(row.number, {"content": text}, tokens)

    def _end(self, choice: Choice) -> Iterator[bytes]:
        yield from self._begin(choice.number)
        if self.held:
            message = _message(choice)
            whole = {key: message[key] for key in ("content", "images") if message.get(key)}
            yield self._chunk(choice.number, whole, choice.tokens)
        yield self._chunk(choice.number, {}, choice.tokens, choice)

    def _begin(self, number: int) -> Iterator[bytes]:
        if number not in self.edges:
            self.edges[number] = _Edges()
            yield self._chunk(number, {"role": "assistant", "content": ""})

    def _chunk(
        self,
        number: int,
        delta: dict[str, Any],
        tokens: Sequence[Scored] | None = None,
        ended: Choice | None = None,
    ) -> bytes:
        """tokens: all so far; the log probabilities of the new ones are sent."""
        scores = None
        if tokens is not None and self.chat.request.logprobs:
            start = self.scored.get(number, 0)
            new = tokens[start:]  # while it is read, the scheduler may append
            self.scored[number] = start + len(new)
            scores = logprobs(new, self.engine)
        choice: dict[str, Any] = {"index": number, "delta": delta, "logprobs": scores}
        choice["finish_reason"] = ended and ended.reason
        if ended and ended.fallback:
            choice["fallback"] = ended.fallback
        usage = {"usage": None} if self.usage else {}
        return server_sent({**self.head, "choices": [choice], **usage})
