"""A folder of ``multimodal export hf``, perhaps trained further elsewhere, as ours again.

Its config.json says what a stock class does not need: ``image_levels``, the templates and the chat
format. Folders of earlier releases have the first alone.
"""

import json
from pathlib import Path
from typing import Any

from multimodal.model.stock import read_weights, transformer_config
from multimodal.model.templates import Templates
from multimodal.model.vocabulary import SPECIALS, image_token
from multimodal.provenance import Provenance
from multimodal.released.assemble import Released, ids_of, part_of_config
from multimodal.schemas import construct
from multimodal.tokenizers.chat import ChatFormat
from multimodal.tokenizers.image import load_image_tokenizer
from multimodal.tokenizers.text import TextTokenizer
from multimodal.tokenizers.weights import Fit


def read(folder: Path, config: dict[str, Any], image_size: int | None, fit: Fit | None) -> Released:
    """Read a folder. image_size, fit: None. They are those of its image tokenizer.

    Raises:
        ValueError: for anything else than an export, or another size or fit.
    """
    if image_size is not None or fit is not None:
        raise ValueError("an export has the image size and the fit of its image tokenizer")
    levels = part_of_config(config, "image_levels")
    images, whole = load_image_tokenizer(folder / "image_tokenizer"), TextTokenizer.load(folder)
    specials, ids = ids_of(whole, {name: name for name in SPECIALS}), whole.vocabulary()
    tokens = map(image_token, range(images.codebook_size))
    return Released(
        transformer_config(config, str(folder)),
        read_weights(folder),
        texts_of(whole, specials["<bos>"], config),
        specials,
        [ids[token] for token in tokens if token in ids],
        images,
        reads=tuple(levels.get("reads", ())),
        draws=tuple(levels.get("draws", ())),
        templates=construct(Templates, config.get("templates", {}), "templates"),
        provenance=Provenance.read(folder),
    )


def texts_of(whole: TextTokenizer, size: int, config: dict[str, Any]) -> TextTokenizer:
    """The text tokenizer alone: without the tokens for specials and codes.

    Args:
        size: the number of its tokens, which come first.
        config: says how to talk, and what ends a text.
    """
    stored = json.loads(whole.to_json())
    stored["added_tokens"] = [each for each in stored["added_tokens"] if each["id"] < size]
    chat = config.get("chat_format")
    talk = None if chat is None else construct(ChatFormat, chat, "chat_format")
    ends = config.get("end_tokens", [])
    if not isinstance(ends, list) or not all(isinstance(token, str) for token in ends):
        raise ValueError("its config.json has end_tokens that are no list of texts")
    return TextTokenizer.from_json(json.dumps(stored), talk, ends)
