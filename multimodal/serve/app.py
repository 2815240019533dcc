"""The endpoints, and what stands before all of them: keys, sizes, errors."""

import asyncio
import contextlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from multimodal.api import Model
from multimodal.filters.rules import Filters
from multimodal.origin.credentials import Signer
from multimodal.record.chain import Record
from multimodal.record.drift import Rows
from multimodal.record.report import NOT_ADMITTED
from multimodal.serve.endpoints.bridge import CLIENT_LEFT, Disconnected, finished
from multimodal.serve.endpoints.chat import chat_completions
from multimodal.serve.endpoints.drawings import images_edits, images_generations
from multimodal.serve.endpoints.embeddings import embeddings
from multimodal.serve.endpoints.feedback import feedback
from multimodal.serve.endpoints.noting import Note, note_of
from multimodal.serve.engine.engine import Engines, models_of
from multimodal.serve.engine.errors import ApiError, as_api_error
from multimodal.serve.engine.metrics import Metrics
from multimodal.serve.engine.settings import Settings
from multimodal.serve.peers import Peers
from multimodal.serve.static import page_routes
from multimodal.serve.watching import DriftWatch, embed_prompts, keep_daily

Endpoint = Callable[[Request, Engines], Awaitable[Response]]
log = logging.getLogger("multimodal.serve")
UNWIND_SECONDS = 5.0  # in which requests that the HTTP server has cancelled end
_LOCAL = re.compile(rb"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)


def make_app(
    model: Model,
    settings: Settings,
    fallback: tuple[str, Model] | None = None,
    signer: Signer | None = None,
) -> ASGIApp:
    """An ASGI application. Its scheduler starts and stops with its lifespan.

    Args:
        model: with its adapters by name.
        fallback: another model by its name, see ``Engines``.
        signer: of images that are drawn.
    """
    if settings.unsure is not None and not (fallback or settings.fallback_answer):
        raise ValueError(f"unsure={settings.unsure}: give a fallback: an answer or a model")
    created, counted, page = int(time.time()), Metrics(), page_routes()
    models = models_of(model, settings.name)
    filters = Filters.read(settings.filters) if settings.filters else Filters()
    peers = Peers(settings.peers, settings.worker, counted.text) if settings.peers else None

    async def embed(prompts: Sequence[str]) -> Rows:
        engines: Engines = app.state.engines
        rows: Rows = await finished(engines.scheduler, embed_prompts(engines.base.model, prompts))
        return rows

    watch = None
    if settings.drift_reference:
        watch = DriftWatch(settings.drift_reference, counted.drift, embed)
    record = Record(settings.record, settings.record_texts) if settings.record else None
    days, text_days = settings.record_days, settings.record_text_days

    async def health(request: Request, engines: Engines) -> Response:
        stopping = engines.scheduler.stopping
        status = {"status": "stopping" if stopping else "ok", "model": settings.name}
        return JSONResponse(status, 503 if stopping else 200)

    def model_entry(name: str) -> dict[str, Any]:
        parent = {} if name == settings.name else {"parent": settings.name}
        entry = {"id": name, "object": "model", "created": created, "owned_by": "multimodal"}
        return {**entry, **parent}

    async def all_models(request: Request, engines: Engines) -> Response:
        return JSONResponse({"object": "list", "data": list(map(model_entry, models))})

    async def metrics(request: Request, engines: Engines) -> Response:
        text = counted.text() if peers is None else await peers.metrics()
        return Response(text, media_type="text/plain; version=0.0.4")

    async def one_model(request: Request, engines: Engines) -> Response:
        return JSONResponse(model_entry(engines.named(request.path_params["name"]).name))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.engines = Engines(models, settings, counted, filters, fallback, signer)
        telling = None if peers is None else await peers.listen()
        keeping = None
        if record is not None and (days or text_days):
            keeping = asyncio.create_task(keep_daily(record, days, text_days))
        try:
            yield
        finally:
            if keeping is not None:
                keeping.cancel()
            if watch is not None:
                watch.stop()
            if telling is not None:
                telling.close()
            app.state.engines.stop()  # the HTTP server has let requests end before
            await gate.until_idle()
            if record is not None:
                record.close()

    app = Starlette(
        routes=[
            *page,
            _route("/health", health, "GET"),
            _route("/metrics", metrics, "GET"),
            _route("/v1/models", all_models, "GET"),
            _route("/v1/models/{name:path}", one_model, "GET"),
            _route("/v1/chat/completions", chat_completions, "POST"),
            _route("/v1/images/generations", images_generations, "POST"),
            _route("/v1/images/edits", images_edits, "POST"),
            _route("/v1/embeddings", embeddings, "POST"),
            _route("/v1/feedback", feedback, "POST"),
        ],
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )
    paths = {route.path for route in app.routes if isinstance(route, Route)}
    free = {"/health", *(route.path for route in page)}
    gate = Gate(app, settings, counted, paths, free, record, watch)
    return gate


def _route(path: str, endpoint: Endpoint, method: str) -> Route:
    async def handle(request: Request) -> Response:
        engines: Engines = request.app.state.engines
        try:
            return await endpoint(request, engines)
        except Disconnected:
            return Response(status_code=CLIENT_LEFT)
        except HTTPException:
            raise
        except Exception as error:
            if not isinstance(error, ApiError | ValueError):
                log.exception("%s failed", path)
            return error_response(as_api_error(error), request)

    return Route(path, handle, methods=[method], name=endpoint.__name__)


def error_response(error: ApiError, request: Request | None = None) -> Response:
    if request is not None:
        note_of(request).facts["code"] = error.code
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "there is no such address", 405: "not with this method"}
    return error_response(ApiError(error.status_code, words.get(error.status_code, error.detail)))


