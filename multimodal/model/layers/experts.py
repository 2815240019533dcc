"""Experts: a token goes through the few MLPs that a router chooses for it.

In the shape of Qwen3-MoE (arXiv:2505.09388), name for name. The router scores all experts, and the
MLPs of the k best are added up, weighted by their probabilities. So a layer has the parameters of
all experts, and costs those of k.

Two losses train the router besides the token losses. ``balance_loss`` spreads the tokens over the
experts (Switch Transformer, Fedus et al. 2021, arXiv:2101.03961), but as Qwen3-MoE of transformers
has it: of all layers together. ``router_z_loss`` keeps its logits small (ST-MoE, Zoph et al. 2022,
arXiv:2202.08906).

Shapes: N tokens, D width, E experts, k experts of a token, S layers with experts.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from multimodal.distributed import global_sum, world_size
from multimodal.model.layers.mlp import MLP
from multimodal.schemas import Between, check_fields

MAX_EXPERTS = 2**15  # of all layers together
ROUTER_STD = 0.02  # of the weights of a new router: its probabilities are nearly equal
Weight = Annotated[float, Between(0, 1e6)]


@dataclass(frozen=True)
class ExpertsConfig:
    """Experts in place of the MLPs. The names are those of Qwen3-MoE.

    Args:
        num_experts: E, in each layer.
        num_experts_per_tok: k, those that a token goes through.
        moe_intermediate_size: the width inside each expert. None: that of an MLP.
        norm_topk_prob: divide the weights of the k experts by their sum.
        mlp_only_layers: numbers of the layers that keep an MLP.
        router_aux_loss_coef: weight of ``balance_loss``.
        router_z_loss_coef: weight of ``router_z_loss``.

    Raises:
        ValueError: for numbers that do not fit.
    """

    num_experts: Annotated[int, Between(1, 1024)]
    num_experts_per_tok: Annotated[int, Between(1, 1024)] = 2
    moe_intermediate_size: Annotated[int, Between(1, 2**20)] | None = None
    norm_topk_prob: bool = True
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: Weight = 0.01
    router_z_loss_coef: Weight = 0.001

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "mlp_only_layers", tuple(sorted(set(self.mlp_only_layers))))
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok}: there are only "
                f"num_experts={self.num_experts}"
            )

    def check_router(self) -> None:
        """Raises ``ValueError`` if the token losses would teach the router nothing.

        The weight of one expert divided by itself is 1, whatever the router says.
        """
        if self.norm_topk_prob and self.num_experts_per_tok == 1 < self.num_experts:
            raise ValueError(
                "num_experts_per_tok=1 with norm_topk_prob: true: the expert of a token always has "
                "the weight 1, so no token loss trains the router; give 2 experts for a token, or, "
                "unless they start as copies of an MLP, norm_topk_prob: false"
            )

    def fitted(self, layers: int, width: int) -> "ExpertsConfig":
        """The same for a transformer of so many layers and of this width inside its MLPs.

        Raises:
            ValueError: if no layer has experts, or if there are too many.
        """
        if any(not 0 <= number < layers for number in self.mlp_only_layers):
            raise ValueError(
                f"mlp_only_layers={list(self.mlp_only_layers)}: expected 0 to {layers - 1}"
            )
        sparse = layers - len(self.mlp_only_layers)
        if not 0 < sparse * self.num_experts <= MAX_EXPERTS:
            raise ValueError(
                f"num_experts={self.num_experts} in {sparse} layers: expected 1 to {MAX_EXPERTS:,} "
                "experts together"
            )
        return replace(self, moe_intermediate_size=self.moe_intermediate_size or width)


class Router(nn.Linear):
    """Scores of experts, a linear layer: float[N, D] -> float[N, E]."""


class SparseMLP(nn.Module):
    """Has the place of an ``MLP``. Each expert is one, so that every tool for matrices applies."""

    def __init__(self, hidden_size: int, config: ExpertsConfig) -> None:
        super().__init__()
        assert config.moe_intermediate_size is not None
        self.config = config
        self.gate = Router(hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            MLP(hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts)
        )

    def forward(self, x: Tensor, router_logits: list[Tensor] | None = None) -> Tensor:
        """float[..., D] -> float[..., D].

        Args:
            router_logits: those of these tokens are appended, float[N, E].
        """
        tokens = x.reshape(-1, x.shape[-1])
        logits = self.gate(tokens)
        if router_logits is not None:
            router_logits.append(logits)
        probabilities = logits.softmax(-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self.config.num_experts_per_tok, dim=-1)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        outputs: Tensor = self._outputs(tokens, chosen)
        return (outputs * weights[..., None].to(outputs.dtype)).sum(1).view_as(x)

    def forward_token(self, x: Tensor) -> Tensor:
        return self(x)

    # How many tokens an expert has is known only when it runs.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _outputs(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """What the chosen experts say of each token. Tokens are sorted by expert, and each expert
        reads all of its tokens at once.

        Args:
            tokens: float[N, D].
            chosen: int64[N, k].

        Returns:
            float[N, k, D]
        """
        experts = rearrange(chosen, "n k -> (n k)")
        order = experts.argsort(stable=True)
        counts = experts.bincount(minlength=len(self.experts)).tolist()
        parts = torch.split(tokens[order // chosen.shape[1]], counts)
        # In training also those without a token: a rank that left one out would have no gradient
        # of it, and the others would wait. Without any token all of them, for their empty outputs.
        outputs = [
            expert(part)
            for expert, part in zip(self.experts, parts, strict=True)
            if len(part) or torch.is_grad_enabled() or not len(tokens)
        ]
        return rearrange(torch.cat(outputs)[order.argsort()], "(n k) d -> n k d", k=chosen.shape[1])


def expert_shares(logits: Tensor, k: int, counted: Tensor) -> Tensor:
    """How many of the tokens of all ranks go to each expert.

    Args:
        logits: float[S, N, E], of the routers.
        k: experts of a token.
        counted: bool[N], the tokens that count.

    Returns:
        float32[S, E], as a share of the tokens: a row adds up to k.
    """
    best = logits.detach().topk(k, dim=-1).indices
    chosen = torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, best, 1.0)
    tokens = global_sum(counted.sum()).clamp(min=1)
    return global_sum(einsum(chosen, counted.float(), "s n e, n -> s e")) / tokens


def balance_loss(logits: Tensor, k: int, counted: Tensor) -> Tensor:
    """E times the sum over experts of their share of the tokens times their mean probability.

    Shares and means are over all layers and all ranks, as in Qwen3-MoE of transformers. It is k if
    all experts have as many tokens. That need not hold in a layer: layers that each send all tokens
    to one expert, each to another one, have the loss k too. ``busiest`` of ``expert_use`` shows
    them. Arguments as for ``expert_shares``.

    Returns:
        float32[]. Gradients are averaged over ranks afterwards, so it is multiplied by their
        number, as in ``token_losses``.
    """
    tokens = global_sum(counted.sum()).clamp(min=1)
    probabilities = logits.softmax(-1, dtype=torch.float32)
    means = einsum(probabilities, counted.float(), "s n e, n -> e") / (len(logits) * tokens)
    shares = expert_shares(logits, k, counted).mean(0)
    return world_size() * logits.shape[-1] * (shares * means).sum()


def router_z_loss(logits: Tensor, counted: Tensor) -> Tensor:
    """The mean of (log of the sum of exp(logits))^2 over tokens and layers, float32[].

    Arguments as for ``expert_shares``. Multiplied by the number of ranks as ``balance_loss``.
    """
    tokens = global_sum(counted.sum()).clamp(min=1)
    squares = logits.float().logsumexp(-1).square() * counted
    return world_size() * squares.sum() / (len(logits) * tokens)


def expert_use(logits: Tensor, k: int, kinds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How kinds of tokens use the experts, for the log.

    Args:
        logits, k: as for ``expert_shares``.
        kinds: bool[N] by name.

    Returns:
        float32[] by name, means over layers and over all ranks. ``KIND``: how many experts the
        tokens use, the exponential of the entropy of their shares: 1 to E. A kind without tokens is
        left out. ``shared``, of two kinds: the share of its choices that one kind has in common
        with the other, from 0 (experts of their own) to 1. ``busiest``: the largest share of the
        tokens of a kind that goes to one expert.
    """
    present = [name for name, mask in kinds.items() if global_sum(mask.sum()) > 0]
    shares = {name: expert_shares(logits, k, kinds[name]) / k for name in present}
    use = {name: torch.special.entr(share).sum(-1).exp().mean() for name, share in shares.items()}
    if shares:
        use["busiest"] = k * torch.stack(list(shares.values())).amax(-1).mean(-1).max()
    if len(shares) == 2:
        one, other = shares.values()
        use["shared"] = torch.minimum(one, other).sum(-1).mean()
    return use


