"""A model folder with weights of 8 or 4 bits (multimodal/model/layers/quantization.py)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from multimodal.data.shards import Shards, splits_of
from multimodal.export.calibration import BATCH, calibration_batches, input_moments
from multimodal.files import local_path, new_folder, read_text
from multimodal.hub.names import find_model
from multimodal.model.checkpoint import ModelParts
from multimodal.model.layers.quantization import COLUMNS, SCALE, WEIGHT, quantize_rows
from multimodal.model.network import MultimodalLM

Bits = Literal["int8", "int4"]
BITS: dict[str, Literal[8, 4]] = {"int8": 8, "int4": 4}


def quantize_model(
    source: str | Path,
    out: str | Path,
    to: Bits = "int8",
    data: str | Path | None = None,
    samples: int = 256,
    on_problem: Callable[[str], object] = lambda problem: None,
) -> None:
    """Write a model folder again, with all matrices of its network quantized.

    Norms become bfloat16. The image tokenizer stays as it is: rounded, it would give other codes
    than in training.

    Args:
        source: a model: see multimodal/hub/names.py.
        out: a new or empty folder.
        data: a shard folder of images with captions, for int4: weights are rounded so that what
            the layers make of these (of the split train, if there is one) changes least.
        samples: so many of them.
        on_problem: is told each sample that cannot be read, in one line.

    Raises:
        ValueError: for a model that is quantized already, other bits, a folder that is not empty,
            for int4 a width that is no multiple of 32, or for data that cannot be used.
    """
    folder, out = find_model(source), local_path(out)
    if to not in BITS:
        raise ValueError(f"to={to!r:.80}: expected one of {', '.join(BITS)}")
    if data is not None and to != "int4":
        raise ValueError(f"data: nothing is gained by samples with {to}; they are for int4")
    with new_folder(out) as written:
        model = ModelParts.load(folder)
        if (bits := model.config.transformer.weight_bits) is not None:
            raise ValueError(f"{source}: is quantized already, to {bits} bits")
        moments = {} if data is None else _moments(model, data, samples, on_problem)
        provenance = model.provenance.of_model(str(source), model.fingerprint)
        smaller = ModelParts(
            quantized_network(model.network, BITS[to], moments),
            model.text_tokenizer,
            model.image_tokenizer,
            provenance=provenance,
        )
        card = folder / "README.md"
        text = read_text(card) if card.is_file() else "# A quantized model\n"
        by = "" if data is None else f", with samples of {Path(data).name}"
        note = (
            f"Quantized to {to} from {source} ({model.fingerprint}){by}. It trains adapters only."
        )
        smaller.save(written, f"{text.rstrip()}\n\n{note}\n", torch.bfloat16)


def _moments(
    model: ModelParts, data: str | Path, samples: int, on_problem: Callable[[str], object]
) -> dict[str, Tensor]:
    """What the layers read of the first samples of a shard folder."""
    if samples < 1:
        raise ValueError(f"samples={samples}: expected 1 or more")
    splits = splits_of(data)
    shards = Shards(data, "train" if "train" in splits else splits[0])
    batches = calibration_batches(model, shards, samples, on_problem)
    shown = tqdm(batches, "reading samples", -(-samples // BATCH), unit="batch", disable=None)
    return input_moments(model.network, shown)


def quantized_network(
    network: MultimodalLM, bits: Literal[8, 4], moments: Mapping[str, Tensor] | None = None
) -> MultimodalLM:
    """A network with its matrices quantized, and all else as it is.

    Args:
        moments: of ``input_moments``, for 4 bits.
    """
    smaller = MultimodalLM(network.config.with_bits(bits)).eval()
    smaller.take_weights(network)
    if not moments:
        return smaller
    state, floats = smaller.state_dict(), network.state_dict()
    for name, of_layer in tqdm(moments.items(), "rounding matrices", disable=None):
        if name + SCALE in state and name + COLUMNS not in state:
            integers, _ = quantize_rows(floats[name + WEIGHT], bits, of_layer)
            state[name + WEIGHT].copy_(integers)
    return smaller
