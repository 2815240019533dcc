"""Which position predicts what, how rows are packed, and the rule of attention."""

import numpy as np
import pytest
import torch

from multimodal.model.batches import random_mask
from multimodal.model.layers.attention import attention_mask
from multimodal.model.sequences import (
    NO_LOSS,
    OBJECTIVES,
    TokenSequence,
    describe,
    document,
    draw,
    pack,
)
from multimodal.model.vocabulary import SPECIALS, Vocabulary

VOCABULARY = Vocabulary(text_size=100, codebook_size=50)
TEXT, CODES = [11, 12, 13], [4, 0, 49]


def name(token: int) -> str:
    """A token as the tables below show it."""
    if token < VOCABULARY.text_size:
        return str(token)
    if token < VOCABULARY.image_start:
        return SPECIALS[token - VOCABULARY.text_size]
    return f"i{token - VOCABULARY.image_start}"


def table(sequence: TokenSequence) -> list[str]:
    """A line for each position: what it reads, what it predicts for which objective, its block."""
    lines = []
    for token, target, objective, block in zip(
        sequence.ids, sequence.targets, sequence.objectives, sequence.blocks, strict=True
    ):
        line = name(int(token))
        if objective != NO_LOSS:
            line += f" -> {name(int(target))} {OBJECTIVES[objective]}"
        lines.append(line + (" b" if block else ""))
    return lines


def test_describe() -> None:
    sequence = describe(VOCABULARY, CODES, [TEXT])
    assert table(sequence) == [
        "<bos>",
        "<boi>",
        "i4",
        "i0",
        "i49",
        "<eoi> -> 11 caption",
        "11 -> 12 caption",
        "12 -> 13 caption",
        "13 -> <eos> caption",
        "<eos>",
    ]
    assert name(int(sequence.ids[sequence.state])) == "<eoi>"


def test_draw_next_token() -> None:
    sequence = draw(VOCABULARY, TEXT, CODES)
    assert table(sequence) == [
        "<bos> -> 11 text",
        "11 -> 12 text",
        "12 -> 13 text",
        "13 -> <boi> text",
        "<boi> -> i4 image",
        "i4 -> i0 image",
        "i0 -> i49 image",
        "i49 -> <eoi> image",
        "<eoi>",
    ]
    assert name(int(sequence.ids[sequence.state])) == "<boi>"


def test_questions_follow_each_other_in_a_branch() -> None:
    """The questions carry no loss, and the state is that of the image alone."""
    turns = [([7, 8], TEXT), ([9], [10])]
    first = [
        "<bos>",
        "<boi>",
        "i4",
        "i0",
        "i49",
        "<eoi>",
        "7",
        "8 -> 11 answer",
        "11 -> 12 answer",
        "12 -> 13 answer",
        "13 -> <eos> answer",
        "<eos>",
    ]
    sequence = describe(VOCABULARY, CODES, [], turns)
    assert table(sequence) == [*first, "9 -> 10 answer", "10 -> <eos> answer", "<eos>"]
    assert sequence.state == 5
    for max_length, length in ((15, 15), (14, 12), (12, 12)):
        assert table(describe(VOCABULARY, CODES, [], turns, max_length)) == table(sequence)[:length]
    shorter = describe(VOCABULARY, CODES, [], [turns[0]], 11)  # its question loses its beginning
    assert table(shorter) == [*first[:6], *first[7:]] and shorter.cut
    with pytest.raises(ValueError, match="describes nothing"):
        describe(VOCABULARY, CODES, [])


