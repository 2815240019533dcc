"""A model: one transformer, two tokenizers, the alignment projections; and its folder.

config.json  model.safetensors  heads.safetensors  text_tokenizer.json  image_tokenizer/
"""

import hashlib
import json
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from multimodal.attention import attention_mask
from multimodal.objectives import Alignment, ObjectivesConfig, token_losses
from multimodal.sequences import NO_LOSS, Packed, Sequence, describe, draw, random_mask
from multimodal.tokenizers.image import ViTTokenizer, load_image_tokenizer
from multimodal.tokenizers.text import TextTokenizer
from multimodal.transformer import Transformer, TransformerConfig, named_config
from multimodal.vocabulary import Vocabulary

if TYPE_CHECKING:
    from PIL import Image

FORMAT_VERSION = 1
SHAPE_MULTIPLE = 256  # positions with a target are padded to this


@dataclass(frozen=True)
class ModelConfig:
    """Everything but the weights: sizes, vocabulary, objectives."""

    transformer: TransformerConfig
    text_size: int
    codebook_size: int
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.text_size, self.codebook_size)


class Multimodal(nn.Module):
    """Text and images through one transformer.

    Build one with ``new``, load one with ``multimodal.load``. ``forward`` returns the losses;
    ``caption`` and its kin are for use.
    """

    def __init__(
        self, config: ModelConfig, text_tokenizer: TextTokenizer, image_tokenizer: ViTTokenizer
    ) -> None:
        super().__init__()
        self.config, self.vocabulary = config, config.vocabulary
        if len(text_tokenizer) != config.text_size:
            raise ValueError(
                f"the text tokenizer has {len(text_tokenizer)} tokens, "
                f"the model was made for {config.text_size}"
            )
        if image_tokenizer.codebook_size != config.codebook_size:
            raise ValueError(
                f"the image tokenizer has {image_tokenizer.codebook_size} codes, "
                f"the model was made for {config.codebook_size}"
            )
        self.text_tokenizer = text_tokenizer
        self.image_tokenizer = image_tokenizer.requires_grad_(False).eval()
        self.transformer = Transformer(config.transformer)
        goals = config.objectives
        self.alignment = Alignment(
            config.transformer.hidden_size, goals.alignment_dim, goals.alignment_form
        )

    @classmethod
    def new(
        cls,
        size: str,
        text_tokenizer: TextTokenizer,
        image_tokenizer: ViTTokenizer,
        objectives: ObjectivesConfig | None = None,
    ) -> "Multimodal":
        """Random weights of a named size; code embeddings start from what the codes look like."""
        vocabulary = Vocabulary(len(text_tokenizer), image_tokenizer.codebook_size)
        config = ModelConfig(
            named_config(size, vocabulary.size),
            vocabulary.text_size,
            vocabulary.codebook_size,
            objectives or ObjectivesConfig(),
        )
        model = cls(config, text_tokenizer, image_tokenizer)
        model._embed_codes()
        return model

    @torch.no_grad()
    def _embed_codes(self) -> None:
        """Codes that mean alike start alike: random Fourier features of their vectors.

        Rahimi & Recht 2007. With thousands of codes, most are rare; without this each has to be
        learned alone.
        """
        codes = torch.arange(self.config.codebook_size)
        vectors = self.image_tokenizer.quantizer.lookup(codes)
        width = self.config.transformer.hidden_size
        # A frequency of pi over the range [-1, 1]: neighbouring values of a channel stay similar.
        angles = vectors @ (torch.randn(vectors.shape[-1], width) * torch.pi / 2)
        features = 2**0.5 * torch.cos(angles + 2 * torch.pi * torch.rand(width))
        table = self.transformer.embed_tokens.weight
        table[self.vocabulary.image_start : self.vocabulary.image_end] = 0.02 * features

    def train(self, mode: bool = True) -> "Multimodal":
        super().train(mode)
        self.image_tokenizer.eval()  # frozen, whatever the model does
        return self

    @property
    def device(self) -> torch.device:
        return self.alignment.log_scale.device

    @property
    def fingerprint(self) -> str:
        """16 hex digits over config, weights, and both tokenizers."""
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        digest.update(self.text_tokenizer.to_json().encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        digest.update(self.image_tokenizer.fingerprint.encode())
        return digest.hexdigest()[:16]

    # --- training -----------------------------------------------------------------------------

    def pair_sequences(
        self, codes: Tensor, texts: SequenceOf[str], seeds: SequenceOf[int]
    ) -> list[Sequence]:
        """Two sequences a pair: all ``describe`` first, then all ``draw``.

        codes: int64[B, n]; texts: B captions; seeds: B numbers that decide all that is random.
        """
        goals = self.config.objectives
        describes, draws = [], []
        for image, text, seed in zip(codes.cpu().numpy(), texts, seeds, strict=True):
            ids = self.text_tokenizer.encode(text)
            describes.append(describe(self.vocabulary, image, ids))
            rng = np.random.default_rng([seed, 1])
            form, dropped = rng.random(), rng.random() < goals.drop_condition
            if form >= goals.reconstruct_share + goals.next_token_share:
                draws.append(draw(self.vocabulary, ids))
                continue
            masked = random_mask(len(image), rng) if form < goals.reconstruct_share else None
            draws.append(draw(self.vocabulary, None if dropped else ids, image, masked))
        return describes + draws

    def hidden(self, packed: Packed) -> Tensor:
        """float[R, L, D]"""
        mask = attention_mask(packed.documents, packed.blocks)
        states: Tensor = self.transformer(packed.ids, packed.positions, mask)
        return states

    def forward(
        self, packed: Packed, image_ids: Tensor, text_ids: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The joint loss of rows that hold B describe and then B draw sequences (and any others).

        image_ids, text_ids: int64[B], equal for equal images and equal texts, -1 for a dropped one.
        Returns the weighted sum and its parts.
        """
        goals = self.config.objectives
        hidden = self.hidden(packed).flatten(0, 1)
        objectives = packed.objectives.flatten()
        chosen = (objectives != NO_LOSS).nonzero()[:, 0]
        count = len(chosen)
        # A matrix of a new shape costs a kernel to be made and kept: pad, so that there are few.
        chosen = F.pad(chosen, (0, -count % SHAPE_MULTIPLE))
        objectives = objectives[chosen]
        objectives[count:] = NO_LOSS
        logits = self.transformer.logits(hidden[chosen])
        total, parts = token_losses(logits, packed.targets.flatten()[chosen], objectives, goals)
        if goals.alignment_weight:
            states = hidden[packed.states]
            pairs = len(image_ids)
            parts["alignment"], parts["alignment_accuracy"] = self.alignment(
                self.alignment.embed_image(states[:pairs]),
                self.alignment.embed_text(states[pairs : 2 * pairs]),
                image_ids,
                text_ids,
            )
            total = total + goals.alignment_weight * parts["alignment"]
        return total, {**parts, "total": total}

    # --- the folder ---------------------------------------------------------------------------

    def save(self, folder: str | Path, card: str = "") -> None:
        """Write the model folder; ``card`` is its README.md."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.transformer.stock_state_dict(), folder / "model.safetensors")
        heads = {name: value.contiguous() for name, value in self.alignment.state_dict().items()}
        save_file(heads, folder / "heads.safetensors")
        self.text_tokenizer.save(folder / "text_tokenizer.json")
        self.image_tokenizer.save(folder / "image_tokenizer")
        config = {
            "format": FORMAT_VERSION,
            **asdict(self.config),
            "preprocessing": {
                "image_size": self.image_tokenizer.config.image_size,
                "fit": self.image_tokenizer.config.fit,
            },
            "fingerprints": {
                "model": self.fingerprint,
                "image_tokenizer": self.image_tokenizer.fingerprint,
            },
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        if card or not (folder / "README.md").exists():
            (folder / "README.md").write_text(card or DEFAULT_CARD)

    # --- use ----------------------------------------------------------------------------------

    def caption(
        self,
        images: SequenceOf["str | Path | bytes | Image.Image"],
        *,
        batch_size: int = 32,
        max_tokens: int = 64,
    ) -> list[str]:
        """One caption an image (paths, bytes or Pillow images), greedy. Errors: ``ValueError``."""
        from multimodal.generation import caption

        return caption(self, images, batch_size=batch_size, max_tokens=max_tokens)


DEFAULT_CARD = "# A model of the multimodal toolkit\n\nNo card was written for this model.\n"


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder. Errors: ``ValueError`` that says what is missing."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such model folder")
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: not a model folder (config.json is missing)") from error
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT_VERSION:
        raise ValueError(f"{path}: not the config of a model of this release")
    return config


def load(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Multimodal:
    """Load a model folder, ready for use. Errors: ``ValueError`` for anything that is not one."""
    folder = Path(path)
    stored = read_config(folder)
    try:
        config = ModelConfig(
            TransformerConfig(**stored["transformer"]),
            stored["text_size"],
            stored["codebook_size"],
            ObjectivesConfig(**stored["objectives"]),
        )
        model = Multimodal(
            config,
            TextTokenizer.load(folder / "text_tokenizer.json"),
            load_image_tokenizer(folder / "image_tokenizer"),
        )
        model.transformer.load_stock_state_dict(load_file(folder / "model.safetensors"))
        model.alignment.load_state_dict(load_file(folder / "heads.safetensors"))
        expected = stored["fingerprints"]["image_tokenizer"]
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: {error.filename or error} is missing") from error
    except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: not a model of this release: {error}") from error
    if model.image_tokenizer.fingerprint != expected:
        raise ValueError(
            f"{folder}: the model was trained with image tokenizer {expected}, "
            f"the folder holds {model.image_tokenizer.fingerprint}"
        )
    # The tokenizer stays in fp32: in bf16 it would pick other codes than in training.
    model.transformer.to(dtype)
    model.alignment.to(dtype)
    return model.to(device).eval()
