"""Texts and images become sequences, and sequences become rows.

This table says which position predicts what. i is a code, t a token of a text, p one of a prompt,
M a <mask>.

    sequence        tokens                                   predicts                objective
    describe        <bos> <boi> i i i, the trunk
      each caption      ... <eoi> t t <eos>                  after <eoi>: t t <eos>  caption
      questions         ... <eoi> p p t t <eos>              after p p: t t <eos>    answer
                        ... and further turns of p p t t <eos>
    draw            <bos> t t <boi> ...                      after <bos>: t t <boi>  text
      next-token    ... <boi> i i i <eoi>                    after <boi>: i i i <eoi>  image
      masked        ... <boi> i i i M M i                    at M itself: i          reconstruct
    document        <bos> t t <boi> i i <eoi> t t <eos>      after <bos>: t t <boi>  text
                    texts and images in any order            after <boi>: i i <eoi>  image
                                                             after <eoi>: t t <eos>  caption
    text            <bos> t t <eos>, a document              after <bos>: t t <eos>  text

Prompts of answers carry no loss. A document that is longer than a row continues after another
<bos>. An image is never cut.

An image that opens a sequence has the levels that a model reads, every other one those it draws.

The captions and the questions of ``describe`` are branches 1, 2, ... of one sequence. Each
continues the trunk, branch 0, and sees no other branch. So the image is read once for all of them.
Each branch has an <eoi> of its own, at the position after the trunk: the state there is the same in
every branch, and predicts the first token of that branch. What inference reads, one image and one
text, is a sequence with one branch.

The codes of a masked level are one bidirectional block, without <boi> and <eoi>. The levels before
it stand before the block, the levels after it are left out. The block has the codes that are known
and those that are predicted, each at its position in the whole image. All other codes are left out,
in training as in drawing: a <mask> that is not predicted says nothing and costs as much as a code.
Everything else is causal. So the state at <eoi> of ``describe`` knows the image and nothing else,
and the state at <boi> of ``draw`` knows the text and nothing else. They are the embeddings.

A dropped condition is <null> in the place of the text. It carries no loss.

Shapes: n codes of an image, K codebook size, R rows, L tokens of a row.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from multimodal.devices import moved
from multimodal.model.vocabulary import Vocabulary

Ids = NDArray[np.int64]
OBJECTIVES = ("caption", "text", "image", "reconstruct", "answer")
NO_LOSS = -1
Span = tuple[str, int, int]  # an objective, and the positions [start, end) that have it
Turn = tuple[list[int], list[int]]  # ids of a question, which carry no loss, and of its answer


@dataclass(frozen=True)
class TokenSequence:
    """Arrays of one length.

    Attributes:
        ids: the tokens that are read.
        targets: the id that each position predicts.
        objectives: the index in OBJECTIVES of that prediction, or NO_LOSS.
        blocks: 1 in the bidirectional block, else 0.
        branches: 0 in the trunk, 1, 2, ... in what continues it.
        positions: for RoPE, from 0. A code of a masked level has its position in the whole image.
            Each branch goes on from the trunk.
        state: the index of the embedding.
        unknown: the share of the codes of its masked level that is unknown. 1 without one.
        cut: whether a text was cut, because it did not fit.
    """

    ids: Ids
    targets: Ids
    objectives: Ids
    blocks: Ids
    branches: Ids
    positions: Ids
    state: int = 0
    unknown: float = 1.0
    cut: bool = False

    def __len__(self) -> int:
        return len(self.ids)


def image_tokens(vocabulary: Vocabulary, codes: Sequence[int] | Ids) -> list[int]:
    """<boi>, the ids of the codes, <eoi>. codes: n image codes in [0, K)."""
    ids = [vocabulary.image_start + int(code) for code in codes]
    return [vocabulary.boi, *ids, vocabulary.eoi]


def describe_prompt(vocabulary: Vocabulary, codes: Sequence[int] | Ids) -> list[int]:
    """What a caption follows: <bos> and an image. codes: n image codes in [0, K)."""
    return [vocabulary.bos, *image_tokens(vocabulary, codes)]


def draw_prompt(vocabulary: Vocabulary, text: list[int] | None) -> list[int]:
    """What an image follows: <bos>, the ids of a text, <boi>. None is the dropped condition."""
    return [vocabulary.bos, *([vocabulary.null] if text is None else text), vocabulary.boi]


def _next_token(ids: list[int], spans: Sequence[Span], state: int = 0) -> TokenSequence:
    """A causal sequence. The positions of each span predict the token after them."""
    tokens = np.array(ids, np.int64)
    objectives = np.full(len(ids), NO_LOSS, np.int64)
    for name, start, end in spans:
        objectives[start:end] = OBJECTIVES.index(name)
    targets = np.where(objectives == NO_LOSS, 0, np.roll(tokens, -1))
    blocks, branches = np.zeros_like(tokens), np.zeros_like(tokens)
    return TokenSequence(tokens, targets, objectives, blocks, branches, np.arange(len(ids)), state)


def _branched(trunk: TokenSequence, branches: Sequence[TokenSequence]) -> TokenSequence:
    """A trunk and what continues it. The state is at the first token of the first branch."""
    parts = [trunk, *branches]
    arrays: dict[str, Any] = {
        f.name: np.concatenate([getattr(part, f.name) for part in parts])
        for f in fields(TokenSequence)
        if f.name not in ("state", "unknown", "cut")
    }
    lengths = [len(part) for part in parts]
    arrays["branches"] = np.repeat(np.arange(len(parts)), lengths)
    arrays["positions"][len(trunk) :] += len(trunk)
    return TokenSequence(state=len(trunk), **arrays)


def describe(
    vocabulary: Vocabulary,
    codes: Sequence[int] | Ids,
    texts: Sequence[list[int]],
    turns: Sequence[Turn] = (),
    max_length: int = sys.maxsize,
    written: Sequence[Turn] = (),
) -> TokenSequence:
    """An image with its captions, and with questions about it in turn.

    Args:
        codes: n image codes in [0, K).
        texts: ids of each caption.
        turns: of questions and answers.
        max_length: captions and turns that would make the sequence longer are left out. Turns come
            before the second caption. A first caption that is too long is cut, and its end is not
            learned. Without a caption a first question that is too long loses its beginning.
        written: texts by a model up to their last token, each behind its question or none:
            branches 1, 2, ... without a loss. The last token is not read.

    Raises:
        ValueError: if there is nothing but the image.
    """
    if not (texts or turns or written):
        raise ValueError("an image without a caption and a question describes nothing")
    *trunk, eoi = describe_prompt(vocabulary, codes)
    branches = [_next_token([eoi, *prompt, *text[:-1]], []) for prompt, text in written]
    room = max_length - len(trunk) - sum(len(branch) for branch in branches)
    cut = False

    def add(text: list[int]) -> None:
        nonlocal room, cut
        branch = [eoi, *text, vocabulary.eos]
        if branches and len(branch) > room:
            return
        cut = cut or len(branch) > room
        branch = branch[:room]
        branches.append(_next_token(branch, [("caption", 0, len(branch) - 1)]))
        room -= len(branch)

    for text in texts[:1]:
        add(text)
    ids, spans = [eoi], list[Span]()
    if turns and not branches and min(len(p) + len(t) + 2 for p, t in turns) > room:
        prompt, text = turns[0]
        kept = min(len(prompt), max(1, room - len(text) - 2))
        turns, cut = [(prompt[-kept:], text)], True
    for prompt, text in turns:
        turn = [*prompt, *text, vocabulary.eos]
        if cut and not branches:
            turn = turn[: room - 1]
        if len(ids) + len(turn) > room:
            continue
        spans.append(("answer", len(ids) + len(prompt) - 1, len(ids) + len(turn) - 1))
        ids += turn
    if spans:
        branches.append(_next_token(ids, spans))
        room -= len(ids)
    for text in texts[1:]:
        add(text)
    return replace(_branched(_next_token(trunk, []), branches), cut=cut)


def draw(
    vocabulary: Vocabulary,
    text: list[int] | None,
    codes: Sequence[int] | Ids | None = None,
    masked: NDArray[np.bool_] | None = None,
    known: NDArray[np.bool_] | None = None,
    level: slice = slice(None),
    max_length: int = sys.maxsize,
) -> TokenSequence:
    """A text and the image that it describes.

    Args:
        text: ids. None: the dropped condition.
        codes: those that are drawn, in [0, K). None: the sequence ends at <boi>.
        masked: bool[m], the codes to reconstruct. None: next-token prediction.
        known: bool[m], those that are read. None: all others.
        level: the m codes of the level that is masked. By default all.
        max_length: the text is cut to fit before the image, and a cut end is not learned.

    Raises:
        ValueError: if masked or known have another length than the codes of the level.
    """
    room = max(0, max_length - 2 - (0 if codes is None else len(codes) + 1))
    cut = text is not None and len(text) > room
    text = text[:room] if text is not None else None
    prompt = draw_prompt(vocabulary, text)
    boi = len(prompt) - 1
    spans = [] if text is None else [("text", 0, boi - cut)]
    if codes is None:
        return replace(_next_token(prompt, spans, state=boi), cut=cut)
    ids = prompt[:-1] + image_tokens(vocabulary, codes)
    if masked is None:
        spans = [*spans, ("image", boi, len(ids) - 1)]
        return replace(_next_token(ids, spans, state=boi), cut=cut)
    known = ~masked if known is None else known
    image = ids[boi + 1 : -1]
    before, image = image[: level.start or 0], image[level]
    if not len(masked) == len(known) == len(image):
        raise ValueError(
            f"masked, known: {len(masked)} and {len(known)} entries for {len(image)} codes"
        )
    kept = np.flatnonzero(masked | known)
    tokens = [*prompt, *before, *(image[code] for code in kept)]
    sequence = _next_token(tokens, spans, state=boi)
    start = len(prompt) + len(before)
    block = slice(start, None)
    predicted = start + np.flatnonzero(masked[kept])
    sequence.positions[block] = start + kept
    sequence.blocks[block] = 1
    sequence.targets[predicted] = sequence.ids[predicted]
    sequence.objectives[predicted] = OBJECTIVES.index("reconstruct")
    sequence.ids[predicted] = vocabulary.mask
    return replace(sequence, unknown=1 - float(known.mean()), cut=cut)


def document(
    vocabulary: Vocabulary,
    parts: Sequence[list[int] | Ids],
    max_length: int | None = None,
    read: Ids | slice = slice(None),
    drawn: Ids | slice = slice(None),
) -> list[TokenSequence]:
    """Texts and images in their order.

    Args:
        parts: ids of a text (a list), or n image codes (an array).
        max_length: tokens of a sequence. What is more continues in the next sequence.
        read: which of the n codes an image has that opens a sequence. By default all.
        drawn: which every other one has.

    Raises:
        ValueError: if an image does not fit a sequence.
    """
    sequences: list[TokenSequence] = []
    ids, spans, objective = [vocabulary.bos], list[Span](), "text"

    def extend(more: list[int], objective: str) -> None:
        spans.append((objective, len(ids) - 1, len(ids) - 1 + len(more)))
        ids.extend(more)

    def cut() -> None:
        nonlocal ids, spans, objective
        if spans:
            sequences.append(_next_token(ids, spans))
        ids, spans, objective = [vocabulary.bos], [], "text"

    for part in parts:
        if isinstance(part, list):
            while max_length is not None and len(ids) + len(part) > max_length:
                room = max_length - len(ids)
                extend(part[:room], objective)
                part = part[room:]
                cut()
            extend(part, objective)
            continue
        boi, *image = image_tokens(vocabulary, part[drawn] if spans else part[read])
        if max_length is not None and len(ids) + 1 + len(image) > max_length:
            cut()
            boi, *image = image_tokens(vocabulary, part[read])
            if 2 + len(image) > max_length:
                raise ValueError(f"an image of {len(part)} codes does not fit {max_length} tokens")
        extend([boi], objective)
        extend(image, "image")
        objective = "caption"
    # <eos> would teach to say nothing: right after a cut, or of an image that stands alone.
    silent = len(spans) == 2 if objective == "caption" else bool(sequences) and not spans
    if not silent and (max_length is None or len(ids) < max_length):
        extend([vocabulary.eos], objective)
    cut()
    return sequences


@dataclass
class Packed:
    """Rows of one length. Tensors are int64[R, L], if nothing else is said.

    Attributes:
        ids, targets, objectives, blocks, branches: as in TokenSequence.
        documents: numbers from 1 in each row. 0 is padding.
        positions: within the document.
        states: int64[sequences], where the embedding of each is in the flattened rows.
        unknown: float32[R, L], as in TokenSequence.
    """

    ids: Tensor
    targets: Tensor
    objectives: Tensor
    blocks: Tensor
    branches: Tensor
    documents: Tensor
    positions: Tensor
    states: Tensor
    unknown: Tensor

    def to(self, device: torch.device) -> "Packed":
        return Packed(**{f.name: moved(getattr(self, f.name), device) for f in fields(self)})

    @property
    def document_numbers(self) -> Tensor:
        """int64[R, L]: documents and paddings, numbered through all rows."""
        rows, length = self.ids.shape
        first = (length + 1) * torch.arange(rows, device=self.ids.device)
        return self.documents + first[:, None]

    def count(self, tokens: Tensor) -> Tensor:
        """How many of some tokens each document has: bool[R, L] -> int64[R (L + 1)]."""
        rows, length = self.ids.shape
        counts = torch.zeros(rows * (length + 1), dtype=torch.int64, device=self.ids.device)
        return counts.index_add_(0, self.document_numbers.flatten(), tokens.flatten().long())

    @property
    def efficiency(self) -> float:
        """The share of the positions that are not padding."""
        return float((self.documents > 0).float().mean())


def pack(
    sequences: list[TokenSequence], row_length: int, pad: int, row_multiple: int = 1
) -> Packed:
    """Pack sequences into rows by first-fit-decreasing.

    Args:
        sequences: their order is kept in ``states``.
        row_length: L.
        pad: the id of padding.
        row_multiple: rows of padding bring R to a multiple of this. In training each new shape
            costs kernels that are compiled and kept.

    Raises:
        ValueError: for a sequence longer than a row.
    """
    longest = max(map(len, sequences), default=0)
    if longest > row_length:
        raise ValueError(
            f"a sequence of {longest} tokens does not fit rows of {row_length}: "
            "raise row_length, or cut the text"
        )
    rows, room = list[list[int]](), list[int]()
    for i in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
        n = len(sequences[i])
        row = next((r for r, free in enumerate(room) if free >= n), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_length)
        rows[row].append(i)
        room[row] -= n
    shape = (-(-len(rows) // row_multiple) * row_multiple, row_length)
    ids, objectives = np.full(shape, pad, np.int64), np.full(shape, NO_LOSS, np.int64)
    targets, blocks, branches, documents, positions = (np.zeros(shape, np.int64) for _ in range(5))
    states, unknown = np.zeros(len(sequences), np.int64), np.ones(shape, np.float32)
    for r, members in enumerate(rows):
        start = 0
        for document, i in enumerate(members, start=1):
            sequence = sequences[i]
            here = slice(start, start + len(sequence))
            ids[r, here], targets[r, here] = sequence.ids, sequence.targets
            objectives[r, here], blocks[r, here] = sequence.objectives, sequence.blocks
            branches[r, here], positions[r, here] = sequence.branches, sequence.positions
            documents[r, here] = document
            states[i] = r * row_length + start + sequence.state
            unknown[r, here] = sequence.unknown
            start += len(sequence)
    arrays = (ids, targets, objectives, blocks, branches, documents, positions, states, unknown)
    return Packed(*(torch.from_numpy(array) for array in arrays))
