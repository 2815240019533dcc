"""Prompts of the tiny model, for the tests of generation."""

import numpy as np

from multimodal.api import Model
from multimodal.model.sequences import describe_prompt


def prompts_of(model: Model, count: int = 6) -> list[list[int]]:
    """Images, each followed by the beginning of a caption, of different lengths."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 64, (count, 16))
    text = model.text_tokenizer.encode("a red bus")
    return [
        [*describe_prompt(model.vocabulary, row.tolist()), *text[: i % 4]]
        for i, row in enumerate(codes)
    ]
