"""What a run says while it trains: a bar in a terminal, else a line every so often."""

import math
import sys
import time
from typing import Any

import lightning as L
from tqdm import tqdm

from multimodal.terminal import print_status
from multimodal.train.run.best import BestValidation

SECONDS = 30.0  # between two lines
BAR_SECONDS = 1.0  # between two looks at the numbers beside a bar
# Shown while a run trains, beside what is logged with prog_bar.
SHOWN = ("loss", "psnr", "train/variance_lost", "tokens/s", "MFU", "memory_GB")
# Of a validation these are for the log alone.
DIAGNOSTICS = ("grad_norm/", "reconstruct/", "largest_logit", "log_z", "packing", "caption_")


def in_bar(trainer: L.Trainer) -> bool:
    """``prog_bar`` of ``log`` for a number in ``SHOWN``: whether there is a bar of Lightning.

    Lightning reads such a number in each step, on all ranks, and reading waits for the device.
    """
    return trainer.progress_bar_callback is not None


class Progress(L.Callback):
    """Prints step, loss, tokens/s and the time that is left, and the numbers of each validation.

    Numbers are on their device. They are read when they are printed: reading waits for the device.

    Args:
        bar: show a bar. By default if stderr is a terminal.
        best: knows whether a validation is the best so far.
        seconds: between two lines, if there is no bar.
    """

    def __init__(
        self,
        bar: bool | None = None,
        best: BestValidation | None = None,
        seconds: float | None = None,
    ) -> None:
        self.bar = sys.stderr is not None and sys.stderr.isatty() if bar is None else bar
        self.best, self.seconds = best, SECONDS if seconds is None else seconds
        self._bars: list[Any] = []
        self._printed = self._started = 0.0
        self._first = self._step = 0

    # --- training -----------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first = self._step = trainer.global_step
        self._started = time.monotonic()
        self._printed = -math.inf if self.bar else self._started  # a bar has numbers at once
        steps = trainer.estimated_stepping_batches
        self._open(trainer, "steps", None if math.isinf(steps) else int(steps), self._first)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self._step or not trainer.is_global_zero:
            return
        done, self._step = trainer.global_step - self._step, trainer.global_step
        waited = time.monotonic() - self._printed
        if self._bars:
            if waited >= BAR_SECONDS:
                self._printed = time.monotonic()
                self._show_numbers(trainer)
            self._bars[-1].update(done)
        elif waited >= self.seconds:
            self._printed = time.monotonic()
            print_status(self.line(trainer))

    def _show_numbers(self, trainer: L.Trainer) -> None:
        shown = {name: number(value) for name, value in self._metrics(trainer).items()}
        self._bars[-1].set_postfix(shown, refresh=False)

    @staticmethod
    def _metrics(trainer: L.Trainer) -> dict[str, float]:
        """Read the numbers. This waits for the device."""
        logged: dict[str, Any] = {
            name: value for name, value in trainer.callback_metrics.items() if name in SHOWN
        }
        logged |= trainer.progress_bar_metrics
        return {name: float(value) for name, value in logged.items() if "v_num" not in name}

    def line(self, trainer: L.Trainer) -> str:
        """Such as "step 120 of 1,200 (10 %), loss 3.21, 12,300 tokens/s, 7 min left"."""
        step, steps = trainer.global_step, trainer.estimated_stepping_batches
        parts = [f"step {step:,}"]
        if not math.isinf(steps):
            parts[0] += f" of {int(steps):,} ({step / steps:.0%})"
        metrics = self._metrics(trainer)
        for name in sorted(metrics, key=lambda n: ("memory" in n, "/s" in n)):  # losses first
            value = metrics[name]
            parts.append(f"{number(value)} {name}" if "/s" in name else f"{name} {number(value)}")
        if not math.isinf(steps) and step > self._first:
            elapsed = time.monotonic() - self._started
            seconds = elapsed / (step - self._first) * (steps - step)
            parts.append(f"{duration(seconds)} left")
        return ", ".join(parts)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._bars:
            self._show_numbers(trainer)
        self._close()

    # --- validation ---------------------------------------------------------------------------

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._open(trainer, "validation", count(trainer.num_val_batches))

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self._advance()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()
        if trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.is_global_zero:
            return
        values = {
            name.removeprefix("val/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        values = {n: v for n, v in values.items() if not n.startswith(DIAGNOSTICS)}
        best = " (the best so far)" if self.best is not None and self.best.improved else ""
        numbers = ", ".join(f"{name} {number(value)}" for name, value in values.items())
        print_line = tqdm.write if self._bars else print
        print_line(f"validation at step {trainer.global_step:,}{best}: {numbers}", file=sys.stderr)

    # --- the other verbs ----------------------------------------------------------------------

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._open(trainer, "test", count(trainer.num_test_batches))

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._open(trainer, "predict", count(trainer.num_predict_batches))

    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        self._advance()

    def on_predict_batch_end(self, *_: Any, **__: Any) -> None:
        self._advance()

    def on_test_end(self, *_: Any) -> None:
        self._close()

    def on_predict_end(self, *_: Any) -> None:
        self._close()

    def on_exception(self, *_: Any) -> None:
        while self._bars:
            self._close()

    # ------------------------------------------------------------------------------------------

    def _open(self, trainer: L.Trainer, name: str, total: int | None, done: int = 0) -> None:
        if self.bar and trainer.is_global_zero:
            bar = tqdm(
                desc=name, total=total, initial=done, file=sys.stderr, dynamic_ncols=True,
                leave=not self._bars,
            )  # fmt: skip
            self._bars.append(bar)

    def _advance(self) -> None:
        if self._bars:
            self._bars[-1].update()

    def _close(self) -> None:
        if self._bars:
            self._bars.pop().close()


def count(batches: Any) -> int | None:
    """The number of batches of all loaders. None: unknown."""
    total = sum(batches) if isinstance(batches, list) else batches
    return None if math.isinf(total) else int(total)


def number(value: float) -> str:
    """A number with four digits, without an exponent where it can be."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Such as 3 h 5 min, 12 min, or 40 s."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
