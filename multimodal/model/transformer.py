"""The decoder, in the shape of Qwen3 (arXiv:2505.09388), name for name.

Pre-RMSNorm, QK-norm per head, grouped-query attention, SwiGLU, rotate-half RoPE, no bias. Without
QK-norm it is a Llama, with biases for queries, keys and values too a Qwen2 (model/stock.py). An
image is only tokens here, so the weights of this file are a stock language model for any engine.

``forward`` reads many tokens. ``forward_token``, beside it in each module, reads one token of each
row after a cache: the same numbers, with as few operations as possible.

Shapes: B batch, L queries, S keys, D width, H heads, G key-value heads, d head size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multimodal.model.attention import KVCache, Mask, QKNorm, attend, attend_exactly, head_norm
from multimodal.model.rope import Rope, RopeScaling, rotate
from multimodal.schemas import Between, Positive, check_fields

ALL = slice(None)
MAX_STATIC_ROWS = 2  # rows of a static compiled step: one prompt, or a drawing and its guidance


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

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: RoPE rotates pairs, so it must be even")

    def stored(self) -> dict[str, Any]:
        """As in config.json. What only other stock classes have is there if it is used."""
        plain = {"qk_norm": "rms", "norm_after": False, "attention_bias": False}
        return {k: v for k, v in asdict(self).items() if v is not None and v != plain.get(k)}

    @property
    def rope(self) -> Rope:
        return Rope(self.head_dim, self.rope_theta, self.rope_scaling)


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


def add_dropped(x: Tensor, branch: Tensor, dropout: float) -> Tensor:
    """x + branch, without a random share of the branch (dropout, Srivastava et al. 2014).

    On a CPU the share is rounded to 1/256 and decided by random bytes: random floats take long.
    """
    if not dropout:
        return x + branch
    if not branch.is_cpu or torch.compiler.is_compiling():
        return x + F.dropout(branch, dropout)
    words = torch.empty(-(-branch.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    dropped = min(255, round(256 * dropout))  # of 256 bytes
    kept = words.view(torch.uint8)[: branch.numel()].view(branch.shape) >= dropped
    return torch.addcmul(x, branch, kept.to(branch.dtype), value=256 / (256 - dropped))


def token_product(x: Tensor, linear: nn.Module) -> Tensor:
    """A linear layer for one token of each row: float[B, D] -> float[B, N].

    Compiled for few rows on a CPU it is a sum: such a product only waits for its weights, and the
    compiler's loop reads them three times as fast (docs/decisions/decoding_speed.md).
    """
    weight, bias = linear.weight, linear.bias
    assert isinstance(weight, Tensor) and not isinstance(bias, nn.Module)
    if torch.compiler.is_compiling() and not x.is_cuda and len(x) <= MAX_STATIC_ROWS:
        product = (x[:, None].float() * weight.float()).sum(-1)
        return (product if bias is None else product + bias.float()).to(x.dtype)
    return F.linear(x, weight, bias)


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

    def forward(
        self,
        x: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        mask: Mask,
        cache: KVCache | None,
        layer: int,
        query_slice: slice,
    ) -> Tensor:
        heads = "b l (h d) -> b l h d"
        q = rearrange(self.q_proj(x[:, query_slice]), heads, d=self.head_dim)
        k = rearrange(self.k_proj(x), heads, d=self.head_dim)
        v = rearrange(self.v_proj(x), heads, d=self.head_dim)
        # Norm and rotation in fp32, as the angles are. The products in the dtype of the weights.
        # Keep [B, L, H, d] until after RoPE: memory stays contiguous.
        query_cos_sin = [angles[:, query_slice] for angles in cos_sin]
        q = rotate(self.q_norm(q), *query_cos_sin).to(v.dtype)
        k = rotate(self.k_norm(k), *cos_sin).to(v.dtype)
        q, k, v = (rearrange(x, "b l h d -> b h l d") for x in (q, k, v))
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


class MLP(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def forward_token(self, x: Tensor) -> Tensor:
        gated = F.silu(token_product(x, self.gate_proj)) * token_product(x, self.up_proj)
        return token_product(gated, self.down_proj)


class Layer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
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
    ) -> Tensor:
        attended = self.normed(
            self.input_layernorm, self.self_attn, x, cos_sin, mask, cache, layer, query_slice
        )
        x = add_dropped(x[:, query_slice], attended, dropout)
        return add_dropped(x, self.normed(self.post_attention_layernorm, self.mlp, x), dropout)

    def forward_token(self, x: Tensor, *attended: Any) -> Tensor:
        """attended: the other arguments of ``Attention.forward_token``."""
        x = x + self.normed(self.input_layernorm, self.self_attn.forward_token, x, *attended)
        return x + self.normed(self.post_attention_layernorm, self.mlp.forward_token, x)


class Transformer(nn.Module):
    """Ids in, hidden states out. ``logits`` turns hidden states into float32 scores.

    Attributes:
        recompute: in training keep only what enters a layer, and compute the rest again in the
            backward pass (Chen et al. 2016, arXiv:1604.06174).
        dropout: in training, the share of embeddings and of what layers add that is set to 0.
    """

    recompute = False
    dropout = 0.0

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
    ) -> Tensor:
        """Read tokens.

        Args:
            ids, positions: int64[B, L].
            mask: bool[B, 1, L, S], the mask of another backend (model/attention.py), or None: every
                token sees all. With a cache, S counts the cached tokens and the L new ones.
            cache: the L tokens are appended to it.
            query_slice: the Q of the L tokens whose states are returned. The last layer computes
                only keys and values for the others.

        Returns:
            float[B, Q, D], normed.
        """
        cos_sin = self.config.rope.angles(positions)
        dropout = self.dropout if self.training else 0.0
        recompute = self.recompute and torch.is_grad_enabled() and cache is None
        x = self.embed_tokens(ids)
        x = add_dropped(torch.zeros_like(x[..., :1]), x, dropout) if dropout else x
        for number, layer in enumerate(self.layers):
            queries = query_slice if number == len(self.layers) - 1 else ALL
            run = partial(checkpoint, layer, use_reentrant=False) if recompute else layer
            x = run(x, cos_sin, mask, cache, number, queries, dropout)
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

    def empty_cache(self, rows: int, capacity: int) -> KVCache:
        """A cache for so many rows and tokens."""
        config = self.config
        return KVCache.empty(
            config.num_hidden_layers,
            rows,
            config.num_key_value_heads,
            capacity,
            config.head_dim,
            self.embed_tokens.weight,
        )

    def logits(self, hidden: Tensor, ids: slice = ALL) -> Tensor:
        """Scores of ids: float[..., D] -> float32[..., V].

        In bf16 the differences between tokens would be rounded away.

        Args:
            ids: the ids whose scores are needed. A part of a large vocabulary costs a part.
        """
        return F.linear(hidden, self.lm_head.weight[ids]).float()

    def stock_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of the stock classes (model/stock.py)."""
        state = {name: weight.contiguous() for name, weight in self.state_dict().items()}
        head = state.pop("lm_head.weight")
        stock = {f"model.{name}": weight for name, weight in state.items()}
        return stock if self.config.tie_word_embeddings else {**stock, "lm_head.weight": head}

    def load_stock_state_dict(self, state: dict[str, Tensor]) -> None:
        """The reverse of ``stock_state_dict``. Raises ``RuntimeError`` for what does not fit."""
        state = {name.removeprefix("model."): value for name, value in state.items()}
        if self.config.tie_word_embeddings and "embed_tokens.weight" in state:
            embeddings = state["embed_tokens.weight"]
            head = state.setdefault("lm_head.weight", embeddings)
            if head is not embeddings and not torch.equal(head, embeddings):
                raise RuntimeError(
                    "lm_head differs from embed_tokens: tie_word_embeddings is wrong"
                )
        self.load_state_dict(state)