def test_captions_and_questions_are_branches_of_one_trunk() -> None:
    turns = [([7], [8]), ([9], [10])]
    sequence = describe(VOCABULARY, CODES, [TEXT, [14]], turns)
    trunk = ["<bos>", "<boi>", "i4", "i0", "i49"]
    caption = [
        "<eoi> -> 11 caption", "11 -> 12 caption", "12 -> 13 caption", "13 -> <eos> caption",
        "<eos>",
    ]  # fmt: skip
    questions = ["<eoi>", "7 -> 8 answer", "8 -> <eos> answer", "<eos>"]
    questions += ["9 -> 10 answer", "10 -> <eos> answer", "<eos>"]
    other = ["<eoi> -> 14 caption", "14 -> <eos> caption", "<eos>"]
    assert table(sequence) == [*trunk, *caption, *questions, *other]
    assert sequence.branches.tolist() == 5 * [0] + 5 * [1] + 7 * [2] + 3 * [3]
    assert sequence.positions.tolist() == [*range(5), *range(5, 10), *range(5, 12), *range(5, 8)]
    assert sequence.state == 5
    # What does not fit is left out. The questions come before the other captions.
    for max_length, parts in (
        (20, [caption, questions, other]),
        (19, [caption, questions]),
        (17, [caption, questions]),
        (16, [caption, questions[:4]]),
        (13, [caption, other]),
        (12, [caption]),
        (10, [caption]),
    ):
        shorter = describe(VOCABULARY, CODES, [TEXT, [14]], turns, max_length)
        assert table(shorter) == trunk + sum(parts, []), max_length
        assert not shorter.cut
    cut = describe(VOCABULARY, CODES, [TEXT, [14]], turns, 8)
    assert table(cut) == [*trunk, *caption[:2], "12"] and cut.cut


def test_draw_masked() -> None:
    sequence = draw(VOCABULARY, TEXT, CODES, np.array([True, False, True]))
    assert table(sequence) == [
        "<bos> -> 11 text",
        "11 -> 12 text",
        "12 -> 13 text",
        "13 -> <boi> text",
        "<boi>",
        "<mask> -> i4 reconstruct b",
        "i0 b",
        "<mask> -> i49 reconstruct b",
    ]
    assert name(int(sequence.ids[sequence.state])) == "<boi>"
    assert sequence.positions.tolist() == [*range(8)]


def test_codes_neither_predicted_nor_known_are_left_out_and_the_others_keep_their_positions() -> (
    None
):
    masked, known = np.array([False, False, True]), np.array([True, False, False])
    sequence = draw(VOCABULARY, TEXT, CODES, masked, known)
    whole = draw(VOCABULARY, TEXT, CODES, ~known, known)
    assert table(sequence) == table(whole)[:6] + ["<mask> -> i49 reconstruct b"]
    assert sequence.positions.tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert sequence.state == whole.state


def test_a_dropped_condition_is_null_and_carries_no_loss() -> None:
    sequence = draw(VOCABULARY, None, CODES)
    assert table(sequence) == [
        "<bos>",
        "<null>",
        "<boi> -> i4 image",
        "i4 -> i0 image",
        "i0 -> i49 image",
        "i49 -> <eoi> image",
        "<eoi>",
    ]
    masked = draw(VOCABULARY, None, CODES, np.array([False, True, False]))
    assert table(masked) == [
        "<bos>", "<null>", "<boi>", "i4 b", "<mask> -> i0 reconstruct b", "i49 b"
    ]  # fmt: skip


def test_draw_without_an_image_and_text() -> None:
    sequence = draw(VOCABULARY, TEXT)
    assert table(sequence) == [
        "<bos> -> 11 text", "11 -> 12 text", "12 -> 13 text", "13 -> <boi> text", "<boi>"
    ]  # fmt: skip
    assert sequence.state == 4
    assert table(document(VOCABULARY, [TEXT])[0]) == [
        "<bos> -> 11 text", "11 -> 12 text", "12 -> 13 text", "13 -> <eos> text", "<eos>"
    ]  # fmt: skip


def test_a_document_has_texts_and_images_in_any_order() -> None:
    image, more = np.array(CODES), np.array([1, 2, 3])
    (whole,) = document(VOCABULARY, [TEXT, image, [14], more])
    assert table(whole) == [
        "<bos> -> 11 text", "11 -> 12 text", "12 -> 13 text", "13 -> <boi> text",
        "<boi> -> i4 image", "i4 -> i0 image", "i0 -> i49 image", "i49 -> <eoi> image",
        "<eoi> -> 14 caption", "14 -> <boi> caption",
        "<boi> -> i1 image", "i1 -> i2 image", "i2 -> i3 image", "i3 -> <eoi> image",
        "<eoi> -> <eos> caption", "<eos>",
    ]  # fmt: skip


