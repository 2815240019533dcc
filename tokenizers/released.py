"""Weights of released VQ tokenizers, in our modules: LlamaGen, taming VQGAN, Janus, Chameleon.

All have the autoencoder of tokenizers/vqgan.py, with other names of the weights. Sizes, depth and
the levels with attention are inferred from names and shapes. A checkpoint is opened without running
code from it, and saved as a tokenizer folder: safetensors and JSON.
"""

import argparse
import re
import textwrap
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from multimodal.files import open_file
from multimodal.tokenizers.detail import VQTokenizer, VQTokenizerConfig
from multimodal.tokenizers.weights import Fit

FIRST_WEIGHT = "encoder.conv_in.weight"  # in every layout, after a prefix
IGNORED = ("loss.", "quantize.codebook_used")  # state of the training
_UP = re.compile(r"decoder\.up\.(\d+)\.")
_LEVEL = re.compile(
    r"(?:down|up|conv_blocks)\.(\d+)\.(?:(block|res|attn)\.(\d+)\.(\w+)|(?:down|up)sample\.conv)$"
)
_MIDDLE = re.compile(r"mid\.(block_|attn_)?(\d)\.(\w+)$")
_LAYERS = {"nin_shortcut": "shortcut", "q": "query", "k": "key", "v": "value", "proj_out": "out"}
_DIMENSIONS = {FIRST_WEIGHT: 4, "encoder.conv_out.weight": 4, "quantizer.codebook.weight": 2}
_OUTSIDE = {
    "quant_conv": "encoder.to_code",
    "post_quant_conv": "decoder.from_code",
    "quantize.embedding": "quantizer.codebook",
}


class _PickleStub:
    """Replaces a class that pickles of taming's time name. It does nothing."""


