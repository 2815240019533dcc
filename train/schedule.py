"""What every LightningModule here shares: Muon, warm-up and cosine, clipping by global norm."""

import math
import shutil
from collections.abc import Sequence
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
    twice the steps here (docs/decisions.md has the numbers).

    learning_rate, weight_decay: of both; warmup_steps: linear, then a cosine to zero.
    """

    def __init__(self, learning_rate: float, weight_decay: float, warmup_steps: int) -> None:
        super().__init__()
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup_steps = warmup_steps

    @property
    def heads(self) -> list[nn.Module]:
        """What is thrown away after training: it judges, and is not a part of the network."""
        return []

    @property
    def undecayed(self) -> list[nn.Module]:
        """What weight decay would pull from where it has to be: codebooks."""
        return []

    def configure_optimizers(self) -> Any:
        optimizer = muon(self, self.heads, self.learning_rate, self.weight_decay, self.undecayed)
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
) -> Muon:
    """Muon where it fits, AdamW elsewhere; norms, biases and ``undecayed`` do not decay."""
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
    return Muon(
        [group for group in groups if group["params"]],
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
