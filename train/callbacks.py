"""Callbacks of every run: random state, speed, energy, mixture of the data, and predictions."""

import json
import random
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only

from multimodal.distributed import gather_objects
from multimodal.energy import GRAMS_PER_KWH, WATTS_PER_CORE, Energy, EnergyMeter, EnergyOptions
from multimodal.files import atomic_file
from multimodal.seeds import rank_seed
from multimodal.terminal import print_status
from multimodal.train.cost import peak_flops, peak_memory
from multimodal.train.run.folder import archive, log_folder
from multimodal.train.run.progress import in_bar

PRINTED_NOTES = 5


class RandomState(L.Callback):
    """Gives each rank random numbers of its own, and saves their states. Lightning does neither.

    All ranks build the model with one seed, so that their weights are the same. Before the first
    step all but the first get new seeds. Otherwise the dropout of all ranks would be the same.

    A checkpoint has the state of every rank. A run that goes on with more ranks gives the new ones
    a seed of that step, and one with fewer ranks leaves states out.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] = []  # by rank

    def state_dict(self) -> dict[str, Any]:
        """All ranks have to call."""
        first, *others = gather_objects([random_state()])
        return {**first, "other_ranks": others} if others else first

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Older checkpoints have the state of the first rank only.
        states = [state_dict, *state_dict.get("other_ranks", ())]
        self._restored = [loaded_random_state(state) for state in states]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Not earlier: the setup and the sanity check draw random numbers too.
        rank, states = trainer.global_rank, self._restored
        if rank < len(states):
            set_random_state(states[rank])
        elif rank:
            seed = rank_seed(torch.initial_seed(), trainer.global_step, rank)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
        self._restored = []


def random_state() -> dict[str, Any]:
    """The random state of this process, of plain values and tensors."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = [torch.cuda.get_rng_state()]  # of the GPU of this rank
    return state


def loaded_random_state(state: dict[str, Any]) -> dict[str, Any]:
    """A random state of a checkpoint, as Python and NumPy take it."""
    version, internal, gauss = state["python"]
    kind, keys, *rest = state["numpy"]
    return {
        **state,
        "python": (version, tuple(internal), gauss),
        "numpy": (kind, keys.numpy().astype(np.uint32), *rest),
    }


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state.get("cuda") and torch.cuda.is_available():
        # Older checkpoints have the states of all GPUs. There may be fewer GPUs now, or more.
        number = min(torch.cuda.current_device(), len(state["cuda"]) - 1)
        torch.cuda.set_rng_state(state["cuda"][number])


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
        bar = in_bar(trainer)
        tokens, flops = getattr(pl_module, "tokens", 0), getattr(pl_module, "flops", 0.0)
        self._steps.append((time.perf_counter(), int(tokens), float(flops)))
        if len(self._steps) > 1:
            times, counts, operations = zip(*self._steps, strict=True)
            seconds = max(times[-1] - times[0], 1e-9)
            speed = sum(counts[1:]) * trainer.world_size / seconds
            pl_module.log("tokens/s", speed, prog_bar=bar)
            if flops_per_second := sum(operations[1:]) / seconds:
                pl_module.log("TFLOP/s", flops_per_second / 1e12)
                on_gpu = pl_module.device.type == "cuda"
                if on_gpu and (peak := peak_flops()):
                    pl_module.log("MFU", flops_per_second / peak, prog_bar=bar)
        pl_module.log("memory_GB", peak_memory(), prog_bar=bar)


class EnergyLog(L.Callback):
    """Writes the energy of a training, and its CO2, to ``energy.json`` in the logs.

    Written with each checkpoint, after each validation and at the end, for all ranks. The file of
    an earlier start keeps a number: the energy of a resumed run is the sum over ``energy*.json``.

    Args:
        watts_per_core: see ``multimodal.energy.EnergyOptions``.
        grams_per_kwh: CO2 of the electricity in use.
    """

    def __init__(
        self, watts_per_core: float = WATTS_PER_CORE, grams_per_kwh: float = GRAMS_PER_KWH
    ) -> None:
        self.options = EnergyOptions(watts_per_core, grams_per_kwh)
        self._meter: EnergyMeter | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first_step, self._start = trainer.global_step, time.perf_counter()
        # One rank on each machine counts the machine, and each its GPU and its own CPU time: the
        # other ranks are children of the first one if Lightning has started them.
        ranks = [process.pid for process in getattr(trainer.strategy.launcher, "procs", ())]
        first = trainer.local_rank == 0
        self._meter = EnergyMeter(pl_module.device, self.options, first, without=ranks)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            archive(log_folder(trainer) / "energy.json")

    def _write(self, trainer: L.Trainer) -> Energy | None:
        if self._meter is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        joules = sum(gather_objects([self._meter.read().joules]))
        energy = Energy(joules, self.options.grams_per_kwh, self._meter.how)
        if trainer.is_global_zero:
            record = {
                "from_step": self._first_step,
                "to_step": trainer.global_step,
                "seconds": time.perf_counter() - self._start,
                "watt_hours": energy.watt_hours,
                "co2_grams": energy.co2_grams,
                "grams_per_kwh": energy.grams_per_kwh,
                "how": energy.how,
                "ranks": trainer.world_size,
            }
            path = log_folder(trainer) / "energy.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as part:
                part.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        return energy

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        self._write(trainer)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._write(trainer)

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        if energy := self._write(trainer):
            print_status(f"energy of this start: {energy}")

    def teardown(self, *_: Any, **__: Any) -> None:
        if self._meter is not None:
            self._meter.close()
            self._meter = None


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


class Summary(L.Callback):
    """Prints the number of parameters and steps."""

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in pl_module.parameters() if not p.requires_grad)
        print_status(
            f"{trained:,} parameters to train, {frozen:,} frozen; steps "
            f"{trainer.global_step:,} to {trainer.estimated_stepping_batches:,}, "
            f"{trainer.num_training_batches:,} an epoch"
        )


class Notes(L.Callback):
    """Names and counts the samples that are left out or cut: a bad sample does not end a run.

    Each is a line of ``left_out.jsonl`` in the logs, once: ``{"folder", "key", "reason"}``. The
    first ones are printed, and their number at the end.
    """

    def __init__(self) -> None:
        self._seen: set[Any] = set()

    def _note(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        folders = getattr(getattr(trainer, "datamodule", None), "folders", [])
        for note in getattr(batch, "notes", ()):
            if note in self._seen or trainer.fast_dev_run:  # type: ignore[attr-defined]
                continue
            self._seen.add(note)
            folder = str(folders[note.source]) if note.source < len(folders) else ""
            record = {"folder": folder, "key": note.key, "reason": note.reason}
            rank = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
            path = log_folder(trainer) / f"left_out{rank}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            if len(self._seen) <= PRINTED_NOTES:
                print_status(f"{folder}: {note.key}: {note.reason}")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._note(trainer, pl_module, batch)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._note(trainer, pl_module, batch)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._note(trainer, pl_module, batch)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._seen:
            print_status(
                f"{len(self._seen):,} samples were left out or cut; "
                f"{log_folder(trainer) / 'left_out*.jsonl'} names each"
            )


class MeasuredOnly(L.Callback):
    """Logs in a step only what was measured in this step.

    Lightning repeats the last value of a name that a step does not log, until the epoch ends.
    """

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        for metric in trainer.fit_loop.epoch_loop._results.values():
            metric._forward_cache = None


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
