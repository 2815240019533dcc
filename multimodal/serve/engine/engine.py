"""A model of a server, and what requests to it share: the codes of images, grammars, schemas.

The models of one server, a base and its adapters, share a scheduler and the limits.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch
from PIL import Image
from torch import Tensor

from multimodal.api import Model
from multimodal.data.images import fit_image, to_tensor
from multimodal.filters.rules import Filters
from multimodal.inference.codec import UNKNOWN
from multimodal.inference.json_schema import Schema, SchemaTokenizer, token_bytes
from multimodal.inference.mixed import Grammar, MixedRow, image_ids
from multimodal.origin.credentials import DRAWN, Drawing, Signer
from multimodal.serve.engine.encoders import Encoders
from multimodal.serve.engine.errors import ApiError
from multimodal.serve.engine.messages import Conversation
from multimodal.serve.engine.metrics import Metrics
from multimodal.serve.engine.pictures import Budget, Credentials, digest_of, fetch_image
from multimodal.serve.engine.scheduler import Scheduler
from multimodal.serve.engine.settings import Settings

KEPT_IMAGES = 1024  # whose codes are kept: many questions about an image encode it once
READERS = 4  # threads that decode files of images
FETCHERS = 8  # threads that fetch them
Given = ParamSpec("Given")
Value = TypeVar("Value")
Waiting: TypeAlias = Generator[Future[Any], None, Value]  # for what other threads compute


def models_of(model: Model, name: str) -> dict[str, Model]:
    """A model by its name, then its adapters by theirs: each is a model of its own.

    Raises:
        ValueError: for an adapter with the name of the model.
    """
    adapters = model.adapters.adapters if model.adapters is not None else {}
    if name in adapters or not all(each.strip() for each in adapters):
        raise ValueError(f"adapters {list(adapters)}: expected names, other than that of the model")
    others = {each: model.adapted(each) for each in adapters}
    if adapters:
        model.use_adapter()
    return {name: model, **others}


class Engines:
    """The engines of a server by the names of their models. The first one is that of the base.

    Args:
        models: their networks compute in the scheduler's thread only.
        settings: the limits.
        metrics: counts tokens, and looks at the scheduler.
        filters: rules for prompts and replies.
        fallback: another model, which answers where one of these cannot.
        signer: of images that are drawn.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        settings: Settings,
        metrics: Metrics,
        filters: Filters,
        fallback: tuple[str, Model] | None = None,
        signer: Signer | None = None,
    ) -> None:
        self.settings, self.metrics, self.filters = settings, metrics, filters
        self.signer = signer
        self.scheduler = Scheduler(settings.rows, settings.requests, settings.prefix_bytes)
        self.readers, self.encoders = asyncio.Semaphore(READERS), Encoders()
        # A slow address keeps its thread, which is none of those that all others need.
        self.fetching = asyncio.Semaphore(FETCHERS)
        self._fetchers = ThreadPoolExecutor(FETCHERS, "fetcher")
        self.decoded = Budget(settings.max_decoded)
        metrics.watch(self.scheduler)
        self.by_name = {name: Engine(name, model, self) for name, model in models.items()}
        self.fallback = None if fallback is None else Engine(*fallback, self)

    def stop(self) -> None:
        """Requests that have not ended get status 503."""
        self.scheduler.stop(0)
        self.encoders.stop()
        self._fetchers.shutdown(wait=False, cancel_futures=True)

    async def fetched(self, url: str, seconds: float) -> bytes:
        """The bytes of an image behind an address. Raises ``ApiError``."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._fetchers, fetch_image, url, self.settings, seconds)

    @property
    def looks_at_replies(self) -> bool:
        """Whether a reply has to be whole before any of it is sent."""
        falls_back = self.fallback is not None or self.settings.fallback_answer
        return bool(falls_back) or self.filters.has("reply")

    @property
    def base(self) -> "Engine":
        return next(iter(self.by_name.values()))

    def named(self, name: str) -> "Engine":
        """Raises ``ApiError`` 404 for another model."""
        if name not in self.by_name:
            known = ", ".join(map(repr, self.by_name))
            raise ApiError(
                404,
                f"there is no model {name[:100]!r} here: there is {known}",
                param="model",
                code="model_not_found",
            )
        return self.by_name[name]


class Engine:
    """One model, as endpoints use it. Its other attributes are those of all engines."""

    def __init__(self, name: str, model: Model, engines: Engines) -> None:
        self.name, self.model, self.engines = name, model, engines
        self.settings, self.metrics = engines.settings, engines.metrics
        self.filters, self.scheduler = engines.filters, engines.scheduler
        self.grammar = Grammar.of(model)
        self._ids: OrderedDict[tuple[str, bool], Future[list[int]]] = OrderedDict()

    async def in_thread(self, function: Callable[..., Value], *arguments: object) -> Value:
        """Call a function that takes long but does not use the network, in another thread."""
        async with self.engines.readers:
            return await asyncio.to_thread(function, *arguments)

    def pixels(self, image: Image.Image) -> Tensor:
        """An image as the tokenizer takes it: float32[1, 3, H, W] in [-1, 1]."""
        tokenizer = self.model.image_tokenizer
        pixels = to_tensor(fit_image(image, tokenizer.image_size, tokenizer.fit))[None]
        digest_of(pixels)  # here, in a thread of its own, and not where requests wait for it
        return pixels

    @cached_property
    def max_characters(self) -> int:
        """A text with more characters has more tokens than the model reads.

        A token stands for as many characters as its name in the vocabulary has, or fewer. (If a
        normalizer removes characters, such a text might fit. It is refused all the same.)
        """
        longest = max(map(len, self.model.text_tokenizer.vocabulary()))
        return longest * self.model.config.transformer.max_position_embeddings

    def check_characters(self, count: int, param: str) -> None:
        """Refuse a text before time is spent on its tokens. param: where it is in the request.

        Raises:
            ApiError: 400, as for a prompt of too many tokens.
        """
        if count > self.max_characters:
            limit = self.model.config.transformer.max_position_embeddings
            raise ApiError(
                400,
                f"a prompt of {count:,} characters: the model reads at most {limit} tokens",
                param=param,
                code="context_length_exceeded",
            )

    @cached_property
    def _schema_tokenizer(self) -> SchemaTokenizer:
        return SchemaTokenizer(self.model)

    def schema(self, schema: dict[str, object]) -> Schema:
        return Schema(self.model, schema, self._schema_tokenizer)

    def computed(
        self, function: Callable[Given, Value], *arguments: Given.args, **more: Given.kwargs
    ) -> Waiting[Value]:
        """What a function gives that encodes an image: another thread calls it."""
        future = self.engines.encoders.submit(function, *arguments, **more)
        yield future
        return future.result()

    def _image_ids(self, pixels: Tensor, opens: bool) -> Future[list[int]]:
        """The ids of an image in a prompt. opens: it is the first thing in it.

        An image is encoded alone, so its ids do not depend on the requests beside it.
        """
        key = digest_of(pixels), opens
        kept = self._ids.get(key)
        if kept is None or (kept.done() and kept.exception() is not None):
            kept = self.engines.encoders.submit(image_ids, self.model, pixels, opens)
            self._ids[key] = kept
            if len(self._ids) > KEPT_IMAGES:
                self._ids.popitem(last=False)
        self._ids.move_to_end(key)
        return kept

    def prompt(self, parts: Sequence[str | Tensor]) -> Waiting[tuple[list[int], list[int]]]:
        """The ids of texts and images (``pixels``), and where each ends: of a conversation each
        piece.
        """
        first = next(
            (number for number, part in enumerate(parts) if not isinstance(part, str) or part), 0
        )
        encoding = {
            number: self._image_ids(part, number == first)
            for number, part in enumerate(parts)
            if isinstance(part, Tensor)
        }
        ids, ends = [self.model.vocabulary.bos], list[int]()
        for number, part in enumerate(parts):
            if isinstance(part, Conversation):
                try:
                    pieces = self.model.text_tokenizer.chat_pieces(part.messages)
                except ValueError as error:
                    raise ApiError(400, str(error), param="messages") from error
                ids = [number for piece in pieces for number in piece]
                ends += accumulate(map(len, pieces))
            elif isinstance(part, str):
                ids += self.model.text_tokenizer.encode(part)
            else:
                yield encoding[number]
                ids += encoding[number].result()
            ends.append(len(ids))
        return ids, ends

    @cached_property
    def fingerprint(self) -> str:
        return self.model.fingerprint

    def credentials(self, prompt: str, source_type: str = DRAWN) -> Credentials | None:
        """Those of images that are drawn after a prompt, if they are signed at all."""
        signer = self.engines.signer
        if signer is None:
            return None
        return Credentials(signer, Drawing.of(self.fingerprint, prompt, source_type))

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each id."""
        return token_bytes(self.model)

    def count_usage(self, rows: Sequence[MixedRow]) -> dict[str, int]:
        """Tokens that were read and written. Choices of one request share their prompt."""
        replies = [row.reply for row in rows]
        written = sum(reply.text_tokens + reply.image_tokens for reply in replies)
        read = replies[0].prompt_tokens if replies else 0
        self.metrics.count_tokens(read, written)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        }

    def unknown_codes(self) -> Tensor:
        """An image of which no code is drawn: int64[1, n]."""
        return torch.full((1, self.model.codes_per_image), UNKNOWN)
