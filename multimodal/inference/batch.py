"""Prompts of different lengths, read together into one cache, and gone on with token by token.

Rows leave when they are done, and others take their places: a row sees its own tokens only, so what
becomes of it does not depend on those beside it.

Shapes: B rows, L longest prompt, S tokens in the cache, V vocabulary.
"""

from collections.abc import Callable, Sized
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.model.attention import attention_mask
from multimodal.model.compiled import FEW, ROOM_MULTIPLE, mark_addresses, read_prompt, read_token
from multimodal.model.transformer import Cache

if TYPE_CHECKING:
    from multimodal.model.network import Multimodal

SHARED_AT_LEAST = 16  # tokens


def text_ids(model: "Multimodal", text: str) -> list[int]:
    """What a user wrote, as ids; it can hold no special. Errors: ``ValueError`` for nothing."""
    if not text.strip():
        raise ValueError("the text is empty")
    return model.text_tokenizer.encode(text.strip())


def check_length(model: "Multimodal", prompts: SequenceOf[Sized], room: int) -> None:
    """Errors: ``ValueError`` where a prompt and what is to follow are more than the model reads."""
    longest, limit = max(map(len, prompts)), model.config.transformer.max_position_embeddings
    if longest + room > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and {room} more: the model reads at most {limit}"
        )


