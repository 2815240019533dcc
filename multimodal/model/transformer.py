"""The decoder, in the shape of Qwen3 (arXiv:2505.09388), name for name.

Pre-RMSNorm, QK-norm per head, grouped-query attention, SwiGLU, rotate-half RoPE, no bias. An image
is only tokens here, so the weights of this file are a stock language model for any engine.

Shapes: B batch, L queries, S keys, D width, H heads, G key-value heads, d head size, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multimodal.model.attention import Mask, attend

ALL = slice(None)


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes; ``intermediate_size`` is the width inside the SwiGLU."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: RoPE turns pairs, so it must be even")


# name: layers, width, heads, key-value heads, head size, SwiGLU width; then the parameters of the
# layers alone, and with a vocabulary of 49,152 ids (32k of text, 16k codes)
SIZES = {
    "tiny": (2, 64, 4, 2, 16, 128),  #             74 k    3.2 M
    "mini": (4, 256, 4, 2, 64, 768),  #           3.1 M    16 M
    "starter": (6, 384, 6, 2, 64, 1024),  #       9.4 M    28 M
    "base": (12, 768, 12, 4, 64, 2304),  #         83 M   120 M
    "large": (24, 1024, 16, 8, 64, 3072),  #      302 M   352 M
    "1b": (28, 1536, 16, 8, 128, 4608),  #        859 M   934 M
    "7b": (32, 4096, 32, 8, 128, 12288),  #       6.2 B   6.6 B
}


def named_config(size: str, vocab_size: int) -> TransformerConfig:
    """A config of the table of sizes; embeddings are tied up to ``1b``."""
    if size not in SIZES:
        raise ValueError(f"size {size!r}: expected one of {', '.join(SIZES)}")
    layers, width, heads, kv_heads, head_dim, intermediate = SIZES[size]
    return TransformerConfig(
        vocab_size, width, layers, heads, kv_heads, head_dim, intermediate, size != "7b"
    )


@dataclass
class Cache:
    """Keys and values of what was read so far.

    keys, values: of each layer float[B, G, S, d], with room for S tokens; length: how many are
    filled. A layer has memory of its own: what is written to a part of a larger tensor, a compiled
    step copies whole.
    """

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0

    @classmethod
    def empty(cls, config: TransformerConfig, batch: int, room: int, like: Tensor) -> "Cache":
        shape = (batch, config.num_key_value_heads, room, config.head_dim)
        keys, values = (
            [like.new_zeros(shape) for _ in range(config.num_hidden_layers)] for _ in range(2)
        )
        return cls(keys, values)

    @property
    def room(self) -> int:
        """How many tokens it can hold."""
        return self.keys[0].shape[2]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v: float[B, G, L, d] of one layer; returns all it has, S = length + L."""
        end = self.length + k.shape[2]
        assert end <= self.room, f"the cache has room for {self.room} tokens"
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def columns(self, columns: slice) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of some of its tokens, of the same memory."""
        keys, values = ([x[:, :, columns] for x in several] for several in (self.keys, self.values))
        return keys, values

    def put(self, rows: slice, start: int, keys: list[Tensor], values: list[Tensor]) -> None:
        """Copy keys and values, of each layer float[B, G, L, d], to these rows from a token on."""
        for mine, given in ((self.keys, keys), (self.values, values)):
            for x, new in zip(mine, given, strict=True):
                x[rows, :, start : start + new.shape[2]] = new

    def keep(self, rows: Tensor) -> None:
        """rows: int64[B'], those to go on with, in this order, some several times. Those that stay
        where they are cost nothing; the room of those that are gone is kept."""
        count = len(rows)
        if count > len(self.keys[0]):
            self.keys, self.values = ([x[rows] for x in each] for each in (self.keys, self.values))
            return
        moved = (rows != torch.arange(count, device=rows.device)).nonzero()[:, 0]
        if len(moved):
            sources = rows[moved]
            for x in (*self.keys, *self.values):
                x[moved, :, : self.length] = x[sources, :, : self.length]
        self.keys, self.values = ([x[:count] for x in each] for each in (self.keys, self.values))

    def grow(self, room: int) -> None:
        """Make room for so many tokens more."""
        self.keys, self.values = (
            [F.pad(x, (0, 0, 0, room)) for x in several] for several in (self.keys, self.values)
        )


def rope(positions: Tensor, config: TransformerConfig) -> tuple[Tensor, Tensor]:
    """positions: int64[B, L] -> cos, sin: float32[B, L, 1, d], the first half of sin negated"""
    half = torch.arange(0, config.head_dim, 2, device=positions.device).float()
    frequencies = config.rope_theta ** (-half / config.head_dim)
    angles = positions[:, :, None, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + d/2) of float[B, L, H, d] by the angles of their positions."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def norm_in_fp32(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """float[..., d] -> float32[..., d]; torch has a fused kernel where the types are one"""
    return F.rms_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.eps)


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d, width = config.head_dim, config.hidden_size
        self.head_dim = d
        self.q_proj = nn.Linear(width, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, width, bias=False)
        self.q_norm = nn.RMSNorm(d, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(d, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        mask: Mask,
        cache: Cache | None,
        layer: int,
        wanted: slice,
    ) -> Tensor:
        heads = "b l (h d) -> b l h d"
        q = rearrange(self.q_proj(x[:, wanted]), heads, d=self.head_dim)
        k = rearrange(self.k_proj(x), heads, d=self.head_dim)
        v = rearrange(self.v_proj(x), heads, d=self.head_dim)
        # Norm and rotation in fp32 (the angles are), the products in the precision of the rest.
        # Heads stand behind tokens until both are done: every operation reads what lies in a row.
        of_queries = [angles[:, wanted] for angles in turn]
        q = rotate(norm_in_fp32(self.q_norm, q), *of_queries).to(v.dtype)
        k = rotate(norm_in_fp32(self.k_norm, k), *turn).to(v.dtype)
        q, k, v = (rearrange(one, "b l h d -> b h l d") for one in (q, k, v))
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if isinstance(mask, Tensor):
            mask = mask[:, :, wanted]
        out: Tensor = self.o_proj(rearrange(attend(q, k, v, mask), "b h l d -> b l (h d)"))
        return out


class MLP(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        mask: Mask,
        cache: Cache | None,
        layer: int,
        wanted: slice,
    ) -> Tensor:
        read = self.self_attn(self.input_layernorm(x), turn, mask, cache, layer, wanted)
        x = x[:, wanted] + read
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Transformer(nn.Module):
    """ids in, hidden states out; ``logits`` turns those it is given into float32 scores.

    ``recompute``: in training, keep what enters a layer, and compute the rest again going back
    (Chen et al. 2016, arXiv:1604.06174).
    """

    recompute = False

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, Attention | MLP):
            # Each layer adds twice to the residual stream: keep its variance at 1 over the depth.
            out = module.o_proj if isinstance(module, Attention) else module.down_proj
            with torch.no_grad():
                out.weight.mul_((2 * self.config.num_hidden_layers) ** -0.5)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Mask,
        cache: Cache | None = None,
        wanted: slice = ALL,
    ) -> Tensor:
        """ids, positions: int64[B, L]; mask: bool[B, 1, L, S], that of another
        backend (multimodal/model/attention.py), or None -> float[B, L, D], normed

        With a cache, S counts what it holds and the L new tokens, which are added to it. wanted:
        those of the L whose states are wanted, Q of them -> float[B, Q, D]; by default all.
        """
        turn = rope(positions, self.config)
        x = self.embed_tokens(ids)
        for number, layer in enumerate(self.layers):
            # What is not wanted needs no more than keys and values in the last layer.
            asked = wanted if number == len(self.layers) - 1 else ALL
            if self.recompute and torch.is_grad_enabled() and cache is None:
                x = checkpoint(layer, x, turn, mask, cache, number, asked, use_reentrant=False)
            else:
                x = layer(x, turn, mask, cache, number, asked)
        if cache is not None:
            cache.length += ids.shape[1]
        out: Tensor = self.norm(x)
        return out

    def logits(self, hidden: Tensor, ids: slice = slice(None)) -> Tensor:
        """float[..., D] -> float32[..., V]: bf16 logits would round away what separates tokens.

        ids: those whose logits are wanted; of a large vocabulary, a part costs a part.
        """
        return F.linear(hidden, self.lm_head.weight[ids]).float()

    def stock_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of ``Qwen3ForCausalLM``."""
        return dict(self._stock_names())

    def _stock_names(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.state_dict().items():
            if name != "lm_head.weight":
                yield f"model.{name}", value.contiguous()
            elif not self.config.tie_word_embeddings:
                yield name, value.contiguous()

    def load_stock_state_dict(self, state: dict[str, Tensor]) -> None:
        """The reverse of ``stock_state_dict``. Errors: RuntimeError, what does not fit."""
        state = {name.removeprefix("model."): value for name, value in state.items()}
        if self.config.tie_word_embeddings and "embed_tokens.weight" in state:
            embeddings = state["embed_tokens.weight"]
            head = state.setdefault("lm_head.weight", embeddings)
            if head is not embeddings and not torch.equal(head, embeddings):
                raise RuntimeError(
                    "lm_head differs from embed_tokens: tie_word_embeddings is wrong"
                )
        self.load_state_dict(state)
