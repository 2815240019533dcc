"""Callbacks every run has: exact random state, tokens per second, and a model folder to use."""

import random
import time
from collections import deque
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch


class RandomState(L.Callback):
    """Puts the random state of this process into the checkpoint, which Lightning leaves out."""

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
        # Only now: setting up, and the sanity check, draw random numbers too.
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
    """Tokens per second over the last 20 steps, all ranks, in the progress bar and the log."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque(maxlen=21)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._steps.clear()  # the time that validation took is not training time

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        self._steps.append((time.perf_counter(), int(getattr(pl_module, "tokens", 0))))
        if len(self._steps) > 1:
            (first, _), (last, _) = self._steps[0], self._steps[-1]
            tokens = sum(count for _, count in list(self._steps)[1:]) * trainer.world_size
            pl_module.log("tokens/s", tokens / max(last - first, 1e-9), prog_bar=True)


class ExportModel(L.Callback):
    """Writes the model folder after every validation and at the end, so that a run is usable."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def _export(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking and trainer.state.fn == "fit":
            module.export(self.folder)  # type: ignore[operator]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._export(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._export(trainer, pl_module)