def shared_length(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with, if that is worth a pass of its own; else 0."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # by their tokens: what these share, all do
    least = min(map(len, prompts)) - 1  # each has to have a token left
    shared = next((n for n in range(least) if first[n] != last[n]), least)
    return shared if shared >= SHARED_AT_LEAST else 0


def closed_up(going: list[int]) -> list[int]:
    """The places of rows that go on, in such an order that few move: the last ones into holes."""
    count, staying = len(going), set(going)
    behind = [place for place in going if place >= count]
    return [place if place in staying else behind.pop() for place in range(count)]


class Batch:
    """Prompts of different lengths, read once into a cache and then continued token by token.

    A beginning that all have in common (an image of many questions, examples) is read once for
    all. The rest is padded on the left; padding is a document of its own that no real token sees.
    """

    def __init__(self, model: "Multimodal", prompts: list[list[int]], room: int) -> None:
        check_length(model, prompts, room)
        self.model = model
        shared = shared_length(prompts)
        longest = max(map(len, prompts)) - shared
        ids = torch.full((len(prompts), longest), model.vocabulary.pad)
        documents = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            start = longest - (len(prompt) - shared)
            ids[row, start:] = torch.tensor(prompt[shared:])
            documents[row, start:] = 1
        ids, documents = ids.to(model.device), documents.to(model.device)
        positions = documents.cumsum(1).sub(1).clamp(min=0) + shared
        config, weight = model.config.transformer, model.transformer.embed_tokens.weight
        self.cache = Cache.empty(config, len(prompts), self._room(shared + longest + room), weight)
        mask = attention_mask(documents, torch.zeros_like(documents))
        if shared:
            self._read_once(prompts[0][:shared], weight)
            sees = documents.bool()[:, None, :, None].expand(-1, -1, -1, shared)
            mask = torch.cat([sees, mask], dim=-1)
        self.hidden = self._read_prompt(ids, positions, mask, self.cache)
        self.last = positions[:, -1:]
        self.visible = F.pad(documents.bool(), (shared, 0), value=True)

    def _read_once(self, ids: list[int], like: Tensor) -> None:
        """Put the keys and values of a common beginning into the cache, for all rows."""
        begun = torch.tensor([ids], device=like.device)
        one = Cache.empty(self.model.config.transformer, 1, self._room(len(ids)), like)
        causal = attention_mask(torch.ones_like(begun), torch.zeros_like(begun))
        self._read_prompt(begun, torch.arange(len(ids), device=like.device)[None], causal, one)
        self.cache.put(slice(None), 0, *one.columns(slice(len(ids))))
        self.cache.length = len(ids)

    def _read_prompt(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """``read_prompt``, compiled or not."""
        if (compiled := self.model.compiled) is not None:
            return compiled.prompt(ids, positions, mask, cache)
        return read_prompt(self.model.transformer, ids, positions, mask, cache)

    def logits(self, ids: slice = slice(None)) -> Tensor:
        """float32[B, V] for the next token; ids: those that are asked for"""
        return self.model.transformer.logits(self.hidden, ids)

    def read(self, ids: Tensor) -> None:
        """Go on by ids: int64[B]"""
        self.last = self.last + 1
        self.visible = torch.cat([self.visible, torch.ones_like(self.visible[:, :1])], dim=1)
        cache, end = self.cache, self.cache.length + 1
        assert end <= cache.room, f"the cache has room for {cache.room} tokens"
        place = torch.tensor([end - 1], device=ids.device)
        seen = self.visible[:, None, None, :]
        compiled, transformer = self.model.compiled, self.model.transformer
        if compiled is not None and self._fixed():
            mark_addresses(cache)
            mask = F.pad(seen, (0, cache.room - end))
            state = compiled.step(ids, self.last, mask, cache.keys, cache.values, place)
            self.hidden = state.clone()  # a CUDA graph writes to the same memory again
        else:
            filled = cache.columns(slice(end))
            if compiled is not None:
                self.hidden = compiled.step_of_many(ids, self.last, seen, *filled, place)
            else:
                # Nothing is padded: every key may be seen, and SDPA needs no mask.
                needed = None if self.visible.all() else seen
                self.hidden = read_token(transformer, ids, self.last, needed, *filled, place)
        cache.length = end

    def read_block(self, ids: Tensor, places: Tensor, real: Tensor, asked: int) -> Tensor:
        """The states of codes after the prompts that see them and each other, and are not kept.

        ids: int64[B, m]; places: int64[B, m], where each stands in the image; real: bool[B, m],
        False for padding; asked: how many states, from the first -> float[B, asked, D]
        """
        forward: Callable[..., Tensor] = self.model.transformer.forward
        wanted = asked
        if (compiled := self.model.compiled) is not None:
            # To a compiler one is a shape of its own, and so is asking for all: neither is met.
            forward, wanted = compiled.block, max(2, asked)
            missing = max(0, wanted + 1 - ids.shape[1])
            ids, places, real = (F.pad(x, (0, missing)) for x in (ids, places, real))
        seen = torch.cat([self.visible, real], dim=1)
        mask = seen[:, None, None].expand(-1, 1, ids.shape[1], -1)
        # The cache forgets them: this one's length stays.
        positions, cache = self.last + 1 + places, replace(self.cache)
        return forward(ids, positions, mask, cache, slice(wanted))[:, :asked]

    def _room(self, tokens: int) -> int:
        """In the cache, for so many tokens: compiled, of few sizes, none of which is just filled:
        there is the padding of a block, and what has no end behind it is another form."""
        if self.model.compiled is None:
            return tokens
        return -(-(tokens + 2) // ROOM_MULTIPLE) * ROOM_MULTIPLE

    def grow(self, tokens: int) -> None:
        """Make room for so many more."""
        self.cache.grow(self._room(self.cache.room + tokens) - self.cache.room)

    def _fixed(self) -> bool:
        """Whether a compiled step finds shapes here that stay the same."""
        return len(self.hidden) <= FEW and self.cache.room % ROOM_MULTIPLE == 0

    def keep(self, places: SequenceOf[int] | Tensor) -> None:
        """Go on with the rows of these places only (0 to B - 1), in this order, with some several
        times (see ``closed_up``)."""
        rows = torch.as_tensor(places, dtype=torch.int64, device=self.last.device)
        self.last, self.visible, self.hidden = (
            x[rows] for x in (self.last, self.visible, self.hidden)
        )
        self.cache.keep(rows)

    def join(self, others: "Batch", room: int) -> None:
        """Go on with the rows of another batch too, after those of this one; room: for how many
        tokens more. Columns of the cache that no row sees any more are given up."""
        unseen = int(self.visible.any(0).int().argmax())
        lengths = self.cache.length - unseen, others.cache.length
        counts = len(self.last), len(others.last)
        length = max(lengths)
        config, weight = self.model.config.transformer, self.model.transformer.embed_tokens.weight
        cache = Cache.empty(config, sum(counts), self._room(length + room), weight)
        cache.length = length
        for rows, own, start, begun in (
            (slice(counts[0]), lengths[0], unseen, self.cache),
            (slice(counts[0], None), lengths[1], 0, others.cache),
        ):
            # All rows end in the same column: the next token of each is the next of all.
            cache.put(rows, length - own, *begun.columns(slice(start, start + own)))
        self.visible = torch.cat([
            F.pad(self.visible[:, unseen:], (length - lengths[0], 0)),
            F.pad(others.visible, (length - lengths[1], 0)),
        ])  # fmt: skip
        self.last = torch.cat([self.last, others.last])
        self.hidden = torch.cat([self.hidden, others.hidden])
        self.cache = cache
