"""What every LightningModule here shares: AdamW, warm-up and cosine, clipping by global norm."""

import math
import shutil
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn


class TrainedByAdamW(L.LightningModule):
    """learning_rate, weight_decay: AdamW's; warmup_steps: linear, then a cosine to zero."""

    def __init__(self, learning_rate: float, weight_decay: float, warmup_steps: int) -> None:
        super().__init__()
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup_steps = warmup_steps

    def configure_optimizers(self) -> Any:
        optimizer = adamw(self, self.learning_rate, self.weight_decay)
        return warmup_cosine(optimizer, self.warmup_steps, self.trainer)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm, and log it.

        Lightning refuses to clip for a fused optimizer, since one could unscale fp16 gradients
        inside; in bf16 and fp32 there is no scaling.
        """
        norm = nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val or math.inf)
        self.log("train/gradient_norm", norm)


def can_compile() -> bool:
    """Whether torch.compile can work here; on a CPU it needs a C++ compiler. Says so if not."""
    if torch.cuda.is_available() or any(map(shutil.which, ("g++", "clang++"))):
        return True
    rank_zero_warn("compile: true, but no C++ compiler (g++, clang++) is here: going on without")
    return False


def adamw(module: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; only matrices and kernels decay, not norms and biases."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


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
