"""``multimodal export model``: the model folder of a checkpoint, or a smaller model folder.

A checkpoint holds weights. What they belong to is in the configuration of its run, which lies
beside it (``logs/config.yaml``).
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import ArgumentParser

from multimodal.export.model import export_model
from multimodal.files import new_folder
from multimodal.terminal import Parser
from multimodal.train.run.checkpoints import load_weights
from multimodal.train.run.damage import check_checkpoint

EXAMPLES = """examples:
  multimodal export model runs/joint/checkpoints/last.ckpt model
  multimodal export model runs/joint/checkpoints/step=600.ckpt model --dtype bfloat16
  multimodal export model runs/joint/model smaller --dtype bfloat16
  multimodal export model starter mine --adapter runs/finetune/adapter
"""


def export_checkpoint(
    checkpoint: Path, out: Path, config: Path | None = None, changed: bool = False
) -> None:
    """Write the model folder (or the image tokenizer) of a training checkpoint.

    Args:
        checkpoint: a file, or the folder of a sharded run.
        out: a new or empty folder.
        config: of the run. By default the one in the run's folder.
        changed: whether the model is given another dtype or image tokenizer afterwards.

    Raises:
        ValueError: if the checkpoint is damaged, its configuration is missing or another one, or
            an adapter would be changed.
    """
    check_checkpoint(checkpoint)
    config = config or checkpoint.resolve().parent.parent / "logs" / "config.yaml"
    module: Any = module_of(config)
    if changed and module.exports == "adapter":
        raise ValueError(
            f"{checkpoint}: of a run with LoRA, whose adapter takes no --dtype and no "
            "--image-tokenizer: leave them out"
        )
    module.configure_model()  # an adapter has weights, too
    if checkpoint.is_dir():
        from lightning.fabric.strategies.fsdp import _METADATA_FILENAME  # type: ignore[attr-defined]
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        with tempfile.NamedTemporaryFile(suffix=".ckpt") as whole:
            dcp_to_torch_save(checkpoint, whole.name)
            load_weights(module, Path(whole.name), checkpoint / _METADATA_FILENAME)
    else:
        load_weights(module, checkpoint)
    with new_folder(out) as folder:
        module.export(folder)


def module_of(config: Path) -> L.LightningModule:
    """The LightningModule that the configuration of a run names, with untrained weights."""
    try:
        settings = yaml.safe_load(config.read_text("utf-8"))["model"]
    except FileNotFoundError as error:
        raise ValueError(f"{config}: no such file; give the run's with --config") from error
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{config}: not the configuration of a run") from error
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningModule, "model", fail_untyped=False)
    parsed = parser.parse_object({"model": settings})
    module: L.LightningModule = parser.instantiate_classes(parsed).model
    return module


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="multimodal export model",
        description="Make a model folder of a training checkpoint, or a smaller one of a model. Of "
        "a checkpoint of a run with LoRA it makes the folder of the adapter.",
        epilog=EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint, or a model folder")
    parser.add_argument("out", metavar="OUT", help="the folder to write; new, or empty")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the written weights (default: bfloat16 of a model, half the size; float32 of a "
        "checkpoint, and with --adapter)",
    )
    parser.add_argument(
        "--image-tokenizer", metavar="DIR", help="put in this one: the same codes, another decoder"
    )
    parser.add_argument("--adapter", metavar="DIR", help="merge this adapter (LoRA) into the model")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="of the run of the checkpoint (default: logs/config.yaml of its folder)",
    )
    arguments = parser.parse_args(argv)
    source, out = Path(arguments.model), Path(arguments.out)
    tokenizer = arguments.image_tokenizer
    if not (source.is_file() or (source / ".metadata").is_file()):
        dtype = arguments.dtype or ("bfloat16" if arguments.adapter is None else "float32")
        export_model(arguments.model, out, dtype, tokenizer, arguments.adapter)
    elif arguments.adapter is not None:
        raise ValueError(f"{source}: --adapter is merged into a model folder, not a checkpoint")
    elif arguments.dtype in (None, "float32") and tokenizer is None:
        export_checkpoint(source, out, arguments.config)
    else:
        temporary = Path(tempfile.mkdtemp())
        try:
            export_checkpoint(source, temporary / "model", arguments.config, changed=True)
            export_model(temporary / "model", out, arguments.dtype or "float32", tokenizer)
        finally:
            shutil.rmtree(temporary)
    print(out)
    return 0
