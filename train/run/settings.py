"""The settings of a run: written down, and compared with those of the checkpoint it resumes."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

from multimodal.files import atomic_file
from multimodal.terminal import print_status
from multimodal.train.run.folder import archive, log_folder
from multimodal.train.run.resuming import check_same_checkpoint

# The optimizer of a checkpoint has them, and they stay in force.
RESTORED = ("learning_rate", "learning_rates", "weight_decay")
COMPARED = ("seed_everything", "model", "data", "trainer")
# Where and how a run is shown, and how fast: nothing that it learns depends on these.
IGNORED = (
    "logger", "callbacks", "plugins", "profiler", "default_root_dir", "accelerator", "devices",
    "num_nodes", "strategy", "log_every_n_steps", "workers", "compile",
)  # fmt: skip


class SaveConfig(SaveConfigCallback):
    """Writes the configuration to the logs of the run. That of an earlier start keeps a number."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        path = log_folder(trainer) / self.config_filename
        config = self.config.clone()
        config.overwrite = False  # it was meant once
        text = self.parser.dump(config, skip_none=False)
        if not (path.is_file() and path.read_text("utf-8") == text):
            archive(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as part:
                part.write_text(text, "utf-8")


class ResumedSettings(L.Callback):
    """Keeps the settings of a run in its checkpoints, and prints what a resume changes of them.

    A run always uses the configuration that it is given. Only the learning rate and the weight
    decay stay those of the checkpoint.

    Args:
        settings: the configuration: nested, of plain values.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = flatten({name: settings.get(name) for name in COMPARED})
        self.ckpt_path: str | None = settings.get("ckpt_path")
        self._before: dict[str, str] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        check_same_checkpoint(self.ckpt_path)
        # on_fit_start asks for it. With FSDP2 Lightning reads the checkpoint, and sets it, later.
        trainer.ckpt_path = self.ckpt_path

    def state_dict(self) -> dict[str, Any]:
        return {"settings": self.settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict["settings"]

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for line in changes(self._before or self.settings, self.settings):
            print_status(line)


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Lines about the settings that differ between a checkpoint and now."""
    lines = []
    for name in sorted({*before, *now}):
        old, new = before.get(name, "nothing"), now.get(name, "nothing")
        if old != new:
            if set(name.split(".")) & set(RESTORED):
                lines.append(f"{name}: the checkpoint's {old} stays in force, not the {new} given")
            else:
                lines.append(f"{name}: {old} in the checkpoint, {new} from now on")
    return lines


def flatten(settings: Any, name: str = "") -> dict[str, str]:
    """``{"data": {"seed": 0}}`` -> ``{"data.seed": "0"}``, without what is ignored."""
    if isinstance(settings, Mapping) and settings:
        return {
            key: value
            for part, inner in settings.items()
            if part not in IGNORED
            for key, value in flatten(inner, f"{name}.{part}".lstrip(".")).items()
        }
    return {name: str(settings)}
