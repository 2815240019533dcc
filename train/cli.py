"""``multimodal fit|validate|test|predict``: LightningCLI with the loggers and callbacks of a run.

All files of a run are in one folder (``--output``): logs (CSV, TensorBoard), pictures,
``checkpoints/last.ckpt``, and the trained model in ``model/``. ``--config`` finds the recipes of
this package by name: ``multimodal fit --config scenes_joint.yaml``.
"""

import io
import logging
import re
import sys
import warnings
from contextlib import ExitStack, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ProgressBar, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from multimodal.devices import warn_of_slow_bfloat16
from multimodal.distributed import leave_store_of_last_attempt
from multimodal.files import local_path
from multimodal.model.layers.transformer import SIZES, named_config
from multimodal.terminal import print_error, print_status
from multimodal.train.callbacks import (
    EnergyLog,
    MeasuredOnly,
    Mixture,
    Notes,
    RandomState,
    Summary,
    Throughput,
    WritePredictions,
)
from multimodal.train.cost import layer_parameters
from multimodal.train.data import ShardData
from multimodal.train.run.annotate import annotate
from multimodal.train.run.best import (
    LAST,
    BestValidation,
    ExportModel,
    begin_with_now,
    keep_equal_weights,
)
from multimodal.train.run.checkpoints import AtomicCheckpointIO, RunCheckpoints, load_weights
from multimodal.train.run.copies import CheckpointCopies
from multimodal.train.run.finite import FiniteLoss
from multimodal.train.run.folder import (
    ClearFolder,
    RunFolder,
    archive,
    is_first_rank,
)
from multimodal.train.run.lost import is_lost_rank, lost_rank, set_rank_timeout
from multimodal.train.run.progress import Progress
from multimodal.train.run.recipes import find_recipes, help_text
from multimodal.train.run.resuming import find_checkpoint
from multimodal.train.run.settings import ResumedSettings, SaveConfig
from multimodal.train.run.stopping import GracefulStop
from multimodal.train.run.switches import check_switches

MODULES = (
    "multimodal.train.joint.JointModule",
    "multimodal.train.distill.DistillModule",
    "multimodal.train.distill.KeepWordsModule",
    "multimodal.train.rewards.module.RewardModule",
    "multimodal.train.preferences.module.PreferenceModule",
    "multimodal.train.tokenizers.detail.DetailModule",
    "multimodal.train.tokenizers.meaning.MeaningModule",
)
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
IGNORED_MESSAGES = (
    "`weights_only` was not set",
    "litlogger",
    "litmodels",
    "TPU available",
    "HPU available",
)


