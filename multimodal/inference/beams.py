"""Beam search: of a text, the likeliest whole rather than the likeliest next token.

Kept to what transformers does, whose ``generate(num_beams=K)`` finds the same texts (tests).

Shapes: B prompts, K beams of each, V vocabulary.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from multimodal.inference.batch import Batch


class _Whole:
    """The best finished texts of one prompt: at most ``beams``, each with its score."""

    def __init__(self, beams: int) -> None:
        self.beams = beams
        self.found: list[tuple[float, list[int]]] = []

    def add(self, score: float, ids: list[int]) -> None:
        self.found.append((score, ids))
        self.found = sorted(self.found, key=lambda one: -one[0])[: self.beams]

    def beats(self, best_to_come: float) -> bool:
        """Whether what is still unfinished, ended now, would not get among them (that a longer text
        might yet, by the length penalty, is left aside, as in transformers)."""
        return len(self.found) == self.beams and self.found[-1][0] >= best_to_come


def search(
    batch: "Batch", allowed: Tensor, eos: int, max_tokens: int, beams: int, length_penalty: float
) -> list[list[int]]:
    """Of each prompt of the batch, the best text without its <eos>; allowed: bool[V]"""
    prompts = len(batch.last)
    whole = [_Whole(beams) for _ in range(prompts)]
    alive = list(range(prompts))
    batch.keep([row for row in range(prompts) for _ in range(beams)])
    scores = torch.full((prompts, beams), -torch.inf, device=allowed.device)
    scores[:, 0] = 0  # all beams of a prompt begin alike: one is enough
    said: list[list[list[int]]] = [[[] for _ in range(beams)] for _ in range(prompts)]
    for length in range(1, max_tokens + 1):
        steps = batch.logits().log_softmax(-1).masked_fill(~allowed, -torch.inf)
        vocabulary = steps.shape[-1]
        every = (scores[..., None] + steps.view(len(alive), beams, vocabulary)).flatten(1)
        # Twice as many: at most one of each beam can be an end.
        best = every.topk(2 * beams, dim=-1)
        keep, rows, following, next_scores, next_said = [], [], [], [], []
        for place, (prompt, values, places) in enumerate(
            zip(alive, best.values.tolist(), best.indices.tolist(), strict=True)
        ):
            going: list[tuple[float, int, int]] = []
            for rank, (score, index) in enumerate(zip(values, places, strict=True)):
                beam, token = divmod(index, vocabulary)
                if token != eos:
                    going.append((score, beam, token))
                elif rank < beams and score > -torch.inf:
                    whole[prompt].add(score / length**length_penalty, said[place][beam])
            going = going[:beams]
            if whole[prompt].beats(going[0][0] / length**length_penalty):
                continue
            if length == max_tokens:
                for score, beam, token in going:
                    if score > -torch.inf:
                        text = [*said[place][beam], token]
                        whole[prompt].add(score / length**length_penalty, text)
                continue
            keep.append(prompt)
            rows += [place * beams + beam for _, beam, _ in going]
            following += [token for _, _, token in going]
            next_scores.append([score for score, _, _ in going])
            next_said.append([[*said[place][beam], token] for _, beam, token in going])
        if not keep:
            break
        alive, said = keep, next_said
        scores = torch.tensor(next_scores, device=allowed.device)
        batch.keep(rows)
        batch.read(torch.tensor(following, device=allowed.device))
    return [one.found[0][1] for one in whole]