@pytest.mark.parametrize("max_length", range(6, 20))
def test_a_long_document_continues_in_the_next_sequence_and_loses_nothing(max_length: int) -> None:
    parts = [[11, 12, 13, 14, 15, 16, 17, 18], np.array([1, 2, 3]), [], [19], np.array([4, 5, 6])]
    (whole,) = document(VOCABULARY, parts)
    pieces = document(VOCABULARY, parts, max_length)
    assert max(map(len, pieces)) <= max_length
    assert len(pieces) == 1 or max_length < len(whole)
    read = [token for piece in pieces for token in piece.ids[1:]]
    assert read in (whole.ids[1:].tolist(), whole.ids[1:-1].tolist())  # no room for <eos> alone
    empty = [VOCABULARY.bos, VOCABULARY.eos]
    assert all(piece.ids.tolist() != empty for piece in pieces), "none teaches to say nothing"
    assert all(piece.ids[0] == VOCABULARY.bos for piece in pieces)
    for piece in pieces:  # every token after <bos> is predicted, once
        assert piece.targets[:-1].tolist() == piece.ids[1:].tolist()
        assert (piece.objectives[:-1] >= 0).all() and piece.objectives[-1] == NO_LOSS
    with pytest.raises(ValueError, match="an image of 3 codes does not fit 5 tokens"):
        document(VOCABULARY, parts, 5)


def test_an_image_that_stands_alone_teaches_no_empty_caption() -> None:
    image = np.array(CODES)
    alone = ["<bos> -> <boi> text", "<boi> -> i4 image", "i4 -> i0 image", "i0 -> i49 image"]
    alone += ["i49 -> <eoi> image", "<eoi>"]
    assert [table(each) for each in document(VOCABULARY, [image])] == [alone]
    after_a_cut = document(VOCABULARY, [TEXT, image], 8)
    assert len(after_a_cut) == 2 and table(after_a_cut[1]) == alone
    for parts in ([TEXT, image], [image, TEXT], [image, image]):
        assert document(VOCABULARY, parts)[0].ids[-1] == VOCABULARY.eos


def test_an_empty_text() -> None:
    assert table(describe(VOCABULARY, CODES, [[]]))[-2:] == ["<eoi> -> <eos> caption", "<eos>"]
    assert table(draw(VOCABULARY, []))[0] == "<bos> -> <boi> text"
    assert table(document(VOCABULARY, [[]])[0]) == ["<bos> -> <eos> text", "<eos>"]


def test_a_mask_of_another_length_is_refused() -> None:
    for masks in ([True, False],), ([True, False, True], [False, True]):
        with pytest.raises(ValueError, match="and 2 entries for 3 codes"):
            draw(VOCABULARY, TEXT, CODES, *map(np.array, masks))


def test_the_codes_are_not_changed_by_masking() -> None:
    codes = np.array(CODES)
    draw(VOCABULARY, TEXT, codes, np.array([True, True, True]))
    assert codes.tolist() == CODES


# --- rows -----------------------------------------------------------------------------------------


def of_length(n: int, mark: int) -> TokenSequence:
    """n tokens with the id ``mark``. The state is at the last position."""
    marks = (np.full(n, mark, np.int64) for _ in range(5))
    return TokenSequence(*marks, positions=np.arange(n), state=n - 1)


