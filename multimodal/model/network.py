"""A model: one transformer, two tokenizers, the alignment projections."""

import hashlib
import json
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.api import Usable
from multimodal.distributed import global_sum, world_size
from multimodal.model.alignment import Alignment
from multimodal.model.attention import Backend, attention_mask, block_mask
from multimodal.model.compiled import Compiled
from multimodal.model.objectives import ObjectivesConfig, token_losses
from multimodal.model.qwen3 import read_qwen3
from multimodal.model.sequences import (
    NO_LOSS,
    OBJECTIVES,
    Packed,
    Sequence,
    answer,
    describe,
    document,
    draw,
    random_mask,
)
from multimodal.model.templates import Templates
from multimodal.model.transformer import SIZES, Transformer, TransformerConfig, named_config
from multimodal.model.vocabulary import Vocabulary
from multimodal.tokenizers.image import VQTokenizer, hash_weights
from multimodal.tokenizers.text import TextTokenizer

UNKNOWN_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # the bins of the logged curves
SHAPE_MULTIPLE = 256  # positions with a target are padded to this


def _grown(table: Tensor, vocabulary: Vocabulary, codes: Tensor) -> Tensor:
    """float[old V, D] with the rows of text kept and all others at their mean, around which codes
    differ by a tenth of what texts do."""
    text = table[: vocabulary.text_size]
    grown = text.mean(0).repeat(vocabulary.size, 1)
    grown[: vocabulary.text_size] = text
    grown[vocabulary.image_start : vocabulary.image_end] += 0.1 * text.std() * codes
    return grown


@dataclass(frozen=True)
class ModelConfig:
    """Everything but the weights: sizes, vocabulary, objectives, how tasks are put in words."""

    transformer: TransformerConfig
    text_size: int
    codebook_size: int
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    templates: Templates = field(default_factory=Templates)

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.text_size, self.codebook_size)


