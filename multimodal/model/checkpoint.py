"""A model on disk: the network and its two tokenizers, and the folder that holds them.

    config.json, model.safetensors, heads.safetensors, text_tokenizer.json, image_tokenizer/,
    README.md, LICENSE, sources.json

Nothing in it is a pickle.
"""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from multimodal.adapters.choice import AdapterChoice
from multimodal.adapters.folder import Adapter, AdapterSource
from multimodal.adapters.images import adapt_decoder
from multimodal.files import local_path
from multimodal.hub.card import DEFAULT_CARD
from multimodal.hub.names import find_model
from multimodal.model.batches import BatchBuilder
from multimodal.model.layers.experts import ExpertsConfig
from multimodal.model.layers.graphs import StepGraphs
from multimodal.model.layers.quantization import dequantized, read_weights, stored_weights
from multimodal.model.layers.transformer import TransformerConfig
from multimodal.model.network import ModelConfig, MultimodalLM
from multimodal.model.objectives import ObjectivesConfig
from multimodal.model.stock import language_model
from multimodal.model.templates import Templates
from multimodal.model.vocabulary import Vocabulary
from multimodal.provenance import Provenance, model_folder
from multimodal.schemas import construct
from multimodal.tokenizers.image import ImageTokenizer, load_image_tokenizer
from multimodal.tokenizers.language_model import read_beside
from multimodal.tokenizers.levels import Layout
from multimodal.tokenizers.text import TextTokenizer
from multimodal.tokenizers.weights import hash_weights, load_weights, read_config_file

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Fingerprints:
    """What a model folder says it holds, 16 hex digits each."""

    model: str
    image_tokenizer: str