def upcycled(weights: Mapping[str, Tensor], config: ExpertsConfig) -> dict[str, Tensor]:
    """The weights of a dense model for one with experts.

    Each expert starts as a copy of the MLP, so the model computes the same before training
    (Komatsuzaki et al. 2022, arXiv:2212.05055). Routers are new.

    Args:
        weights: by name, those of MLPs as ``...layers.NUMBER.mlp.gate_proj.weight``.

    Raises:
        ValueError: if the experts are of another width, their weights do not add up to 1, or no
            token loss would train the router.
    """
    if not config.norm_topk_prob:
        raise ValueError("experts that start as copies of an MLP need norm_topk_prob=true")
    config.check_router()
    made: dict[str, Tensor] = {}
    for name, weight in weights.items():
        found = re.fullmatch(r"(.*\blayers\.(\d+)\.mlp)\.((gate|up|down)_proj\.weight)", name)
        if found is None or int(found[2]) in config.mlp_only_layers:
            made[name] = weight
            continue
        part, kind = found[1], found[4]
        width, inside = weight.shape if kind == "down" else weight.T.shape
        if inside != config.moe_intermediate_size:
            raise ValueError(
                f"moe_intermediate_size={config.moe_intermediate_size}: experts that start as "
                f"copies of an MLP have its width, {inside}"
            )
        for number in range(config.num_experts):
            made[f"{part}.experts.{number}.{found[3]}"] = weight.clone()
        router = ROUTER_STD * torch.randn(config.num_experts, width)
        made.setdefault(f"{part}.gate.weight", router.to(weight))
    return made


def idle_parameters(module: nn.Module) -> int:
    """Number of the parameters of a module that one token leaves out."""
    idle = 0
    for part in module.modules():
        if isinstance(part, SparseMLP):
            size = sum(p.numel() for p in part.experts[0].parameters())
            idle += (part.config.num_experts - part.config.num_experts_per_tok) * size
    return idle


def stacked(router_logits: Sequence[Tensor]) -> Tensor:
    """The router logits of all layers, float32[S, N, E]."""
    return torch.stack(list(router_logits)).float()
