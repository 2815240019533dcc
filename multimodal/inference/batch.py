"""Prompts of different lengths, read together into one cache, and continued token by token.

Rows leave when they are done, and others take their places. A row sees its own tokens only, so its
result does not depend on the rows beside it: to the last bits of floats, or exactly.

Shapes: B rows, L longest prompt, S tokens in the cache, m codes of a block, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence, Sized
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.memory import check_memory
from multimodal.model.layers.attention import (
    KVCache,
    attention_mask,
    visible,
    without_cudnn_attention,
)
from multimodal.model.layers.compiled import ROOM_MULTIPLE
from multimodal.model.layers.mlp import MAX_STATIC_ROWS
from multimodal.model.layers.prefixes import MIN_SHARED, PrefixCache
from multimodal.model.layers.reading import read_prompts
from multimodal.model.layers.transformer import ALL
from multimodal.model.network import MultimodalLM

GROWTH = 64  # tokens that a full cache grows by
COLUMN_MULTIPLE = 16  # of exact rows: keys that are not visible then fill whole vectors of a CPU


def check_length(network: MultimodalLM, prompts: Sequence[Sized], new_tokens: int) -> None:
    """Raises ``ValueError`` if a prompt and its continuation are more than the model reads."""
    longest, limit = max(map(len, prompts)), network.config.transformer.max_position_embeddings
    if longest + new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and {new_tokens} more: the model reads at most {limit}"
        )


def shared_length(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with, or 0 if that is not worth a pass of its own."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # in lexicographic order: all share what these share
    longest = min(map(len, prompts)) - 1  # each prompt must keep a token of its own
    shared = next((n for n in range(longest) if first[n] != last[n]), longest)
    return shared if shared >= MIN_SHARED else 0


def pieces_of(prompt: list[int], ends: Sequence[int]) -> list[list[int]]:
    """A prompt cut at these places, without pieces that are not worth a pass of their own."""
    cuts = [0]
    for end in sorted(ends):
        if cuts[-1] + MIN_SHARED <= end < len(prompt):
            cuts.append(end)
    return [prompt[start:end] for start, end in pairwise([*cuts, len(prompt)])]


def compact_rows(going: Sequence[int]) -> list[int]:
    """The rows that go on, in an order in which few move: the last ones fill the holes."""
    count, staying = len(going), set(going)
    behind = [row for row in going if row >= count]
    return [row if row in staying else behind.pop() for row in range(count)]


class DecodeBatch:
    """Prompts that were read into a cache, and the state after their last token.

    The token at position i of a row is in column i of the cache, so rows of any length join and
    leave without moving the others. Equal prompts are read once, and so is a beginning that all
    prompts share (an image with many questions, few-shot examples).

    Args:
        network: reads the tokens.
        prompts: B lists of ids.
        new_tokens: how many tokens there is room for. The cache grows if a row reads more.
        exact: compute each row with the same operations whatever else is in the batch, so that its
            numbers are equal in their last bits, too. Each prompt is read alone, and a step has
            shapes for which the libraries add in the same order: see ``_exact_rows`` and
            COLUMN_MULTIPLE. In float32 on a CPU (one of Intel needs ``add_in_one_order`` before),
            not compiled, and not with experts: how many rows an expert gets depends on all of them.
        ends: with ``exact``, for each prompt where pieces of it end that others may begin with.
        prefixes: with ``exact``, keeps these pieces. The numbers are the same without it.

    Attributes:
        hidden: float[B, D], the state after the last token of each row.
        lengths: how many tokens each row has.
        last_position: int64[B, 1], lengths - 1.
    """

    def __init__(
        self,
        network: MultimodalLM,
        prompts: Sequence[list[int]],
        new_tokens: int,
        exact: bool = False,
        ends: Sequence[Sequence[int]] | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        check_length(network, prompts, new_tokens)
        self.network, self.exact = network, exact
        self._prefixes = PrefixCache(0) if prefixes is None else prefixes
        # With gradients, or other dtypes than those of the weights, a step is another one.
        special = exact or torch.is_grad_enabled() or torch.is_autocast_enabled(network.device.type)
        self.graphs = None if special else network.graphs
        longest = max(map(len, prompts))
        self._check_memory(len(prompts), longest + new_tokens)
        cut = [tuple(ends[n]) if ends is not None else () for n in range(len(prompts))]
        keys = list(zip(map(tuple, prompts), cut, strict=True))
        number_of = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        rows, prompts = [number_of[key] for key in keys], [list(prompt) for prompt, _ in number_of]
        capacity = self._capacity(longest + new_tokens)
        self.cache = self._empty_cache(len(prompts), capacity)
        if exact:
            pieces = [pieces_of(list(prompt), ends) for prompt, ends in number_of]
            caches = [self.cache.row(number) for number in number_of.values()]
            self.hidden = read_prompts(network, pieces, caches, self._prefixes, _exact_rows(1))
        else:
            self.hidden = self._read(prompts, self.cache)
        self._set_lengths(list(map(len, prompts)))
        if len(rows) > len(prompts):
            self.keep(rows)

    def _set_lengths(self, lengths: list[int]) -> None:
        self.lengths, self.cache.length = lengths, max(lengths)
        positions = [length - 1 for length in lengths]
        self.last_position = torch.tensor(positions, device=self.network.device)[:, None]

    def _read(self, prompts: Sequence[list[int]], cache: KVCache) -> Tensor:
        """Read prompts into a cache: the states of their last tokens, float[B, D].

        They are padded on the left, so that all end in one column. Padding is a document of its own
        that no token sees. Then the rows move to the left.
        """
        shared = shared_length(prompts)
        lengths = [len(prompt) - shared for prompt in prompts]
        longest = max(lengths)
        ids = torch.full((len(prompts), longest), self.network.vocabulary.pad)
        documents = torch.zeros_like(ids)
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            ids[row, longest - length :] = torch.tensor(prompt[shared:])
            documents[row, longest - length :] = 1
        ids, documents = ids.to(self.network.device), documents.to(self.network.device)
        positions = documents.cumsum(1).sub(1).clamp(min=0) + shared
        mask = attention_mask(documents, torch.zeros_like(documents))
        if shared:
            self._read_shared(prompts[0][:shared], cache)
            sees_shared = documents.bool()[:, None, :, None].expand(-1, -1, -1, shared)
            mask = torch.cat([sees_shared, mask], dim=-1)
        hidden = self._read_prompt(ids, positions, mask, cache)
        if min(lengths) < longest:
            cache.shift(shared, [longest - length for length in lengths])
        return hidden

    def _read_shared(self, ids: list[int], into: KVCache) -> None:
        """Read a common beginning once and copy its keys and values to all rows."""
        cache = self.network.transformer.empty_cache(1, self._capacity(len(ids)))
        self._read_on(ids, cache)
        into.put(slice(None), 0, *cache.columns(slice(len(ids))))
        into.length = len(ids)

    def _read_on(self, ids: list[int], cache: KVCache) -> Tensor:
        """Read tokens after those in a cache of one row: the state of the last one, float[1, D]."""
        start, end, device = cache.length, cache.length + len(ids), self.network.device
        sees = torch.ones(len(ids), end, dtype=torch.bool, device=device).tril(start)
        positions = torch.arange(start, end, device=device)[None]
        tokens = torch.tensor([ids], device=device)
        return self._read_prompt(tokens, positions, sees[None, None], cache)

    @without_cudnn_attention()
    def _read_prompt(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
        compiled, transformer = self.network.compiled, self.network.transformer
        forward = transformer.forward_prompt if compiled is None else compiled.prompt
        return forward(ids, positions, mask, cache)

    def logits(self, ids: slice = ALL, rows: Tensor | None = None) -> Tensor:
        """Scores of the next token of each row: float32[B, V], of a range of ids.

        rows: int64[B], some of the rows.
        """
        hidden = self.hidden if rows is None else self.hidden[rows]
        count = len(hidden)
        if self.exact:
            hidden = F.pad(hidden, (0, 0, 0, _exact_rows(count) - count))
        return self.network.transformer.logits(hidden, ids)[:count]

    @without_cudnn_attention()
    def step(self, ids: Tensor) -> None:
        """Read one token of each row: int64[B]."""
        end, count = self.cache.length + 1, len(ids)
        if self.graphs is not None:
            self._make_room(count, end)
        elif end > self.cache.capacity:
            self.cache.grow(self._capacity(self.cache.capacity + GROWTH) - self.cache.capacity)
        cache, positions = self.cache, self.last_position + 1
        compiled, transformer = self.network.compiled, self.network.transformer
        if self.exact:
            missing = _exact_rows(count) - count
            self._make_room(count + missing, cache.capacity)
            cache = self.cache
            ids, positions = F.pad(ids, (0, missing)), F.pad(positions, (0, 0, 0, missing))
            seen = -(-end // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
            mask = visible(positions, seen)
            filled = cache.columns(slice(seen))
            state = transformer.forward_token(
                ids, positions, mask, *filled, positions[:, 0], exact=True
            )
            self.hidden = state[:count]
            cache.set_rows(count)
        elif self.graphs is not None:
            self.hidden = self.graphs.step(transformer, ids, positions, cache, end)
        elif compiled is not None and self._has_static_shapes():
            mask = visible(positions, cache.capacity)
            slots = positions[:, 0]
            self.hidden = compiled.step(ids, positions, mask, cache.keys, cache.values, slots)
        else:
            # Where all rows have one length every key is visible, and SDPA needs no mask.
            equal = compiled is None and min(self.lengths) == max(self.lengths)
            needed = None if equal else visible(positions, end)
            forward = transformer.forward_token if compiled is None else compiled.step_dynamic
            filled = cache.columns(slice(end))
            self.hidden = forward(ids, positions, needed, *filled, positions[:, 0])
        self.last_position = positions[:count]
        self.lengths = [length + 1 for length in self.lengths]
        cache.length = end

    @without_cudnn_attention()
    def forward_block(self, ids: Tensor, positions: Tensor, valid: Tensor, queries: int) -> Tensor:
        """The states of codes that see the prompt and one another. The cache does not keep them.

        Args:
            ids: int64[B, m].
            positions: int64[B, m], the place of each code in its image.
            valid: bool[B, m], False for padding.
            queries: how many of the m states are needed, from the first one.

        Returns:
            float[B, queries, D].
        """
        forward: Callable[..., Tensor] = self.network.transformer.forward
        computed = queries
        if (compiled := self.network.compiled) is not None:
            # A compiler takes a size of one, and all of a size, for special shapes: avoid both.
            forward, computed = compiled.block, max(2, queries)
            missing = max(0, computed + 1 - ids.shape[1])
            ids, positions, valid = (F.pad(x, (0, missing)) for x in (ids, positions, valid))
        mask = visible(self.last_position, self.cache.length)
        mask = torch.cat([mask, valid[:, None, None]], dim=-1).expand(-1, 1, ids.shape[1], -1)
        # A copy shares the memory but has a length of its own: the codes are overwritten next time.
        cache = replace(self.cache)
        positions = self.last_position + 1 + positions
        return forward(ids, positions, mask, cache, slice(computed))[:, :queries]

    def _check_memory(self, rows: int, tokens: int) -> None:
        """Raises ``ValueError`` if so many rows do not fit into the memory of a CPU.

        A GPU says so itself. Linux would end the process.
        """
        if self.network.device.type != "cpu":
            return
        sizes, weight = self.network.config.transformer, self.network.alignment.image_projection
        kept = 2 * sizes.num_hidden_layers * sizes.num_key_value_heads * sizes.head_dim
        scores = 3 * sizes.vocab_size  # float32: logits, what is allowed of them, probabilities
        needed = rows * (tokens * kept * weight.weight.element_size() + 4 * scores)
        check_memory(
            needed,
            f"a batch of {rows:,} texts or images of {tokens:,} tokens",
            "batch_size, beams, candidates, max_tokens, or the number of choices",
        )

    def _capacity(self, tokens: int) -> int:
        """The capacity of a cache for so many tokens.

        Compiled steps need few sizes. Round up to ROOM_MULTIPLE. Leave at least two free slots for
        the padding of a block: a full cache has other strides and triggers a recompile.
        """
        if self.exact:
            return -(-tokens // GROWTH) * GROWTH
        if self.network.compiled is None:
            return tokens
        return -(-(tokens + 2) // ROOM_MULTIPLE) * ROOM_MULTIPLE

    def _empty_cache(self, rows: int, capacity: int) -> KVCache:
        transformer = self.network.transformer
        if self.graphs is None:
            return transformer.empty_cache(rows, capacity)
        cache = self.graphs.cache(transformer, rows, capacity)
        cache.set_rows(rows)
        return cache

    def _has_static_shapes(self) -> bool:
        return len(self.hidden) <= MAX_STATIC_ROWS and self.cache.capacity % ROOM_MULTIPLE == 0

    def keep(self, rows: Sequence[int] | Tensor) -> None:
        """Go on with these rows only, in this order. A row may be given several times.

        Args:
            rows: numbers in [0, B). See ``compact_rows`` for an order that copies little.
        """
        if len(rows) > len(self.hidden):
            self._check_memory(len(rows), self.cache.capacity)
            if self.graphs is not None:
                self._make_room(len(rows), self.cache.capacity)
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.last_position.device)
        self.last_position, self.hidden = self.last_position[index], self.hidden[index]
        self.lengths = [self.lengths[row] for row in index.tolist()]
        self.cache.keep(index)
        self.cache.length = max(self.lengths)

    def join(self, other: "DecodeBatch", new_tokens: int) -> None:
        """Take the rows of another batch in, after the rows of this one.

        Nothing is copied but them, if the cache has room: rows that left have made some.

        Args:
            new_tokens: how many tokens one of them will read at most from now on.
        """
        count, lengths = len(self.hidden), self.lengths + other.lengths
        self._make_room(len(lengths), max(self.cache.length + 1, other.cache.length + new_tokens))
        columns = other.cache.columns(slice(other.cache.length))
        self.cache.put(slice(count, None), 0, *columns)
        self.last_position = torch.cat([self.last_position, other.last_position])
        self.hidden = torch.cat([self.hidden, other.hidden])
        self.lengths, self.cache.length = lengths, max(lengths)

    def _make_room(self, rows: int, tokens: int) -> None:
        """Let the cache have so many rows, and room for so many tokens of each."""
        if tokens <= self.cache.capacity and self.cache.set_rows(rows):
            return
        capacity = max(self.cache.capacity, self._capacity(tokens))
        room = self.cache.most_rows if rows <= self.cache.most_rows else 2 * rows
        self._check_memory(room, capacity)
        cache = self._empty_cache(room, capacity)
        kept = slice(min(len(self.hidden), rows))
        cache.put(kept, 0, *self.cache.columns(slice(self.cache.length)))
        cache.length = self.cache.length
        cache.set_rows(rows)
        self.cache = cache


def _exact_rows(rows: int) -> int:
    """So many rows that each thread of a product has four or more: with fewer, it adds otherwise.

    Measured for the products of MKL and oneDNN (tests/inference/test_exact.py).
    """
    multiple = 4 * torch.get_num_threads()
    return -(-rows // multiple) * multiple
