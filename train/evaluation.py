"""Runs evaluators of ``multimodal eval`` at each validation."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L

from multimodal.data.shards import Shards
from multimodal.eval.evaluator import Subject, evaluate, training_samples, usable_samples
from multimodal.eval.tasks.registry import find_evaluator
from multimodal.terminal import print_error
from multimodal.train.run.folder import is_first_rank, log_folder
from multimodal.train.sharding import unsharded


class EvaluateModel(L.Callback):
    """Logs scores, and writes them with their intervals to ``evaluation/`` beside the log.

    The log has them as ``val/TASK/SCORE``, or as ``val/FOLDER/TASK/SCORE`` with several shard
    folders. With several ranks each rank measures a share. The scores are of all samples. On shards
    of codes only tasks with ``from_codes`` run. What the training split alone gives (the best
    constant caption, the lookup) is left out: it does not change during training.

    In a recipe:

        trainer:
          callbacks:
            - class_path: multimodal.train.evaluation.EvaluateModel
              init_args: {tasks: [captioning, scene_captions], limit: 200}

    Args:
        tasks: names of ``multimodal eval``, or FILE.py:CLASS. One that fits no sample is skipped.
        limit: most samples of each shard folder, the first ones of the validation split.
        batch_size: samples per batch.
        seed: of everything random.

    Raises:
        ValueError: if there is no task, a task is unknown, or a number is below 1.
    """

    def __init__(
        self, tasks: list[str], limit: int = 200, batch_size: int = 32, seed: int = 0
    ) -> None:
        if not tasks or min(limit, batch_size) < 1:
            raise ValueError(
                f"tasks={tasks}, limit={limit}, batch_size={batch_size}: expected at least one "
                "task, limit >= 1 and batch_size >= 1"
            )
        self.evaluators = {task.rpartition(":")[2]: find_evaluator(task) for task in tasks}
        self.limit, self.batch_size, self.seed = limit, batch_size, seed
        self._said: set[str] = set()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check_folders(trainer)  # before the first step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check_folders(trainer)

    def _check_folders(self, trainer: L.Trainer) -> None:
        """Refuse folders that a task cannot use."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        for shards in data.shards(data.val_split):
            for task, evaluator in self.evaluators.items():
                if shards.encoding is not None and not getattr(evaluator, "from_codes", False):
                    raise ValueError(
                        f"{shards.folder}: the folder holds codes, and the task {task} needs images"
                    )

    def _note(self, problem: str) -> None:
        """Say once which sample is left out. Each validation leaves it out."""
        if problem not in self._said and is_first_rank():
            self._said.add(problem)
            print_error(f"evaluation: {problem}")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        model: Any = pl_module.model
        results: dict[str, dict[str, Any]] = {}
        folders: list[Shards] = data.shards(data.val_split)
        for shards in folders:
            samples = list(islice(usable_samples(shards, self._note, model), self.limit))
            for task, make_evaluator in self.evaluators.items():
                evaluator = make_evaluator()
                usable = [sample for sample in samples if evaluator.fits(sample)]
                if not usable:
                    continue
                with unsharded(model.network):
                    subject = Subject(
                        model,
                        usable,
                        self.batch_size,
                        self.seed,
                        training=training_samples(shards.folder, data.val_split),
                        yardsticks=False,
                    )
                    scores = evaluate(evaluator, subject)
                name = task if len(folders) == 1 else f"{Path(shards.folder).name}/{task}"
                results[name] = {"n": len(usable), "protocol": evaluator.protocol, "scores": scores}
                pl_module.log_dict(
                    {f"val/{name}/{score}": result["value"] for score, result in scores.items()},
                    sync_dist=True,  # the values are the same on every rank
                )
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = log_folder(trainer) / "evaluation"
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"step-{trainer.global_step:06d}.json"
            path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
