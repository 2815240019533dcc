"""``multimodal fit|validate|test|predict``: LightningCLI, and what every run has.

A run lives in one folder (``--output``): logs (CSV, TensorBoard), pictures,
``checkpoints/last.ckpt`` and ``model/``, the folder to use. The recipes of this package are found
by name: ``multimodal fit --config scenes_joint.yaml``.
"""

import logging
import re
import sys
import warnings
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from multimodal.cli import print_error
from multimodal.train.callbacks import (
    ExportModel,
    Mixture,
    RandomState,
    Summary,
    Throughput,
    WritePredictions,
)
from multimodal.train.checkpointing import AtomicCheckpointIO, GracefulStop, LinkedCheckpoint
from multimodal.train.data import ShardData

VERBS = ("fit", "validate", "test", "predict")
HELP = """\
usage: multimodal {verb} --config RECIPE [--KEY VALUE ...]

{about}

options:
  --config FILE        a YAML file, or a recipe of the package: {recipes}
  --output DIR         the folder of the run: logs/, checkpoints/, model/
  --ckpt_path FILE     {checkpoint}
  --init_from MODEL    start from the weights of this model folder
  --checkpoint_every N training steps between checkpoints
  --threads N          CPU threads
  --model.KEY, --data.KEY, --trainer.KEY
                       override anything a recipe can say
  --print_config       print the whole configuration, with defaults and comments, and stop
  --help-all           every option of the model, the data and Lightning's Trainer

examples:
  multimodal {verb} --config scenes_joint.yaml{example}
  multimodal {verb} --config scenes_joint.yaml --data.workers 0 --trainer.precision 32-true
{more}"""
ABOUT = {
    "fit": "Train, from a recipe.",
    "validate": "Measure a checkpoint on the validation split; figures go to OUTPUT/validate.",
    "test": "Measure a checkpoint as validate does; figures go to OUTPUT/test.",
    "predict": "Caption the validation split with a checkpoint, to OUTPUT/predictions.jsonl.",
}
# Said of a run of ours, these are wrong or of no use.
IGNORED_WARNINGS = (
    ".*LightningCLI's args parameter",  # multimodal.cli passes argv on, that is all
    ".*does not have many workers",
    ".*persistent_workers=True",
    ".*LeafSpec",  # Lightning with a newer torch
    ".*Experiment logs directory",  # archive_log has seen to it
    ".*Checkpoint directory .* exists and is not empty",
    ".*number of training batches .* is smaller than the logging interval",
    ".*Found .* module\\(s\\) in eval mode",  # the image tokenizer, on purpose
    ".*callbacks used to create the checkpoint need to be provided",  # to measure, none is
    ".*Precision .* is not supported by the model summary",
)
IGNORED_MESSAGES = ("litlogger", "litmodels", "TPU available", "HPU available")


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
        if config.init_from and config.ckpt_path:
            raise ValueError("--init_from starts a run, --ckpt_path resumes one: give one of them")
        if self.subcommand == "fit" and config.trainer.max_steps == -1:
            if config.trainer.max_epochs is None and config.trainer.max_time is None:
                raise ValueError("the run has no end: give --trainer.max_steps or max_epochs")
        if config.trainer.logger is None:
            # Each verb has a folder of its own: measuring a run must not touch its training log.
            version = "logs" if self.subcommand == "fit" else str(self.subcommand)
            archive_log(output / version / "metrics.csv")
            kwargs["logger"] = [
                # Written at every step that is logged: what a killed run logged is there.
                CSVLogger(output, name="", version=version, flush_logs_every_n_steps=1),
                TensorBoardLogger(output, name="", version=version),
            ]
        callbacks: list[L.Callback] = [RandomState(), Throughput(), Summary(), Mixture()]
        if find_spec("rich") and config.trainer.enable_progress_bar is not False:
            callbacks.append(RichProgressBar(console_kwargs={"stderr": True}))
        if self.subcommand == "fit":
            callbacks += [
                LinkedCheckpoint(
                    output / "checkpoints",
                    filename="{step}",
                    every_n_train_steps=config.checkpoint_every,
                    save_last="link",
                    enable_version_counter=False,
                ),
                ExportModel(output / "model"),
                GracefulStop(output / "checkpoints" / "last.ckpt"),
            ]
            given = self._get(self.config_init, "trainer", default={}).get("plugins") or []
            kwargs["plugins"] = [
                *(given if isinstance(given, list) else [given]),
                AtomicCheckpointIO(),
            ]
        elif self.subcommand == "predict":
            callbacks.append(WritePredictions(output))
        # The user's first: what averages the weights has to have done so before they are exported.
        given = self._get(self.config_init, "trainer", default={}).get("callbacks") or []
        kwargs["callbacks"] = [*(given if isinstance(given, list) else [given]), *callbacks]
        return super().instantiate_trainer(**kwargs)

    def _parse_ckpt_path(self) -> None:
        """Take nothing from a checkpoint but its state: the configuration is what was given.

        Lightning would import whatever class a checkpoint names."""

    def before_fit(self) -> None:
        source = self.config.fit.init_from
        if source:
            self.model.init_from(source)

    def _find_weights(self) -> None:
        """For measuring: --ckpt_path, or --init_from, or the last checkpoint of --output."""
        config = self.config[self.subcommand]
        if config.init_from:
            self.model.init_from(config.init_from)
        elif not config.ckpt_path:
            last = Path(config.output) / "checkpoints" / "last.ckpt"
            if not last.exists():  # of a sharded run it is a folder
                raise ValueError(
                    f"no weights to use: {last} is not there; give --ckpt_path or --init_from"
                )
            self.config_init[self.subcommand]["ckpt_path"] = str(last)

    before_validate = before_test = before_predict = _find_weights


