"""The one loop that decodes tokens: for texts, JSON, images, and any mix of them.

A ``Row`` is one prompt and what becomes of it. In each step

1. waiting rows join the batch when enough rows have left it,
2. the network's state gives the logits of the next token, guided where a row has two prompts,
3. each row says which ids may come next, and one is chosen,
4. each row takes its token, and rows that are done leave,
5. the network reads the tokens.

Beam search is apart (inference/beams.py): its rows copy one another.

Shapes: B rows, V ids that rows can choose from.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from multimodal.inference.batch import DecodeBatch, compact_rows
from multimodal.inference.sampling import choose, generators, penalise
from multimodal.model.layers.transformer import ALL
from multimodal.model.network import MultimodalLM
from multimodal.options import Sampling

REFILL = 0.75  # waiting rows join when at most this share of the batch is still decoding


class Row(ABC):
    """One prompt and its continuation. Subclasses say what may come next, and take it in.

    Attributes:
        number: with the seed, decides its random numbers.
        prompts: the prompt and, for guidance, the prompt that guidance moves away from.
        max_new_tokens: how many tokens it usually takes. The cache grows if they are more.
        ids: the range of ids it chooses from. The same for all rows of a batch.
        generated: ids that a repetition penalty makes less likely.
        done: whether it takes no further token.
    """

    ids: slice = ALL

    def __init__(self, number: int, prompts: list[list[int]], max_new_tokens: int) -> None:
        self.number, self.prompts, self.max_new_tokens = number, prompts, max_new_tokens
        self.generated: list[int] = []
        self.done = False

    def allowed(self) -> Tensor | None:
        """bool[V]: the ids that may come next. None: all of the range.

        If all rows return the same tensor object, it is used as it is, without a copy for each.
        """
        return None

    def guidance_scale(self) -> float:
        """The scale of this step, for rows with two prompts."""
        return 1.0

    @abstractmethod
    def take(self, token: int, log_probability: float) -> Iterator[Any]:
        """Add a token. Yield every piece of output that it completes.

        Args:
            token: an id.
            log_probability: of the token among those allowed, in nats. 0 where it is not computed.
        """


@torch.inference_mode()
def decode(
    network: MultimodalLM,
    rows: Sequence[Row],
    sampling: Sampling,
    *,
    batch_size: int = 0,
    repetition_penalty: float = 1.0,
    log_probabilities: bool = False,
) -> Iterator[list[tuple[Row, Any]]]:
    """Decode all rows to their ends.

    Args:
        network: reads and scores the tokens.
        rows: what to decode. Their results are in them when the loop has ended.
        sampling: how tokens are chosen.
        batch_size: rows at once. 0: all.
        repetition_penalty: see TextOptions.
        log_probabilities: compute the log probability of each token.

    Yields:
        After each step the pieces that rows have finished: (row, piece).
    """
    size = batch_size or len(rows)
    # Rows of similar length together: less padding is read.
    waiting = sorted(rows, key=lambda row: len(row.prompts[0]))
    random_numbers = dict(
        zip(map(id, rows), generators(sampling, [row.number for row in rows]), strict=True)
    )
    active: list[Row] = []
    batch: DecodeBatch | None = None
    while active or waiting:
        if waiting and len(active) <= REFILL * size:
            fresh, waiting = waiting[: size - len(active)], waiting[size - len(active) :]
            new_tokens = max(row.max_new_tokens for row in fresh)
            joining = DecodeBatch(network, [p for row in fresh for p in row.prompts], new_tokens)
            if batch is None or not active:
                batch = joining
            else:
                batch.join(joining, new_tokens)
            active += fresh
        assert batch is not None
        logits = _next_logits(batch, active)
        if (mask := _stacked([row.allowed() for row in active])) is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        logits = penalise(logits, [row.generated for row in active], repetition_penalty)
        choices = choose(logits, sampling, [random_numbers[id(row)] for row in active])
        scores = [0.0] * len(active)
        if log_probabilities:
            scores = logits.log_softmax(-1).gather(1, choices[:, None])[:, 0].tolist()
        ids = choices + (active[0].ids.start or 0)
        yield [
            (row, piece)
            for row, token, score in zip(active, ids.tolist(), scores, strict=True)
            for piece in row.take(token, score)
        ]
        prompts = len(active[0].prompts)
        unfinished = compact_rows([index for index, row in enumerate(active) if not row.done])
        if len(unfinished) < len(active):
            active = [active[index] for index in unfinished]
            batch.keep([index * prompts + n for index in unfinished for n in range(prompts)])
            ids = ids[unfinished]
        if active:
            batch.step(ids.repeat_interleave(prompts) if prompts > 1 else ids)


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor | float) -> Tensor:
    """Logits led by the difference that a text makes: float32[..., V] each.

    Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598). A scale of 1 is none, 0 ignores
    the text.
    """
    return unconditional + scale * (conditional - unconditional)


def _next_logits(batch: DecodeBatch, rows: Sequence[Row]) -> Tensor:
    """float32[B, V], guided where rows have two prompts."""
    logits = batch.logits(rows[0].ids)
    if len(rows[0].prompts) == 1:
        return logits
    conditional, unconditional = logits.view(len(rows), 2, -1).unbind(1)
    scales = torch.tensor([row.guidance_scale() for row in rows], device=logits.device)
    return guide(conditional, unconditional, scales[:, None])


def _stacked(masks: Sequence[Tensor | None]) -> Tensor | None:
    """bool[B, V], or bool[V] where all rows have the same mask."""
    first = masks[0]
    if first is None or all(mask is first for mask in masks):
        return first
    return torch.stack([mask for mask in masks if mask is not None])
