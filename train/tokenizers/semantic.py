"""The semantic loss: the codes of an image learn to predict the words of its captions.

Codes that are trained on pixels only spend their bits on colour, and a captioner learns little from
them. So a head gives each code a score for every text token. Two losses use these scores.

*Bag*: which tokens do the captions contain? Tokens are labels (Joulin et al. 2016,
arXiv:1511.02251; SuperClass, Huang et al. 2024, arXiv:2411.03313). Any single code may predict a
token. So the scores of all codes are combined by log-sum-exp. A mean would weaken small objects.

*Context*: which token stands between its neighbours (CBOW, Mikolov et al. 2013, arXiv:1301.3781)?
The codes with high scores for the neighbours answer. So the codes that predict "red" must predict
what is red, long before they know any shape (docs/decisions/semantic_loss.md has the numbers).

The head is not exported.

Shapes: B batch, P codes of an image, C channels of a code vector, T text tokens, L caption length.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from multimodal.data.samples import Sample, parts_of, texts_of
from multimodal.devices import moved
from multimodal.model.lessons import no_text_error
from multimodal.tokenizers.text import TextTokenizer

MAX_TOKENS = 64  # of a caption; the rest is cut off
REACH = 2  # neighbours on each side
NO_TOKEN = -100  # padding beyond the end of a caption


@dataclass(frozen=True)
class CaptionTargets:
    """The targets of the semantic loss.

    Args:
        bag: float[B, T], the tokens of all captions of an image, weighted by rarity. Sums to 1.
        caption: int64[B, L], one caption of each image, padded with NO_TOKEN.
    """

    bag: Tensor
    caption: Tensor


class SemanticLoss(nn.Module):
    """The head that predicts text tokens from codes, and its losses.

    Args:
        text_tokenizer: its tokens are the labels.
        channels: C.
        width: of the hidden layers.
    """

    rarity: Tensor

    def __init__(self, text_tokenizer: TextTokenizer, channels: int, width: int = 512) -> None:
        super().__init__()
        self.text_tokenizer = text_tokenizer
        size = len(text_tokenizer)
        self.scores = nn.Sequential(
            nn.Linear(channels, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.LayerNorm(width),
            nn.Linear(width, size),
        )
        # Predicts a token from its neighbours only, so that the codes need not model grammar.
        self.neighbours = nn.Embedding(size + 1, 64)
        self.grammar = nn.Linear(2 * REACH * 64, size)
        self.register_buffer("rarity", torch.ones(size))

    def count(self, captions: Iterable[str]) -> None:
        """Set the rarity of the tokens: "a" is in every caption, and tells nothing of the image.

        Rarity is the inverse document frequency: 1 for a token of one caption, 0 for a token of all
        captions.
        """
        counts, total = torch.zeros_like(self.rarity), 0
        for caption in captions:
            total += 1
            counts[list(set(self.text_tokenizer.encode(caption)))] += 1
        self.rarity.copy_(torch.log(total / counts.clamp(min=1)) / math.log(max(total, 2)))

    def targets(
        self, keys: list[str], records: list[dict[str, Any]], seeds: list[int]
    ) -> CaptionTargets:
        """The targets of a batch.

        Args:
            keys: B names, for errors.
            records: B records with captions, or another text.
            seeds: B numbers that decide which caption is used for the context.

        Raises:
            ValueError: for a pair without a text.
        """
        bag = torch.zeros(len(records), len(self.text_tokenizer))
        captions = np.full((len(records), MAX_TOKENS), NO_TOKEN, np.int64)
        longest = 1
        for i, (key, record, seed) in enumerate(zip(keys, records, seeds, strict=True)):
            if parts_of(record) and not any(texts_of(record)):
                continue  # images alone: there is nothing to learn from them here
            texts = [self.text_tokenizer.encode(text) for text in texts_about(key, record)]
            for ids in texts:
                bag[i, list(set(ids))] += 1
            ids = texts[int(np.random.default_rng([seed, 2]).integers(len(texts)))][:MAX_TOKENS]
            captions[i, : len(ids)] = ids
            longest = max(longest, len(ids))
        bag = moved(bag, self.rarity.device).to(self.rarity) * self.rarity
        # Round up the length: on a CPU each new shape needs time and memory for new kernels.
        caption = torch.from_numpy(captions[:, : min(MAX_TOKENS, -(-longest // 16) * 16)])
        return CaptionTargets(
            bag / bag.sum(-1, keepdim=True).clamp(min=1e-6), moved(caption, bag.device)
        )

    def forward(self, vectors: Tensor, targets: CaptionTargets) -> dict[str, Tensor]:
        """The two cross-entropies in nats, float32[] each: ``words`` (the bag) and ``context``.

        Args:
            vectors: float[B, h, w, C], code vectors.
            targets: of the B images.
        """
        scores = self.scores(vectors.flatten(1, 2)).float()
        bag = F.cross_entropy(scores.logsumexp(1), targets.bag)
        neighbours = self._neighbours(targets.caption)
        padded = F.pad(scores, (0, 1))  # score 0 for the neighbours beyond the ends
        index = neighbours.flatten(1)[:, None].expand(-1, scores.shape[1], -1)
        of_neighbours = rearrange(padded.gather(2, index), "b p (l n) -> b p l n", n=2 * REACH)
        attention = of_neighbours.sum(-1).softmax(1)
        grammar = self.grammar(self.neighbours(neighbours).flatten(2)).float()
        answers = attention.transpose(1, 2) @ scores + grammar
        tokens = targets.caption.flatten()
        each = F.cross_entropy(
            answers.flatten(0, 1), tokens, ignore_index=NO_TOKEN, reduction="none"
        )
        context = each.sum() / (tokens != NO_TOKEN).sum().clamp(min=1)
        return {"words": bag, "context": context}

    def _neighbours(self, caption: Tensor) -> Tensor:
        """The neighbours of each token, int64[B, L] -> int64[B, L, 2 REACH]. T means none."""
        none = len(self.text_tokenizer)
        padded = F.pad(caption, (REACH, REACH), value=NO_TOKEN)
        padded = padded.masked_fill(padded == NO_TOKEN, none)
        around = padded.unfold(1, 2 * REACH + 1, 1)
        return torch.cat([around[..., :REACH], around[..., REACH + 1 :]], -1)


def texts_about(key: str, record: Mapping[str, Any]) -> list[str]:
    """The captions of a sample, or the texts of a document, or its questions with their answers.

    Args:
        key: names the sample in errors.
        record: what ``KEY.json`` holds.

    Raises:
        ValueError: for a sample without any text.
    """
    texts = [str(caption) for caption in record.get("captions", []) if caption.strip()]
    texts = texts or [part["text"] for part in parts_of(record) if "text" in part]
    texts = texts or [f"{question} {answer}" for question, answer in record.get("qa", [])]
    if not texts:
        raise no_text_error(key)
    return texts


def known_texts(sample: Sample) -> list[str]:
    """The texts about an image. One without any is left out later, and named then."""
    try:
        return texts_about(sample.key, sample.record)
    except ValueError:
        return []