_PICKLE_STUBS: list[Any] = [
    (_PickleStub, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
]


def import_tokenizer(
    source: str | Path, image_size: int, fit: Fit = "squash", decoder_required: bool = True
) -> VQTokenizer:
    """Read the weights of a released tokenizer.

    Args:
        source: a ``.safetensors``, ``.pt``, ``.pth``, ``.ckpt`` or ``.bin`` file, or a folder of
            safetensors.
        image_size: pixels of a side of the square image. The weights do not tell it.
        fit: how other images are made square. The weights do not tell it either.
        decoder_required: refuse weights without a decoder. Otherwise they become a tokenizer that
            encodes, and refuses to decode.

    Returns:
        The tokenizer in eval mode.

    Raises:
        ValueError: if the source does not exist, cannot be read, or is not a complete tokenizer.
    """
    source = Path(source)
    released = read_weights(source)
    weights = translate(released)
    decodes = decoder_required or "decoder.conv_in.weight" in released
    if not decodes:
        weights = {name: w for name, w in weights.items() if not name.startswith("decoder.")}
    # The codes of LlamaGen and Janus are unit vectors, those of taming and Chameleon are not. The
    # former number the levels of the decoder in order, the latter in reverse. Only Chameleon's
    # decoder was not released.
    normalise = decodes and (
        "decoder.up.0.block.0.conv1.weight" not in released
        or "decoder.up.0.upsample.conv.weight" in released
    )
    try:
        config = infer_config(weights, image_size, fit, normalise)
        if not decodes:
            config = replace(config, autoencoder={**config.autoencoder, "decodes": False})
        tokenizer = VQTokenizer(config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    expected = tokenizer.state_dict()
    missing, unknown = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    if missing:
        raise ValueError(f"{source}: {_shortened(missing)} missing: not a complete tokenizer")
    if unknown:
        raise ValueError(f"{source}: {_shortened(unknown)} unknown: not a VQGAN of a known shape")
    for name, tensor in expected.items():
        if tensor.shape != weights[name].shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(weights[name].shape)}, "
                f"expected {tuple(tensor.shape)}"
            )
    tokenizer.load_state_dict(weights)
    return tokenizer.eval()


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def read_weights(source: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names there, without the common prefix.

    Raises:
        ValueError: if the source does not exist, cannot be read, or has no tokenizer.
    """
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    if not files:
        raise ValueError(f"{source}: no .safetensors file in this folder")
    for file in files:
        open_file(file).close()  # a regular file
    if files[0].suffix != ".safetensors":
        weights = _unpickle(files[0])
        prefix = _prefix(weights, source)
        return {
            n.removeprefix(prefix): w.float() for n, w in weights.items() if _is_used(n, prefix)
        }
    try:
        with ExitStack() as stack:
            # Read the names first: the tokenizer may be a small part of a large model.
            opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
            file_of = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
            prefix = _prefix(file_of, source)
            return {
                name.removeprefix(prefix): file.get_tensor(name).float()
                for name, file in file_of.items()
                if _is_used(name, prefix)
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{source}: cannot be read as safetensors: {error}") from error


def _unpickle(file: Path) -> dict[str, Tensor]:
    """Read a torch checkpoint without running code from it: tensors and plain values only."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_PICKLE_STUBS]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        if match := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{file}: holds a {match[1]}, and making one could run code. If you trust the "
                "file, save its tensors alone: safetensors.torch.save_file("
                'torch.load(FILE, weights_only=False)["state_dict"], "weights.safetensors")'
            ) from error
        reason = textwrap.shorten(str(error), 200)
        raise ValueError(f"{file}: not a torch checkpoint: {reason}") from error
    for key in ("ema", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(f"{file}: holds a {type(content).__name__}, expected named tensors")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _prefix(names: Iterable[str], source: Path) -> str:
    """The common prefix of the names of the tokenizer's weights."""
    prefixes = [name.removesuffix(FIRST_WEIGHT) for name in names if name.endswith(FIRST_WEIGHT)]
    if len(prefixes) != 1:
        raise ValueError(
            f"{source}: {len(prefixes)} tensors are named ...{FIRST_WEIGHT}, expected 1: "
            "not the weights of LlamaGen's VQ, taming's VQGAN, Janus's or Chameleon's"
        )
    return prefixes[0]


def _is_used(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and not name.removeprefix(prefix).startswith(IGNORED)


def translate(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename released weights to our names. Unknown names stay as they are."""
    levels = {int(match[1]) for name in weights if (match := _UP.match(name))}
    # taming numbers the levels of the decoder from the pixels, the others in order of use.
    reverse = bool(levels) and "decoder.up.0.upsample.conv.weight" not in weights
    translated = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        translated[f"{_module(module, max(levels) if reverse else None)}.{kind}"] = tensor
    if (codebook := translated.get("quantizer.codebook.weight")) is not None:
        translated["quantizer.counts"] = torch.ones(codebook.shape[:1])
        translated["quantizer.initialised"] = torch.tensor(True)
    return translated


def _module(name: str, last: int | None) -> str:
    """Our name of a released module. last: the decoder's last level if numbered in reverse."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    side, _, rest = name.partition(".")
    if match := _MIDDLE.match(rest):
        kind, number, layer = match.groups()
        # taming names them block_1, attn_1, block_2. LlamaGen numbers them from 0.
        index = number if kind is None else {"block_1": 0, "attn_1": 1, "block_2": 2}[kind + number]
        return f"{side}.middle.{index}{_layer(layer)}"
    if match := _LEVEL.match(rest):
        level, kind, number, layer = match.groups()
        if side == "decoder" and last is not None:
            level = str(last - int(level))
        if kind is None:
            return f"{side}.levels.{level}.resize"
        part = "attention" if kind == "attn" else "blocks"
        return f"{side}.levels.{level}.{part}.{number}{_layer(layer)}"
    return name


def _layer(name: str) -> str:
    return f".{_LAYERS.get(name, name)}"


def infer_config(
    weights: Mapping[str, Tensor], image_size: int, fit: Fit, normalise: bool
) -> VQTokenizerConfig:
    """Infer the configuration of a translated tokenizer from its weights.

    Args:
        weights: by our names.
        image_size: pixels of a side.
        fit: how images are made square.
        normalise: whether codes are unit vectors.

    Raises:
        ValueError: for weights of another layout.
    """
    widths: list[int] = []
    while (block := f"encoder.levels.{len(widths)}.blocks.0.conv1.weight") in weights:
        if weights[block].ndim != 4 or not weights[block].numel():
            raise ValueError(f"{block} has shape {tuple(weights[block].shape)}")
        widths.append(len(weights[block]))
    for name, dimensions in _DIMENSIONS.items():
        if name in weights and (weights[name].ndim != dimensions or not weights[name].numel()):
            raise ValueError(f"{name} has shape {tuple(weights[name].shape)}")
    if not widths:
        raise ValueError("no level of the encoder has a known name: not a VQGAN of a known layout")
    try:
        channels = len(weights[FIRST_WEIGHT])
        latent_channels = len(weights["encoder.conv_out.weight"])
        size, code_channels = weights["quantizer.codebook.weight"].shape
    except KeyError as error:
        raise ValueError(f"{error} is missing: not a complete tokenizer") from error
    if any(width % channels for width in widths):
        raise ValueError(f"levels of {widths} channels are not multiples of the first {channels}")
    blocks = [name for name in weights if name.startswith("encoder.levels.0.blocks.")]
    return VQTokenizerConfig(
        image_size,
        fit,
        2 ** (len(widths) - 1),
        {
            "name": "vqgan",
            "channels": channels,
            "multipliers": [width // channels for width in widths],
            "depth": len({name.split(".")[4] for name in blocks}),
            "attention": [
                f"encoder.levels.{level}.attention.0.query.weight" in weights
                for level in range(len(widths))
            ],
            "latent_channels": latent_channels,
        },
        {
            "name": "vq",
            "codebook_size": size,
            "channels": code_channels,
            "normalise": normalise,
            "learning": "gradient",
        },
    )
