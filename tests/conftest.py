"""Tiny models with random weights, for the tests of everything that has one.

Tests are imported one by one (import-mode=importlib) and share code as fixtures.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from multimodal.model import Multimodal

if "PYTEST_XDIST_WORKER" in os.environ:  # two workers with two threads each wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"

SENTENCES = (
    "a red bus in the snow",
    "two dogs run on the beach",
    "a small blue circle above a green square",
    "the cat sleeps on a yellow chair",
)


@pytest.fixture(scope="session")
def sentences() -> tuple[str, ...]:
    """What the tiny text tokenizer was trained on."""
    return SENTENCES


@pytest.fixture(scope="session")
def tiny_model() -> "Callable[..., Multimodal]":
    """A factory: ``tiny_model(seed=0, noise=0.0, tied=True, **objectives)``, in eval mode.

    300 text ids, 64 codes, 32 x 32 pixels = 16 codes an image, 13 rows of padding. ``noise`` is the
    standard deviation of what is added to every weight of the transformer, norms included: at their
    start all norms are one, and a wrong one does not show.
    """
    import torch

    from multimodal.model import ModelConfig, Multimodal
    from multimodal.objectives import ObjectivesConfig
    from multimodal.tokenizers.image import ImageTokenizerConfig, VQTokenizer
    from multimodal.tokenizers.text import TextTokenizer
    from multimodal.transformer import Transformer

    text_tokenizer = TextTokenizer.train(SENTENCES * 4, 300)
    quantizer = {"name": "fsq", "levels": [4, 4, 4]}
    vit = {"name": "vit", "dim": 32, "encoder_depth": 1, "decoder_depth": 1, "heads": 2}
    images = ImageTokenizerConfig(32, "squash", 8, vit, quantizer)

    def make(seed: int = 0, noise: float = 0.0, tied: bool = True, **objectives: Any) -> Multimodal:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            goals = ObjectivesConfig(**{"alignment_dim": 32, **objectives})
            model = Multimodal.new("tiny", text_tokenizer, VQTokenizer(images), goals)
            if not tied:
                sizes = dataclasses.replace(model.config.transformer, tie_word_embeddings=False)
                config: ModelConfig = dataclasses.replace(model.config, transformer=sizes)
                model.config, model.transformer = config, Transformer(sizes)
            with torch.no_grad():
                for weight in model.transformer.parameters():
                    weight += noise * torch.randn_like(weight)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tiny_model_folder(
    tiny_model: "Callable[..., Multimodal]", tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of ``tiny_model(noise=0.1)``; only to be read."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(noise=0.1).save(folder)
    return folder
