"""What ``multimodal eval`` measures, at each validation of a run."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L

from multimodal.data.shards import Shards
from multimodal.eval.evaluator import Subject, evaluate
from multimodal.eval.tasks.registry import find_evaluator
from multimodal.train.sharding import unsharded


class EvaluateModel(L.Callback):
    """Logs ``val/TASK/SCORE`` (``val/FOLDER/TASK/SCORE`` where there are several shard folders),
    and writes all scores with their intervals to ``evaluation/`` beside the log.

    Args:
        tasks: of ``multimodal eval``, or FILE.py:CLASS; one that no sample fits is left out.
        limit: samples of each shard folder, the first ones of the validation split.
        batch_size: samples at once; seed: of what is random.

    On several ranks each measures a share of the samples, and the scores are of all of them.
    """

    def __init__(
        self, tasks: list[str], limit: int = 200, batch_size: int = 32, seed: int = 0
    ) -> None:
        if not tasks or min(limit, batch_size) < 1:
            raise ValueError(
                f"tasks={tasks}, limit={limit}, batch_size={batch_size}: expected at least one "
                "task, and numbers from 1 on"
            )
        self.evaluators = {task.rpartition(":")[2]: find_evaluator(task) for task in tasks}
        self.limit, self.batch_size, self.seed = limit, batch_size, seed

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        model: Any = pl_module.model
        results: dict[str, dict[str, Any]] = {}
        folders: list[Shards] = data.shards(data.val_split)
        for shards in folders:
            if shards.encoding is not None:
                raise ValueError(f"{shards.folder}: evaluators look at images, and it holds codes")
            samples = list(islice(shards, self.limit))
            for task, make in self.evaluators.items():
                evaluator = make()
                usable = [sample for sample in samples if evaluator.fits(sample)]
                if not usable:
                    continue
                with unsharded(model):
                    subject = Subject(model, usable, self.batch_size, self.seed)
                    scores = evaluate(evaluator, subject)
                name = task if len(folders) == 1 else f"{Path(shards.folder).name}/{task}"
                results[name] = {"n": len(usable), "protocol": evaluator.protocol, "scores": scores}
                pl_module.log_dict(
                    {f"val/{name}/{score}": found["value"] for score, found in scores.items()},
                    sync_dist=True,  # they are the same on every rank
                )
        log_dir = trainer.log_dir  # once, and on every rank: it is a broadcast
        if trainer.is_global_zero and log_dir:
            folder = Path(log_dir) / "evaluation"
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"step-{trainer.global_step:06d}.json"
            path.write_text(json.dumps(results, indent=1) + "\n")
