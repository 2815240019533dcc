"""``import_model``: a folder of a released unified model, as transformers saves it, into ours.

An export of ours that was trained further elsewhere comes back this way, too. To add a model, write
``read`` in a file like chameleon.py, and name it in READERS.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch

from multimodal.model.checkpoint import ModelParts
from multimodal.released import chameleon, emu3, exported
from multimodal.released.assemble import Released, assemble
from multimodal.tokenizers.image import ImageTokenizer, load_image_tokenizer
from multimodal.tokenizers.released import import_tokenizer
from multimodal.tokenizers.weights import Fit, read_config_file

Reader: TypeAlias = Callable[[Path, dict[str, Any], int | None, Fit | None], Released]
# By the model_type of config.json.
READERS: dict[str, Reader] = {"chameleon": chameleon.read, "emu3": emu3.read}
JANUS = (
    "it reads images as continuous features, and scores codes by an MLP, not by rows of a table "
    "(docs/decisions/released_models.md); its image tokenizer: multimodal tokenizer import"
)
REFUSED = {"janus": JANUS, "multi_modality": JANUS}  # as transformers and DeepSeek name it


def import_model(
    folder: str | Path,
    image_size: int | None = None,
    fit: Fit | None = None,
    image_tokenizer: str | Path | None = None,
) -> tuple[ModelParts, torch.dtype]:
    """Read a released unified model.

    Args:
        folder: as transformers saves it: config.json, tokenizer.json and safetensors.
        image_size: pixels of a side of images. None: what the model was trained with.
        fit: how other images are made square. None: as the model was trained.
        image_tokenizer: take this one in its place: released weights with a decoder, or a folder of
            ours. Its codes have to be those of the folder.

    Returns:
        The model, and the dtype in which its weights were stored.

    Raises:
        ValueError: for another kind of model, or one that is not complete.
    """
    folder = Path(folder)
    config = read_config_file(folder / "config.json")
    kind = str(config.get("model_type"))
    if kind in REFUSED:
        raise ValueError(f"{folder}: a Janus cannot be imported: {REFUSED[kind]}")
    reader = exported.read if "image_levels" in config else READERS.get(kind)
    if reader is None:
        raise ValueError(
            f"{folder}: a model of type {kind!r}, expected one of {', '.join(READERS)}; "
            "a language model starts a training instead (size: FOLDER)"
        )
    try:
        released = reader(folder, config, image_size, fit)
        model = assemble(released)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if str(folder) in message else f"{folder}: {message}") from error
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder}: its config.json does not fit: {error!r:.200}") from error
    if image_tokenizer is not None:
        model.image_tokenizer = same_codes(model.image_tokenizer, Path(image_tokenizer))
    stored = released.weights["model.embed_tokens.weight"].dtype
    half = stored in (torch.bfloat16, torch.float16)
    return model, stored if half else torch.float32


def same_codes(ours: ImageTokenizer, path: Path) -> ImageTokenizer:
    """Another image tokenizer with the same codes, with more precise weights or a decoder.

    Raises:
        ValueError: if its codes are others.
    """
    if (path / "config.json").is_file():
        other = load_image_tokenizer(path)
    else:
        other = ImageTokenizer(detail=import_tokenizer(path, ours.image_size, ours.fit))
    if other.layout != ours.layout:
        raise ValueError(f"{path}: has {other.layout}, expected {ours.layout}")
    vectors, expected = (next(iter(each.code_vectors())) for each in (other, ours))
    # Those of the folder may be rounded to bfloat16.
    if vectors.shape != expected.shape or not torch.allclose(vectors, expected, 0.01, 1e-3):
        raise ValueError(f"{path}: has other codes than the model")
    return other.eval()