class Multimodal(Usable, nn.Module):
    """Text and images through one transformer.

    Build one with ``new``, load one with ``multimodal.load`` (multimodal/model/checkpoint.py).
    ``forward`` returns the losses; ``caption`` and its kin are for use.
    """

    def __init__(
        self, config: ModelConfig, text_tokenizer: TextTokenizer, image_tokenizer: VQTokenizer
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
        self.attention_backend: Backend = "sdpa"  # of training
        self.compiled: Compiled | None = None  # see compile_decoding
        if not goals.alignment_weight:
            self.alignment.requires_grad_(False)  # several ranks would wait for its gradients

    @classmethod
    def new(
        cls,
        size: str,
        text_tokenizer: TextTokenizer,
        image_tokenizer: VQTokenizer,
        objectives: ObjectivesConfig | None = None,
    ) -> "Multimodal":
        """A model to train. size: a named one, with random weights, or the folder of a Qwen3, with
        its weights (and its text tokenizer).

        Of a Qwen3 the rows of the text ids are kept, and the others start at their mean. Codes that
        mean alike start alike (``_code_features``).
        """
        vocabulary = Vocabulary(len(text_tokenizer), image_tokenizer.codebook_size)
        weights = None
        if size not in SIZES and Path(size).is_dir():
            sizes, weights = read_qwen3(size)
            if sizes.vocab_size < vocabulary.text_size:
                raise ValueError(
                    f"{size}: has {sizes.vocab_size} embeddings, and the text tokenizer "
                    f"{vocabulary.text_size} tokens: is it that of the same folder?"
                )
            sizes = replace(sizes, vocab_size=vocabulary.size)
        else:
            sizes = named_config(size, vocabulary.size)
        config = ModelConfig(
            sizes,
            vocabulary.text_size,
            vocabulary.codebook_size,
            objectives or ObjectivesConfig(),
        )
        model = cls(config, text_tokenizer, image_tokenizer)
        codes = model._code_features()
        if weights is not None:
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                if name in weights:
                    weights[name] = _grown(weights[name].float(), vocabulary, codes)
            model.transformer.load_stock_state_dict(weights)
        else:
            with torch.no_grad():
                table = model.transformer.embed_tokens.weight
                table[vocabulary.image_start : vocabulary.image_end] = 0.02 * codes
        return model

    def _code_features(self) -> Tensor:
        """Codes that mean alike start alike: random Fourier features of their vectors, float[K, D].

        Rahimi & Recht 2007. With thousands of codes, most are rare; without this each has to be
        learned alone.
        """
        codes = torch.arange(self.config.codebook_size)
        vectors = self.image_tokenizer.quantizer.lookup(codes).detach()
        width = self.config.transformer.hidden_size
        # A frequency of pi over the range [-1, 1]: neighbouring values of a channel stay similar.
        angles = vectors @ (torch.randn(vectors.shape[-1], width) * torch.pi / 2)
        return 2**0.5 * torch.cos(angles + 2 * torch.pi * torch.rand(width))

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
        hash_weights(digest, self.state_dict())
        digest.update(self.image_tokenizer.fingerprint.encode())
        return digest.hexdigest()[:16]

    # --- training -----------------------------------------------------------------------------

    def sequences(
        self,
        codes: Tensor,
        captions: SequenceOf[str | None],
        seeds: SequenceOf[int],
        exchanges: SequenceOf[SequenceOf[tuple[str, str]]] | None = None,
        longest: int | None = None,
    ) -> list[Sequence]:
        """What B images with their texts teach: B sequences that start with the image, then B that
        start with the text, then the rest.

        codes: int64[B, n]; captions: B, None where there is none; seeds: B numbers that decide all
        that is random; exchanges: B lists of prompts with their answers, empty where there is none;
        longest: of these, only the first and those that fit so many tokens are asked.

        An image without a caption starts its exchanges, and is drawn from the dropped condition.
        """
        goals, vocabulary = self.config.objectives, self.vocabulary
        encode = self.text_tokenizer.encode
        describes, draws, answers = [], [], []
        exchanges = exchanges or [()] * len(codes)
        everything = zip(codes.cpu().numpy(), captions, seeds, exchanges, strict=True)
        for image, text, seed, asked in everything:
            if asked:
                turns = [(encode(prompt), encode(reply)) for prompt, reply in asked]
                answers.append(answer(vocabulary, image, turns, longest))
            if text is not None:
                describes.append(describe(vocabulary, image, encode(text)))
            elif asked:
                describes.append(answers.pop())
            else:
                raise ValueError("an image needs a caption or an exchange to learn from")
            rng = np.random.default_rng([seed, 1])
            form, dropped = rng.random(), rng.random() < goals.drop_condition
            ids = None if text is None else encode(text)
            if form >= goals.reconstruct_share + goals.next_token_share:
                draws.append(draw(vocabulary, ids))
                continue
            masked = random_mask(len(image), rng) if form < goals.reconstruct_share else ()
            draws.append(draw(vocabulary, None if dropped else ids, image, *masked))
        return describes + draws + answers

    def document(
        self, parts: SequenceOf[str | None], codes: Tensor, longest: int | None = None
    ) -> list[Sequence]:
        """What a document teaches.

        parts: its texts, and None for each image; codes: int64[images, n]; longest: tokens of a
        sequence, what is more goes on in the next."""
        images = iter(codes.cpu().numpy())
        made = [next(images) if p is None else self.text_tokenizer.encode(p) for p in parts]
        return document(self.vocabulary, made, longest)

    def hidden(self, packed: Packed) -> Tensor:
        """float[R, L, D]"""
        made = block_mask if self.attention_backend == "flex" else attention_mask
        mask = made(packed.documents, packed.blocks)
        states: Tensor = self.transformer(packed.ids, packed.positions, mask)
        return states

    def forward(
        self, packed: Packed, image_ids: Tensor, text_ids: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The joint loss of rows that hold what ``sequences`` made of B images.

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
        head, targets = self.transformer.lm_head.weight, packed.targets.flatten()[chosen]
        codes = self.image_tokenizer.config.grid**2
        shares = packed.unknown_shares(codes).flatten()[chosen]
        masked = objectives == OBJECTIVES.index("reconstruct")
        groups = {
            f"reconstruct/{low:.2f}-{high:.2f}": masked & (shares > low) & (shares <= high)
            for low, high in pairwise(UNKNOWN_SHARES)
        }
        total, parts = token_losses(hidden[chosen], head, targets, objectives, goals, groups)
        if goals.alignment_weight:
            states = hidden[packed.states]
            pairs = len(image_ids)
            parts["alignment"], parts["alignment_accuracy"] = self.alignment(
                self.alignment.embed_image(states[:pairs]),
                self.alignment.embed_text(states[pairs : 2 * pairs]),
                image_ids,
                text_ids,
            )
            weighted = goals.alignment_weight * parts["alignment"]
            if states.requires_grad:
                (of_states,) = torch.autograd.grad(weighted, states, retain_graph=True)
                squares = global_sum(of_states.float().square().sum())
                parts["grad_norm/alignment"] = squares.sqrt() / world_size()
            total = total + weighted
        return total, {**parts, "total": total}

    def save(self, folder: str | Path, card: str = "") -> None:
        """Write the model folder; ``card`` is its README.md."""
        from multimodal.model.checkpoint import save

        save(self, Path(folder), card)
