"""Samples become one batch: their sequences, packed into rows, and where the embeddings stand.

Everything random about a sample is decided by its seed alone. So a sample gives the same sequences
on every machine, whichever samples are beside it.

Shapes: B samples, n codes of an image.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from multimodal.model.lessons import answer_text, descriptions_of, exchanges_of, lesson_of
from multimodal.model.objectives import Alphabet, ObjectivesConfig, PolicyConfig, PolicyTokens
from multimodal.model.sequences import (
    NO_LOSS,
    OBJECTIVES,
    Ids,
    TokenSequence,
    describe,
    document,
    draw,
    pack,
)
from multimodal.model.templates import Templates
from multimodal.model.training_batch import TrainingBatch, TrainingSample, Written
from multimodal.model.vocabulary import Vocabulary
from multimodal.seeds import stable_number
from multimodal.tokenizers.levels import Layout, Level

# Sequences of one document in a batch. Without a limit, one book could fill a huge batch.
DOCUMENT_SEQUENCES = 8
# Empty rows are added until their number is a multiple of this. Each new shape of a batch makes
# kernels that are compiled and stay in memory.
ROW_MULTIPLE = 4
CHARACTERS_PER_TOKEN = 8  # more than of any usual text
# In the record of a document of images with a text each: it is read as a few-shot prompt is.
FEW_SHOT = "few_shot"


@dataclass(frozen=True)
class PairSequences:
    """The sequences of one image with its texts.

    Attributes:
        describe: starts with the image. Its captions and its questions are branches.
        draw: starts with the text: the first caption.
        text: the text of ``draw``. None: there is none, or it was dropped.
    """

    describe: TokenSequence
    draw: TokenSequence
    text: str | None


@dataclass(frozen=True)
class BatchBuilder:
    """Makes training batches of samples.

    Args:
        vocabulary: the ids.
        objectives: which sequences are made, and how often.
        templates: the words around questions and statements.
        encode: the text tokenizer, text -> ids.
        layout: the levels of an image's codes.
        reads: the levels of an image that is read.
        draws: the levels of an image that is drawn.
        row_length: tokens of a packed row.
        question_share: the share of the captioned samples whose questions are also used.
        captions_per_image: at most so many captions of an image are used at once. 0: all.
    """

    vocabulary: Vocabulary
    objectives: ObjectivesConfig
    templates: Templates
    encode: Callable[[str], list[int]]
    layout: Layout
    reads: Sequence[str]
    draws: Sequence[str]
    row_length: int
    question_share: float = 1.0
    captions_per_image: int = 1

    @cached_property
    def read(self) -> Ids:
        """Which of the n codes are read."""
        return self.layout.indices(self.reads).numpy()

    @cached_property
    def drawn(self) -> Ids:
        """Which of the n codes are drawn."""
        return self.layout.indices(self.draws).numpy()

    @cached_property
    def drawn_levels(self) -> list[tuple[Level, slice]]:
        """Each level that is drawn, and where its codes stand among those that are drawn."""
        levels = self.layout.chosen(self.draws)
        return [(level, self.layout.span(level.name, self.draws)) for level in levels]

    def build(
        self,
        samples: Sequence[TrainingSample],
        skip_untaught: bool = False,
        policy: PolicyConfig | None = None,
    ) -> TrainingBatch:
        """The batch of these samples.

        Args:
            skip_untaught: leave out sequences that no loss reads. This halves the cost of a run
                that only draws. An alignment loss needs all sequences.
            policy: how it learns from what the network made itself. None: there is nothing.

        Raises:
            ValueError: for a sample without text, or an image that is longer than a row.
        """
        draws = policy is not None and policy.drawings
        drawings = [written for sample in samples for written in sample.written] if draws else []
        pairs = {
            number: self.pair(replace(sample, written=()) if draws else sample)
            for number, sample in enumerate(samples)
            if not sample.document
        }
        for number, pair in pairs.items():
            longest = max(len(pair.describe), len(pair.draw))
            self._check_length(longest, f"sample {samples[number].key}")
        sequences = [pair.describe for pair in pairs.values()]
        sequences += [pair.draw for pair in pairs.values()]
        cut = {n for n, pair in pairs.items() if pair.describe.cut or pair.draw.cut}
        for number, sample in enumerate(samples):
            if sample.document:
                of_document = self.document(sample)
                sequences += of_document
                cut |= {number for sequence in of_document if sequence.cut}
        numbers, before = list(pairs), len(sequences)
        sequences += [self._drawing(written) for written in drawings]
        if skip_untaught:
            taught = [sequence for sequence in sequences if self.objectives.teaches(sequence)]
            sequences, numbers = taught or sequences[:1], []
        packed = pack(sequences, self.row_length, self.vocabulary.pad, ROW_MULTIPLE)
        image_hashes = torch.tensor([stable_number(sample.key) for sample in samples])
        text_hashes = torch.full_like(image_hashes, -1)
        for number, pair in pairs.items():
            if pair.text is not None:
                text_hashes[number] = stable_number(pair.text)
        positions = torch.zeros(2, len(samples), dtype=torch.int64)
        positions[:, numbers] = packed.states[: 2 * len(numbers)].view(2, -1)
        return TrainingBatch(
            packed,
            image_positions=positions[0],
            text_positions=positions[1],
            image_hashes=image_hashes,
            text_hashes=text_hashes,
            tokens=int((packed.documents > 0).sum()),
            cut=tuple(sorted(cut)),
            policy=None
            if policy is None
            else self._policy(samples, pairs, packed.states.tolist(), before, policy),
        )

    def _policy(
        self,
        samples: Sequence[TrainingSample],
        pairs: Mapping[int, PairSequences],
        states: Sequence[int],
        before: int,
        config: PolicyConfig,
    ) -> PolicyTokens:
        """Where the tokens that the network made are predicted.

        Args:
            states: of all sequences: of the pairs first, of drawings after ``before`` others.
        """
        starts: list[int] = []
        if config.drawings:
            made = [written for sample in samples for written in sample.written]
            starts += states[before:]
        else:
            made = [written for number in pairs for written in samples[number].written]
            for state, (number, pair) in zip(states, pairs.items(), strict=False):
                for branch, written in enumerate(samples[number].written, start=1):
                    first = int(np.searchsorted(pair.describe.branches, branch))  # its <eoi>
                    starts.append(state - pair.describe.state + first + len(written.prompt))
        ranges = zip(starts, made, strict=True)
        positions = [start + np.arange(len(written.ids)) for start, written in ranges]
        return PolicyTokens(
            torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *positions])),
            torch.tensor([token for each in made for token in each.ids], dtype=torch.int64),
            torch.tensor([w.advantage for w in made for _ in w.ids], dtype=torch.float32),
            self.alphabets(config.drawings),
            config,
        )

    def alphabets(self, drawings: bool) -> tuple[Alphabet, ...]:
        """From which ids a token of a drawing is sampled, at each place; or a token of a text."""
        vocabulary, start = self.vocabulary, self.vocabulary.image_start
        if not drawings:
            return (((0, vocabulary.text_size), (vocabulary.eos, vocabulary.eos + 1)),)
        bounds = (self.layout.first[self.drawn].tolist(), self.layout.last[self.drawn].tolist())
        ranges = dict.fromkeys(zip(*bounds, strict=True))
        return tuple(((start + first, start + last + 1),) for first, last in ranges)

    def _drawing(self, written: Written) -> TokenSequence:
        """A drawing that the network made, without a loss."""
        codes = np.array(written.ids, np.int64) - self.vocabulary.image_start
        sequence = draw(self.vocabulary, list(written.prompt), codes)
        return replace(sequence, objectives=np.full(len(sequence), NO_LOSS))

    def pair(self, sample: TrainingSample) -> PairSequences:
        """The sequences of a sample of one image, chosen by its seed."""
        lesson = lesson_of(
            sample.key,
            sample.record,
            sample.seed,
            self.templates,
            self.question_share,
            self.captions_per_image,
        )
        (codes,) = sample.codes
        texts = [self.encode(caption) for caption in lesson.captions]
        describe_image = self._describe(codes, texts, lesson.exchanges, sample.written)
        rng = np.random.default_rng([sample.seed, 1])
        form, dropped = rng.random(), rng.random() < self.objectives.drop_condition
        ids, text = (texts[0], lesson.captions[0]) if texts else (None, None)
        masked_share = self.objectives.reconstruct_share
        if not sample.drawn or form >= masked_share + self.objectives.next_token_share:
            drawing, dropped = self._text_alone(ids), False
        else:
            condition = None if dropped else ids
            if form < masked_share:
                levels = self.drawn_levels
                level, span = levels[int(rng.integers(len(levels))) if len(levels) > 1 else 0]
                drawing = self._draw(condition, codes, *random_mask(level.codes, rng), span)
            else:
                drawing = self._draw(condition, codes)
        return PairSequences(describe_image, drawing, None if dropped else text)

    def document(self, sample: TrainingSample) -> list[TokenSequence]:
        """The sequences of a document.

        If there are more than DOCUMENT_SEQUENCES, the seed picks that many neighbouring ones. Each
        epoch has another seed.
        """
        sequences = self._document_sequences(sample)
        more = len(sequences) - DOCUMENT_SEQUENCES
        rng = np.random.default_rng([sample.seed, 3])
        start = int(rng.integers(more + 1)) if more > 0 else 0
        return sequences[start : start + DOCUMENT_SEQUENCES]

    def possible(self, sample: TrainingSample) -> Iterator[TokenSequence]:
        """Every kind of sequence that a sample can make, whatever its seed is.

        Of a long document only the beginning is read.

        Raises:
            ValueError: for an image that is longer than a row, or an empty question.
        """
        sequences: list[TokenSequence] = []
        if sample.document:
            sequences += self._document_sequences(sample, DOCUMENT_SEQUENCES)
        else:
            (codes,) = sample.codes
            descriptions = descriptions_of(sample.record)
            texts = [self.encode(caption) for caption in descriptions]
            for ids in texts:
                sequences.append(self._describe(codes, [ids]))
                sequences.append(self._text_alone(ids))
            if self.question_share or not descriptions:
                for prompt, reply in exchanges_of(sample.record, self.templates):
                    exchange = (prompt, answer_text(reply))
                    sequences.append(self._describe(codes, texts[:1], [exchange]))
            if sample.drawn and self.objectives.next_token_share:
                sequences.append(self._draw(texts[0] if texts else None, codes))
            if sample.drawn and self.objectives.reconstruct_share:
                for level, span in self.drawn_levels:
                    masked = np.ones(level.codes, np.bool_)
                    sequences.append(self._draw(None, codes, masked, level=span))
        for sequence in sequences:
            self._check_length(len(sequence), f"sample {sample.key}")
            yield sequence

    def _document_sequences(
        self, sample: TrainingSample, at_most: int | None = None
    ) -> list[TokenSequence]:
        """The sequences of a document, or about the first ones: a book takes long to tokenize."""
        images, length = iter(sample.codes), 0
        parts: list[list[int] | Ids] = []
        for text in sample.document:
            if at_most is not None and length >= at_most * self.row_length:
                break
            if at_most is not None and text is not None:
                text = text[: at_most * self.row_length * CHARACTERS_PER_TOKEN]
            parts.append(next(images) if text is None else self.encode(text))
            length += len(parts[-1])
        few_shot = bool(sample.record.get(FEW_SHOT))
        later = self.read if few_shot else self.drawn
        sequences = document(self.vocabulary, parts, self.row_length, self.read, later)
        if not few_shot:
            return sequences
        # What does not fit a row would begin anew, without examples: rather have fewer of them.
        while len(sequences) > 1 and len(parts) > 4:
            parts = parts[2:]
            sequences = document(self.vocabulary, parts, self.row_length, self.read, later)
        sequence = after_examples(self.vocabulary, sequences[0])
        return [replace(sequence, cut=len(sequences) > 1)]

    def _describe(
        self,
        codes: Ids,
        texts: list[list[int]],
        exchanges: Sequence[tuple[str, str]] = (),
        written: Sequence[Written] = (),
    ) -> TokenSequence:
        turns = [(self.encode(prompt), self.encode(reply)) for prompt, reply in exchanges]
        made = [(list(each.prompt), list(each.ids)) for each in written]
        return describe(self.vocabulary, codes[self.read], texts, turns, self.row_length, made)

    def _text_alone(self, text: list[int] | None) -> TokenSequence:
        """``draw`` that ends at <boi>, without a loss where captions do not train ``text``."""
        sequence = self._draw(text)
        if self.objectives.captions_train_text:
            return sequence
        return replace(sequence, objectives=np.full(len(sequence), NO_LOSS))

    def _draw(
        self,
        text: list[int] | None,
        codes: Ids | None = None,
        masked: NDArray[np.bool_] | None = None,
        known: NDArray[np.bool_] | None = None,
        level: slice = slice(None),
    ) -> TokenSequence:
        codes = None if codes is None else codes[self.drawn]
        return draw(self.vocabulary, text, codes, masked, known, level, self.row_length)

    def _check_length(self, length: int, name: str) -> None:
        if length > self.row_length:
            raise ValueError(
                f"{name} makes a sequence of {length} tokens without a text, more than "
                f"row_length={self.row_length}: raise it"
            )


def after_examples(vocabulary: Vocabulary, sequence: TokenSequence) -> TokenSequence:
    """A document of images with a text each, as what few-shot prompts teach.

    Each text but the first is learned, after the images and texts before it. At its end <eos> is
    learned, which ends it in use, though the next image is read. The images are not learned, nor is
    the first text: nothing before it says how it is written.

    Args:
        sequence: of ``document``, with the levels of each image that are read.
    """
    caption = sequence.objectives == OBJECTIVES.index("caption")
    learned = caption & (np.cumsum(sequence.ids == vocabulary.boi) > 1)
    at_end = sequence.targets == vocabulary.boi
    return replace(
        sequence,
        objectives=np.where(learned, sequence.objectives, NO_LOSS),
        targets=np.where(at_end, vocabulary.eos, sequence.targets),
    )


def mask_ratio(uniform: float) -> float:
    """The share that is unknown, by the cosine schedule of MaskGIT (Chang et al. 2022,
    arXiv:2202.04200): [0, 1) -> (0, 1]."""
    return float(np.cos(uniform * np.pi / 2))


def random_mask(
    count: int, rng: np.random.Generator
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """What one step of a masked drawing predicts and what it knows.

    A share of the codes, by ``mask_ratio`` of a uniform number, is unknown: at least one code. A
    uniform share of the unknown codes is predicted: at least one code.

    Returns:
        masked, known: bool[count] each.
    """
    unknown = max(1, round(count * mask_ratio(rng.random())))
    to_predict = max(1, round(unknown * rng.random()))
    rank = rng.permutation(count)
    return rank < to_predict, rank >= unknown