class Gate:
    """Before a request is read: its key, and whether a page of another site sends it. While it is
    read: how long it is, and how long it takes. While it is answered: whether the client reads.

    Args:
        app: gets the requests that may pass.
        settings: keys and limits.
        metrics: counts the requests.
        paths: the addresses that are counted by name.
        free: the addresses that need no key.
        record: of the requests to the API.
        watch: compares them with earlier ones.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        metrics: Metrics,
        paths: Collection[str],
        free: Collection[str],
        record: Record | None,
        watch: DriftWatch | None,
    ) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.paths, self.free, self.record, self.watch = paths, free, record, watch
        self.received = 0  # bytes of all bodies that have not been worked on to the end
        self.open = 0  # requests

    async def until_idle(self) -> None:
        """Wait until the requests that were cut off have ended, so that they are recorded."""
        end = time.monotonic() + UNWIND_SECONDS
        while self.open and time.monotonic() < end:
            await asyncio.sleep(0.01)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        size, complete, status = 0, False, 0
        start = time.monotonic()
        deadline = start + self.settings.body_timeout
        path = scope["path"] if scope["path"] in self.paths else "other"
        note = scope["note"] = Note({"request": f"req_{secrets.token_hex(12)}", "path": path})
        at_end = scope["at_end"] = contextlib.ExitStack()  # of calls when the response is sent
        self.open += 1

        async def counted() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except TimeoutError as error:
                raise ApiError(408, "the request did not arrive in time", code="timeout") from error
            if message["type"] == "http.request":
                length = len(message.get("body", b""))
                size, self.received = size + length, self.received + length
                complete = not message.get("more_body", False)
                self._check_size(size)
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = list(message.get("headers", ()))
                streams = dict(given).get(b"content-type", b"").startswith(b"text/event-stream")
                first = self.metrics.first.labels(path, str(streams).lower())
                first.observe(time.monotonic() - start)
                name = (b"x-request-id", note.facts["request"].encode())
                message = {**message, "headers": [*given, name]}
            try:
                async with asyncio.timeout(self.settings.write_timeout):
                    await send(message)
            except TimeoutError as error:
                raise ApiError(408, "the client reads nothing", code="timeout") from error

        try:
            headers = {name.lower(): value for name, value in scope["headers"]}
            self._check_key(scope["path"], headers.get(b"authorization", b""))
            self._check_site(scope["path"], scope["method"], headers)
            length = headers.get(b"content-length", b"0")
            self._check_size(int(length) if length.isdigit() else 0)
            await self.app(scope, counted, noted)
        except ApiError as error:
            if status:
                note.failed(error)
            else:
                note.facts["code"] = error.code
                await error_response(error)(scope, receive, noted)
        finally:
            at_end.close()
            self.received -= size
            status = note.status or status
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.monotonic() - start)
            posted = path.startswith("/v1/") and scope["method"] == "POST"
            # Who has no key is counted only: else anybody could fill the disk, and feign a drift.
            if self.record is not None and posted and status not in NOT_ADMITTED:
                self._write(self.record, note, status, time.monotonic() - start)
            self.open -= 1

    def _write(self, record: Record, note: Note, status: int, seconds: float) -> None:
        facts = {**note.facts, "status": status or CLIENT_LEFT, "seconds": round(seconds, 4)}
        try:
            entry = record.append(facts, note.texts)
            if self.watch is not None:
                self.watch.add(entry, note.texts.get("prompt", ""))
        except (OSError, ValueError):
            log.exception("the record was not written")

    def _check_key(self, path: str, header: bytes) -> None:
        """Raises ``ApiError`` 401."""
        if not self.settings.keys or path in self.free:
            return
        kind, _, given = header.partition(b" ")
        # All keys are compared, in a time that does not depend on how far they are equal.
        equal = [hmac.compare_digest(given.strip(), key.encode()) for key in self.settings.keys]
        if kind.lower() != b"bearer" or not any(equal):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    def _check_site(self, path: str, method: str, headers: Mapping[bytes, bytes]) -> None:
        """Keep pages of other sites from a server that needs no key, but is for this machine only.

        A name of theirs may lead here (DNS rebinding): then it is the Host of the request. They may
        send forms: then browsers say that the request is of another site.

        Raises:
            ApiError: 403
        """
        if self.settings.keys or not self.settings.local or path == "/health":
            return
        if not _LOCAL.fullmatch(headers.get(b"host", b"localhost")):  # browsers always send it
            raise ApiError(
                403,
                "Host: is not this machine. Open http://127.0.0.1, or start the server with a key",
                code="wrong_host",
            )
        if method == "POST" and headers.get(b"sec-fetch-site") == b"cross-site":
            raise ApiError(403, "pages of other sites may not use this server", code="cross_site")

    def _check_size(self, size: int) -> None:
        if size > self.settings.max_body:
            raise ApiError(
                413,
                f"the request has over {self.settings.max_body:,} bytes",
                code="request_too_large",
            )
        if self.received > self.settings.max_bytes:
            raise ApiError(
                429, "too many bytes are being received", code="too_many_bytes", retry_after=2
            )
