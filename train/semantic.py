"""The semantic loss: the codes of an image learn to say the words of its captions.

Codes trained on pixels alone spend their bits on colour, and a captioner reads little from them. So
while an image tokenizer trains, every code gives a score to every text token, and is asked two
things.

*Bag*: which tokens do the captions hold? Tokens as labels (Joulin et al. 2016, arXiv:1511.02251;
SuperClass, Huang et al. 2024, arXiv:2411.03313); a token may be said by any one code, so the codes'
scores meet in a log-sum-exp, not in a mean that dilutes a small object.

*Context*: which token stands between its neighbours (CBOW, Mikolov et al. 2013, arXiv:1301.3781)?
The codes that answer are those where the neighbours' own scores are high. The codes that say "red"
are so asked for what is red, long before they know any shape: docs/decisions/semantic_loss.md has
the numbers.

The head is thrown away after training.

Shapes: B batch, P codes of an image, C channels of a code vector, T text tokens, L caption length.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from multimodal.tokenizers.text import TextTokenizer
from multimodal.train.lessons import texts_about

LONGEST = 64  # tokens of a caption that are read
REACH = 2  # neighbours to each side
NOTHING = -100  # no token: beyond the ends of a caption


@dataclass(frozen=True)
class Words:
    """What the captions of a batch say.

    bag: float[B, T], the tokens of all captions of an image, by rarity, summing to 1;
    caption: int64[B, L], one caption of each, padded with NOTHING.
    """

    bag: Tensor
    caption: Tensor


class SemanticLoss(nn.Module):
    """Args: text_tokenizer: whose tokens are the labels; channels: of a code vector."""

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
        # What the neighbours alone give away, so that the codes need not explain grammar.
        self.neighbours = nn.Embedding(size + 1, 64)
        self.grammar = nn.Linear(2 * REACH * 64, size)
        self.register_buffer("rarity", torch.ones(size))

    def count(self, captions: Iterable[str]) -> None:
        """Set the tokens' rarity: "a" is in every caption and says nothing about the picture.

        It is the inverse document frequency, 1 for a token of one caption, 0 for one of them all.
        """
        counts, total = torch.zeros_like(self.rarity), 0
        for caption in captions:
            total += 1
            counts[list(set(self.text_tokenizer.encode(caption)))] += 1
        self.rarity.copy_(torch.log(total / counts.clamp(min=1)) / math.log(max(total, 2)))

    def words(self, keys: list[str], records: list[dict[str, Any]], seeds: list[int]) -> Words:
        """The targets of a batch. Errors: ``ValueError`` for a sample without any text."""
        bag = torch.zeros(len(records), len(self.text_tokenizer))
        captions = np.full((len(records), LONGEST), NOTHING, np.int64)
        longest = 1
        for i, (key, record, seed) in enumerate(zip(keys, records, seeds, strict=True)):
            texts = [self.text_tokenizer.encode(text) for text in texts_about(key, record)]
            for ids in texts:
                bag[i, list(set(ids))] += 1
            ids = texts[int(np.random.default_rng([seed, 2]).integers(len(texts)))][:LONGEST]
            captions[i, : len(ids)] = ids
            longest = max(longest, len(ids))
        bag = bag.to(self.rarity) * self.rarity
        # Few lengths: on a CPU every new shape costs kernels, to be made and kept.
        caption = torch.from_numpy(captions[:, : min(LONGEST, -(-longest // 16) * 16)])
        return Words(bag / bag.sum(-1, keepdim=True).clamp(min=1e-6), caption.to(bag.device))

    def forward(self, vectors: Tensor, words: Words) -> dict[str, Tensor]:
        """vectors: float[B, h, w, C] -> the two cross-entropies, in nats"""
        scores = self.scores(vectors.flatten(1, 2)).float()
        bag = F.cross_entropy(scores.logsumexp(1), words.bag)
        neighbours = self._neighbours(words.caption)
        shared = F.pad(scores, (0, 1))  # beyond the ends there is a token that no code prefers
        at = neighbours.flatten(1)[:, None].expand(-1, scores.shape[1], -1)
        theirs = rearrange(shared.gather(2, at), "b p (l n) -> b p l n", n=2 * REACH)
        attention = theirs.sum(-1).softmax(1)
        grammar = self.grammar(self.neighbours(neighbours).flatten(2)).float()
        answers = attention.transpose(1, 2) @ scores + grammar
        targets = words.caption.flatten()
        context = F.cross_entropy(answers.flatten(0, 1), targets, ignore_index=NOTHING)
        return {"words": bag, "context": context}

    def _neighbours(self, caption: Tensor) -> Tensor:
        """int64[B, L] -> int64[B, L, 2 REACH], T where there is none"""
        nothing = len(self.text_tokenizer)
        padded = F.pad(caption, (REACH, REACH), value=NOTHING)
        padded = padded.masked_fill(padded == NOTHING, nothing)
        around = padded.unfold(1, 2 * REACH + 1, 1)
        return torch.cat([around[..., :REACH], around[..., REACH + 1 :]], -1)
