"""Several prompts, read in a few passes: not one bit of a state depends on the other prompts.

The tokens of all pieces stand in one row. A product with a matrix computes each of them with the
same operations however many there are (from a few on, tests/inference/test_exact.py). Attention is
computed piece by piece, with the shapes that it has for one alone.

Shapes: P pieces, L tokens of all, D width, H heads, G key-value heads, d head size.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from multimodal.model.layers.attention import KVCache, attend
from multimodal.model.layers.prefixes import MIN_SHARED, Piece, PrefixCache, key_after
from multimodal.model.layers.transformer import ALL, Attention, Layer, Transformer

MOST_TOKENS = 1024  # of one pass. More are no faster, and take memory


def read_prompts(
    network: Any,
    prompts: Sequence[Sequence[list[int]]],
    caches: Sequence[KVCache],
    prefixes: PrefixCache,
    multiple: int,
) -> Tensor:
    """Read prompts, but for pieces that are kept: the state after each, float[prompts, D].

    Their first pieces are read together, then their second ones, and so on. A piece that several
    begin with is read once, if it is kept.

    Args:
        network: has a ``transformer``, and its pieces are apart from those of others.
        prompts: the pieces of each.
        caches: for each an empty one of one row.
        multiple: see ``read_pieces``.
    """
    keys, states = [b""] * len(prompts), [torch.empty(0)] * len(prompts)
    for number in range(max(map(len, prompts))):
        rows = [row for row, pieces in enumerate(prompts) if number < len(pieces)]
        for row in rows:
            keys[row] = key_after(keys[row], prompts[row][number])
        while rows:
            reading, later, tokens = dict[bytes, int](), list[int](), 0
            for row in rows:
                size = len(prompts[row][number])
                if reading and (keys[row] in reading or tokens + size > MOST_TOKENS):
                    later.append(row)
                    continue
                key = network, keys[row]
                kept = prefixes.find(key, size) if size >= MIN_SHARED else None
                if kept is None:
                    reading[keys[row]], tokens = row, tokens + size
                else:
                    kept.put_into(caches[row])
                    states[row] = kept.hidden
            several = list(reading.values())
            pieces, into = [prompts[row][number] for row in several], [caches[n] for n in several]
            if several:
                read = read_pieces(network.transformer, pieces, into, multiple)
            for place, (row, ids) in enumerate(zip(several, pieces, strict=True)):
                states[row] = read[place : place + 1]
                if len(ids) >= MIN_SHARED and prefixes.max_bytes:
                    piece = Piece.last_of(caches[row], len(ids), states[row])
                    prefixes.add((network, keys[row]), piece)
            rows = later
    return torch.cat(states)


def read_pieces(
    transformer: Transformer, pieces: Sequence[list[int]], caches: Sequence[KVCache], multiple: int
) -> Tensor:
    """Read a piece after what is in each of some caches with one row.

    Args:
        multiple: in products there are a multiple of so many tokens. Those that are added are of
            no piece.

    Returns:
        The state of the last token of each piece, float[P, D], normed.
    """
    device = transformer.norm.weight.device
    tokens, positions, spans, masks = list[int](), list[int](), list[slice](), list[Tensor]()
    for piece, cache in zip(pieces, caches, strict=True):
        end = cache.length + len(piece)
        sees = torch.ones(len(piece), end, dtype=torch.bool, device=device).tril(cache.length)
        masks.append(sees[None, None])
        spans.append(slice(len(tokens), len(tokens) + len(piece)))
        tokens += piece
        positions += range(cache.length, end)

    def filled(numbers: list[int]) -> Tensor:
        return torch.tensor([*numbers, *[0] * (-len(numbers) % multiple)], device=device)

    places = filled([span.stop - 1 for span in spans])

    cos_sin = transformer.config.rope.angles(filled(positions)[None])
    x = transformer.embed_tokens(filled(tokens)[None])
    for number, layer in enumerate(transformer.layers):
        assert isinstance(layer, Layer)
        queries: slice | Tensor = places if number == len(transformer.layers) - 1 else ALL
        attention = partial(
            _attention, layer.self_attn, cos_sin, queries, spans, masks, caches, number
        )
        x = x[:, queries] + layer.normed(layer.input_layernorm, attention, x)
        x = x + layer.normed(layer.post_attention_layernorm, layer.mlp, x)
    for cache, piece in zip(caches, pieces, strict=True):
        cache.length += len(piece)
    return transformer.norm(x)[0, : len(pieces)]


def _attention(
    attention: Attention,
    cos_sin: tuple[Tensor, Tensor],
    queries: slice | Tensor,
    spans: Sequence[slice],
    masks: Sequence[Tensor],
    caches: Sequence[KVCache],
    layer: int,
    x: Tensor,
) -> Tensor:
    """What attention adds to the tokens of ``queries``: all, or the last of each piece first."""
    q, k, v = attention.heads(x, cos_sin, queries)  # type: ignore[arg-type]
    attended = torch.zeros_like(q)
    for number, (span, mask, cache) in enumerate(zip(spans, masks, caches, strict=True)):
        keys, values = cache.append(layer, k[:, :, span], v[:, :, span])
        of_piece = span
        if isinstance(queries, Tensor):
            of_piece, mask = slice(number, number + 1), mask[:, :, -1:]
        attended[:, :, of_piece] = attend(q[:, :, of_piece], keys, values, mask)
    return attention.o_proj(rearrange(attended, "b h l d -> b l (h d)"))