class TrainingCLI(LightningCLI):
    """LightningCLI with --output, --init_from, --overwrite and what else concerns a run folder."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.verb: str = kwargs["args"][0]
        with ExitStack() as self.open_run:
            super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static in Lightning
        """The given verb alone: to set up the options of all four takes four times as long."""
        return {self.verb: LightningCLI.subcommands()[self.verb]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--output",
            type=str,
            default="runs/latest",
            help="folder of this run: logs, checkpoints, model",
        )
        parser.add_argument(
            "--overwrite",
            action="store_true",
            help="replace the checkpoints and the model of another run in --output",
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
        parser.add_argument(
            "--keep",
            type=int,
            default=1,
            help="how many of the newest checkpoints stay, beside the best one; 0: all",
        )
        parser.add_argument(
            "--checkpoint_in_background",
            type=bool,
            default=False,
            help="train on while a checkpoint is written; takes memory for one more copy of it",
        )
        parser.add_argument(
            "--checkpoint_copy",
            type=str | None,
            default=None,
            help="an address for a copy of every checkpoint, such as s3://bucket/run",
        )
        parser.add_argument(
            "--best_by",
            type=str | None,
            default=None,
            help="which validation is the best, and makes model/: NAME:min, NAME:max, or last (the "
            "newest). By default that of EarlyStopping, else what the module names",
        )
        parser.add_argument(
            "--rank_timeout",
            type=int,
            default=0,
            help="seconds after which a rank that does not answer ends the run; 0: 30 minutes",
        )
        parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")

    def before_instantiate_classes(self) -> None:
        """Check what is cheap to check, and take the folder, before anything is loaded."""
        config = self.config[self.subcommand]
        self.run = RunFolder(local_path(config.output))
        if config.data.seed is None:
            config.data.seed = int(config.seed_everything)
        if config.threads < 0:
            raise ValueError(f"--threads {config.threads}: expected 0 (torch's choice) or more")
        if config.threads:
            import torch

            torch.set_num_threads(config.threads)
        leave_store_of_last_attempt()
        find_checkpoint(config, self.run, fit=self.subcommand == "fit")
        check_switches(config.trainer, str(self.subcommand))
        if self.subcommand == "fit" and is_first_rank() and not config.trainer.fast_dev_run:
            self.open_run.enter_context(self.run.locked())
            if not config.overwrite:
                self.run.check_free(config.ckpt_path)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self.config[self.subcommand]
        output, fit = self.run.path, self.subcommand == "fit"
        tried = bool(config.trainer.fast_dev_run)  # Lightning then writes nothing, nor do we
        kwargs["default_root_dir"] = str(output)
        if config.trainer.logger is None or config.trainer.logger is True:
            version = "logs" if fit else str(self.subcommand)
            if is_first_rank() and not tried:
                archive(output / version / "metrics.csv")  # CSVLogger would delete it
            kwargs["logger"] = [
                # Flush each logged step, so that the log of a killed run is complete.
                CSVLogger(output, name="", version=version, flush_logs_every_n_steps=1),
                TensorBoardLogger(output, name="", version=version),
            ]
        # Callbacks of the user first: a weight average must be up to date before the export. Of
        # these, averages last: others use the averaged weights at the end of a validation.
        given = self._get(self.config_init, "trainer", default={}).get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        given = sorted(given, key=lambda callback: isinstance(callback, WeightAveraging))
        for average in given:
            if isinstance(average, WeightAveraging):
                keep_equal_weights(average)
                begin_with_now(average)
        callbacks: list[L.Callback] = [RandomState(), Throughput(), Summary(), Mixture(), Notes()]
        best = None
        if fit and not any(isinstance(callback, EnergyLog) for callback in given):
            callbacks.append(EnergyLog())
        if fit:
            callbacks += [MeasuredOnly(), ResumedSettings(config.as_dict()), FiniteLoss()]
        if fit and config.overwrite and not config.ckpt_path and not tried:
            callbacks.append(ClearFolder(self.run))
        if fit and not tried:
            best = self._best_validation(given)
            export = ExportModel(self._exported, best)
            checkpoints = None
            callbacks += [best, export]
            if config.trainer.enable_checkpointing is not False:
                address = config.checkpoint_copy
                checkpoints = RunCheckpoints(
                    self.run,
                    config.checkpoint_every,
                    config.keep,
                    best,
                    background=config.checkpoint_in_background,
                    copies=CheckpointCopies(address) if address else None,
                )
                callbacks.append(checkpoints)
            callbacks.append(GracefulStop(checkpoints, export))
            plugins = self._get(self.config_init, "trainer", default={}).get("plugins") or []
            kwargs["plugins"] = [
                *(plugins if isinstance(plugins, list) else [plugins]),
                AtomicCheckpointIO(),
            ]
        elif self.subcommand == "predict":
            callbacks.append(WritePredictions(output))
        if not any(isinstance(callback, ProgressBar) for callback in given):
            shown = None if config.trainer.enable_progress_bar is not False else False
            callbacks.append(Progress(shown, best))
            kwargs["enable_progress_bar"] = False  # Lightning's own
        kwargs["callbacks"] = [*given, *callbacks]
        trainer = super().instantiate_trainer(**kwargs)
        set_rank_timeout(trainer, config.rank_timeout)
        if str(trainer.precision).startswith("bf16") and is_first_rank():
            warn_of_slow_bfloat16(trainer.strategy.root_device, "--trainer.precision 32-true")
        return trainer

    @property
    def _exported(self) -> Path:
        """The folder that this run writes."""
        return self.run.path / getattr(self.model, "exports", "model")

    def _best_validation(self, given: list[L.Callback]) -> BestValidation:
        """By --best_by, else by EarlyStopping, else by what the module names."""
        asked = self.config.fit.best_by
        stopping = [callback for callback in given if isinstance(callback, EarlyStopping)]
        if asked:
            return BestValidation(asked, required=asked != LAST)
        if stopping:
            by = f"{stopping[0].monitor}:{stopping[0].mode}"
            return BestValidation(by, min_delta=abs(stopping[0].min_delta))
        return BestValidation(getattr(self.model, "best_by", LAST))

    def _parse_ckpt_path(self) -> None:
        """Do not read the configuration from a checkpoint.

        Lightning would import any class that the checkpoint names.
        """

    def before_fit(self) -> None:
        if source := self.config[self.subcommand].init_from:
            self.model.init_from(source)

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            if is_lost_rank(error):
                raise lost_rank(self.trainer, error) from error
            if "conditioned on metric" in str(error):  # early stopping by a name not logged
                raise ValueError(str(error)) from error
            connector = self.trainer._checkpoint_connector
            if not connector._loaded_checkpoint:  # it was restored, or there was none
                raise
            path = self.config[subcommand].ckpt_path
            reason = next(iter(str(error).splitlines()), "")
            if "loading state_dict" in str(error):
                reason = "its weights do not fit this configuration"
            raise ValueError(
                f"{path}: the checkpoint is of another model or another version: {reason}"
            ) from error

    def after_fit(self) -> None:
        """Write the model of a run that was resumed at its end, if it has none."""
        if not self.run.has_export and not self.config.fit.trainer.fast_dev_run:
            checkpoint = self.run.best if self.run.best.exists() else self.run.last
            if is_first_rank() and checkpoint.is_file():
                load_weights(self.model, checkpoint)
                self.model.export(self._exported)
                print_status(f"{self._exported}: from {checkpoint}")

    before_validate = before_test = before_predict = before_fit


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
        sizes = {name: layer_parameters(named_config(name, 1)) for name in SIZES}
        print(help_text(verb, sizes), file=sys.stdout if rest else sys.stderr)
        return 0 if rest else 2
    _silence_useless_messages()
    if "--help-all" in rest:
        for options in (["--help"], *(["--model.help", name] for name in MODULES)):
            with suppress(SystemExit):
                run(verb, options, cli)
        return 0
    if "--print_config" not in rest:
        return run(verb, rest, cli)
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            return run(verb, rest, cli)
    finally:
        print(annotated(printed.getvalue()), end="")


def annotated(configuration: str) -> str:
    """A configuration with comments about the options of the model and the data."""
    found = re.search(r"^  class_path: (\S+)\.(\w+)$", configuration, re.MULTILINE)
    classes: dict[str, type[Any]] = {"data": ShardData}
    if found:  # its parser has imported it
        classes["model.init_args"] = getattr(sys.modules[found[1]], found[2])
    return annotate(configuration, classes)


def run(verb: str, arguments: list[str], cli: type[TrainingCLI]) -> int:
    """Run LightningCLI, and turn what a user got wrong into ValueError or a line."""
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
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            parser_kwargs={"exit_on_error": False, verb: {"exit_on_error": False}},
            args=find_recipes([verb, *arguments]),
        )
    except SIGTERMException as stop:
        return int(str(stop.code))
    except ArgumentError as error:
        print_error(f"multimodal {verb}: error: {_reason(error)}")
        return 2
    except (ValueError, MisconfigurationException) as error:
        raise ValueError(_reason(error)) from error
    sys.stdout.flush()
    return 0
