"""A model folder, or an image tokenizer, written again: rounded, another decoder, an adapter."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from multimodal.adapters.folder import Adapter
from multimodal.adapters.images import adapt_images
from multimodal.files import local_path, new_folder
from multimodal.hub.names import find_model, part_of
from multimodal.model.checkpoint import ModelParts
from multimodal.tokenizers.image import load_image_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_model(
    source: str | Path,
    out: str | Path,
    dtype: str = "bfloat16",
    image_tokenizer: str | Path | None = None,
    adapter: str | Path | None = None,
) -> None:
    """Write a model folder again, with its weights rounded, or with an adapter merged in.

    Quantized weights become floats again.

    Args:
        source: a model: see multimodal/hub/names.py. With an adapter also the folder of an image
            tokenizer, which stays in float32.
        out: a new or empty folder.
        dtype: of the written weights, one of DTYPES.
        image_tokenizer: one with another decoder for the same codes, to put into the model.
        adapter: of this model, or of its images' decoder; see multimodal/adapters/folder.py.

    Raises:
        ValueError: as ``export_hf``, for an image tokenizer that makes other codes or does not fit
            the model, for an adapter of another model, and for one of images beside an image
            tokenizer.
    """
    source, out = find_model(source), local_path(out)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if adapter is not None and image_tokenizer is not None and Adapter.read(adapter).is_of_images:
        raise ValueError(
            f"{adapter}: is for the image tokenizer that {image_tokenizer} would replace: give one "
            "of the two"
        )
    if adapter is not None and not (source / "text_tokenizer.json").exists():
        _export_images(source, out, adapter)
        return
    with new_folder(out) as folder:
        model = ModelParts.load(source, adapter=adapter).dequantized()
        if image_tokenizer is not None:
            other = load_image_tokenizer(part_of(image_tokenizer, "image_tokenizer"))
            if other.codes_fingerprint != model.image_tokenizer.codes_fingerprint:
                raise ValueError(
                    f"{image_tokenizer}: makes other codes than the tokenizer of {source}; "
                    "only its decoder may differ (see decoder_only)"
                )
            model = replace(model, image_tokenizer=other)  # which checks that they fit
        model.save(folder, dtype=DTYPES[dtype])
        if (source / "README.md").is_file():
            shutil.copyfile(source / "README.md", folder / "README.md")
        if adapter is not None:
            _note_adapter(folder, adapter)


def _export_images(source: Path, out: Path, adapter: str | Path) -> None:
    """Write an image tokenizer with an adapter merged in."""
    with new_folder(out) as folder:
        tokenizer = load_image_tokenizer(source)
        adapt_images(tokenizer, Adapter.read(adapter), source)
        tokenizer.save(folder)
        if (source / "README.md").is_file():
            shutil.copyfile(source / "README.md", folder / "README.md")
        _note_adapter(folder, adapter)


def _note_adapter(folder: Path, adapter: str | Path) -> None:
    with open(folder / "README.md", "a", encoding="utf-8") as card:
        card.write(f"\nThe adapter {adapter} is merged into these weights.\n")
