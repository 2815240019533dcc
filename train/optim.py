"""What every LightningModule here shares: Muon, warm-up and cosine, clipping by global norm."""

import math
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from timm.optim.muon import Muon
from torch import nn

from multimodal.train.sharding import clip_gradients


class TrainedByMuon(L.LightningModule):
    """Muon for the matrices and kernels inside the network, AdamW for the rest.

    The rest: embeddings, norms, biases, the modules of ``heads``, and codebooks. Muon makes the
    update of a matrix orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon), scaled as
    in Liu et al. 2025 (arXiv:2502.16982), so that one learning rate fits both. AdamW alone needs
    twice the steps here (docs/decisions/optimizer.md has the numbers).

    learning_rate, weight_decay: of both; warmup_steps: linear, then a cosine to zero.
    learning_rates: other rates for parts, by their names as ``parts_named`` reads them.
    """

    def __init__(
        self,
        learning_rate: float,
        weight_decay: float,
        warmup_steps: int,
        learning_rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup_steps, self.learning_rates = warmup_steps, dict(learning_rates or {})

    @property
    def heads(self) -> list[nn.Module]:
        """What is thrown away after training: it judges, and is not a part of the network."""
        return []

    @property
    def undecayed(self) -> list[nn.Module]:
        """What weight decay would pull from where it has to be: codebooks."""
        return []

    def configure_optimizers(self) -> Any:
        rates = {
            parameter: rate
            for name, rate in self.learning_rates.items()
            for parameter in parts_named(self, name)
        }
        optimizer = muon(
            self, self.heads, self.learning_rate, self.weight_decay, self.undecayed, rates
        )
        return warmup_cosine(optimizer, self.warmup_steps, self.trainer)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm, and log it."""
        norm = clip_gradients(list(self.parameters()), gradient_clip_val or math.inf)
        self.log("train/gradient_norm", norm)


def parts_named(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of this name, or of the part of this name: ``model.transformer.layers.0``;
    with wildcards: ``*.mlp.*``. Errors: ``ValueError`` where there are none."""
    found = [
        parameter
        for own, parameter in module.named_parameters()
        if own == name or own.startswith(f"{name}.") or fnmatchcase(own, name)
    ]
    if not found:
        tops = dict.fromkeys(".".join(n.split(".")[:2]) for n, _ in module.named_parameters())
        raise ValueError(f"{name!r}: no part of that name; there is {', '.join(tops)}")
    return found


def can_compile() -> bool:
    """Whether torch.compile can work here; on a CPU it needs a C++ compiler. Says so if not."""
    if torch.cuda.is_available() or any(map(shutil.which, ("g++", "clang++"))):
        return True
    rank_zero_warn("compile: true, but no C++ compiler (g++, clang++) is here: going on without")
    return False


def muon(
    module: nn.Module,
    heads: list[nn.Module],
    learning_rate: float,
    weight_decay: float,
    undecayed: Sequence[nn.Module] = (),
    rates: Mapping[nn.Parameter, float] | None = None,
) -> Muon:
    """Muon where it fits, AdamW elsewhere; norms, biases and ``undecayed`` do not decay; rates: of
    the parameters that have one of their own."""
    by_adamw = [m for m in module.modules() if isinstance(m, nn.Embedding)] + heads
    outside = {id(p) for part in by_adamw for p in part.parameters()}
    free = {id(p) for part in undecayed for p in part.parameters()}
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim >= 2 and id(p) not in free]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in matrices if id(p) not in outside]},
        {"params": [p for p in matrices if id(p) in outside], "use_fallback": True},
        {
            "params": [p for p in parameters if p.ndim < 2 or id(p) in free],
            "use_fallback": True,
            "weight_decay": 0.0,
        },
    ]
    rate_of = {id(parameter): rate for parameter, rate in (rates or {}).items()}
    divided = []
    for group in groups:
        own = [rate_of.get(id(p), learning_rate) for p in group["params"]]
        for rate in dict.fromkeys(own):
            of_rate = [p for p, its in zip(group["params"], own, strict=True) if its == rate]
            divided.append({**group, "params": of_rate, "lr": rate})
    return Muon(
        divided,
        lr=learning_rate,
        weight_decay=weight_decay,
        betas=(0.9, 0.95),
        nesterov=True,
        ns_coefficients="polar_express",
        adjust_lr_fn="match_rms_adamw",
    )


def warmup_cosine(
    optimizer: torch.optim.Optimizer, warmup_steps: int, trainer: L.Trainer
) -> dict[str, Any]:
    """What ``configure_optimizers`` returns; the cosine ends where the trainer does."""
    total = trainer.estimated_stepping_batches
    if math.isinf(total):
        raise ValueError("the schedule needs an end: give trainer.max_steps or trainer.max_epochs")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = (step - warmup_steps) / max(1, total - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule, "interval": "step"},
    }
