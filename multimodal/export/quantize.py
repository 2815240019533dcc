"""A model folder with weights of 8 or 4 bits (multimodal/model/layers/quantization.py)."""

from pathlib import Path
from typing import Literal

import torch

from multimodal.files import local_path, new_folder, read_text
from multimodal.hub.names import find_model
from multimodal.model.checkpoint import ModelParts
from multimodal.model.network import MultimodalLM

Bits = Literal["int8", "int4"]
BITS: dict[str, Literal[8, 4]] = {"int8": 8, "int4": 4}


def quantize_model(source: str | Path, out: str | Path, to: Bits = "int8") -> None:
    """Write a model folder again, with all matrices of its network quantized.

    Norms become bfloat16. The image tokenizer stays as it is: rounded, it would give other codes
    than in training.

    Args:
        source: a model: see multimodal/hub/names.py.
        out: a new or empty folder.

    Raises:
        ValueError: for a model that is quantized already, other bits, a folder that is not empty,
            or for int4 a width that is no multiple of 32.
    """
    folder, out = find_model(source), local_path(out)
    if to not in BITS:
        raise ValueError(f"to={to!r:.80}: expected one of {', '.join(BITS)}")
    with new_folder(out) as written:
        model = ModelParts.load(folder)
        if (bits := model.config.transformer.weight_bits) is not None:
            raise ValueError(f"{source}: is quantized already, to {bits} bits")
        provenance = model.provenance.of_model(str(source), model.fingerprint)
        smaller = ModelParts(
            quantized_network(model.network, BITS[to]),
            model.text_tokenizer,
            model.image_tokenizer,
            provenance=provenance,
        )
        card = folder / "README.md"
        text = read_text(card) if card.is_file() else "# A quantized model\n"
        note = f"Quantized to {to} from {source} ({model.fingerprint}). It trains adapters only."
        smaller.save(written, f"{text.rstrip()}\n\n{note}\n", torch.bfloat16)


def quantized_network(network: MultimodalLM, bits: Literal[8, 4]) -> MultimodalLM:
    """A network with its matrices quantized, and all else as it is."""
    smaller = MultimodalLM(network.config.with_bits(bits)).eval()
    smaller.take_weights(network)
    return smaller
