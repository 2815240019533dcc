"""A model on disk: the network and its two tokenizers, and the folder that holds them.

    config.json, model.safetensors, heads.safetensors, text_tokenizer.json, image_tokenizer/,
    README.md, LICENSE, sources.json

Nothing in it is a pickle.
"""

import copy
import hashlib
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Self, TypeVar, get_args, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from multimodal.files import atomic_folder, local_path
from multimodal.hub.card import DEFAULT_CARD
from multimodal.hub.names import find_model
from multimodal.model.batches import BatchBuilder
from multimodal.model.network import ModelConfig, MultimodalLM
from multimodal.model.objectives import ObjectivesConfig
from multimodal.model.templates import Templates
from multimodal.model.transformer import TransformerConfig
from multimodal.model.vocabulary import Vocabulary
from multimodal.provenance import Provenance
from multimodal.tokenizers.image import ImageTokenizer, load_image_tokenizer
from multimodal.tokenizers.levels import Layout, Level
from multimodal.tokenizers.text import TextTokenizer
from multimodal.tokenizers.weights import at_most, hash_weights

FORMAT_VERSION = 1
ConfigT = TypeVar("ConfigT")


@dataclass(eq=False)
class ModelParts:
    """A network with the two tokenizers whose ids it was made for.

    The image tokenizer is frozen, and stays in fp32: rounded, it would give other codes than in
    training.
    """

    network: MultimodalLM
    text_tokenizer: TextTokenizer
    image_tokenizer: ImageTokenizer
    urls: bool = False  # whether images may be web addresses
    provenance: Provenance = Provenance()

    def __post_init__(self) -> None:
        config = self.network.config
        if len(self.text_tokenizer) != config.text_size:
            raise ValueError(
                f"the text tokenizer has {len(self.text_tokenizer)} tokens, "
                f"the model was made for {config.text_size}"
            )
        if self.image_tokenizer.layout != config.layout:
            raise ValueError(
                f"the image tokenizer has {self.image_tokenizer.layout}, "
                f"the model was made for {config.layout}"
            )
        self.image_tokenizer.requires_grad_(False).eval()
        self.provenance = self.provenance + self.image_tokenizer.provenance

    @classmethod
    def new(
        cls,
        size: str,
        text_tokenizer: TextTokenizer,
        image_tokenizer: ImageTokenizer,
        objectives: ObjectivesConfig | None = None,
        reads: Sequence[str] = (),
    ) -> Self:
        """A model to train. Arguments as for ``MultimodalLM.new``."""
        network = MultimodalLM.new(
            size,
            len(text_tokenizer),
            image_tokenizer.layout,
            image_tokenizer.code_vectors(),
            objectives,
            reads,
        )
        return cls(network, text_tokenizer, image_tokenizer)

    @classmethod
    def load(
        cls, path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Load a model, ready for use.

        Args:
            path: a folder or a name: see multimodal/hub/names.py.
            dtype: of the network.

        Raises:
            ValueError: for anything that is not a model of this release.
        """
        folder = find_model(path)
        stored = read_config(folder)
        try:
            config = ModelConfig(
                _typed(TransformerConfig, stored["transformer"]),
                stored["text_size"],
                Layout(tuple(_typed(Level, level) for level in stored["layout"]["levels"])),
                _typed(ObjectivesConfig, stored["objectives"]),
                _typed(Templates, stored.get("templates", {})),
                stored["reads"],
            )
            weights = (folder / "model.safetensors", folder / "heads.safetensors")
            with at_most(*weights):
                network = MultimodalLM(config)
            parts = cls(
                network,
                TextTokenizer.load(folder / "text_tokenizer.json"),
                load_image_tokenizer(folder / "image_tokenizer"),
            )
            network.transformer.load_stock_state_dict(load_file(weights[0]))
            network.alignment.load_state_dict(load_file(weights[1]))
            expected = stored["fingerprints"]["image_tokenizer"]
        except FileNotFoundError as error:
            raise ValueError(f"{folder}: {error.filename or error} is missing") from error
        except (KeyError, TypeError, RuntimeError, ArithmeticError, SafetensorError) as error:
            reason = textwrap.shorten(str(error), 300)  # torch names every single wrong weight
            raise ValueError(f"{folder}: not a model of this release: {reason}") from error
        if parts.image_tokenizer.fingerprint != expected:
            raise ValueError(
                f"{folder}: the model was trained with image tokenizer {expected}, "
                f"the folder holds {parts.image_tokenizer.fingerprint}"
            )
        parts.provenance = Provenance.read(folder) + parts.provenance
        network.to(dtype)
        return parts.to(device).eval()

    def save(self, folder: str | Path, card: str = "", dtype: torch.dtype = torch.float32) -> None:
        """Write the model folder.

        Args:
            card: the text of its README.md.
            dtype: the weights of the network are rounded to this.

        Raises:
            OSError: if something could not be written. What was there before is left.
        """
        folder = local_path(folder)
        with atomic_folder(folder) as part:
            _write(self, part, dtype)
            self.provenance.write(part)
            if card or not (folder / "README.md").exists():
                (part / "README.md").write_text(card or DEFAULT_CARD, "utf-8")

    def to(self, device: str | torch.device) -> Self:
        """Move the network and the image tokenizer."""
        self.network.to(device)
        self.image_tokenizer.to(device)
        return self

    def eval(self) -> Self:
        """Switch the network to inference."""
        self.network.eval()
        return self

    @property
    def config(self) -> ModelConfig:
        return self.network.config

    @property
    def vocabulary(self) -> Vocabulary:
        return self.network.vocabulary

    @property
    def codes_per_image(self) -> int:
        return self.image_tokenizer.codes_per_image

    def read(self, codes: Tensor) -> Tensor:
        """Of the codes of whole images those of the levels that are read.

        Args:
            codes: int64[B, n]. What was encoded at these levels alone is returned as it is.
        """
        indices = self.config.layout.indices(self.config.reads)
        return codes if codes.shape[-1] == len(indices) else codes[..., indices.to(codes.device)]

    def batch_builder(
        self, row_length: int = 256, question_share: float = 1.0, captions_per_image: int = 1
    ) -> BatchBuilder:
        """Makes training batches for the network. Arguments as for ``BatchBuilder``."""
        return BatchBuilder(
            self.vocabulary,
            self.config.objectives,
            self.config.templates,
            self.text_tokenizer.encode,
            self.config.layout,
            self.config.reads,
            row_length,
            question_share,
            captions_per_image,
        )

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def fingerprint(self) -> str:
        """16 hex digits over config, weights and both tokenizers."""
        digest = hashlib.sha256(json.dumps(self.config.stored(), sort_keys=True).encode())
        digest.update(self.text_tokenizer.to_json().encode())
        images = self.image_tokenizer.state_dict()
        weights = {f"image_tokenizer.{name}": weight for name, weight in images.items()}
        hash_weights(digest, {**self.network.state_dict(), **weights})
        digest.update(self.image_tokenizer.fingerprint.encode())
        return digest.hexdigest()[:16]


def _typed(kind: type[ConfigT], stored: dict[str, Any]) -> ConfigT:
    """A dataclass of what JSON holds. Raises ``TypeError`` for a value of another type."""
    hints = get_type_hints(kind)
    for name, value in stored.items():
        if not _fits(value, hints.get(name)):
            raise TypeError(f"{name}={value!r:.60}: expected {hints.get(name)}")
    return kind(**stored)


def _fits(value: object, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if hint is float:
        return type(value) in (int, float) and abs(value) < 1e30  # type: ignore[arg-type]  # no NaN
    if hint in (int, str, bool, NoneType):
        return type(value) is hint
    return type(value) in (str, dict, list)  # of a Literal, or a dataclass: it checks itself


def _write(model: ModelParts, folder: Path, dtype: torch.dtype) -> None:
    if dtype != torch.float32:
        network = copy.deepcopy(model.network).to(dtype).float()
        # The fingerprint is of the weights as they will be loaded.
        model = ModelParts(network, model.text_tokenizer, model.image_tokenizer)
    weights = model.network.transformer.stock_state_dict()
    save_file({name: w.to(dtype) for name, w in weights.items()}, folder / "model.safetensors")
    heads = model.network.alignment.state_dict()
    save_file(
        {name: w.contiguous().to(dtype) for name, w in heads.items()}, folder / "heads.safetensors"
    )
    model.text_tokenizer.save(folder / "text_tokenizer.json")
    model.image_tokenizer.save(folder / "image_tokenizer")
    config = {
        "format": FORMAT_VERSION,
        **model.config.stored(),
        "preprocessing": {
            "image_size": model.image_tokenizer.image_size,
            "fit": model.image_tokenizer.fit,
        },
        "fingerprints": {
            "model": model.fingerprint,
            "image_tokenizer": model.image_tokenizer.fingerprint,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder. Raises ``ValueError`` that says what is missing."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such model folder")
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: not a model folder (config.json is missing)") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT_VERSION:
        raise ValueError(f"{path}: not the config of a model of this release")
    return config
