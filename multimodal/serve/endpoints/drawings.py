"""``/v1/images/generations`` and ``/v1/images/edits``: images after texts, and parts of images.

Beyond OpenAI's fields: ``seed``, ``temperature``, ``top_k``, ``top_p``, ``min_p``,
``guidance_scale``, ``guidance_schedule``, ``negative_prompt``, and ``steps`` (masked drawing) or
``method``. The image has the size of the model, and is resized where ``size`` asks for another.
"""

import re
import secrets
import time
from asyncio import CancelledError
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import Tensor

from multimodal.data.images import to_image
from multimodal.inference.codec import UNKNOWN, decode_images, preview_images
from multimodal.inference.drawing import ImageRow, guided_prompts, masked_steps
from multimodal.inference.editing import edit_steps
from multimodal.options import MAX_STEPS, DrawOptions, Method, Schedule
from multimodal.origin.credentials import PARTLY_DRAWN
from multimodal.schemas import Between
from multimodal.serve.endpoints.bodies import Ignored, read_body, read_form
from multimodal.serve.endpoints.bridge import Disconnected, Result, events, result_of
from multimodal.serve.endpoints.noting import Note, digests_of, note_of
from multimodal.serve.endpoints.partial_images import is_due, with_partial_images
from multimodal.serve.endpoints.screening import Screening, screened
from multimodal.serve.endpoints.streams import event_stream, server_sent
from multimodal.serve.engine.engine import Engine, Engines
from multimodal.serve.engine.errors import ApiError
from multimodal.serve.engine.pictures import (
    Credentials,
    OutputFormat,
    check_pixels,
    read_image,
    read_transparency,
    to_base64,
)
from multimodal.serve.engine.scheduler import Decoding, Steps

