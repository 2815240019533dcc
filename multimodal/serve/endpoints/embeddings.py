"""``/v1/embeddings``: texts, and images in messages, as rows of unit norm in one space."""

import base64
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import Tensor

from multimodal.inference.batch import check_length
from multimodal.inference.codec import encode_text, encode_to_read
from multimodal.inference.embedding import embed_codes, embed_texts
from multimodal.schemas import Between
from multimodal.serve.endpoints.bodies import Ignored, read_body
from multimodal.serve.endpoints.bridge import result_of, unless_left
from multimodal.serve.endpoints.noting import note_of
from multimodal.serve.endpoints.screening import Screening, screened, screened_pixels
from multimodal.serve.engine.engine import Engine, Engines
from multimodal.serve.engine.errors import ApiError
from multimodal.serve.engine.messages import ImageUrl, Message, message_parts
from multimodal.serve.engine.pictures import digest_of
from multimodal.serve.engine.scheduler import Steps

AT_ONCE = 32  # texts in one piece of work
LONG = 10_000  # characters of a text whose tokens are a piece of work


@dataclass(frozen=True, kw_only=True)
class EmbeddingRequest(Ignored):
    """Texts in ``input``. Or ``messages`` of the user, each with one text or one image."""

    model: str
    input: str | tuple[str, ...] | None = None
    messages: tuple[Message, ...] | None = None
    dimensions: Annotated[int, Between(1, 2**20)] | None = None
    encoding_format: Literal["float", "base64"] | None = None


async def embeddings(request: Request, engines: Engines) -> Response:
    wanted = await read_body(request, EmbeddingRequest)
    engine = engines.named(wanted.model)
    width = engine.model.config.objectives.alignment_dim
    if (wanted.dimensions or width) > width:
        raise ApiError(400, f"dimensions={wanted.dimensions}: at most {width}", param="dimensions")
    note = note_of(request)
    screen = Screening(engine.filters, note)
    items = await unless_left(request, _items(wanted, engine, screen))
    images = [digest_of(item) for item in items if not isinstance(item, str)]
    note.asked(wanted, engine.fingerprint, images)
    note.texts["prompt"] = "\n".join(item for item in items if isinstance(item, str))
    screen.check()
    rows, tokens = await result_of(request, engine.scheduler, embed_steps(engine, items))
    engine.metrics.count_tokens(tokens, 0)
    rows = rows[:, : wanted.dimensions]
    rows = torch.nn.functional.normalize(rows, dim=-1)
    data = [
        {"object": "embedding", "index": number, "embedding": _encoded(row, wanted)}
        for number, row in enumerate(rows)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    note.answered(usage)
    return JSONResponse({"object": "list", "data": data, "model": wanted.model, "usage": usage})


async def _items(wanted: EmbeddingRequest, engine: Engine, screen: Screening) -> list[str | Tensor]:
    """The texts as far as they may be read, and the images as pixels. Raises ``ApiError``."""
    settings = engine.settings
    if (wanted.input is None) == (wanted.messages is None):
        raise ApiError(400, "input: give input or messages, one of the two", param="input")
    parts: list[str | ImageUrl] = []
    if wanted.input is not None:
        parts += [wanted.input] if isinstance(wanted.input, str) else wanted.input
    for message in wanted.messages or ():
        found = message_parts([message], "none", engine.model.config.templates)
        if len(found) != 1:
            raise ApiError(400, "messages: each has one text or one image", param="messages")
        parts += found
    if not 0 < len(parts) <= settings.max_inputs:
        raise ApiError(
            400, f"input: {len(parts)} items, expected 1 to {settings.max_inputs}", param="input"
        )
    for text in (part for part in parts if isinstance(part, str)):
        if not text.strip():
            raise ApiError(400, "input: a text is empty", param="input")
        engine.check_characters(len(text.strip()), "input")
    urls = [part.url for part in parts if isinstance(part, ImageUrl)]
    images = iter(await screened_pixels(urls, screen, [engine]))
    items: list[str | Tensor] = []
    for part in parts:
        if isinstance(part, str):
            items.append(await screened(engine, screen.text, part, "prompt"))
        else:
            items += next(images)
    return items


def embed_steps(engine: Engine, items: list[str | Tensor]) -> Steps:
    """The work. Returns float32[N, D], and how many tokens were read."""
    model, rows, tokens = engine.model, list[Tensor](), 0
    for start in range(0, len(items), AT_ONCE):
        part = items[start : start + AT_ONCE]
        texts = [item for item in part if isinstance(item, str)]
        if texts:
            for text in texts:
                ids = encode_text(model, text)
                check_length(model.network, [ids], 2)
                tokens += len(ids) + 2
                if len(text) > LONG:
                    yield None
            embedded = iter(embed_texts(model, texts))
            yield None
        for item in part:
            if isinstance(item, str):
                rows.append(next(embedded))
                continue
            codes = yield from engine.computed(encode_to_read, model, item)
            rows.append(embed_codes(model, codes)[0])
            tokens += codes.shape[1] + 3
            yield None
    return torch.stack(rows), tokens


def _encoded(row: Tensor, wanted: EmbeddingRequest) -> Any:
    if wanted.encoding_format == "base64":
        data = row.numpy().astype(np.dtype("<f4")).tobytes()
        return base64.b64encode(data).decode("ascii")
    return row.tolist()
