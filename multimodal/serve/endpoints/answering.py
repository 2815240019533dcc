"""How a chat is answered: rows are decoded, rules look at them, and a fallback takes their place.

A fallback is another model, then a fixed answer, as far as the server has them. It answers where
the model failed, where it is unsure (a token is less likely than ``Settings.unsure`` on average),
and where a rule without an answer of its own has refused the reply. A refused prompt goes to no
model. What a fallback has said is named in the reply and in the record.
"""

import logging
from asyncio import CancelledError
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, TypeAlias

from PIL import Image
from torch import Tensor

from multimodal.inference.mixed import MixedRow, Output, check_prompt
from multimodal.inference.text import TextRow
from multimodal.memory import NotEnoughMemory
from multimodal.serve.endpoints.asking import Chat
from multimodal.serve.endpoints.bridge import finished
from multimodal.serve.endpoints.noting import Note
from multimodal.serve.endpoints.screening import CODE, Screening
from multimodal.serve.engine.engine import Engine
from multimodal.serve.engine.errors import ApiError
from multimodal.serve.engine.pictures import Credentials, digest_of
from multimodal.serve.engine.scheduler import Decoding, Steps

Scored: TypeAlias = tuple[int, float, Sequence[tuple[int, float]]]
Why = Literal["failed", "unsure", "filtered"]
ANSWER = "answer"  # the name of the fixed answer
log = logging.getLogger("multimodal.serve")


class ChatRow(MixedRow):
    """A reply that keeps what its tokens are, and in which errors end nothing but itself.

    Attributes:
        tokens: (id, log probability, likeliest ids) of each token, without those that are not
            shown: what ends a text, and a stop text.
        error: what went wrong.
    """

    def __init__(
        self, *arguments: Any, alternatives: int, ends: Sequence[int], **more: Any
    ) -> None:
        super().__init__(*arguments, **more)
        self.alternatives, self.ends = alternatives, ends
        self.tokens: list[Scored] = []
        self.error: Exception | None = None

    def allowed(self) -> Tensor | None:
        try:
            return super().allowed()
        except Exception as error:
            self.error = error
            return self.grammar.text_only if self.kind == "text" else self.grammar.text

    def take(self, token: int, log_probability: float) -> list[Output]:  # type: ignore[override]
        if self.error is None:
            try:
                text = self.part if isinstance(self.part, TextRow) else None
                if text is None or token not in text.end_ids:
                    self.tokens.append((token, log_probability, self.likeliest))
                pieces = list(super().take(token, log_probability))
                if text is not None and text.ended == "stop":
                    self._drop_stop(text)
                return pieces
            except Exception as error:
                self.error = error
        self.done = True
        return []

    def _drop_stop(self, text: TextRow) -> None:
        """Leave out the tokens after the last one that has a part of the text before a stop."""
        shown, count = text.text(), len(text.tokens)
        while count and text.tokenizer.decode(text.tokens[: count - 1]).startswith(shown):
            count -= 1
            self.tokens.pop()

    def parts_so_far(self) -> list[str | Image.Image]:
        """Those of the reply, and the text that has not ended. The row may be decoded meanwhile."""
        parts, last = list(self.reply.parts), self.part
        if isinstance(last, TextRow) and last.tokens and not self.done:
            parts.append(last.text().strip())
        return parts


@dataclass(frozen=True)
class Choice:
    """One reply as it is sent.

    Attributes:
        parts: texts and images.
        tokens: those that may be shown.
        reason: why it ended, as OpenAI says it.
        fallback: ``why`` it is not from the model that was asked, and ``by`` whom it is.
        credentials: of its images, if they are signed.
    """

    number: int
    parts: Sequence[str | Image.Image]
    tokens: Sequence[Scored] = ()
    reason: str = "stop"
    fallback: dict[str, str] | None = None
    credentials: Credentials | None = None

    @classmethod
    def of(cls, row: ChatRow, chat: Chat) -> Self:
        reason = "length" if row.reply.ended == "length" else "stop"
        parts, credentials = row.reply.parts, chat.credentials
        return cls(row.number, parts, row.tokens, reason, credentials=credentials)

    @classmethod
    def fixed(cls, number: int, answer: str, why: Why, by: str = "") -> Self:
        """A text that no model has written. by: of a fallback."""
        fallback = {"why": str(why), "by": by} if by else None
        return cls(
            number, [answer] if answer else [], (), CODE if why == "filtered" else "stop", fallback
        )


