"""``multimodal fit|validate|test|predict``: LightningCLI with the loggers and callbacks of a run.

All files of a run are in one folder (``--output``): logs (CSV, TensorBoard), pictures,
``checkpoints/last.ckpt``, and the trained model in ``model/``. ``--config`` finds the recipes of
this package by name: ``multimodal fit --config scenes_joint.yaml``.
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
from lightning.pytorch.callbacks import RichProgressBar, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from multimodal.files import local_path
from multimodal.terminal import print_error
from multimodal.train.callbacks import (
    ExportModel,
    Mixture,
    RandomState,
    Summary,
    Throughput,
    WritePredictions,
    keep_equal_weights,
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
                       override a value of the recipe
  --print_config       print the full configuration, with defaults and comments, and stop
  --help-all           all options of the model, the data and Lightning's Trainer

examples:
  multimodal {verb} --config scenes_joint.yaml{example}
  multimodal {verb} --config scenes_joint.yaml --data.workers 0 --trainer.precision 32-true
{more}"""
ABOUT = {
    "fit": "Train, from a recipe.",
    "validate": "Measure a checkpoint on the validation split; scores go to OUTPUT/validate.",
    "test": "Measure a checkpoint as validate does; scores go to OUTPUT/test.",
    "predict": "Caption the validation split with a checkpoint, to OUTPUT/predictions.jsonl.",
}
# These warnings and messages are wrong or useless for our runs.
IGNORED_WARNINGS = (
    ".*LightningCLI's args parameter",  # multimodal.cli passes argv on
    ".*does not have many workers",
    ".*persistent_workers=True",
    ".*LeafSpec",  # Lightning with a newer torch
    ".*Experiment logs directory",  # archive_log has moved the old log
    ".*Checkpoint directory .* exists and is not empty",
    ".*number of training batches .* is smaller than the logging interval",
    ".*Found .* module\\(s\\) in eval mode",  # the frozen image tokenizer
    ".*callbacks used to create the checkpoint need to be provided",  # not to measure
    ".*Precision .* is not supported by the model summary",
    ".*WeightAveraging doesn't support sharding",  # configure_model shards with FSDP2 only
)
IGNORED_MESSAGES = ("litlogger", "litmodels", "TPU available", "HPU available")


class TrainingCLI(LightningCLI):
    """LightningCLI with --output, --init_from, --checkpoint_every and --threads."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--output",
            type=str,
            default="runs/latest",
            help="folder of this run: logs, checkpoints, model",
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
        output = local_path(config.output)
        if config.threads:
            import torch

            torch.set_num_threads(config.threads)
        if config.init_from and config.ckpt_path:
            raise ValueError(
                "--init_from starts a run, --ckpt_path resumes a run: give one of them"
            )
        if self.subcommand == "fit" and config.trainer.max_steps == -1:
            if config.trainer.max_epochs is None and config.trainer.max_time is None:
                raise ValueError("the run has no end: give --trainer.max_steps or max_epochs")
        if config.trainer.logger is None:
            # Another folder for each verb: measuring a run must not change its training log.
            version = "logs" if self.subcommand == "fit" else str(self.subcommand)
            archive_log(output / version / "metrics.csv")
            kwargs["logger"] = [
                # Flush each logged step, so that the log of a killed run is complete.
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
        # Callbacks of the user first: a weight average must be up to date before the export. Of
        # these, averages last: others use the averaged weights at the end of a validation.
        given = self._get(self.config_init, "trainer", default={}).get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        given = sorted(given, key=lambda callback: isinstance(callback, WeightAveraging))
        for average in given:
            if isinstance(average, WeightAveraging):
                keep_equal_weights(average)
        kwargs["callbacks"] = [*given, *callbacks]
        return super().instantiate_trainer(**kwargs)

    def _parse_ckpt_path(self) -> None:
        """Do not read the configuration from a checkpoint.

        Lightning would import any class that the checkpoint names.
        """

    def before_fit(self) -> None:
        source = self.config.fit.init_from
        if source:
            self.model.init_from(source)

    def _find_weights(self) -> None:
        """Use --init_from, --ckpt_path, or the last checkpoint of --output, to measure a model."""
        config = self.config[self.subcommand]
        if config.init_from:
            self.model.init_from(config.init_from)
        elif not config.ckpt_path:
            last = Path(config.output) / "checkpoints" / "last.ckpt"
            if not last.exists():  # a file, or a folder of a sharded run
                raise ValueError(
                    f"no weights to use: {last} does not exist; give --ckpt_path or --init_from"
                )
            self.config_init[self.subcommand]["ckpt_path"] = str(last)

    before_validate = before_test = before_predict = _find_weights


@rank_zero_only
def archive_log(path: Path) -> None:
    """Rename the log of an earlier run to metrics.1.csv and so on. CSVLogger would delete it."""
    if path.is_file():
        number = 1
        while (archived := path.with_suffix(f".{number}.csv")).exists():
            number += 1
        path.rename(archived)


def recipe_names() -> list[str]:
    """File names of the recipes of this package, sorted."""
    folder = files("multimodal.train") / "recipes"
    return sorted(item.name for item in folder.iterdir() if item.name.endswith(".yaml"))


def _find_recipes(argv: list[str]) -> list[str]:
    """Replace ``--config NAME`` by the path of the recipe if no file has that name."""
    arguments = list(argv)
    recipes = files("multimodal.train") / "recipes"
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-c") and not equals and i + 1 < len(arguments):
            value, position = arguments[i + 1], i + 1
        elif flag == "--config" and equals:
            position = i
        else:
            continue
        if Path(value).exists():
            continue
        if not (recipe := recipes / value).is_file():
            raise ValueError(
                f"--config {value}: no such file, and no recipe of that name; recipes are "
                f"{', '.join(recipe_names())}"
            )
        arguments[position] = f"--config={recipe}" if equals else str(recipe)
    return arguments


def help_text(verb: str) -> str:
    """The text of ``multimodal VERB --help``."""
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
    """The cause of an error, without jsonargparse's list of all types that do not match."""
    text = str(error)
    cause = re.search(r"Errors:\s+- (.*?)\s+- Expected a <class 'NoneType'>", text, re.DOTALL)
    if cause is None:
        return text
    key = re.match(r'Parser key "(\S+)":', text)
    return (f"{key[1]}: " if key else "") + cause[1].removeprefix("Problem with given class_path ")


def _silence_useless_messages() -> None:
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message)

    def is_useful(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in IGNORED_MESSAGES)

    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(is_useful)


def main(argv: list[str], cli: type[TrainingCLI] = TrainingCLI) -> int:
    """Run ``multimodal ARGV...``. argv[0] is the verb. Returns the exit status."""
    verb, *rest = argv
    if not rest or {"-h", "--help"} & set(rest):
        print(help_text(verb), file=sys.stdout if rest else sys.stderr)
        return 0 if rest else 2
    _silence_useless_messages()
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
                "enable_model_summary": False,  # Summary prints one line
                # FSDP2 cannot train weights that it gathered in inference mode.
                "inference_mode": False,
            },
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "exit_on_error": False,
                **{name: {"exit_on_error": False} for name in VERBS},
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
