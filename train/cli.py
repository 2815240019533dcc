"""``multimodal fit|validate|test|predict``: LightningCLI, and what every run has.

A run lives in one folder (``--output``): logs (CSV, TensorBoard), pictures, ``checkpoints/last.ckpt``
and ``model/``, the folder to use. The recipes of this package are found by name:
``multimodal fit --config scenes_joint.yaml``.
"""

import sys
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from multimodal.train.callbacks import ExportModel, RandomState, Throughput
from multimodal.train.data import ShardData


class TrainingCLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--output", type=str, default="runs/latest", help="folder of this run: logs, model"
        )
        parser.add_argument(
            "--init_from",
            type=str | None,
            default=None,
            help="start from the weights of this model folder (to resume a run: --ckpt_path)",
        )
        parser.add_argument(
            "--checkpoint_every", type=int, default=500, help="training steps between checkpoints"
        )
        parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self.config[self.subcommand]
        output = Path(config.output)
        if config.threads:
            import torch

            torch.set_num_threads(config.threads)
        if self.subcommand == "fit" and config.init_from and config.ckpt_path:
            raise ValueError("--init_from starts a new run, --ckpt_path resumes one: give one of them")
        if config.trainer.logger is None:
            kwargs["logger"] = [
                CSVLogger(output, name="", version="logs", flush_logs_every_n_steps=50),
                TensorBoardLogger(output, name="", version="logs"),
            ]
        callbacks: list[L.Callback] = [RandomState(), Throughput()]
        if self.subcommand == "fit":
            callbacks += [
                ModelCheckpoint(
                    output / "checkpoints",
                    filename="{step}",
                    every_n_train_steps=config.checkpoint_every,
                    save_last=True,
                    enable_version_counter=False,
                ),
                ExportModel(output / "model"),
            ]
        kwargs["callbacks"] = [*callbacks, *(config.trainer.callbacks or [])]
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        source = self.config.fit.init_from
        if source:
            self.model.init_from(source)


def _find_recipes(argv: list[str]) -> list[str]:
    """``--config NAME`` that is no file here may be a recipe of the package."""
    found = list(argv)
    recipes = files("multimodal.train") / "recipes"
    for i, argument in enumerate(found):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-c") and not equals and i + 1 < len(found):
            value, place = found[i + 1], i + 1
        elif flag == "--config" and equals:
            place = i
        else:
            continue
        recipe = recipes / value
        if not Path(value).exists() and recipe.is_file():
            found[place] = f"--config={recipe}" if equals else str(recipe)
    return found


def main(argv: list[str]) -> int:
    # Ours is deterministic by (seed, epoch, key); Lightning warns of workers it knows nothing of.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    TrainingCLI(
        L.LightningModule,
        ShardData,
        subclass_mode_model=True,
        seed_everything_default=0,
        trainer_defaults={"use_distributed_sampler": False, "num_sanity_val_steps": 0},
        save_config_kwargs={"overwrite": True},
        args=_find_recipes(argv),
    )
    sys.stdout.flush()
    return 0