@dataclass(frozen=True)
class Answer:
    """What a chat has given. rows: what each model has written for it."""

    choices: Sequence[Choice]
    rows: Sequence[Sequence[ChatRow]] = ()


def chat_steps(chat: Chat, streams: bool, numbers: Sequence[int]) -> Steps:
    """The work of a chat: images to codes, then its rows. Returns the rows.

    numbers: of the choices.
    """
    engine, options = chat.engine, chat.options
    model, settings = engine.model, engine.settings
    ids, ends = yield from engine.prompt(chat.parts)
    room = model.config.transformer.max_position_embeddings - len(ids)
    if chat.request.most_tokens is None and room > 0:  # nobody asked for more than there is
        options = replace(options, max_tokens=min(options.max_tokens, room))
    try:
        check_prompt(model, ids, chat.kind, options)
    except ValueError as error:
        raise ApiError(400, str(error), param="messages", code="context_length_exceeded") from error
    rows = [
        ChatRow(
            model,
            number,
            ids,
            chat.kind,
            options,
            engine.grammar,
            streams=streams,
            state=chat.schema.start() if chat.schema else None,
            alternatives=chat.request.top_logprobs or 0,
            ends=ends,
        )
        for number in numbers
    ]
    chat.written.append(rows)
    scored = bool(chat.request.logprobs or settings.record or settings.unsure is not None)
    penalty, long = options.repetition_penalty, chat.kind != "text"
    yield Decoding(model.network, rows, options, penalty, scored, long)
    for row in rows:
        if row.error is not None:
            raise row.error
    return rows


async def settle(chat: Chat, result: Sequence[ChatRow] | Exception, note: Note) -> Answer:
    """What is sent of rows, or of an error in their place.

    Raises:
        Exception: the error, if it is the client's, or if nothing takes its place.
    """
    if isinstance(result, ApiError | ValueError) and not isinstance(result, NotEnoughMemory):
        raise result
    settings, fallback = chat.engine.settings, chat.engine.engines.fallback
    choices: dict[int, Choice] = {}
    left: dict[int, Why] = {}  # choices that need a fallback
    rows: list[Sequence[ChatRow]] = []
    if isinstance(result, Exception):
        for number in range(chat.count):
            left[number] = "failed"
    else:
        choices, left = await _judge(chat, result, note)
        rows.append(result)
    if fallback is not None and left:
        try:
            other = await chat.asked_of(fallback)
            again = await finished(fallback.scheduler, chat_steps(other, False, list(left)))
            found, unsettled = await _judge(other, again, note)
        except Exception as error:
            log.warning("the fallback %s failed: %r", fallback.name, error)
        else:
            rows.append(again)
            for number, choice in found.items():
                if number not in unsettled or number not in choices:
                    named = {"why": str(left[number]), "by": fallback.name}
                    # Its tokens are of another vocabulary.
                    choices[number] = replace(choice, tokens=(), fallback=named)
            left = {number: left[number] for number in unsettled}
    for number, why in left.items() if settings.fallback_answer else ():
        choices[number] = Choice.fixed(number, settings.fallback_answer, why, ANSWER)
    if isinstance(result, Exception) and len(choices) < chat.count:
        raise result
    return _named(Answer([choices[number] for number in sorted(choices)], rows), note)


