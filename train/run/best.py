"""Which validation of a run was the best, and the model folder, which is of that validation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from multimodal.terminal import print_status
from multimodal.train.run.finite import check_finite, is_last_step

LAST = "last"


def parse_best_by(text: str) -> tuple[str, str] | None:
    """``val/CIDEr:max`` is ("val/CIDEr", "max"), and ``last`` is None.

    Raises:
        ValueError: for anything else.
    """
    name, _, mode = text.rpartition(":")
    if text == LAST:
        return None
    if not name or mode not in ("min", "max"):
        raise ValueError(f"--best_by {text}: expected NAME:min, NAME:max or {LAST}")
    return name, mode


class BestValidation(L.Callback):
    """Knows whether the last validation is the best so far.

    A run that has validations ends with one, so that its last weights are compared too. Callbacks
    that read ``improved`` come after this one.

    Args:
        best_by: a logged value and whether it is to be small or large: ``val/CIDEr:max``. ``last``:
            each validation counts as the best.
        min_delta: a value has to be better by more than this.
        required: whether a value that is not logged is an error. If not, each validation counts as
            the best then.
    """

    def __init__(self, best_by: str, min_delta: float = 0.0, required: bool = False) -> None:
        self.measure, self.min_delta, self.required = parse_best_by(best_by), min_delta, required
        self.count, self.step = 0, -1
        self.value: float | None = None
        self.improved = False

    def state_dict(self) -> dict[str, Any]:
        by = ":".join(self.measure) if self.measure else LAST
        return {"by": by, "value": self.value, "step": self.step, "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]
        if parse_best_by(state_dict["by"]) == self.measure:  # else values cannot be compared
            self.value, self.step = state_dict["value"], state_dict["step"]

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if is_last_step(trainer):
            trainer.should_stop = True  # Lightning validates before it stops

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self.count += 1
        value = None
        if self.measure:
            if (logged := trainer.callback_metrics.get(self.measure[0])) is not None:
                value = float(logged)
            elif self.required:
                names = ", ".join(sorted(n for n in trainer.callback_metrics if "val/" in n))
                raise ValueError(f"--best_by {self.measure[0]}: not logged; there is {names}")
        improved = value is None or self._is_better(value)
        self.improved = trainer.strategy.broadcast(improved)  # the ranks save together
        if self.improved:
            self.value, self.step = value, trainer.global_step

    def _is_better(self, value: float) -> bool:
        assert self.measure
        if self.value is None or value != value:
            return value == value
        gain = self.value - value if self.measure[1] == "min" else value - self.value
        return gain > self.min_delta

    def __str__(self) -> str:
        """Such as "step 600, the best of 3 validations by val/total (3.21)"."""
        if not self.count:
            return "no validation yet"
        if self.value is None or not self.measure:
            return f"step {self.step:,}, the newest validation"
        return (
            f"step {self.step:,}, the best of {self.count} validations by {self.measure[0]} "
            f"({self.value:.4g})"
        )


class ExportModel(L.Callback):
    """Writes the model folder: after each validation that is the best so far.

    It has the averaged weights if there is a callback that averages. A run without a validation
    writes it at its end, and one that is stopped before its first validation when it stops.

    Args:
        folder: of the model.
        best: of this run.
    """

    def __init__(self, folder: str | Path, best: BestValidation) -> None:
        self.folder, self.best = Path(folder), best

    def export(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the folder. On all ranks: with FSDP2 each rank has a part of the weights."""
        check_finite(trainer, module)
        with averaged_weights(trainer, module):
            module.export(self.folder)  # type: ignore[operator]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self.best.improved:
            self.export(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.best.count:
            self.export(trainer, pl_module)
        if trainer.is_global_zero:
            print_status(f"{self.folder}: {self.describe(trainer)}")

    def describe(self, trainer: L.Trainer) -> str:
        """Of which step the model is."""
        return str(self.best) if self.best.count else f"step {trainer.global_step:,}, the last"


def keep_equal_weights(average: WeightAveraging) -> None:
    """Let an average leave weights as they are that do not change.

    Lightning's EMA multiplies and adds. Rounding changes frozen weights too: those of the image
    tokenizer, and with them the fingerprint of its codes.
    """
    if (mean := average._kwargs.get("avg_fn")) is not None:

        def exact_mean(averaged: Tensor, now: Tensor, count: Tensor) -> Tensor:
            return torch.where(averaged == now, now, mean(averaged, now, count))

        average._kwargs["avg_fn"] = exact_mean


def begin_with_now(average: WeightAveraging) -> None:
    """Let an average be the weights of now until its first update.

    Lightning's is a copy of those that the run began with. It would be validated, compared and
    exported until then.
    """
    for name in ("on_validation_epoch_start", "on_train_end", "on_save_checkpoint"):

        def caught_up(
            trainer: L.Trainer,
            module: L.LightningModule,
            *more: Any,
            hook: Callable[..., None],
        ) -> None:
            mean = average._average_model
            if mean is not None and not int(mean.n_averaged):
                weights = chain(mean.module.parameters(), mean.module.buffers())
                of_now = chain(module.parameters(), module.buffers())
                for one, now in zip(weights, of_now, strict=True):
                    one.data.copy_(now.data)
            hook(trainer, module, *more)

        setattr(average, name, partial(caught_up, hook=getattr(average, name)))


@contextmanager
def averaged_weights(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """Have the averaged weights in the module, outside of a validation."""
    averages = [c for c in trainer.callbacks if isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
    for average in averages:
        average.on_validation_epoch_start(trainer, module)
    try:
        yield
    finally:
        for average in averages:
            average.on_validation_epoch_end(trainer, module)
