"""The one loop that decodes tokens: for texts, JSON, images, and any mix of them.

A ``Row`` is one prompt and what becomes of it. A ``Decoder`` holds the rows that are decoded
together. Rows of any kind join it at any step, and leave when they are done. In each step

1. the network's state gives the logits of the next token, guided where a row has two prompts,
2. each row says which ids may come next, and one is chosen,
3. each row takes its token, and rows that are done leave,
4. the network reads the tokens.

``decode`` runs a list of rows to their ends. The server (multimodal/serve) lets rows join as
requests come. Beam search is apart (inference/beams.py): its rows copy one another.

Shapes: B rows, V ids that rows can choose from.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multimodal.inference.batch import DecodeBatch, compact_rows
from multimodal.inference.sampling import NOT_FINITE, choose, generators, penalise
from multimodal.model.layers.prefixes import PrefixCache
from multimodal.model.layers.transformer import ALL
from multimodal.model.network import MultimodalLM
from multimodal.options import Sampling

REFILL = 0.75  # waiting rows join when at most this share of the batch is still decoding


class Row(ABC):
    """One prompt and its continuation. Subclasses say what may come next, and take it in.

    Attributes:
        number: with the seed, decides its random numbers.
        prompts: the prompt and, for guidance, the prompt that guidance moves away from.
        ends: where pieces of the prompt end that other prompts may begin with.
        max_new_tokens: how many tokens it usually takes. The cache grows if they are more.
        ids: the range of ids it chooses from.
        generated: ids that a repetition penalty makes less likely.
        done: whether it takes no further token.
        alternatives: how many of the likeliest ids it wants to know at each step.
        likeliest: these ids before each ``take``, with their log probabilities.
    """

    ids: slice = ALL
    ends: Sequence[int] = ()
    alternatives = 0
    likeliest: Sequence[tuple[int, float]] = ()

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


@dataclass(frozen=True)
class Joining:
    """Rows that join, and how their tokens are chosen: the arguments of ``Decoder.join``."""

    rows: Sequence[Row]
    sampling: Sampling
    repetition_penalty: float = 1.0
    log_probabilities: bool = False


@dataclass(eq=False)
class _Member:
    """A row in the batch.

    Attributes:
        sampling, penalty, scored: how its tokens are chosen, and whether they are scored.
        dice: its random numbers.
        slots: its rows of the batch, one for each of its prompts.
    """

    row: Row
    sampling: Sampling
    penalty: float
    scored: bool
    dice: torch.Generator
    slots: list[int]

    def group(self) -> tuple[object, ...]:
        """Members with the same value have their tokens chosen together."""
        how, ids = self.sampling, self.row.ids
        drawn = (how.temperature, how.top_k, how.top_p, how.min_p)
        return ids.start, ids.stop, len(self.slots), *drawn, self.penalty, self.scored


class Decoder:
    """Rows that are decoded together.

    Args:
        network: reads and scores the tokens.
        exact: no bit of a row depends on the others: see ``DecodeBatch``.
        prefixes: with ``exact``, keeps pieces of prompts.

    Attributes:
        failed: the rows for which the last step found no token, and why. They have left.
    """

    def __init__(
        self, network: MultimodalLM, exact: bool = False, prefixes: PrefixCache | None = None
    ) -> None:
        self.network, self.exact, self.prefixes = network, exact, prefixes
        self._members: list[_Member] = []
        self._groups: list[list[_Member]] = []
        self._batch: DecodeBatch | None = None
        self.failed: list[tuple[Row, Exception]] = []

    def __len__(self) -> int:
        return len(self._members)

    @property
    def rows(self) -> list[Row]:
        """The rows that are being decoded."""
        return [member.row for member in self._members]

    def join(
        self,
        rows: Sequence[Row],
        sampling: Sampling,
        repetition_penalty: float = 1.0,
        log_probabilities: bool = False,
    ) -> None:
        """Read the prompts of rows, and decode them from the next step on.

        Args:
            sampling: how their tokens are chosen.
            repetition_penalty: see TextOptions.
            log_probabilities: compute the log probability of each token.

        Raises:
            ValueError: if they do not fit into the model or the memory. Then none of them joins.
        """
        self.join_together([Joining(rows, sampling, repetition_penalty, log_probabilities)])

    @torch.inference_mode()
    def join_together(self, several: Sequence["Joining"]) -> None:
        """As ``join``, for rows whose tokens are chosen in several ways: all prompts are read at
        once.
        """
        rows = [row for part in several for row in part.rows]
        new_tokens = max(row.max_new_tokens for row in rows)
        prompts, ends = list[list[int]](), list[Sequence[int]]()
        for row in rows:
            prompts += row.prompts
            ends += [row.ends, *[()] * (len(row.prompts) - 1)]
        joining = DecodeBatch(self.network, prompts, new_tokens, self.exact, ends, self.prefixes)
        start = 0
        if self._batch is None or not self._members:
            self._batch = joining
        else:
            start = len(self._batch.hidden)
            self._batch.join(joining, new_tokens)
        for part in several:
            how = part.sampling, part.repetition_penalty, part.log_probabilities
            dice = generators(part.sampling, [row.number for row in part.rows])
            for row, each in zip(part.rows, dice, strict=True):
                slots = list(range(start, start + len(row.prompts)))
                self._members.append(_Member(row, *how, each, slots))
                start += len(slots)
        self._regroup()

    @torch.inference_mode()
    def drop(self, rows: Iterable[Row]) -> None:
        """Rows leave before they are done. Those that are not here are ignored."""
        gone = set(map(id, rows))
        self._keep([member for member in self._members if id(member.row) not in gone])

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, Any]]:
        """Decode one token of each row. Rows for which that fails are in ``failed``.

        Returns:
            The pieces that rows have finished: (row, piece).
        """
        assert self._batch is not None, "no row has joined"
        pieces: list[tuple[Row, Any]] = []
        self.failed = []
        ids = self._batch.last_position.new_zeros(len(self._batch.hidden))
        for group in self._groups:
            slots = torch.tensor([member.slots for member in group], device=ids.device)
            try:
                chosen, scores = self._choose(group, slots)
            except Exception as error:  # the other groups have logits of their own
                self.failed += [(member.row, error) for member in group]
                continue
            ids[slots] = chosen[:, None]
            for member, token, score in zip(group, chosen.tolist(), scores, strict=True):
                try:
                    if token < (member.row.ids.start or 0):  # NOTHING
                        raise ValueError(NOT_FINITE)
                    pieces += [(member.row, piece) for piece in member.row.take(token, score)]
                except Exception as error:
                    self.failed.append((member.row, error))
        left = {id(row) for row, _ in self.failed}
        left |= {id(member.row) for member in self._members if member.row.done}
        kept = self._keep([member for member in self._members if id(member.row) not in left])
        if self._members:
            self._batch.step(ids if kept is None else ids[kept])
        return pieces

    def _choose(self, group: Sequence[_Member], slots: Tensor) -> tuple[Tensor, list[float]]:
        """The next ids of a group, int64[B], and their log probabilities (0 if not scored).

        slots: int64[B, prompts of each].
        """
        assert self._batch is not None
        rows, first = [member.row for member in group], group[0]
        some = len(group) < len(self._members) or slots.shape[1] > 1
        logits = self._batch.logits(first.row.ids, slots.T.flatten() if some else None)
        if slots.shape[1] > 1:
            conditional, unconditional = logits.chunk(2)
            scales = torch.tensor([row.guidance_scale() for row in rows], device=logits.device)
            logits = guide(conditional, unconditional, scales[:, None])
        if (mask := _stacked([row.allowed() for row in rows])) is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        logits = penalise(logits, [row.generated for row in rows], first.penalty)
        choices = choose(logits, first.sampling, [member.dice for member in group])
        start = first.row.ids.start or 0
        if not first.scored:
            return choices + start, [0.0] * len(group)
        table = logits.log_softmax(-1)
        for row, scores in zip(rows, table, strict=True):
            if row.alternatives:
                best = scores.topk(min(row.alternatives, len(scores)))
                likely = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                row.likeliest = [(start + number, score) for number, score in likely]
        return choices + start, table.gather(1, choices[:, None].clamp(min=0))[:, 0].tolist()

    def _keep(self, members: list[_Member]) -> list[int] | None:
        """Go on with these members only.

        Returns:
            The rows of the batch that are kept, in their new order. None: all, as they were.
        """
        if len(members) == len(self._members):
            return None
        assert self._batch is not None
        kept = compact_rows([slot for member in members for slot in member.slots])
        place = {slot: number for number, slot in enumerate(kept)}
        for member in members:
            member.slots = [place[slot] for slot in member.slots]
        self._members = sorted(members, key=lambda member: member.slots)
        if members:
            self._batch.keep(kept)
        else:
            self._batch = None
        self._regroup()
        return kept

    def _regroup(self) -> None:
        groups: dict[object, list[_Member]] = {}
        for member in self._members:
            groups.setdefault(member.group(), []).append(member)
        self._groups = list(groups.values())


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
        repetition_penalty, log_probabilities: see ``Decoder.join``.

    Yields:
        After each step the pieces that rows have finished: (row, piece).

    Raises:
        ValueError: if the logits are not finite.
    """
    size, decoder = batch_size or len(rows), Decoder(network)
    # Rows of similar length together: less padding is read.
    waiting = sorted(rows, key=lambda row: len(row.prompts[0]))
    while len(decoder) or waiting:
        if waiting and len(decoder) <= REFILL * size:
            room = size - len(decoder)
            fresh, waiting = waiting[:room], waiting[room:]
            decoder.join(fresh, sampling, repetition_penalty, log_probabilities)
        pieces = decoder.step()
        for _, error in decoder.failed:
            raise error
        yield pieces


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor | float) -> Tensor:
    """Logits led by the difference that a text makes: float32[..., V] each.

    Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598). A scale of 1 is none, 0 ignores
    the text.
    """
    return unconditional + scale * (conditional - unconditional)


def _stacked(masks: Sequence[Tensor | None]) -> Tensor | None:
    """bool[B, V], or bool[V] where all rows have the same mask."""
    first = masks[0]
    if all(mask is first for mask in masks):
        return first
    size = next(len(mask) for mask in masks if mask is not None)
    device = next(mask.device for mask in masks if mask is not None)
    everything = torch.ones(size, dtype=torch.bool, device=device)
    return torch.stack([everything if mask is None else mask for mask in masks])
