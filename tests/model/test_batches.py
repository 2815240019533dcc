"""The sequences that samples become, and the batches of sequences."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from multimodal.api import Model
from multimodal.model.batches import (
    DOCUMENT_SEQUENCES,
    ROW_MULTIPLE,
    PairSequences,
    mask_ratio,
    random_mask,
)
from multimodal.model.sequences import NO_LOSS, OBJECTIVES, TokenSequence
from tests.samples import samples_of

Make = Callable[..., Model]


def test_the_draw_of_a_pair_depends_on_its_seed_alone(tiny_model: Make) -> None:
    model = tiny_model(reconstruct_share=0.5, next_token_share=0.25, drop_condition=0.2)
    n, vocabulary, builder = 2000, model.vocabulary, model.batch_builder(160)
    (sample,) = samples_of([{"captions": ["a cat"]}])

    def pairs_of(seeds: Sequence[int]) -> list[PairSequences]:
        return [builder.pair(replace(sample, seed=seed)) for seed in seeds]

    pairs = pairs_of(range(n))
    draws = [pair.draw for pair in pairs]
    kinds = [set(sequence.objectives.tolist()) - {-1, 1} for sequence in draws]
    assert kinds.count({3}) / n == pytest.approx(0.5, abs=0.04)
    assert kinds.count({2}) / n == pytest.approx(0.25, abs=0.04)
    dropped = [bool(sequence.ids[1] == vocabulary.null) for sequence in draws]
    # One that ends at <boi> has only its text to teach: it is never dropped.
    assert not any(d for d, kind in zip(dropped, kinds, strict=True) if not kind)
    assert np.mean([d for d, k in zip(dropped, kinds, strict=True) if k]) == pytest.approx(
        0.2, abs=0.03
    )
    assert [pair.text for pair in pairs] == [None if drop else "a cat" for drop in dropped]
    for pair, seed in zip(pairs_of([7, 3, 7]), (7, 3, 7), strict=True):
        assert pair.draw.ids.tolist() == draws[seed].ids.tolist()


def test_the_questions_of_an_image_are_a_branch_beside_its_captions(tiny_model: Make) -> None:
    """Without a caption it is drawn from the dropped condition, whatever the seed is."""
    model = tiny_model(reconstruct_share=0.5, next_token_share=0.5, drop_condition=0.0)
    builder, questions = model.batch_builder(160), [("what?", "a cat"), ("where?", "there")]
    samples = samples_of(
        [
            {"captions": ["a cat"]},
            {"qa": questions},
            {"captions": ["a cat"], "qa": questions},
        ]
    )
    pairs = [builder.pair(sample) for sample in samples]

    def kinds_of(sequence: TokenSequence) -> list[set[str]]:
        """The objectives of each branch."""
        return [
            {OBJECTIVES[o] for o in sequence.objectives[sequence.branches == branch] if o >= 0}
            for branch in range(1, int(sequence.branches.max()) + 1)
        ]

    assert [kinds_of(pair.describe) for pair in pairs] == [
        [{"caption"}],
        [{"answer"}],
        [{"caption"}, {"answer"}],
    ]
    drawing = pairs[1].draw
    assert drawing.ids[1] == model.vocabulary.null
    assert OBJECTIVES.index("text") not in drawing.objectives
    with pytest.raises(ValueError, match="sample 0 has no captions and no questions"):
        builder.pair(*samples_of([{}]))


@pytest.mark.parametrize("used", ["alignment_weight", "next_token_share", "reconstruct_share", ""])
def test_captions_are_texts_only_where_images_are_drawn_or_aligned(
    tiny_model: Make, used: str
) -> None:
    """Otherwise texts are those of documents, and a caption is learned behind its image."""
    names = ("alignment_weight", "next_token_share", "reconstruct_share")
    model = tiny_model(**{name: 0.3 * (name == used) for name in names}, drop_condition=0.0)
    pair, book = samples_of([{"captions": ["a cat"]}, {}])
    book = replace(book, document=["a page"])
    batch = model.batch_builder(160).build([pair, book], skip_untaught=not used)
    is_text = batch.packed.objectives == OBJECTIVES.index("text")
    learned = batch.packed.targets[is_text].tolist()
    page, cat = (model.text_tokenizer.encode(text) for text in ("a page", "a cat"))
    assert learned[-len(page) - 1 :] == [*page, model.vocabulary.eos] or used
    assert len(learned) == len(page) + 1 + (len(cat) + 1 if used else 0)
    assert (batch.packed.objectives == OBJECTIVES.index("caption")).sum() == len(cat) + 1
    sequences = [set(row[row > 0].tolist()) for row in batch.packed.documents]
    assert sum(map(len, sequences)) == (3 if used else 2)
    kinds = [each.objectives.tolist() for each in model.batch_builder(160).possible(pair)]
    assert any(OBJECTIVES.index("text") in kind for kind in kinds) == bool(used)


def test_captions_of_one_image_are_branches_as_long_as_they_fit(tiny_model: Make) -> None:
    """And the image is drawn from the first of them."""
    model = tiny_model(drop_condition=0.0)
    captions = ["a cat", "two dogs run", "a red bus in the snow", "the cat sleeps"]
    (sample,) = samples_of([{"captions": captions}], [3])
    encode, eos = model.text_tokenizer.encode, model.vocabulary.eos

    def texts_of(captions_per_image: int, row_length: int = 160) -> list[str]:
        builder = model.batch_builder(row_length)
        pair = replace(builder, captions_per_image=captions_per_image).pair(sample)
        assert (
            pair.text is not None
            and encode(pair.text) == pair.draw.ids[1 : pair.draw.state].tolist()
        )
        sequence = pair.describe
        branches = [
            sequence.ids[sequence.branches == n] for n in range(1, sequence.branches.max() + 1)
        ]
        assert all(branch[-1] == eos for branch in branches)
        texts = [model.text_tokenizer.decode(branch[1:-1].tolist()) for branch in branches]
        assert texts[0] == pair.text
        return texts

    whole = texts_of(0)
    assert sorted(whole) == sorted(captions) and texts_of(9) == whole
    for count in (1, 2, 3):
        assert texts_of(count) == whole[:count]
    length = 18 + len(encode(whole[0])) + 2  # of <bos> <boi>, 16 codes, and the first caption
    assert texts_of(0, length) == whole[:1]
    fitting = {text for text in whole[1:] if len(encode(text)) + 2 <= 6}
    assert texts_of(0, length + 6)[1:] in [[text] for text in fitting] + [[]]
    seeds = [replace(sample, seed=seed) for seed in range(40)]
    builder = replace(model.batch_builder(160), captions_per_image=2)
    assert {builder.pair(each).text for each in seeds} == set(captions)


def test_a_batch_knows_where_its_embeddings_stand(tiny_model: Make) -> None:
    """A document takes its place among the pairs, and has no text to align."""
    model = tiny_model(drop_condition=0.0)
    vocabulary = model.vocabulary
    first, book, last = samples_of([{"captions": ["a cat"]}, {}, {"captions": ["a dog"]}])
    book = replace(book, document=["a page", None, "another one"])
    batch = model.batch_builder(160).build([first, book, last])
    flat = batch.packed.ids.flatten()
    assert flat[batch.image_positions[[0, 2]]].tolist() == [vocabulary.eoi] * 2
    assert flat[batch.text_positions[[0, 2]]].tolist() == [vocabulary.boi] * 2
    assert batch.text_hashes[1] == -1 and (batch.text_hashes[[0, 2]] >= 0).all()
    assert len(set(batch.image_hashes.tolist())) == 3
    assert len(flat) % ROW_MULTIPLE == 0 and len(batch.packed.ids) % ROW_MULTIPLE == 0
    assert batch.tokens == int((batch.packed.documents > 0).sum())
    again = model.batch_builder(160).build([replace(last, key="0"), first])
    assert again.image_hashes[0] == again.image_hashes[1], "equal keys are equal images"


def test_a_text_that_does_not_fit_is_cut_and_its_end_is_not_learned(tiny_model: Make) -> None:
    """Every target is that of the whole text, as far as the row goes, and there is no <eos>."""
    model, length = tiny_model(), 40
    vocabulary, encode = model.vocabulary, model.text_tokenizer.encode
    long = "a red bus in the snow " * 20
    short, pairs, asked, told = samples_of(
        [
            {"captions": ["a cat"]},
            {"captions": [long]},
            {"qa": [[long, "yes"]]},
            {"qa": [["what?", long]]},
        ]
    )
    builder, whole = model.batch_builder(length), model.batch_builder(9999)
    batch = builder.build([short, pairs, asked, told])
    assert batch.cut == (1, 2, 3) and batch.packed.ids.shape[1] == length
    for sample in (short, pairs, asked, told):
        for sequence in builder.possible(sample):
            assert len(sequence) <= length
    described, uncut = builder.pair(pairs).describe, whole.pair(pairs).describe
    learned = described.objectives != NO_LOSS
    assert learned.sum() == length - 18 - 1, "all but the last token, which predicts nothing"
    assert np.array_equal(described.ids, uncut.ids[:length])
    assert np.array_equal(described.targets[learned], uncut.targets[:length][learned])
    # The answer stays whole where the question is long, and the question where the answer is.
    ids = builder.pair(asked).describe
    answer = [*encode(" yes"), vocabulary.eos]
    assert ids.targets[ids.objectives != NO_LOSS].tolist() == answer
    ids = builder.pair(told).describe
    targets = ids.targets[ids.objectives != NO_LOSS].tolist()
    assert targets and targets == encode(f" {long}")[: len(targets)]
    # A long question gives way to a short one.
    (mixed,) = samples_of([{"qa": [[long, "yes"], ["what?", "cat"]]}])
    assert not replace(builder, row_length=90).pair(mixed).describe.cut
    for pair in (builder.pair(replace(pairs, seed=seed)).draw for seed in range(30)):
        assert len(pair) <= length
        text = pair.targets[pair.objectives == OBJECTIVES.index("text")]
        assert text.tolist() == encode(long)[: len(text)], "<boi> is not learned after a cut"


def test_the_check_before_training_reads_the_beginning_of_a_book(tiny_model: Make) -> None:
    model = tiny_model()
    lengths: list[int] = []

    def counted(text: str) -> list[int]:
        lengths.append(len(text))
        return model.text_tokenizer.encode(text)

    builder = replace(model.batch_builder(160), encode=counted)
    (sample,) = samples_of([{}])
    book = replace(sample, document=["a red bus in the snow " * 9000, None, "two dogs " * 9000])
    sequences = list(builder.possible(book))
    assert len(sequences) >= DOCUMENT_SEQUENCES and sum(lengths) < 20_000
    short = replace(sample, document=["a red bus", None, "two dogs"])
    assert [s.ids.tolist() for s in builder.possible(short)] == [
        s.ids.tolist() for s in builder.document(short)
    ]


def test_the_mask_ratio_is_a_cosine() -> None:
    expected = {0: 1.0, 1 / 3: math.sqrt(3) / 2, 1 / 2: math.sqrt(1 / 2), 2 / 3: 0.5}
    for uniform, ratio in expected.items():
        assert mask_ratio(uniform) == pytest.approx(ratio)
    assert 0 < mask_ratio(1 - 1e-9) < 1e-8


def test_a_random_mask_follows_the_schedule() -> None:
    both = [random_mask(64, np.random.default_rng(seed)) for seed in range(4000)]
    masked, known = (np.array(masks) for masks in zip(*both, strict=True))
    assert not (masked & known).any()
    unknown = 64 - known.sum(1)
    assert unknown.min() == 1 and unknown.max() == 64
    assert unknown.mean() / 64 == pytest.approx(2 / math.pi, abs=0.02)  # mean of the cosine
    # The median of uniform is 1/2.
    assert np.median(unknown) / 64 == pytest.approx(math.cos(math.pi / 4), abs=0.03)
    assert known.mean(0) == pytest.approx(np.full(64, 1 - 2 / math.pi), abs=0.06), (
        "all codes are masked alike"
    )
    share = masked.sum(1) / unknown
    assert masked.sum(1).min() == 1 and share.max() == 1
    early = unknown > 32
    assert np.quantile(share[early], [0.25, 0.5, 0.75]) == pytest.approx(
        [0.25, 0.5, 0.75], abs=0.04
    )
    assert masked.mean(0) == pytest.approx(np.full(64, 1 / math.pi), abs=0.06)
    again = random_mask(64, np.random.default_rng(7))
    assert (again[0] == masked[7]).all() and (again[1] == known[7]).all()
