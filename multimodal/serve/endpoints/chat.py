"""``/v1/chat/completions``: texts, and images if they are asked for, after messages."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import Tensor

from multimodal.serve.endpoints.answering import (
    Answer,
    chat_steps,
    noted,
    noted_if_left,
    refuse,
    settle,
)
from multimodal.serve.endpoints.asking import Chat, read_chat
from multimodal.serve.endpoints.bridge import outcome, unless_left
from multimodal.serve.endpoints.noting import Note, note_of
from multimodal.serve.endpoints.replies import ChatStream, choice_of, made
from multimodal.serve.endpoints.streams import event_stream
from multimodal.serve.engine.engine import Engines
from multimodal.serve.engine.pictures import digest_of


async def chat_completions(request: Request, engines: Engines) -> Response:
    chat, note = await read_chat(request, engines), note_of(request)
    engine = chat.engine
    images = [digest_of(part) for part in chat.parts if isinstance(part, Tensor)]
    note.asked(chat.request, engine.fingerprint, images, id=chat.id, seed=chat.options.seed)
    note.texts["prompt"] = "\n".join(part for part in chat.parts if isinstance(part, str))
    if chat.request.stream:
        return await event_stream(request, ChatStream(chat).events(note))
    answer = await unless_left(request, _answer(chat, note))
    scored = bool(chat.request.logprobs)
    parts = [part for choice in answer.choices for part in choice.parts]
    objects = (choice_of(choice, engine, scored) for choice in answer.choices)
    choices = await made(objects, parts, engine)
    usage = noted(answer, engine, note)
    return JSONResponse({**chat.head("chat.completion"), "choices": choices, "usage": usage})


async def _answer(chat: Chat, note: Note) -> Answer:
    if chat.screen.refused is not None:
        return refuse(chat, note)
    with noted_if_left(chat, note):
        steps = chat_steps(chat, False, range(chat.count))
        return await settle(chat, await outcome(chat.engine.scheduler, steps), note)