MAX_SIDE = 4096
MAX_PIXELS = 1 << 26  # of all images of a response: four of MAX_SIDE
_SIZE = re.compile(r"([1-9]\d{0,3})x([1-9]\d{0,3})", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class ImageRequest(Ignored):
    """What both endpoints take."""

    model: str
    prompt: str
    n: Annotated[int, Between(1, 1024)] | None = None
    size: str | None = None
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    style: str | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: OutputFormat | None = None
    output_compression: Annotated[int, Between(0, 100)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Between(0, 3)] | None = None
    seed: Annotated[int, Between(-(2**63), 2**63 - 1)] | None = None
    temperature: Annotated[float, Between(0, 100)] | None = None
    top_p: Annotated[float, Between(0, 1)] | None = None
    top_k: Annotated[int, Between(0, 2**31)] | None = None
    min_p: Annotated[float, Between(0, 1)] | None = None
    guidance_scale: Annotated[float, Between(0, 1000)] | None = None
    guidance_schedule: Schedule | None = None
    negative_prompt: str | None = None
    steps: Annotated[int, Between(1, MAX_STEPS)] | None = None
    method: Method | None = None

    def options(self) -> DrawOptions:
        """Raises ``ValueError`` for options that exclude one another."""
        names = ("temperature", "top_p", "top_k", "min_p", "guidance_scale", "guidance_schedule")
        given = {name: getattr(self, name) for name in (*names, "steps", "method")}
        given["negative"] = self.negative_prompt
        if self.steps is not None and self.method is None:
            given["method"] = "masked"
        seed = secrets.randbits(31) if self.seed is None else self.seed % 2**63
        return DrawOptions(seed=seed, **{k: v for k, v in given.items() if v is not None})


@dataclass(frozen=True, kw_only=True)
class Look:
    """How images are sent. size: width and height, or None for that of the model."""

    size: tuple[int, int] | None
    kind: OutputFormat
    quality: int
    credentials: Credentials | None = None

    @classmethod
    def of(cls, request: ImageRequest) -> "Look":
        size = None
        if request.size not in (None, "auto"):
            found = _SIZE.fullmatch(str(request.size))
            if found is None or max(int(found[1]), int(found[2])) > MAX_SIDE:
                raise ApiError(
                    400, f"size: expected auto or WxH up to {MAX_SIDE}x{MAX_SIDE}", param="size"
                )
            size = (int(found[1]), int(found[2]))
        compression = 100 if request.output_compression is None else request.output_compression
        return cls(size=size, kind=request.output_format or "png", quality=compression)

    def send(self, image: Image.Image) -> str:
        if self.size is not None and self.size != image.size:
            image = image.resize(self.size, Image.Resampling.BICUBIC)
        return to_base64(image, self.kind, self.quality, self.credentials)


def _checked(request: ImageRequest, engine: Engine) -> tuple[DrawOptions, Look]:
    settings, count = engine.settings, request.n or 1
    if not request.prompt.strip():
        raise ApiError(400, "prompt: is empty", param="prompt")
    if count > settings.max_choices:
        raise ApiError(400, f"n={count}: at most {settings.max_choices}", param="n")
    if request.stream and count > 1:
        raise ApiError(400, f"n={count}: a stream is of one image", param="n")
    for text in (request.prompt, request.negative_prompt or ""):
        engine.check_characters(len(text.strip()), "prompt")
    look = Look.of(request)
    if look.size is not None:
        _check_pixels(count, look.size[0] * look.size[1])
    return request.options(), look


def _check_pixels(count: int, pixels: int) -> None:
    """Raises ``ApiError`` if several images are too many for one response."""
    if count > 1 and count * pixels > MAX_PIXELS:
        given = f"n={count}, {pixels:,} pixels each"
        raise ApiError(400, f"{given}: at most {MAX_PIXELS:,} pixels together", param="n")


def _reserve(request: Request, engine: Engine, size: int) -> None:
    """Take so many bytes from the budget of images until the response is sent.

    Raises:
        ApiError: 429 if there is not enough left.
    """
    budget = engine.engines.decoded
    budget.take(size)
    request.scope["at_end"].callback(budget.give_back, size)


def _count_partial(engine: Engine, request: ImageRequest) -> int:
    """How many partial images are shown: none before the rules have seen all of an image."""
    shows = request.stream and not engine.filters.has("reply")
    return request.partial_images or 0 if shows else 0


def draw_steps(
    engine: Engine, request: ImageRequest, options: DrawOptions, rows: list[ImageRow]
) -> Steps:
    """The work of a drawing. Returns the images, and the tokens of the prompt.

    Args:
        rows: is filled with those that are drawn code by code.
    """
    model, count = engine.model, request.n or 1
    texts = [request.prompt]
    (prompts,) = guided_prompts(model, texts, options)
    images, wanted = list[Image.Image](), _count_partial(engine, request)
    if options.method == "masked":
        for number in range(count):
            unknown = engine.unknown_codes()
            drawing = masked_steps(model, texts, options, unknown, [number])
            codes = yield from with_partial_images(drawing, wanted, options.steps)
            images.append(to_image(decode_images(model, codes)[0]))
            yield None
    else:
        rows += [ImageRow(model, n, prompts, options, bool(wanted)) for n in range(count)]
        yield Decoding(model.network, rows, options, long=True)
        for row in rows:  # each alone: its pixels do not depend on the others
            images.append(to_image(decode_images(model, row.partial()[None])[0]))
            yield None
    return images, len(prompts[0])


async def images_generations(request: Request, engines: Engines) -> Response:
    drawing = await read_body(request, ImageRequest)
    engine = engines.named(drawing.model)
    options, look = _checked(drawing, engine)
    drawing = await _screened(request, drawing, engine, options.seed)
    options = replace(options, negative=drawing.negative_prompt)
    look = replace(look, credentials=engine.credentials(drawing.prompt))
    side, rows = engine.model.image_tokenizer.image_size, list[ImageRow]()
    width, height = look.size or (side, side)
    _reserve(request, engine, 3 * (drawing.n or 1) * width * height)
    steps = draw_steps(engine, drawing, options, rows)
    return await _respond(request, engine, drawing, look, steps, "image_generation", rows)


async def images_edits(request: Request, engines: Engines) -> Response:
    editing, files = await read_form(request, ImageRequest, engines.settings.max_body)
    engine = engines.named(editing.model)
    options, look = _checked(editing, engine)
    if options.method == "causal" and editing.method is not None:
        raise ApiError(400, "method: a part of an image is drawn by masks", param="method")
    image, mask = await _decoded(request, engine, files, editing.n or 1, look)
    editing = await _screened(request, editing, engine, options.seed, [image, mask])
    options = replace(options, negative=editing.negative_prompt)
    look = replace(look, credentials=engine.credentials(editing.prompt, PARTLY_DRAWN))

    def steps() -> Steps:
        images, wanted = list[Image.Image](), _count_partial(engine, editing)
        for number in range(editing.n or 1):
            drawing = edit_steps(engine.model, image, mask, editing.prompt, options, number)
            edited = yield from with_partial_images(drawing, wanted, options.steps)
            images.append(edited)
        return images, len(engine.model.text_tokenizer.encode(editing.prompt))

    return await _respond(request, engine, editing, look, steps(), "image_edit")


async def _decoded(
    request: Request, engine: Engine, files: Mapping[str, bytes], count: int, look: Look
) -> tuple[Image.Image, Image.Image]:
    """The image, and a mask that is white where to draw.

    The edited image has the size of this one, so all of it waits with the request. Its bytes, those
    of the mask and of ``count`` results are taken from the budget until the response is sent.
    """
    settings = engine.settings
    source = "mask" if "mask" in files else "image"
    pixels = await engine.in_thread(check_pixels, files["image"], settings, "image")
    masked = await engine.in_thread(check_pixels, files[source], settings, source)
    _check_pixels(count, pixels)
    width, height = look.size or (0, 0)
    _reserve(request, engine, 3 * (pixels + count * max(pixels, width * height)) + masked)
    image = await engine.in_thread(read_image, files["image"], settings)
    mask = await engine.in_thread(read_transparency, files[source], settings, source)
    if mask is None:
        raise ApiError(
            400,
            f"{source}: has no transparency; it says what is to be drawn anew"
            + ("" if source == "mask" else " (or give a mask)"),
            param="mask",
        )
    return image, mask


async def _screened(
    request: Request,
    asked: ImageRequest,
    engine: Engine,
    seed: int,
    images: Sequence[Image.Image] = (),
) -> ImageRequest:
    """The request as far as the rules let it be seen, after that was noted.

    Args:
        images: the image that is edited, and its mask.

    Raises:
        ApiError: if a rule refuses it.
    """
    note = note_of(request)
    screen = Screening(engine.filters, note)

    def shown() -> ImageRequest:
        text, negative = screen.text(asked.prompt, "prompt"), asked.negative_prompt
        if negative:
            negative = screen.text(negative, "prompt")
        for image in images[:1]:
            screen.image(image, "prompt")
        return replace(asked, prompt=text, negative_prompt=negative)

    asked = await screened(engine, shown)
    digests = await engine.in_thread(digests_of, images) if images else []
    note.asked(asked, engine.fingerprint, digests, seed=seed)
    note.texts["prompt"] = asked.prompt
    if asked.negative_prompt:
        note.texts["negative_prompt"] = asked.negative_prompt
    screen.check()
    return asked


async def _check_drawn(images: Sequence[Image.Image], engine: Engine, note: Note) -> None:
    """Raises ``ApiError`` if a rule refuses one."""
    screen = Screening(engine.filters, note)
    for image in images:
        await engine.in_thread(screen.image, image, "reply")
    screen.check()


async def _respond(
    request: Request,
    engine: Engine,
    asked: ImageRequest,
    look: Look,
    steps: Steps,
    event: str,
    rows: Sequence[ImageRow] = (),
) -> Response:
    if asked.stream:
        shown = _events(engine, asked, look, steps, event, note_of(request), rows)
        return await event_stream(request, shown)
    with _noted_if_left(engine, rows, note_of(request)):
        images, read = await result_of(request, engine.scheduler, steps)
    await _check_drawn(images, engine, note_of(request))
    data = [{"b64_json": await engine.in_thread(look.send, image)} for image in images]
    head = {"created": int(time.time()), "output_format": look.kind}
    usage = await _usage(engine, read, images, note_of(request))
    return JSONResponse({**head, "data": data, "usage": usage})


@contextmanager
def _noted_if_left(engine: Engine, rows: Sequence[ImageRow], note: Note) -> Iterator[None]:
    """Note and count the codes of rows, if the client leaves before the whole image was noted."""
    try:
        yield
    except (CancelledError, GeneratorExit, Disconnected):
        drawn = sum(len(row.codes) for row in rows)
        if drawn and "usage" not in note.facts:
            note.answered(_counted(engine, len(rows[0].prompts[0]), drawn))
        raise


async def _events(
    engine: Engine,
    asked: ImageRequest,
    look: Look,
    steps: Steps,
    event: str,
    note: Note,
    rows: Sequence[ImageRow],
) -> AsyncGenerator[bytes, None]:
    """Partial images while one is drawn, and the whole one."""
    created, shown, wanted = int(time.time()), 0, _count_partial(engine, asked)

    async def message(kind: str, image: Image.Image, **more: Any) -> bytes:
        name = f"{event}.{kind}"
        about = {
            "type": name,
            "b64_json": await engine.in_thread(look.send, image),
            "created_at": created,
            "size": "x".join(map(str, look.size or image.size)),
            "quality": "auto",
            "background": "opaque",
            "output_format": look.kind,
        }
        return server_sent({**about, **more}, name)

    with _noted_if_left(engine, rows, note):
        async with aclosing(events(engine.scheduler, steps)) as stream:  # type: ignore[type-var]
            async for one in stream:
                if isinstance(one, Result):
                    (image,), read = one.value
                    await _check_drawn([image], engine, note)
                    usage = await _usage(engine, read, [image], note)
                    yield await message("completed", image, usage=usage)
                    return
                image = one.piece
                if isinstance(image, Tensor):  # codes
                    share = int((image != UNKNOWN).sum()) / engine.model.codes_drawn
                    if one.row is not None and not is_due(shown, wanted, share):
                        continue
                    codes = image.reshape(1, -1)
                    pixels = await engine.in_thread(preview_images, engine.model, codes)
                    image = to_image(pixels[0])
                yield await message("partial_image", image, partial_image_index=shown)
                shown += 1


async def _usage(
    engine: Engine, read: int, images: Sequence[Image.Image], note: Note
) -> dict[str, Any]:
    """The usage, noted with the digests of the images."""
    usage = _counted(engine, read, len(images) * engine.model.codes_drawn)
    note.answered(usage, drawn=await engine.in_thread(digests_of, images))
    return usage


def _counted(engine: Engine, read: int, drawn: int) -> dict[str, Any]:
    """The usage, after it was counted."""
    engine.metrics.count_tokens(read, drawn)
    return {
        "input_tokens": read,
        "input_tokens_details": {"text_tokens": read, "image_tokens": 0},
        "output_tokens": drawn,
        "total_tokens": read + drawn,
    }
