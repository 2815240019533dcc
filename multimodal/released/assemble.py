"""A released unified model becomes one of ours: its ids in our order, its rows moved with them.

Theirs have one vocabulary too, with image codes and control tokens between the texts. Every id
there is one id here, and no row is changed. Only ``<mask>``, which they lack, and the padding of
the vocabulary are new: rows at the mean of the text rows.

Shapes: K codebook size, V vocabulary, D width.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from multimodal.model.checkpoint import ModelParts
from multimodal.model.layers.transformer import TransformerConfig
from multimodal.model.network import ModelConfig, MultimodalLM
from multimodal.model.stock import check_weights
from multimodal.model.templates import Templates
from multimodal.model.vocabulary import Vocabulary
from multimodal.provenance import Provenance
from multimodal.tokenizers.image import ImageTokenizer
from multimodal.tokenizers.text import TextTokenizer

TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Released:
    """A unified model as its folder has it.

    Attributes:
        config: of its transformer. ``vocab_size`` is theirs.
        weights: of its transformer, by stock names.
        text_tokenizer: with their ids.
        specials: their id of each of our specials that they have. Two may share one.
        codes: their id of each image code, K of them.
        image_tokenizer: that makes these codes.
        reads, draws, templates: see ``ModelConfig``.
        provenance: of the weights.
    """

    config: TransformerConfig
    weights: Mapping[str, Tensor]
    text_tokenizer: TextTokenizer
    specials: Mapping[str, int]
    codes: Sequence[int]
    image_tokenizer: ImageTokenizer
    reads: tuple[str, ...] = ()
    draws: tuple[str, ...] = ()
    templates: Templates = Templates()
    provenance: Provenance = Provenance()

    def __post_init__(self) -> None:
        size = self.image_tokenizer.codebook_size
        if len(self.codes) != size or len(set(self.codes)) != size:
            raise ValueError(
                f"its vocabulary has {len(set(self.codes))} image codes, its image tokenizer {size}"
            )
        ids = [*self.codes, *self.specials.values(), *self.text_tokenizer.vocabulary().values()]
        if not (0 <= min(ids) and max(ids) < self.config.vocab_size):
            raise ValueError(f"ids {min(ids)} to {max(ids)} of {self.config.vocab_size}")
        layers = {name.split(".")[2] for name in self.weights if name.startswith("model.layers.")}
        if len(layers) != self.config.num_hidden_layers:  # before so many are made
            raise ValueError(
                f"its weights have {len(layers)} layers, its config.json "
                f"{self.config.num_hidden_layers}"
            )

    @property
    def text_ids(self) -> list[int]:
        """Their ids of what is text here: all but codes and specials, in their order."""
        moved = {*self.codes, *self.specials.values()}
        return sorted(set(self.text_tokenizer.vocabulary().values()) - moved)


def part_of_config(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part of config.json. Raises ``ValueError`` if it is no object."""
    part = config.get(name)
    if not isinstance(part, dict):
        raise ValueError(f"its config.json has no {name}")
    return part


def ids_of(tokenizer: TextTokenizer, names: Mapping[str, str]) -> dict[str, int]:
    """Their id of each of our specials. Raises ``ValueError`` for a token that is not there.

    Args:
        names: of our specials, their token.
    """
    vocabulary = tokenizer.vocabulary()
    if missing := [token for token in names.values() if token not in vocabulary]:
        raise ValueError(f"its text tokenizer has no {', '.join(missing)}")
    return {name: vocabulary[token] for name, token in names.items()}


def assemble(released: Released) -> ModelParts:
    """The model with our ids.

    Raises:
        ValueError: for weights that do not fit the config, or another kind of text tokenizer.
    """
    text, ids = released.text_tokenizer, released.text_ids
    if ids != list(range(len(text))):
        text = renumbered(text, ids)
    vocabulary = Vocabulary(len(text), len(released.codes))
    rows = source_rows(released, vocabulary)
    config = ModelConfig(
        replace(released.config, vocab_size=vocabulary.size),
        len(text),
        released.image_tokenizer.layout,
        templates=released.templates,
        reads=released.reads,
        draws=released.draws,
    )
    weights = dict(released.weights)
    check_weights(released.config, weights)
    try:
        for name in TABLES:
            if name in weights:
                weights[name] = moved_rows(weights[name], rows, vocabulary)
        network = MultimodalLM(config)
        network.transformer.load_stock_state_dict(weights)
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"its weights and its config.json differ: {str(error)[:300]}") from error
    images, provenance = released.image_tokenizer, released.provenance
    return ModelParts(network, text, images, provenance=provenance).eval()


def source_rows(released: Released, vocabulary: Vocabulary) -> Tensor:
    """Their id of each of our ids: int64[V], -1 where they have none."""
    rows = torch.full((vocabulary.size,), -1)
    rows[: vocabulary.text_size] = torch.tensor(released.text_ids)
    for name, theirs in released.specials.items():
        rows[vocabulary.special(name)] = theirs
    rows[vocabulary.image_start : vocabulary.image_end] = torch.tensor(released.codes)
    ours, end = torch.arange(vocabulary.size), vocabulary.image_end
    if released.config.vocab_size == vocabulary.size and torch.equal(rows[:end], ours[:end]):
        return ours  # an export of ours: its padding stays, too
    return rows


def moved_rows(table: Tensor, rows: Tensor, vocabulary: Vocabulary) -> Tensor:
    """A table with the rows in our order: float[their V, D] -> float32[V, D].

    Args:
        rows: their id of each of our ids, int64[V]. -1: the mean of the text rows.
    """
    moved = table[rows.clamp(min=0)].float()
    moved[rows < 0] = moved[: vocabulary.text_size].mean(0)
    return moved


def renumbered(tokenizer: TextTokenizer, ids: Sequence[int]) -> TextTokenizer:
    """A BPE of some of the tokens of another one. Their new ids are their places in ``ids``.

    Raises:
        ValueError: if it is not BPE.
    """
    stored = json.loads(tokenizer.to_json())
    model, vocabulary = stored["model"], tokenizer.vocabulary()
    if model.get("type") != "BPE":
        raise ValueError(f"its text tokenizer is {model.get('type')}, expected BPE")
    new = {theirs: ours for ours, theirs in enumerate(ids)}
    # Added tokens stand here too: their ids would be chosen anew otherwise.
    kept = {token: new[number] for token, number in vocabulary.items() if number in new}
    model["vocab"] = dict(sorted(kept.items(), key=lambda item: item[1]))
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    model["merges"] = [[a, b] for a, b in pairs if {a, b, a + b} <= kept.keys()]
    if model.get("unk_token") not in kept:
        model["unk_token"] = None
    stored["added_tokens"] = [
        {**token, "id": kept[token["content"]]}
        for token in stored.get("added_tokens") or []
        if token["content"] in kept
    ]
    # It would put control tokens by their old ids around a text. The rules of prompts do that.
    stored["post_processor"] = None
    found = TextTokenizer.from_json(json.dumps(stored))
    if found.vocabulary() != kept:
        raise ValueError("the ids of its text tokenizer cannot be moved")
    return found