@dataclass(frozen=True)
class StoredModel:
    """The schema of ``config.json`` of a model folder. The file may have more keys."""

    format: Literal[1]
    transformer: TransformerConfig
    text_size: int
    layout: Layout
    objectives: ObjectivesConfig
    reads: tuple[str, ...]
    fingerprints: Fingerprints
    templates: Templates = field(default_factory=Templates)
    draws: tuple[str, ...] = ()

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            self.transformer,
            self.text_size,
            self.layout,
            self.objectives,
            self.templates,
            self.reads,
            self.draws,
        )


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
    adapters: AdapterChoice | None = None
    rounded_from: str | None = None  # the fingerprint of the folder whose network this is, rounded

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
        detail = self.image_tokenizer.detail
        if detail is not None and detail.config.meaning_channels and "meaning" not in config.draws:
            raise ValueError(
                f"draws={config.draws}: the decoder of detail reads meaning beside it, so both "
                "have to be drawn"
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
        draws: Sequence[str] = (),
        experts: ExpertsConfig | None = None,
    ) -> Self:
        """A model to train. See ``MultimodalLM.new``; for its errors ``read_beside``, too."""
        source = language_model(size)
        shape = len(text_tokenizer), image_tokenizer.layout, image_tokenizer.code_vectors()
        network = MultimodalLM.new(source or size, *shape, objectives, reads, draws, experts)
        made = cls(network, text_tokenizer, image_tokenizer)
        if source is not None:
            made.provenance = read_beside(source, size, text_tokenizer) + made.provenance
        return made

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        verify: bool = True,
        adapter: AdapterSource | None = None,
    ) -> Self:
        """Load a model, ready for use.

        Args:
            path: a folder or a name: see multimodal/hub/names.py.
            dtype: of the network.
            verify: compare the fingerprint of what was read with that in ``config.json``. A second
                for each two gigabytes of weights.
            adapter: is merged into the network, whose quantized weights become floats, or into the
                decoder of images (multimodal/adapters/folder.py). Of several by name, which are for
                the network, the first is: see ``use_adapter``.

        Raises:
            ValueError: for anything that is not a model of this release, for files that have
                changed since they were written, and for an adapter of another model.
        """
        folder = find_model(path)
        stored = read_config(folder)
        config, claimed = stored.config, stored.fingerprints
        text_tokenizer = TextTokenizer.load(folder / "text_tokenizer.json")
        image_tokenizer = load_image_tokenizer(folder / "image_tokenizer", verify)
        bits = config.transformer.weight_bits
        try:
            with torch.device("meta"):  # shapes alone
                shapes = MultimodalLM(config)
                expected = stored_weights(shapes.transformer.stock_state_dict(), bits)
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from error
        weights = load_weights(
            folder / "model.safetensors",
            expected,
            optional=("lm_head.weight",) if config.transformer.tie_word_embeddings else (),
        )
        heads = load_weights(folder / "heads.safetensors", shapes.alignment.state_dict())
        try:
            parts = cls(MultimodalLM(config), text_tokenizer, image_tokenizer)
            parts.network.transformer.load_stock_state_dict(read_weights(weights, bits))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{folder}: not a model of this release: {error}") from error
        parts.network.alignment.load_state_dict(heads)
        if verify and image_tokenizer.fingerprint != claimed.image_tokenizer:
            raise ValueError(
                f"{folder}: the model was trained with image tokenizer {claimed.image_tokenizer}, "
                f"the folder holds {image_tokenizer.fingerprint}"
            )
        parts.provenance = Provenance.read(folder) + parts.provenance
        if verify and (computed := parts.fingerprint) != claimed.model:
            raise ValueError(
                f"{folder}: damaged: its files have the fingerprint {computed}, its config.json "
                f"says {claimed.model}. Copy or download it again (or load it with verify=False)"
            )
        if adapter is not None:
            parts._adapt(adapter, path, claimed.model)
        elif dtype != torch.float32:
            parts.rounded_from = claimed.model
        parts.network.to(dtype)
        return parts.to(device).eval()

    def _adapt(self, adapter: AdapterSource, name: str | Path, fingerprint: str) -> None:
        """Merge an adapter, or the first of several.

        Args:
            name, fingerprint: of this model.
        """
        sources = adapter if isinstance(adapter, Mapping) else {"": adapter}
        adapters = {key: Adapter.read(source) for key, source in sources.items()}
        if not isinstance(adapter, Mapping) and adapters[""].is_of_images:
            adapt_decoder(self.image_tokenizer, adapters[""], name)
            self.provenance += adapters[""].provenance
            return
        self.network = self.dequantized().network
        for each in adapters.values():
            each.check_base(name, fingerprint)
            self.provenance += each.provenance
        if isinstance(adapter, Mapping):
            self.adapters = AdapterChoice(self.network.transformer, adapters)
            self.use_adapter(*list(adapters)[:1])
        else:
            adapters[""].merge(self.network.transformer)

    def use_adapter(self, *names: str) -> None:
        """Of the adapters that were loaded by name use these. Without a name: the base alone.

        Raises:
            ValueError: for a name that is none of them.
        """
        if self.adapters is None:
            raise ValueError("use_adapter: no adapters were loaded by name (adapter={NAME: DIR})")
        self.adapters.use(*names)

    def adapted(self, *names: str) -> Self:
        """Another model, with these adapters. It shares all weights that no adapter changes.

        Raises:
            ValueError: for a name that is none of those that were loaded.
        """
        if self.adapters is None:
            raise ValueError("adapted: no adapters were loaded by name (adapter={NAME: DIR})")
        other = copy.copy(self)
        other.network, other.adapters = self.adapters.beside(self.network, *names), None
        return other

    def save(self, folder: str | Path, card: str = "", dtype: torch.dtype = torch.float32) -> None:
        """Write the model folder.

        Args:
            card: the text of its README.md.
            dtype: the weights of the network are rounded to this.

        Raises:
            OSError: if something could not be written. What was there before is left.
        """
        folder = local_path(folder)
        with model_folder(folder) as part:
            _write(self, part, dtype)
            self.provenance.write(part)
            if card or not (folder / "README.md").exists():
                (part / "README.md").write_text(card or DEFAULT_CARD, "utf-8")

    def dequantized(self) -> Self:
        """The same model with float32 weights, for what cannot read quantized ones."""
        if self.config.transformer.weight_bits is None:
            return self
        plain = copy.copy(self)
        plain.rounded_from = None
        plain.network = MultimodalLM(self.config.with_bits(None)).eval()
        plain.network.load_state_dict(dequantized(self.network.state_dict()))
        return plain

    def to(self, device: str | torch.device) -> Self:
        """Move the network and the image tokenizer. On a CUDA device its steps become graphs."""
        network, experts = self.network.to(device), self.config.transformer.experts
        # How many tokens an expert has is known only when it runs: no graph can hold that.
        graphed = network.device.type == "cuda" and experts is None
        network.graphs = StepGraphs() if graphed else None
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

    @property
    def codes_drawn(self) -> int:
        """How many codes are drawn of an image: m."""
        return len(self.config.layout.indices(self.config.draws))

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
            self.config.draws,
            row_length,
            question_share,
            captions_per_image,
        )

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def fingerprint(self) -> str:
        """16 hex digits over config, weights and tokenizers. Rounded by ``load``: of the folder."""
        if self.rounded_from is not None:
            return self.rounded_from
        digest = hashlib.sha256(json.dumps(self.config.stored(), sort_keys=True).encode())
        digest.update(self.text_tokenizer.to_json().encode())
        images = self.image_tokenizer.state_dict()
        weights = {f"image_tokenizer.{name}": weight for name, weight in images.items()}
        hash_weights(digest, {**self.network.state_dict(), **weights})
        digest.update(self.image_tokenizer.fingerprint.encode())
        return digest.hexdigest()[:16]


def _write(model: ModelParts, folder: Path, dtype: torch.dtype) -> None:
    if {dtype, next(model.network.alignment.parameters()).dtype} != {torch.float32}:
        network = copy.deepcopy(model.network).to(dtype).float()
        # The fingerprint is of the weights as they will be loaded.
        model = ModelParts(network, model.text_tokenizer, model.image_tokenizer)
    transformer, heads = model.network.transformer, model.network.alignment.state_dict()
    weights = stored_weights(transformer.stock_state_dict(), transformer.config.weight_bits)
    for name, tensors in (("model.safetensors", weights), ("heads.safetensors", heads)):
        rounded = {
            key: (w.to(dtype) if w.is_floating_point() else w).contiguous()
            for key, w in tensors.items()
        }
        save_file(rounded, folder / name)
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


def read_config(folder: Path) -> StoredModel:
    """``config.json`` of a model folder. Raises ``ValueError`` that says what is wrong with it."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such model folder")
    if not path.exists():
        raise ValueError(f"{folder}: not a model folder (config.json is missing)")
    content = read_config_file(path)
    if content.get("format") != FORMAT_VERSION:
        raise ValueError(f"{path}: not the config of a model of this release")
    known = {item.name for item in fields(StoredModel)}
    try:
        stored = construct(StoredModel, {k: v for k, v in content.items() if k in known})
        stored.config  # noqa: B018  (what does not fit together is an error now)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return stored
