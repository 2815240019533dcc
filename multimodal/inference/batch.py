"""Prompts of different lengths, read together into one cache, and continued token by token.

Rows leave when they are done, and others take their places. A row sees its own tokens only, so its
result does not depend on the rows beside it.

Shapes: B rows, L longest prompt, S tokens in the cache, m codes of a block, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence, Sized
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.memory import check_memory
from multimodal.model.layers.attention import KVCache, attention_mask, without_cudnn_attention
from multimodal.model.layers.compiled import ROOM_MULTIPLE, mark_static_addresses
from multimodal.model.layers.mlp import MAX_STATIC_ROWS
from multimodal.model.layers.transformer import ALL
from multimodal.model.network import MultimodalLM

MIN_SHARED = 16  # tokens of a common beginning that are worth a pass of their own
GROWTH = 64  # tokens that a full cache grows by


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


def compact_rows(going: Sequence[int]) -> list[int]:
    """The rows that go on, in an order in which few move: the last ones fill the holes."""
    count, staying = len(going), set(going)
    behind = [row for row in going if row >= count]
    return [row if row in staying else behind.pop() for row in range(count)]


class DecodeBatch:
    """Prompts that were read into a cache, and the state after their last token.

    Equal prompts are read once, and so is a beginning that all prompts share (an image with many
    questions, few-shot examples). The rest is padded on the left. Padding is a document of its own
    that no token sees.

    Args:
        network: reads the tokens.
        prompts: B lists of ids.
        new_tokens: how many tokens there is room for. The cache grows if a row reads more.

    Attributes:
        hidden: float[B, D], the state after the last token of each row.
    """

    def __init__(
        self, network: MultimodalLM, prompts: Sequence[list[int]], new_tokens: int
    ) -> None:
        check_length(network, prompts, new_tokens)
        self.network = network
        self._check_memory(len(prompts), max(map(len, prompts)) + new_tokens)
        number_of = {
            prompt: number for number, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))
        }
        rows, prompts = [number_of[tuple(prompt)] for prompt in prompts], list(map(list, number_of))
        shared = shared_length(prompts)
        longest = max(map(len, prompts)) - shared
        ids = torch.full((len(prompts), longest), network.vocabulary.pad)
        documents = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            start = longest - (len(prompt) - shared)
            ids[row, start:] = torch.tensor(prompt[shared:])
            documents[row, start:] = 1
        ids, documents = ids.to(network.device), documents.to(network.device)
        positions = documents.cumsum(1).sub(1).clamp(min=0) + shared
        capacity = self._capacity(shared + longest + new_tokens)
        self.cache = network.transformer.empty_cache(len(prompts), capacity)
        mask = attention_mask(documents, torch.zeros_like(documents))
        if shared:
            self._read_shared(prompts[0][:shared])
            sees_shared = documents.bool()[:, None, :, None].expand(-1, -1, -1, shared)
            mask = torch.cat([sees_shared, mask], dim=-1)
        self.hidden = self._read_prompt(ids, positions, mask, self.cache)
        self.last_position = positions[:, -1:]
        self.visible = F.pad(documents.bool(), (shared, 0), value=True)
        if len(rows) > len(prompts):
            self.keep(rows)

    def _read_shared(self, ids: list[int]) -> None:
        """Read a common beginning once and copy its keys and values to all rows."""
        tokens = torch.tensor([ids], device=self.network.device)
        cache = self.network.transformer.empty_cache(1, self._capacity(len(ids)))
        causal = attention_mask(torch.ones_like(tokens), torch.zeros_like(tokens))
        positions = torch.arange(len(ids), device=tokens.device)[None]
        self._read_prompt(tokens, positions, causal, cache)
        self.cache.put(slice(None), 0, *cache.columns(slice(len(ids))))
        self.cache.length = len(ids)

    @without_cudnn_attention()
    def _read_prompt(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
        compiled, transformer = self.network.compiled, self.network.transformer
        forward = transformer.forward_prompt if compiled is None else compiled.prompt
        return forward(ids, positions, mask, cache)

    def logits(self, ids: slice = ALL) -> Tensor:
        """Scores of the next token of each row: float32[B, V], of a range of ids."""
        return self.network.transformer.logits(self.hidden, ids)

    @without_cudnn_attention()
    def step(self, ids: Tensor) -> None:
        """Read one token of each row: int64[B]."""
        if self.cache.length == self.cache.capacity:
            self.cache.grow(self._capacity(self.cache.capacity + GROWTH) - self.cache.capacity)
        self.last_position = self.last_position + 1
        self.visible = torch.cat([self.visible, torch.ones_like(self.visible[:, :1])], dim=1)
        cache, end = self.cache, self.cache.length + 1
        slot = torch.tensor([end - 1], device=ids.device)
        visible = self.visible[:, None, None, :]
        compiled, transformer = self.network.compiled, self.network.transformer
        if compiled is not None and self._has_static_shapes():
            mark_static_addresses(cache)
            mask = F.pad(visible, (0, cache.capacity - end))
            state = compiled.step(ids, self.last_position, mask, cache.keys, cache.values, slot)
            self.hidden = state.clone()  # a CUDA graph writes to the same memory again
        elif compiled is not None:
            filled = cache.columns(slice(end))
            self.hidden = compiled.step_dynamic(ids, self.last_position, visible, *filled, slot)
        else:
            # Without padding every key is visible, and SDPA needs no mask.
            needed = None if self.visible.all() else visible
            filled = cache.columns(slice(end))
            self.hidden = transformer.forward_token(ids, self.last_position, needed, *filled, slot)
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
        visible = torch.cat([self.visible, valid], dim=1)
        mask = visible[:, None, None].expand(-1, 1, ids.shape[1], -1)
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
        if self.network.compiled is None:
            return tokens
        return -(-(tokens + 2) // ROOM_MULTIPLE) * ROOM_MULTIPLE

    def _has_static_shapes(self) -> bool:
        return len(self.hidden) <= MAX_STATIC_ROWS and self.cache.capacity % ROOM_MULTIPLE == 0

    def keep(self, rows: Sequence[int] | Tensor) -> None:
        """Go on with these rows only, in this order. A row may be given several times.

        Args:
            rows: numbers in [0, B). See ``compact_rows`` for an order that copies little.
        """
        if len(rows) > len(self.hidden):
            self._check_memory(len(rows), self.cache.capacity)
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.last_position.device)
        self.last_position = self.last_position[index]
        self.visible, self.hidden = self.visible[index], self.hidden[index]
        self.cache.keep(index)

    def join(self, other: "DecodeBatch", new_tokens: int) -> None:
        """Take the rows of another batch in, after the rows of this one.

        Columns of the cache that no row sees any more are dropped.

        Args:
            new_tokens: how many tokens a row will read at most from now on.
        """
        unseen = int(self.visible.any(0).int().argmax())
        lengths = self.cache.length - unseen, other.cache.length
        counts = len(self.hidden), len(other.hidden)
        length = max(lengths)
        capacity = self._capacity(length + new_tokens)
        cache = self.network.transformer.empty_cache(sum(counts), capacity)
        cache.length = length
        for rows, filled, start, source in (
            (slice(counts[0]), lengths[0], unseen, self.cache),
            (slice(counts[0], None), lengths[1], 0, other.cache),
        ):
            # All rows end in the same column, so that their next tokens share one.
            cache.put(rows, length - filled, *source.columns(slice(start, start + filled)))
        self.visible = torch.cat(
            [
                F.pad(self.visible[:, unseen:], (length - lengths[0], 0)),
                F.pad(other.visible, (length - lengths[1], 0)),
            ]
        )
        self.last_position = torch.cat([self.last_position, other.last_position])
        self.hidden = torch.cat([self.hidden, other.hidden])
        self.cache = cache
