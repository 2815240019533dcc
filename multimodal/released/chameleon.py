"""Chameleon (arXiv:2405.09818), and Anole (arXiv:2407.06135), which has its shape.

A Llama with another QK-norm. The 34b has norms after attention and MLP. The folders of transformers
have no decoder of images: ``--image-tokenizer`` brings one.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from multimodal.model.stock import read_weights, transformer_config
from multimodal.released.assemble import Released, ids_of, part_of_config
from multimodal.tokenizers.image import ImageTokenizer
from multimodal.tokenizers.released import import_tokenizer
from multimodal.tokenizers.text import TextTokenizer
from multimodal.tokenizers.weights import Fit

IMAGE_TOKENIZER = "model.vqmodel."
SPECIALS = {
    "<bos>": "<s>",
    "<eos>": "</s>",
    "<pad>": "<pad>",
    "<boi>": "<racm3:break>",
    "<eoi>": "<eoss>",
    "<null>": "<pad>",
}
SIZE: int = 512
FIT: Fit = "crop"


def read(folder: Path, config: dict[str, Any], image_size: int | None, fit: Fit | None) -> Released:
    """Read a folder. image_size, fit: of images. None: what the model was trained with.

    Raises:
        ValueError: for anything else than a Chameleon.
    """
    llama = transformer_config({**config, "model_type": "llama"}, str(folder))
    sizes = replace(llama, qk_norm="layer", norm_after=bool(config.get("swin_norm")))
    vision, tokens = (part_of_config(config, name) for name in ("vq_config", "vocabulary_map"))
    size = image_size or vision.get("resolution", SIZE)
    tokenizer = import_tokenizer(folder, size, fit or FIT, decoder_required=False)
    weights, text = read_weights(folder), TextTokenizer.load(folder)
    return Released(
        sizes,
        # One vector here, float[H d], is float[H, d] there.
        {
            name: weight.flatten() if re.search(r"\.[qk]_norm\.", name) else weight
            for name, weight in weights.items()
            if not name.startswith(IMAGE_TOKENIZER)
        },
        text,
        ids_of(text, SPECIALS),
        image_codes(tokens),
        ImageTokenizer(detail=tokenizer),
    )


def image_codes(tokens: dict[str, int]) -> list[int]:
    """The id of each code. The token of code 102 is ``IMGIMGBACZ``: its digits are letters."""
    digits = str.maketrans("ABCDEFGHIJ", "0123456789")
    codes = {}
    for token, number in tokens.items():
        written = token.removeprefix("IMGIMG").removesuffix("Z").translate(digits)
        if token.startswith("IMGIMG") and written.isdecimal():
            codes[int(written)] = number
    return [codes[code] for code in range(len(codes)) if code in codes]
