"""A run whose loss is no number any more ends, before it replaces what was good."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from multimodal.train.run.folder import RunFolder

LOOK_EVERY = 50  # steps, in a run without a log
SKIPPED_STEPS = 20  # at most so many in a row, where fp16 skips a step whose gradients overflow


def is_last_step(trainer: L.Trainer) -> bool:
    """Whether the step that was just done is the last one, by max_steps or max_epochs."""
    if 0 <= trainer.max_steps <= trainer.global_step:
        return True
    epochs = trainer.max_epochs
    ends = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
    return epochs is not None and 0 < epochs <= trainer.current_epoch + 1 and ends


class FiniteLoss(L.Callback):
    """Stops a run whose loss is not a finite number any more.

    The loss is noted on its device in each step, and read where a step is logged: reading waits for
    the device.
    """

    def __init__(self) -> None:
        self._bad_since: Tensor | None = None  # the step, -1 for none
        self._noted = -1

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        loss = outputs["loss"].detach()
        step = torch.full((), trainer.global_step, device=loss.device)
        before = torch.full_like(step, -1) if self._bad_since is None else self._bad_since
        first = torch.where(before < 0, step, before)
        self._bad_since = torch.where(loss.isfinite(), torch.full_like(step, -1), first)
        if trainer.global_step != self._noted:
            self._noted = trainer.global_step
            every = trainer.log_every_n_steps or LOOK_EVERY  # type: ignore[attr-defined]
            if self._noted % every == 0:
                self.check(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.check(trainer)

    def check(self, trainer: L.Trainer) -> None:
        """Every rank has to call.

        Raises:
            ValueError: if the loss is not finite.
        """
        since = -1 if self._bad_since is None else int(self._bad_since)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        steps = 1 + trainer.global_step - since
        bad = since >= 0 and steps > (0 if scaler is None else SKIPPED_STEPS)
        if trainer.strategy.reduce_boolean_decision(bad, all=False):
            raise diverged(trainer, "the loss", since if since >= 0 else trainer.global_step)


def check_finite(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Refuse to save weights that are no numbers. Every rank has to call.

    Raises:
        ValueError: if the loss or a weight is not finite.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, FiniteLoss):
            callback.check(trainer)
    finite = [
        (p.to_local() if isinstance(p, DTensor) else p).detach().isfinite().all()
        for p in module.parameters()
        if p.requires_grad
    ]
    bad = not all(map(bool, finite))
    if trainer.strategy.reduce_boolean_decision(bad, all=False):
        raise diverged(trainer, "a weight", trainer.global_step)


def diverged(trainer: L.Trainer, what: str, step: int) -> ValueError:
    """The error of a run that cannot go on: where, what is left, and what to try."""
    last = RunFolder.of(trainer).last
    left = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
    return ValueError(
        f"step {step:,}: {what} is not a finite number any more; {left}. Try a lower "
        "learning_rate, more warmup_steps, trainer.gradient_clip_val 1.0, or precision bf16-mixed"
    )
