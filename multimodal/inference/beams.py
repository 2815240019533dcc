"""Beam search: the most likely whole text rather than the most likely next token.

It does what transformers' ``generate(num_beams=K)`` does, and finds the same texts (tests).

Shapes: B prompts, K beams of each, V vocabulary.
"""

import math
from collections.abc import Set

import torch
from torch import Tensor

from multimodal.inference.batch import DecodeBatch
from multimodal.inference.sampling import NOT_FINITE


class FinishedBeams:
    """The best finished texts of one prompt: at most K, each with its score."""

    def __init__(self, beams: int) -> None:
        self.beams = beams
        self.texts: list[tuple[float, list[int]]] = []

    def add(self, score: float, ids: list[int]) -> None:
        self.texts.append((score, ids))
        self.texts = sorted(self.texts, key=lambda text: -text[0])[: self.beams]

    def beats(self, best_unfinished: float) -> bool:
        """Whether no unfinished text would get among them if it ended now.

        A longer text might still do so through the length penalty. transformers ignores that, too.
        """
        return len(self.texts) == self.beams and self.texts[-1][0] >= best_unfinished


def beam_search(
    batch: DecodeBatch,
    allowed: Tensor,
    ends: Set[int],
    max_tokens: int,
    beams: int,
    length_penalty: float,
) -> list[list[int]]:
    """The best text of each prompt of a batch.

    Args:
        batch: B prompts that were read.
        allowed: bool[V], the ids that a text may have.
        ends: the ids that end a text.
        max_tokens: the longest text.
        beams: K.
        length_penalty: scores are log probabilities over the length to the power of this.

    Returns:
        B lists of ids, without the one that ended the text.

    Raises:
        ValueError: if the logits are not finite.
    """
    prompts = len(batch.hidden)
    finished = [FinishedBeams(beams) for _ in range(prompts)]
    alive = list(range(prompts))
    batch.keep([row for row in range(prompts) for _ in range(beams)])
    scores = torch.full((prompts, beams), -torch.inf, device=allowed.device)
    scores[:, 0] = 0  # the beams of a prompt are equal at first: one of them is enough
    texts: list[list[list[int]]] = [[[] for _ in range(beams)] for _ in range(prompts)]
    for length in range(1, max_tokens + 1):
        steps = batch.logits().log_softmax(-1).masked_fill(~allowed, -torch.inf)
        vocabulary = steps.shape[-1]
        totals = (scores[..., None] + steps.view(len(alive), beams, vocabulary)).flatten(1)
        # A beam ends at most once by each of the ends, so this many candidates leave K that go on.
        best = totals.topk((1 + len(ends)) * beams, dim=-1)
        keep, rows, next_ids, next_scores, next_texts = [], [], [], [], []
        for place, (prompt, values, indices) in enumerate(
            zip(alive, best.values.tolist(), best.indices.tolist(), strict=True)
        ):
            # NaN comes first. -inf does where all beams have ended.
            if not (math.isfinite(values[0]) or values[0] == -math.inf and finished[prompt].texts):
                raise ValueError(NOT_FINITE)
            going: list[tuple[float, int, int]] = []
            for rank, (score, index) in enumerate(zip(values, indices, strict=True)):
                beam, token = divmod(index, vocabulary)
                if token not in ends:
                    going.append((score, beam, token))
                elif rank < beams and score > -torch.inf:
                    finished[prompt].add(score / length**length_penalty, texts[place][beam])
            going = going[:beams]
            if finished[prompt].beats(going[0][0] / length**length_penalty):
                continue
            if length == max_tokens:
                for score, beam, token in going:
                    if score > -torch.inf:
                        text = [*texts[place][beam], token]
                        finished[prompt].add(score / length**length_penalty, text)
                continue
            keep.append(prompt)
            rows += [place * beams + beam for _, beam, _ in going]
            next_ids += [token for _, _, token in going]
            next_scores.append([score for score, _, _ in going])
            next_texts.append([[*texts[place][beam], token] for _, beam, token in going])
        if not keep:
            break
        alive, texts = keep, next_texts
        scores = torch.tensor(next_scores, device=allowed.device)
        batch.keep(rows)
        batch.step(torch.tensor(next_ids, device=allowed.device))
    return [beams.texts[0][1] for beams in finished]
