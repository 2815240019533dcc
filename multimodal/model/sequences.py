"""Pairs become sequences, sequences become rows: which position predicts what, in one place.

    sequence        tokens                                   predicts                objective
    describe        <bos> <boi> i i i <eoi> t t <eos>        after <eoi>: t t <eos>  caption
    answer          <bos> <boi> i i i <eoi> p p t t <eos>    after p p: t t <eos>    answer
                    ... and further turns of p p t t <eos>
    draw            <bos> t t <boi> ...                      after <bos>: t t <boi>  text
      next-token    ... <boi> i i i <eoi>                    after <boi>: i i i <eoi>  image
      masked        ... <boi> i M M i                        at M itself: i          reconstruct
    document        <bos> t t <boi> i i <eoi> t t <eos>      after <bos>: t t <boi>  text
                    texts and images in any order            after <boi>: i i <eoi>  image
                                                             after <eoi>: t t <eos>  caption
    text            <bos> t t <eos>, a document              after <bos>: t t <eos>  text

The prompts p p of answers carry no loss. What of a document does not fit a row goes on after
another <bos>; an image is never cut. A masked image is one bidirectional block of codes, without
<boi> and <eoi>: those that are known and those that are asked for, each at the position it has in
the whole image. The others are left out, in training as in drawing: a <mask> that nobody asks for
says nothing, and costs as much as a code. The rest is causal. So the state at <eoi> of describe
knows the image and nothing else, and the state at <boi> of draw knows the text and nothing else:
they are the embeddings. A dropped condition is <null> in the place of the text, and carries no
loss.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from multimodal.model.vocabulary import Vocabulary

Ids = NDArray[np.int64]
OBJECTIVES = ("caption", "text", "image", "reconstruct", "answer")
NO_LOSS = -1
Span = tuple[str, int, int]  # an objective, and the positions [start, end) that have it


@dataclass(frozen=True)
class Sequence:
    """Arrays of one length n.

    ids: what is read; targets: the id that each position predicts; objectives: the number in
    OBJECTIVES of that prediction, or NO_LOSS; blocks: 1 in the bidirectional block, else 0;
    positions: places in the document, from 0, for RoPE; a code of a masked image has that which it
    has in the whole one. state: the index of the embedding.
    """

    ids: Ids
    targets: Ids
    objectives: Ids
    blocks: Ids
    positions: Ids
    state: int = 0

    def __len__(self) -> int:
        return len(self.ids)


def _next_token(ids: list[int], spans: SequenceOf[Span], state: int = 0) -> Sequence:
    """A causal sequence; the positions of each span predict the token after them."""
    read = np.array(ids, np.int64)
    objectives = np.full(len(ids), NO_LOSS, np.int64)
    for name, start, end in spans:
        objectives[start:end] = OBJECTIVES.index(name)
    targets = np.where(objectives == NO_LOSS, 0, np.roll(read, -1))
    return Sequence(read, targets, objectives, np.zeros_like(read), np.arange(len(ids)), state)


def describe(vocabulary: Vocabulary, codes: SequenceOf[int] | Ids, text: list[int]) -> Sequence:
    """codes: n image codes in [0, K); text: ids of the caption"""
    image = [vocabulary.image_start + int(code) for code in codes]
    prompt = describe_prompt(vocabulary, image)
    ids = [*prompt, *text, vocabulary.eos]
    eoi = len(prompt) - 1
    return _next_token(ids, [("caption", eoi, len(ids) - 1)], state=eoi)


def answer(
    vocabulary: Vocabulary,
    codes: SequenceOf[int] | Ids,
    turns: SequenceOf[tuple[list[int], list[int]]],
    longest: int | None = None,
) -> Sequence:
    """turns: ids of each question, which carry no loss, and of its answer; longest: turns after
    the first that would make the sequence longer than this are left out"""
    image = [vocabulary.image_start + int(code) for code in codes]
    ids = describe_prompt(vocabulary, image)
    state, spans = len(ids) - 1, list[Span]()
    for prompt, text in turns:
        turn = [*prompt, *text, vocabulary.eos]
        if spans and longest is not None and len(ids) + len(turn) > longest:
            continue
        spans.append(("answer", len(ids) + len(prompt) - 1, len(ids) + len(turn) - 1))
        ids += turn
    return _next_token(ids, spans, state)


def describe_prompt(vocabulary: Vocabulary, image: list[int]) -> list[int]:
    """image: ids of the codes"""
    return [vocabulary.bos, vocabulary.boi, *image, vocabulary.eoi]


def draw_prompt(vocabulary: Vocabulary, text: list[int] | None) -> list[int]:
    """text: ids of the caption; None: the dropped condition"""
    return [vocabulary.bos, *([vocabulary.null] if text is None else text), vocabulary.boi]


def draw(
    vocabulary: Vocabulary,
    text: list[int] | None,
    codes: SequenceOf[int] | Ids | None = None,
    masked: NDArray[np.bool_] | None = None,
    known: NDArray[np.bool_] | None = None,
) -> Sequence:
    """text: ids, or None for the dropped condition; codes: n image codes, or None to end at <boi>;
    masked: bool[n], the codes to reconstruct, or None for next-token prediction; known: bool[n],
    those that are read, by default all others. Errors: ``ValueError`` for masks that are not as
    long as codes."""
    prompt = draw_prompt(vocabulary, text)
    boi = len(prompt) - 1
    spans = [] if text is None else [("text", 0, boi)]
    if codes is None:
        return _next_token(prompt, spans, state=boi)
    image = [vocabulary.image_start + int(code) for code in codes]
    if masked is None:
        ids = [*prompt, *image, vocabulary.eoi]
        return _next_token(ids, [*spans, ("image", boi, boi + 1 + len(image))], state=boi)
    known = ~masked if known is None else known
    if not len(masked) == len(known) == len(image):
        raise ValueError(
            f"masked, known: {len(masked)} and {len(known)} entries for {len(image)} codes"
        )
    places = np.flatnonzero(masked | known)
    made = _next_token([*prompt, *(image[place] for place in places)], spans, state=boi)
    block = slice(boi + 1, None)
    asked = boi + 1 + np.flatnonzero(masked[places])
    made.positions[block] = boi + 1 + places
    made.blocks[block] = 1
    made.targets[asked] = made.ids[asked]
    made.objectives[asked] = OBJECTIVES.index("reconstruct")
    made.ids[asked] = vocabulary.mask
    return made


def document(
    vocabulary: Vocabulary, parts: SequenceOf[list[int] | Ids], longest: int | None = None
) -> list[Sequence]:
    """parts: ids of a text (a list), or n image codes (an array), in their order; longest: tokens
    of a sequence, what is more goes on in the next. Errors: ``ValueError`` if no image fits."""
    pieces: list[Sequence] = []
    ids, spans, name = [vocabulary.bos], list[Span](), "text"

    def extend(more: list[int], objective: str) -> None:
        spans.append((objective, len(ids) - 1, len(ids) - 1 + len(more)))
        ids.extend(more)

    def cut() -> None:
        nonlocal ids, spans, name
        if spans:
            pieces.append(_next_token(ids, spans))
        ids, spans, name = [vocabulary.bos], [], "text"

    for part in parts:
        if isinstance(part, list):
            while longest is not None and len(ids) + len(part) > longest:
                room = longest - len(ids)
                extend(part[:room], name)
                part = part[room:]
                cut()
            extend(part, name)
            continue
        image = [vocabulary.image_start + int(code) for code in part]
        if longest is not None and len(ids) + len(image) + 2 > longest:
            cut()
            if len(image) + 3 > longest:
                raise ValueError(f"an image of {len(image)} codes does not fit {longest} tokens")
        extend([vocabulary.boi], name)
        extend([*image, vocabulary.eoi], "image")
        name = "caption"
    # After a cut it would teach to say nothing after <bos>.
    if longest is None or len(ids) < longest and (spans or not pieces):
        extend([vocabulary.eos], name)
    cut()
    return pieces


def plain_text(vocabulary: Vocabulary, text: list[int]) -> Sequence:
    return document(vocabulary, [text])[0]


def mask_ratio(uniform: float) -> float:
    """How much is unknown, by the cosine schedule of MaskGIT (Chang et al. 2022,
    arXiv:2202.04200): [0, 1) -> (0, 1]"""
    return float(np.cos(uniform * np.pi / 2))


def random_mask(
    count: int, rng: np.random.Generator
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """masked, known: bool[count], what a step of a drawing asks for, and what it knows.

    A share of ``mask_ratio`` of a uniform number, at least one, is not known; of these, a uniform
    share is asked for, at least one.
    """
    unknown = max(1, round(count * mask_ratio(rng.random())))
    asked = max(1, round(unknown * rng.random()))
    rank = rng.permutation(count)
    return rank < asked, rank >= unknown


@dataclass
class Packed:
    """Rows of one length; every tensor int64[R, L], except ``states``: int64[sequences].

    documents: numbered from 1 in each row, 0 is padding; positions: within the document; states:
    the place of each sequence's embedding in the rows laid end to end.
    """

    ids: Tensor
    targets: Tensor
    objectives: Tensor
    blocks: Tensor
    documents: Tensor
    positions: Tensor
    states: Tensor

    def to(self, device: torch.device) -> "Packed":
        return Packed(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def unknown_shares(self, codes: int) -> Tensor:
        """float32[R, L] in [0, 1]: of the codes of each document's masked image, the share that is
        not known, and 1 where there is none; codes: how many a whole image has"""
        known = (self.blocks > 0) & (self.objectives != OBJECTIVES.index("reconstruct"))
        return (1 - self.count(known).to(torch.float32) / codes)[self.document_numbers]

    @property
    def document_numbers(self) -> Tensor:
        """int64[R, L]: documents, and the padding of each row, numbered through all rows."""
        rows, length = self.ids.shape
        first = (length + 1) * torch.arange(rows, device=self.ids.device)
        return self.documents + first[:, None]

    def count(self, tokens: Tensor) -> Tensor:
        """bool[R, L] -> int64[R (L + 1)]: how many of each of ``document_numbers`` there are"""
        rows, length = self.ids.shape
        counts = torch.zeros(rows * (length + 1), dtype=torch.int64, device=self.ids.device)
        return counts.index_add_(0, self.document_numbers.flatten(), tokens.flatten().long())

    @property
    def efficiency(self) -> float:
        """Share of the positions that are no padding."""
        return float((self.documents > 0).float().mean())


def pack(sequences: list[Sequence], row_length: int, pad: int, row_multiple: int = 1) -> Packed:
    """Put sequences into as few rows as first-fit-decreasing finds; their order is kept in states.

    Rows of padding bring their number to a multiple of ``row_multiple``: in training, a batch of a
    new shape costs kernels to be made and kept.

    Errors: ``ValueError`` for a sequence longer than a row.
    """
    longest = max(map(len, sequences), default=0)
    if longest > row_length:
        raise ValueError(
            f"a sequence of {longest} tokens does not fit rows of {row_length}: "
            "raise row_length, or cut the text"
        )
    rows: list[list[int]] = []
    room: list[int] = []
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
    targets, blocks, documents, positions = (np.zeros(shape, np.int64) for _ in range(4))
    states = np.zeros(len(sequences), np.int64)
    for r, members in enumerate(rows):
        start = 0
        for document, i in enumerate(members, start=1):
            one = sequences[i]
            here = slice(start, start + len(one))
            ids[r, here], targets[r, here] = one.ids, one.targets
            objectives[r, here], blocks[r, here] = one.objectives, one.blocks
            documents[r, here], positions[r, here] = document, one.positions
            states[i] = r * row_length + start + one.state
            start += len(one)
    arrays = (ids, targets, objectives, blocks, documents, positions, states)
    return Packed(*(torch.from_numpy(array) for array in arrays))