def refuse(chat: Chat, note: Note) -> Answer:
    """The answer to a prompt that a rule has refused."""
    refused, general = chat.screen.refused, chat.engine.settings.fallback_answer
    assert refused is not None
    answer, by = (refused.answer, "") if refused.answer else (general, ANSWER if general else "")
    choices = [Choice.fixed(number, answer, "filtered", by) for number in range(chat.count)]
    return _named(Answer(choices), note)


def _named(answer: Answer, note: Note) -> Answer:
    """The answer, after its fallbacks were noted."""
    named = [{"choice": each.number, **each.fallback} for each in answer.choices if each.fallback]
    if named:
        note.facts["fallback"] = named
    return answer


async def _judge(
    chat: Chat, rows: Sequence[ChatRow], note: Note
) -> tuple[dict[int, Choice], dict[int, Why]]:
    """What may be sent of rows by their numbers, and which of them need a fallback."""
    engine, choices, left = chat.engine, dict[int, Choice](), dict[int, Why]()
    for row in rows:
        choice = Choice.of(row, chat)
        if chat.kind == "text" and _is_unsure(row, engine.settings.unsure):
            left[row.number] = "unsure"
        if engine.filters.has("reply"):
            screen = Screening(engine.filters, note)
            shown = await engine.in_thread(screen.parts, choice.parts, "reply")
            if screen.refused is not None:
                left.pop(row.number, None)
                choice = Choice.fixed(row.number, screen.refused.answer, "filtered")
                if not screen.refused.answer:
                    left[row.number] = "filtered"
            elif any(one is not other for one, other in zip(shown, choice.parts, strict=True)):
                # Its tokens would show what is masked.
                choice = replace(choice, parts=shown, tokens=())
        choices[row.number] = choice
    return choices, left


def _is_unsure(row: ChatRow, limit: float | None) -> bool:
    """Whether its tokens have a lower log probability than the limit, on average."""
    scores = [score for _, score, _ in row.tokens]
    return limit is not None and bool(scores) and sum(scores) / len(scores) < limit


def noted(answer: Answer, engine: Engine, note: Note) -> dict[str, int]:
    """The usage, after the answer was noted."""
    usage = Counter[str](prompt_tokens=0, completion_tokens=0, total_tokens=0)
    for rows in answer.rows:
        usage.update(engine.count_usage(rows))
    reply, drawn = _contents(part for choice in answer.choices for part in choice.parts)
    reasons = [choice.reason for choice in answer.choices]
    empty = not reply.strip() and not drawn
    # A fallback's tokens are of another vocabulary.
    own = [row.reply for rows in answer.rows for row in rows if row.model is engine.model]
    total = sum(each.log_probability for each in own)
    written = sum(each.text_tokens + each.image_tokens for each in own)
    likelihood = total / written if written else None
    note.answered(
        usage, reply, finish_reasons=reasons, drawn=drawn, empty=empty, likelihood=likelihood
    )
    return dict(usage)


@contextmanager
def noted_if_left(chat: Chat, note: Note) -> Iterator[None]:
    """Note and count what was written, if the client leaves before all of it was noted."""
    try:
        yield
    except (CancelledError, GeneratorExit):
        engine, usage = chat.engine, Counter[str]()
        begun = [
            [row for row in rows if row.used > row.reply.prompt_tokens] for rows in chat.written
        ]
        if any(begun) and "usage" not in note.facts:
            for rows in begun:
                usage.update(engine.count_usage(rows))
            if engine.engines.looks_at_replies:  # no rule has seen the texts
                note.answered(usage)
            else:
                rows = [row for rows in begun for row in rows]
                reply, drawn = _contents(part for row in rows for part in row.parts_so_far())
                note.answered(usage, reply, drawn=drawn)
        raise


def _contents(parts: Iterable[str | Image.Image]) -> tuple[str, list[str]]:
    """The texts of parts, and the digests of their images."""
    parts = list(parts)
    reply = "\n".join(part for part in parts if isinstance(part, str))
    return reply, [digest_of(part.tobytes()) for part in parts if not isinstance(part, str)]
