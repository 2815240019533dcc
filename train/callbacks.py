"""Callbacks of every run: random state, speed, mixture of the data, export, and predictions."""

import json
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping, WeightAveraging
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from multimodal.train.cost import peak_flops, peak_memory


class RandomState(L.Callback):
    """Saves the random state of this process in the checkpoint. Lightning does not."""

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        kind, keys, *rest = np.random.get_state()
        state: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Not earlier: the setup and the sanity check draw random numbers too.
        if (state := self._restored) is None:
            return
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"])
        self._restored = None


class Throughput(L.Callback):
    """Logs the speed of the last 20 steps, and the peak memory.

    ``tokens/s`` is of all ranks, ``TFLOP/s`` of one rank, ``MFU`` the share of the peak of a known
    GPU. The module sets ``tokens`` in each step, and ``flops`` if it can compute them.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int, float]] = deque(maxlen=21)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._steps.clear()  # do not count the time of the validation

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        tokens, flops = getattr(pl_module, "tokens", 0), getattr(pl_module, "flops", 0.0)
        self._steps.append((time.perf_counter(), int(tokens), float(flops)))
        if len(self._steps) > 1:
            times, counts, operations = zip(*self._steps, strict=True)
            seconds = max(times[-1] - times[0], 1e-9)
            speed = sum(counts[1:]) * trainer.world_size / seconds
            pl_module.log("tokens/s", speed, prog_bar=True)
            if flops_per_second := sum(operations[1:]) / seconds:
                pl_module.log("TFLOP/s", flops_per_second / 1e12)
                on_gpu = pl_module.device.type == "cuda"
                if on_gpu and (peak := peak_flops()):
                    pl_module.log("MFU", flops_per_second / peak, prog_bar=True)
        pl_module.log("memory_GB", peak_memory(), prog_bar=True)


class Mixture(L.Callback):
    """Logs the share of the samples from each folder, since the start or a resume.

    Counts the samples of one rank. The ranks take the samples of a global batch in turn, so their
    shares are about the same.
    """

    def __init__(self) -> None:
        self._counts: torch.Tensor | None = None

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        folders = getattr(getattr(trainer, "datamodule", None), "folders", [])
        if len(folders) < 2:
            return
        counts = torch.bincount(torch.tensor(batch.sources), minlength=len(folders))
        self._counts = counts if self._counts is None else self._counts + counts
        shares: dict[str, float] = {}
        all_shares = (self._counts / self._counts.sum()).tolist()
        for folder, share in zip(folders, all_shares, strict=True):
            shares[str(folder)] = shares.get(str(folder), 0.0) + share
        names = {folder: Path(folder).name for folder in shares}  # works for an address too
        counts_of_names = Counter(names.values())
        for folder, name in names.items():
            if counts_of_names[name] > 1:
                names[folder] = folder.strip("/").replace("/", "_")
        pl_module.log_dict({f"data/share/{names[folder]}": shares[folder] for folder in shares})


class ExportModel(L.Callback):
    """Writes the model folder after each validation and at the end of training.

    It has the averaged weights if there is a callback that averages. If there is an EarlyStopping,
    only a validation with its best score so far writes it: the folder holds the best model.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def _export(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            # On all ranks: with FSDP2 each rank has a part of the weights.
            module.export(self.folder)  # type: ignore[operator]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if all(map(has_best_score, trainer.early_stopping_callbacks, repeat(trainer))):
            with averaged_weights(trainer, pl_module):
                self._export(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not any(stop.best_score.isfinite() for stop in trainer.early_stopping_callbacks):
            self._export(trainer, pl_module)


def has_best_score(stop: EarlyStopping, trainer: L.Trainer) -> bool:
    """Whether the last validation has the best score so far, by the measure of an EarlyStopping."""
    score = trainer.callback_metrics.get(stop.monitor)
    if score is None:
        return False
    best = stop.best_score.to(score.device)
    noted = score == best and stop.wait_count == 0  # or it will be, at the end of the epoch
    return bool(noted or stop.monitor_op(score - stop.min_delta, best))


def keep_equal_weights(average: WeightAveraging) -> None:
    """Let an average leave weights as they are that do not change.

    Lightning's EMA multiplies and adds. Rounding changes frozen weights too: those of the image
    tokenizer, and with them the fingerprint of its codes.
    """
    if (mean := average._kwargs.get("avg_fn")) is not None:

        def exact_mean(averaged: Tensor, now: Tensor, count: Tensor) -> Tensor:
            return torch.where(averaged == now, now, mean(averaged, now, count))

        average._kwargs["avg_fn"] = exact_mean


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


class Summary(L.Callback):
    """Prints the number of parameters and steps. Warns if a resume overrides the learning rate."""

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in pl_module.parameters() if not p.requires_grad)
        print_status(
            f"{trained:,} parameters to train, {frozen:,} frozen; steps "
            f"{trainer.global_step:,} to {trainer.estimated_stepping_batches:,}, "
            f"{trainer.num_training_batches:,} an epoch"
        )
        given = getattr(pl_module, "learning_rate", None)
        restored = {group.get("initial_lr") for group in trainer.optimizers[0].param_groups}
        if trainer.ckpt_path and given is not None and given not in restored:
            rates = ", ".join(map(str, sorted(rate for rate in restored if rate is not None)))
            print_status(
                f"the checkpoint's learning rate {rates} stays in force, not the {given} given"
            )


class WritePredictions(L.Callback):
    """Writes the records of ``predict_step`` to ``predictions.jsonl``, in the order of the data.

    Each line is a JSON object. With several ranks, each writes ``predictions-RANK.jsonl``.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def _path(self, trainer: L.Trainer) -> Path:
        rank = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        return self.folder / f"predictions{rank}.jsonl"

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path(trainer).write_text("", "utf-8")

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any
    ) -> None:
        with open(self._path(trainer), "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in outputs)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        print_status(f"wrote {self._path(trainer)}")


def print_status(message: str) -> None:
    """Print a line on stderr."""
    print(message, file=sys.stderr, flush=True)