@rank_zero_only
def archive_log(path: Path) -> None:
    """Move the log of an earlier run aside, to metrics.1.csv and on: CSVLogger would delete it."""
    if path.is_file():
        number = 1
        while (kept := path.with_suffix(f".{number}.csv")).exists():
            number += 1
        path.rename(kept)


def recipe_names() -> list[str]:
    folder = files("multimodal.train") / "recipes"
    return sorted(item.name for item in folder.iterdir() if item.name.endswith(".yaml"))


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
        if Path(value).exists():
            continue
        if not (recipe := recipes / value).is_file():
            raise ValueError(f"--config {value}: no such file, and no recipe of that name; recipes "
                             f"are {', '.join(recipe_names())}")  # fmt: skip
        found[place] = f"--config={recipe}" if equals else str(recipe)
    return found


def help_text(verb: str) -> str:
    fit = verb == "fit"
    run = "runs/scenes-joint"
    more = f"""  multimodal fit --config scenes_joint.yaml --ckpt_path {run}/checkpoints/last.ckpt
  multimodal fit --config my.yaml --init_from {run}/model"""
    return HELP.format(
        verb=verb,
        about=ABOUT[verb],
        recipes=", ".join(recipe_names()),
        checkpoint="resume this run, exactly" if fit else "weights (default: the last of --output)",
        example=" --trainer.max_steps 100" if fit else "",
        more=more if fit else "",
    ).rstrip()


def _reason(error: Exception) -> str:
    """What was wrong, out of jsonargparse's report on every type that the value is not."""
    text = str(error)
    found = re.search(r"Errors:\s+- (.*?)\s+- Expected a <class 'NoneType'>", text, re.DOTALL)
    if found is None:
        return text
    key = re.match(r'Parser key "(\S+)":', text)
    return (f"{key[1]}: " if key else "") + found[1].removeprefix("Problem with given class_path ")


def _quiet() -> None:
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message)

    def wanted(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in IGNORED_MESSAGES)

    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(wanted)


def main(argv: list[str], cli: type[TrainingCLI] = TrainingCLI) -> int:
    """Run ``multimodal ARGV...``; argv[0] is the verb. Returns the exit status."""
    verb, *rest = argv
    if not rest or {"-h", "--help"} & set(rest):
        print(help_text(verb), file=sys.stdout if rest else sys.stderr)
        return 0 if rest else 2
    _quiet()
    rest = ["--help" if argument == "--help-all" else argument for argument in rest]
    try:
        cli(
            L.LightningModule,
            ShardData,
            subclass_mode_model=True,
            seed_everything_default=0,
            trainer_defaults={
                "use_distributed_sampler": False,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,  # ours is one line
                # Weights that FSDP2 gathers in inference mode cannot be trained afterwards.
                "inference_mode": False,
            },
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "exit_on_error": False,
                **{one: {"exit_on_error": False} for one in VERBS},
            },
            args=_find_recipes([verb, *rest]),
        )
    except SIGTERMException as stop:
        return int(str(stop.code))
    except ArgumentError as error:
        print_error(f"multimodal {verb}: error: {_reason(error)}")
        return 2
    except ValueError as error:
        raise ValueError(_reason(error)) from error
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        raise ValueError(
            "the checkpoint is of another model: its weights do not fit this configuration"
        ) from error
    sys.stdout.flush()
    return 0
