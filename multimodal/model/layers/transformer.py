"""The decoder, in the shape of Qwen3 (arXiv:2505.09388), name for name.

Pre-RMSNorm, QK-norm per head, grouped-query attention, SwiGLU, rotate-half RoPE, no bias. With
experts it is a Qwen3-MoE, without QK-norm a Llama, with biases for queries, keys and values too a
Qwen2 (model/stock.py). An image is only tokens here, so the weights are a stock language model.

``forward`` reads many tokens. ``forward_token``, beside it in each module, reads one token of each
row after a cache: the same numbers, with as few operations as possible.

Shapes: B batch, L queries, S keys, D width, H heads, G key-value heads, d head size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multimodal.model.layers.attention import (
    KVCache,
    Mask,
    QKNorm,
    attend,
    attend_exactly,
    head_norm,
)
from multimodal.model.layers.experts import ExpertsConfig, SparseMLP, idle_parameters
from multimodal.model.layers.mlp import MLP, add_dropped, token_product
from multimodal.model.layers.quantization import QuantizedLinear, with_quantized_layers
from multimodal.model.layers.rope import Rope, RopeScaling, rotate
from multimodal.schemas import Between, Positive, check_fields

ALL = slice(None)


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes, and what the attention has.

    Args:
        intermediate_size: the width inside the SwiGLU.
        rope_theta: the base of the wavelengths of RoPE.
        qk_norm: how each head's query and key are normed, see ``head_norm``.
        norm_after: norm what attention and MLP add, not what they read (Swin v2, arXiv:2111.09883).
        attention_bias: biases of queries, keys and values.
        rope_scaling: for longer texts.
        experts: in place of MLPs.
        weight_bits: of quantized matrices (quantization.py). None: they are floats.

    Raises:
        ValueError: for sizes that do not fit.
    """

    vocab_size: Annotated[int, Between(1, 2**24)]
    hidden_size: Annotated[int, Between(1, 2**17)]
    num_hidden_layers: Annotated[int, Between(1, 256)]
    num_attention_heads: Annotated[int, Between(1, 1024)]
    num_key_value_heads: Annotated[int, Between(1, 1024)]
    head_dim: Annotated[int, Between(2, 4096)]
    intermediate_size: Annotated[int, Between(1, 2**20)]
    tie_word_embeddings: bool = True
    max_position_embeddings: Annotated[int, Between(1, 2**24)] = 4096
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 10000.0
    qk_norm: QKNorm = "rms"
    norm_after: bool = False
    attention_bias: bool = False
    rope_scaling: RopeScaling | None = None
    experts: ExpertsConfig | None = None
    weight_bits: Literal[8, 4] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: RoPE rotates pairs, so it must be even")
        if self.experts is not None:
            fitted = self.experts.fitted(self.num_hidden_layers, self.intermediate_size)
            object.__setattr__(self, "experts", fitted)

    def stored(self) -> dict[str, Any]:
        """As in config.json. What only other stock classes have is there if it is used."""
        plain = {"qk_norm": "rms", "norm_after": False, "attention_bias": False}
        return {k: v for k, v in asdict(self).items() if v is not None and v != plain.get(k)}

    @property
    def rope(self) -> Rope:
        return Rope(self.head_dim, self.rope_theta, self.rope_scaling)


# name: layers, width, heads, key-value heads, head size, SwiGLU width; of a size with experts also
# how many there are, how many a token has, and the width of each. Then the parameters that a token
# has in the layers, and all with a vocabulary of 49,152 ids (32k of text, 16k codes)
SIZES: dict[str, tuple[int, ...]] = {
    "tiny": (2, 64, 4, 2, 16, 128),  #             74 k    3.2 M
    "micro": (4, 128, 2, 1, 64, 384),  #          787 k    7.1 M
    "mini": (4, 256, 4, 2, 64, 768),  #           3.1 M    16 M
    "starter": (6, 384, 6, 2, 64, 1024),  #       9.4 M    28 M
    "starter-moe": (6, 384, 6, 2, 64, 1024, 8, 2, 512),  #   9.5 M    50 M
    "base": (12, 768, 12, 4, 64, 2304),  #         83 M   120 M
    "base-moe": (12, 768, 12, 4, 64, 2304, 8, 2, 1152),  #    83 M   312 M
    "large": (24, 1024, 16, 8, 64, 3072),  #      302 M   352 M
    "1b": (28, 1536, 16, 8, 128, 4608),  #        859 M   934 M
    "7b": (32, 4096, 32, 8, 128, 12288),  #       6.2 B   6.6 B
}


