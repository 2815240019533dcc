"""Samples become one batch: their sequences, packed into rows, and where the embeddings stand.

Everything random about a sample is decided by its seed alone. So a batch is the same wherever and
in whatever company it is made.

Shapes: B samples, n codes of an image.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multimodal.model.lessons import answer_text, descriptions_of, exchanges_of, lesson_of
from multimodal.model.objectives import ObjectivesConfig
from multimodal.model.sequences import (
    Ids,
    Packed,
    TokenSequence,
    answer,
    describe,
    document,
    draw,
    pack,
    random_mask,
)
from multimodal.model.templates import Templates
from multimodal.model.vocabulary import Vocabulary
from multimodal.seeds import stable_number

DOCUMENT_ROWS = 8  # rows of one document in a batch: a book would make a batch of any size
ROW_MULTIPLE = 4  # rows are padded to a multiple: each new shape costs kernels that are kept


@dataclass(frozen=True)
class TrainingSample:
    """One sample of a batch.

    Attributes:
        key: its name. Equal keys are the same image to the alignment loss.
        record: what ``KEY.json`` holds.
        codes: int64[images, n], the codes of its images.
        seed: decides everything random about it.
        document: the texts of a document in their order, with None in the place of each image.
            Empty for an image with texts about it.
    """

    key: str
    record: Mapping[str, Any]
    codes: Ids
    seed: int
    document: Sequence[str | None] = ()


@dataclass(frozen=True)
class TrainingBatch:
    """What one forward pass reads.

    A document takes part in the alignment loss as an image without a text, so that every rank has
    the same number of pairs.

    Attributes:
        packed: the rows.
        image_states: int64[B], where in the flattened rows each image embedding stands (<eoi>).
        text_states: int64[B], where each text embedding stands (<boi>).
        image_ids: int64[B], equal for equal images.
        text_ids: int64[B], equal for equal texts. -1: there is no text, or it was dropped.
        codes_per_image: n.
        tokens: tokens that are not padding.
    """

    packed: Packed
    image_states: Tensor
    text_states: Tensor
    image_ids: Tensor
    text_ids: Tensor
    codes_per_image: int
    tokens: int

    def to(self, device: torch.device) -> "TrainingBatch":
        tensors = ("packed", "image_states", "text_states", "image_ids", "text_ids")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})


@dataclass(frozen=True)
class PairSequences:
    """The sequences of one image with its texts.

    Attributes:
        describe: starts with the image. Without a caption it holds the questions.
        draw: starts with the text.
        answer: the questions of an image that has a caption, too.
        text: the text of ``draw``. None: there is none, or it was dropped.
    """

    describe: TokenSequence
    draw: TokenSequence
    answer: TokenSequence | None
    text: str | None


@dataclass(frozen=True)
class BatchBuilder:
    """Makes training batches of samples.

    Args:
        vocabulary: the ids.
        objectives: which sequences are made, and how often.
        templates: the words around questions and statements.
        encode: the text tokenizer, text -> ids.
        codes_per_image: n.
        row_length: tokens of a packed row.
        question_share: the share of the samples with a caption that bring questions, too.
    """

    vocabulary: Vocabulary
    objectives: ObjectivesConfig
    templates: Templates
    encode: Callable[[str], list[int]]
    codes_per_image: int
    row_length: int
    question_share: float = 1.0

    def build(
        self, samples: Sequence[TrainingSample], skip_untaught: bool = False
    ) -> TrainingBatch:
        """The batch of these samples.

        Args:
            skip_untaught: leave out sequences that no loss reads. A run that only draws costs half.
                Not for runs with an alignment loss.

        Raises:
            ValueError: for a sample without text, or with a sequence longer than a row.
        """
        pairs = {
            row: self.pair(sample) for row, sample in enumerate(samples) if not sample.document
        }
        for row, pair in pairs.items():
            longest = max(len(pair.describe), len(pair.draw))
            self._check_length(longest, f"sample {samples[row].key}")
        sequences = [pair.describe for pair in pairs.values()]
        sequences += [pair.draw for pair in pairs.values()]
        sequences += [pair.answer for pair in pairs.values() if pair.answer is not None]
        for sample in samples:
            if sample.document:
                sequences += self.document(sample)
        rows = list(pairs)
        if skip_untaught:
            taught = [sequence for sequence in sequences if self.objectives.teaches(sequence)]
            sequences, rows = taught or sequences[:1], []
        packed = pack(sequences, self.row_length, self.vocabulary.pad, ROW_MULTIPLE)
        image_ids = torch.tensor([stable_number(sample.key) for sample in samples])
        text_ids = torch.full_like(image_ids, -1)
        for row, pair in pairs.items():
            if pair.text is not None:
                text_ids[row] = stable_number(pair.text)
        image_states, text_states = (torch.zeros_like(image_ids) for _ in range(2))
        image_states[rows], text_states[rows] = packed.states[: 2 * len(rows)].view(2, -1)
        tokens = int((packed.documents > 0).sum())
        return TrainingBatch(
            packed, image_states, text_states, image_ids, text_ids, self.codes_per_image, tokens
        )

    def pair(self, sample: TrainingSample) -> PairSequences:
        """The sequences of a sample of one image, chosen by its seed."""
        lesson = lesson_of(
            sample.key, sample.record, sample.seed, self.templates, self.question_share
        )
        (codes,) = sample.codes
        answers = self._answer(codes, lesson.exchanges) if lesson.exchanges else None
        if lesson.caption is None:
            assert answers is not None, "a lesson has a caption or an exchange"
            describe_image, answers = answers, None
        else:
            describe_image = describe(self.vocabulary, codes, self.encode(lesson.caption))
        rng = np.random.default_rng([sample.seed, 1])
        form, dropped = rng.random(), rng.random() < self.objectives.drop_condition
        ids = None if lesson.caption is None else self.encode(lesson.caption)
        masked_share = self.objectives.reconstruct_share
        if form >= masked_share + self.objectives.next_token_share:
            drawing, dropped = draw(self.vocabulary, ids), False
        else:
            masks = random_mask(len(codes), rng) if form < masked_share else ()
            drawing = draw(self.vocabulary, None if dropped else ids, codes, *masks)
        return PairSequences(describe_image, drawing, answers, None if dropped else lesson.caption)

    def document(self, sample: TrainingSample) -> list[TokenSequence]:
        """Up to DOCUMENT_ROWS sequences of a document that follow one another.

        Of a longer document the seed decides which ones: others in each epoch.
        """
        sequences = self._document_rows(sample)
        more = len(sequences) - DOCUMENT_ROWS
        rng = np.random.default_rng([sample.seed, 3])
        start = int(rng.integers(more + 1)) if more > 0 else 0
        return sequences[start : start + DOCUMENT_ROWS]

    def possible(self, sample: TrainingSample) -> Iterator[TokenSequence]:
        """Every kind of sequence that a sample can make, whatever its seed is.

        Raises:
            ValueError: for a sequence longer than a row.
        """
        sequences: list[TokenSequence] = []
        if sample.document:
            sequences += self._document_rows(sample)
        else:
            (codes,) = sample.codes
            descriptions = descriptions_of(sample.record)
            for caption in descriptions:
                ids = self.encode(caption)
                sequences.append(describe(self.vocabulary, codes, ids))
                sequences.append(draw(self.vocabulary, ids))
            if self.question_share or not descriptions:
                for prompt, reply in exchanges_of(sample.record, self.templates):
                    sequences.append(self._answer(codes, [(prompt, answer_text(reply))]))
            if self.objectives.next_token_share:
                sequences.append(draw(self.vocabulary, None, codes))
            if self.objectives.reconstruct_share:
                masked = np.ones(len(codes), np.bool_)
                sequences.append(draw(self.vocabulary, None, codes, masked))
        for sequence in sequences:
            self._check_length(len(sequence), f"sample {sample.key}")
            yield sequence

    def _document_rows(self, sample: TrainingSample) -> list[TokenSequence]:
        images = iter(sample.codes)
        parts = [next(images) if t is None else self.encode(t) for t in sample.document]
        return document(self.vocabulary, parts, self.row_length)

    def _answer(self, codes: Ids, exchanges: Sequence[tuple[str, str]]) -> TokenSequence:
        turns = [(self.encode(prompt), self.encode(reply)) for prompt, reply in exchanges]
        return answer(self.vocabulary, codes, turns, self.row_length)

    def _check_length(self, length: int, name: str) -> None:
        if length > self.row_length:
            raise ValueError(
                f"{name} makes a sequence of {length} tokens, more than "
                f"row_length={self.row_length}: raise it, or cut the text"
            )