def test_pack_puts_the_longest_first_into_the_first_row_with_room() -> None:
    packed = pack([of_length(n, n) for n in (2, 5, 1, 6, 3)], row_length=8, pad=9)
    assert packed.ids.tolist() == [
        [6, 6, 6, 6, 6, 6, 2, 2],
        [5, 5, 5, 5, 5, 3, 3, 3],
        [1] + 7 * [9],
    ]
    assert packed.documents.tolist() == [
        [1, 1, 1, 1, 1, 1, 2, 2],
        [1, 1, 1, 1, 1, 2, 2, 2],
        [1, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert packed.positions.tolist() == [
        [0, 1, 2, 3, 4, 5, 0, 1],
        [0, 1, 2, 3, 4, 0, 1, 2],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert packed.states.tolist() == [7, 12, 16, 5, 15], "in the order in which they were given"
    assert packed.efficiency == pytest.approx(17 / 24)
    padding = packed.documents == 0
    assert (packed.objectives[padding] == NO_LOSS).all()
    assert (packed.blocks[padding] == 0).all()


def test_pack_keeps_every_sequence_whole() -> None:
    rng = np.random.default_rng(0)
    sequences = [
        draw(VOCABULARY, TEXT[: i % 4], rng.integers(50, size=9), *random_mask(9, rng))
        if i % 2
        else describe(VOCABULARY, rng.integers(50, size=4), [TEXT, TEXT[1:]])
        for i in range(20)
    ]
    packed = pack(sequences, 40, VOCABULARY.pad)
    flat = {
        key: getattr(packed, key).flatten().numpy()
        for key in ("ids", "targets", "objectives", "blocks", "branches", "positions")
    }
    for sequence, state in zip(sequences, packed.states.tolist(), strict=True):
        here = slice(state - sequence.state, state - sequence.state + len(sequence))
        for key, values in flat.items():
            assert values[here].tolist() == getattr(sequence, key).tolist()
        assert len(packed.documents.flatten()[here].unique()) == 1
    assert int((packed.documents > 0).sum()) == sum(map(len, sequences))


def test_a_sequence_that_fits_no_row_is_an_error() -> None:
    assert pack([of_length(8, 1)], 8, 0).ids.shape == (1, 8)
    with pytest.raises(ValueError, match="9 tokens does not fit rows of 8: raise row_length"):
        pack([of_length(3, 1), of_length(9, 1)], 8, 0)


# --- what sees what -------------------------------------------------------------------------------


def test_the_attention_rule_is_that_of_the_table() -> None:
    documents = torch.tensor([[1, 1, 1, 1, 1, 2, 2]])
    blocks = torch.tensor([[0, 0, 1, 1, 0, 0, 0]])
    expected = """
        1 . . . . . .
        1 1 . . . . .
        1 1 1 1 . . .
        1 1 1 1 . . .
        1 1 1 1 1 . .
        . . . . . 1 .
        . . . . . 1 1
    """
    rows = [[mark == "1" for mark in line.split()] for line in expected.strip().splitlines()]
    assert attention_mask(documents, blocks)[0, 0].tolist() == rows


def test_a_branch_sees_its_trunk_and_itself() -> None:
    """Two documents. The first has a trunk of two tokens and branches of two, the second of one."""
    documents = torch.tensor([[1, 1, 1, 1, 1, 1, 2, 2, 2]])
    branches = torch.tensor([[0, 0, 1, 1, 2, 2, 0, 1, 2]])
    expected = """
        1 . . . . . . . .
        1 1 . . . . . . .
        1 1 1 . . . . . .
        1 1 1 1 . . . . .
        1 1 . . 1 . . . .
        1 1 . . 1 1 . . .
        . . . . . . 1 . .
        . . . . . . 1 1 .
        . . . . . . 1 . 1
    """
    rows = [[mark == "1" for mark in line.split()] for line in expected.strip().splitlines()]
    mask = attention_mask(documents, torch.zeros_like(documents), branches)
    assert mask[0, 0].tolist() == rows


def test_blocks_of_different_documents_do_not_see_each_other() -> None:
    """All masked images have block 1. The document tells two of them in a row apart."""
    documents = torch.tensor([[1, 1, 2, 2, 0]])
    blocks = torch.tensor([[1, 1, 1, 1, 0]])
    assert attention_mask(documents, blocks)[0, 0].int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_ids_of_the_vocabulary_follow_each_other() -> None:
    v = VOCABULARY
    ids = [v.bos, v.eos, v.pad, v.boi, v.eoi, v.mask, v.null]
    assert ids == list(range(100, 107))
    assert (v.image_start, v.image_end, v.size) == (107, 157, 256)
    assert Vocabulary(100, 21).size == 128 and Vocabulary(100, 22).size == 256
    with pytest.raises(ValueError, match="codebook_size=0"):
        Vocabulary(100, 0)