def named_config(size: str, vocab_size: int) -> TransformerConfig:
    """A config of the table of sizes; embeddings are tied up to ``1b``."""
    if size not in SIZES:
        raise ValueError(f"size {size!r}: expected one of {', '.join(SIZES)}")
    layers, width, heads, kv_heads, head_dim, inner, *more = SIZES[size]
    experts = ExpertsConfig(more[0], more[1], more[2]) if more else None
    return TransformerConfig(
        vocab_size, width, layers, heads, kv_heads, head_dim, inner, size != "7b", experts=experts
    )


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d, width = config.head_dim, config.hidden_size
        self.head_dim, bias = d, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * d, bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * d, bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * d, bias)
        self.o_proj = nn.Linear(config.num_attention_heads * d, width, bias=False)
        self.q_norm = head_norm(config.qk_norm, config.num_attention_heads, d, config.rms_norm_eps)
        self.k_norm = head_norm(config.qk_norm, config.num_key_value_heads, d, config.rms_norm_eps)

    def heads(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], query_slice: slice) -> list[Tensor]:
        """Queries float[B, H, Q, d], keys and values float[B, G, L, d], as they meet."""
        parts = self.q_proj(x[:, query_slice]), self.k_proj(x), self.v_proj(x)
        q, k, v = (rearrange(part, "b l (h d) -> b l h d", d=self.head_dim) for part in parts)
        # Norm and rotation in fp32, products in the dtype of the weights; [B, L, H, d] until then.
        query_cos_sin = [angles[:, query_slice] for angles in cos_sin]
        q = rotate(self.q_norm(q), *query_cos_sin).to(v.dtype)
        k = rotate(self.k_norm(k), *cos_sin).to(v.dtype)
        return [rearrange(x, "b l h d -> b h l d") for x in (q, k, v)]

    def forward(
        self,
        x: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        mask: Mask,
        cache: KVCache | None,
        layer: int,
        query_slice: slice,
    ) -> Tensor:
        q, k, v = self.heads(x, cos_sin, query_slice)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if isinstance(mask, Tensor):
            mask = mask[:, :, query_slice]
        return self.o_proj(rearrange(attend(q, k, v, mask), "b h l d -> b l (h d)"))

    def forward_token(
        self,
        x: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        mask: Tensor | None,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        exact: bool = False,
    ) -> Tensor:
        q, k, v = (
            token_product(x, projection).view(len(x), -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (
            rotate(norm(part), *cos_sin).to(v.dtype)
            for norm, part in ((self.q_norm, q), (self.k_norm, k))
        )
        rows = torch.arange(len(x), device=x.device)
        keys[rows, :, slots], values[rows, :, slots] = k, v
        # The query heads of a group stand where queries do: [B, G, H / G, d]. Nothing is repeated.
        grouped = q.reshape(len(q), keys.shape[1], -1, self.head_dim)
        if exact and mask is not None:
            attended = attend_exactly(grouped, keys, values, mask)
        else:
            attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        return token_product(attended.flatten(1), self.o_proj)


class Layer(nn.Module):
    """number: of the layer, from 0."""

    def __init__(self, config: TransformerConfig, number: int) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp: MLP | SparseMLP
        if config.experts is None or number in config.experts.mlp_only_layers:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)
        else:
            self.mlp = SparseMLP(config.hidden_size, config.experts)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_after = config.norm_after

    def normed(self, norm: nn.Module, part: Callable[..., Tensor], x: Tensor, *more: Any) -> Tensor:
        return norm(part(x, *more)) if self.norm_after else part(norm(x), *more)

    def forward(
        self,
        x: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        mask: Mask,
        cache: KVCache | None,
        layer: int,
        query_slice: slice,
        dropout: float,
    ) -> tuple[Tensor, list[Tensor]]:
        """The states, and the router logits if there are experts: none or one float[B * Q, E]."""
        attended = self.normed(
            self.input_layernorm, self.self_attn, x, cos_sin, mask, cache, layer, query_slice
        )
        x = add_dropped(x[:, query_slice], attended, dropout)
        router_logits: list[Tensor] = []
        more = (router_logits,) if isinstance(self.mlp, SparseMLP) else ()
        added = self.normed(self.post_attention_layernorm, self.mlp, x, *more)
        return add_dropped(x, added, dropout), router_logits

    def forward_token(self, x: Tensor, *attended: Any) -> Tensor:
        """attended: the other arguments of ``Attention.forward_token``."""
        x = x + self.normed(self.input_layernorm, self.self_attn.forward_token, x, *attended)
        return x + self.normed(self.post_attention_layernorm, self.mlp.forward_token, x)


class Transformer(nn.Module):
    """Ids in, hidden states out. ``logits`` turns hidden states into float32 scores.

    Attributes:
        recompute: of so many layers, the first ones, keep in training only what enters, and compute
            the rest again in the backward pass (Chen et al. 2016, arXiv:1604.06174).
        dropout: in training, the share of embeddings and of what layers add that is set to 0.
    """

    recompute = 0
    dropout = 0.0

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.apply(self._initialise)
        if config.weight_bits is not None:
            with_quantized_layers(self, ("lm_head",))

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
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
        cache: KVCache | None = None,
        query_slice: slice = ALL,
        router_logits: list[Tensor] | None = None,
    ) -> Tensor:
        """Read tokens.

        Args:
            ids, positions: int64[B, L].
            mask: bool[B, 1, L, S], the mask of another backend (model/layers/attention.py), or
                None: every token sees all. With a cache, S counts the cached tokens and the L new
                ones.
            cache: the L tokens are appended to it.
            query_slice: the Q of the L tokens whose states are returned. The last layer computes
                only keys and values for the others.
            router_logits: those of each layer with experts are appended, float[B * L, E].

        Returns:
            float[B, Q, D], normed.
        """
        cos_sin = self.config.rope.angles(positions)
        dropout = self.dropout if self.training else 0.0
        recompute = self.recompute if torch.is_grad_enabled() and cache is None else 0
        x = self.embed_tokens(ids)
        x = add_dropped(torch.zeros_like(x[..., :1]), x, dropout) if dropout else x
        for number, layer in enumerate(self.layers):
            queries = query_slice if number == len(self.layers) - 1 else ALL
            run: Any = layer if cache is None else layer._call_impl  # see compile_layers
            run = partial(checkpoint, layer, use_reentrant=False) if number < recompute else run
            x, logits = run(x, cos_sin, mask, cache, number, queries, dropout)
            if router_logits is not None:
                router_logits += logits
        if cache is not None:
            cache.length += ids.shape[1]
        return self.norm(x)

    def forward_prompt(
        self, ids: Tensor, positions: Tensor, mask: Tensor, cache: KVCache
    ) -> Tensor:
        """Read prompts into a cache: the states of their last tokens, float[B, D]."""
        return self(ids, positions, mask, cache, slice(-1, None))[:, 0]

    def forward_token(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        keys: list[Tensor],
        values: list[Tensor],
        slots: Tensor,
        exact: bool = False,
    ) -> Tensor:
        """Read one token of each row. Its keys and values are written into the cache in place.

        Args:
            ids: int64[B].
            positions: int64[B, 1].
            mask: bool[B, 1, 1, S]. None: all keys are seen.
            keys, values: for each layer float[B, G, S, d].
            slots: int64[B], the index among the S where the token of each row goes.
            exact: the attention of a row does not depend on the others in its last bits.

        Returns:
            float[B, D], normed.
        """
        cos, sin = (angles[:, 0] for angles in self.config.rope.angles(positions))  # [B, 1, d]
        x = self.embed_tokens(ids)
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            x = layer.forward_token(x, (cos, sin), mask, keys[number], values[number], slots, exact)
        return self.norm(x)

    def compile_layers(self) -> None:
        """torch.compile of one layer for all. A cache, which numbers them, goes without it."""
        for layer in self.layers:
            layer.compile()

    @property
    def active_parameters(self) -> int:
        """Number of the parameters that a token goes through: without the experts it leaves out."""
        return sum(p.numel() for p in self.parameters()) - idle_parameters(self)

    def empty_cache(self, rows: int, capacity: int) -> KVCache:
        """A cache for so many rows and tokens."""
        config = self.config
        layers, groups = config.num_hidden_layers, config.num_key_value_heads
        return KVCache.empty(layers, rows, groups, capacity, config.head_dim, self.norm.weight)

    @property
    def head(self) -> Tensor:
        """The matrix of ``logits``: float[V, D]. A quantized one is made anew each time."""
        head = self.lm_head
        return head.matrix() if isinstance(head, QuantizedLinear) else head.weight

    def logits(self, hidden: Tensor, ids: slice = ALL) -> Tensor:
        """Scores of ids: float[..., D] -> float32[..., V]: bf16 would round differences away.

        Args:
            ids: the ids whose scores are needed. A part of a large vocabulary costs a part.
        """
        if not isinstance(self.lm_head, nn.Linear):
            return self.lm_head(hidden, ids).float()
        return F.linear(hidden, self.lm_head.weight[ids]).float()

    def stock_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of the stock classes (model/stock.py)."""
        state = {name: weight.contiguous() for name, weight in self.state_dict().items()}
        head = {name: state.pop(name) for name in list(state) if name.startswith("lm_head.")}
        stock = {f"model.{name}": weight for name, weight in state.items()}
        return stock if self.config.tie_word_embeddings else stock | head

    def load_stock_state_dict(self, state: dict[str, Tensor]) -> None:
        """The reverse of ``stock_state_dict``. Raises ``RuntimeError`` for what does not fit."""
        state = {name.removeprefix("model."): value for name, value in state.items()}
        tied = [name for name in state if name.startswith("embed_tokens.")]
        for name in tied if self.config.tie_word_embeddings else ():
            head = state.setdefault(name.replace("embed_tokens", "lm_head"), state[name])
            if head is not state[name] and not torch.equal(head, state[name]):
                raise RuntimeError(
                    "lm_head differs from embed_tokens: tie_word_embeddings is wrong"
                )
        self.load_state_dict(state)
