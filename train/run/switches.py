"""Which switches of Lightning's Trainer a run of ours takes: the others are refused in one line."""

from typing import Any

PRECISIONS = ("32-true", "32", "bf16-mixed", "bf16", "16-mixed", "16")


def check_switches(trainer: Any, verb: str) -> None:
    """Check the Trainer's options before anything is loaded, and complete them.

    Args:
        trainer: the options by name, as attributes. ``val_check_interval: 1.0`` (a share of an
            epoch) sets ``check_val_every_n_epoch``, which recipes leave out.
        verb: fit, validate, test or predict.

    Raises:
        ValueError: for a choice that cannot work here.
    """
    if trainer.precision is not None and str(trainer.precision) not in PRECISIONS:
        raise ValueError(
            f"trainer.precision={trainer.precision}: expected 32-true, bf16-mixed or 16-mixed. "
            "Weights stay in fp32: rounded, they would lose small updates, and the image tokenizer "
            "would make other codes"
        )
    if trainer.default_root_dir is not None:
        raise ValueError("trainer.default_root_dir: all files of a run are in --output: give that")
    if verb != "fit":
        return
    if trainer.max_steps == -1 and trainer.max_epochs is None and not trainer.fast_dev_run:
        clock = trainer.max_time is not None
        raise ValueError(
            "max_time alone does not say when the learning rate reaches zero: give "
            "--trainer.max_steps or max_epochs too"
            if clock
            else "the run has no end: give --trainer.max_steps or max_epochs"
        )
    for name in ("max_steps", "max_epochs", "limit_train_batches"):
        if getattr(trainer, name) == 0:
            raise ValueError(f"trainer.{name}=0: nothing would be trained")
    for name in ("val_check_interval", "accumulate_grad_batches"):
        if getattr(trainer, name) == 0:
            raise ValueError(f"trainer.{name}=0: expected more than 0")
    accumulated, interval = trainer.accumulate_grad_batches or 1, trainer.val_check_interval
    validates = trainer.limit_val_batches != 0 and isinstance(interval, int)
    if validates and interval % accumulated:
        raise ValueError(
            f"trainer.val_check_interval={interval}, accumulate_grad_batches={accumulated}: a "
            "validation would come in the middle of a step. Both count batches: give a multiple"
        )
    if (largest := trainer.gradient_clip_val) is not None and largest < 0:
        raise ValueError(f"trainer.gradient_clip_val={largest}: expected 0 (none) or more")
    if trainer.check_val_every_n_epoch is None and isinstance(trainer.val_check_interval, float):
        trainer.check_val_every_n_epoch = 1
