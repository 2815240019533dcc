"""Exact rows: not one bit of a row depends on the rows beside it."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from multimodal.api import Model
from multimodal.inference.decode import Decoder, Joining, Row
from multimodal.inference.drawing import ImageRow, guided_prompts
from multimodal.inference.mixed import Grammar, MixedRow
from multimodal.model.layers.prefixes import PrefixCache
from multimodal.options import EditOptions, TextOptions
from tests.prompts import prompts_of

Make = Callable[..., Model]
HOT = TextOptions(temperature=1.0, max_tokens=40, seed=3)
DRAW = EditOptions(guidance_scale=2.0, seed=5)


class Scored(MixedRow):
    """A text that keeps the exact log probabilities of its tokens."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.scores: list[float] = []

    def take(self, token: int, log_probability: float) -> Iterator[Any]:
        self.scores.append(log_probability)
        yield from super().take(token, log_probability)


class Drawn(ImageRow):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.scores: list[float] = []

    def take(self, token: int, log_probability: float = 0.0) -> Iterator[Any]:
        self.scores.append(log_probability)
        yield from super().take(token, log_probability)


def texts(model: Model, prompts: list[list[int]], options: TextOptions) -> list[Scored]:
    grammar = Grammar.of(model)
    return [Scored(model, n, ids, "text", options, grammar) for n, ids in enumerate(prompts)]


def drawings(model: Model, prompts: list[str]) -> list[Drawn]:
    both = guided_prompts(model, prompts, DRAW)
    return [Drawn(model, n, several, DRAW) for n, several in enumerate(both)]


def numbers_of(row: Scored | Drawn) -> tuple[list[int], list[float]]:
    return (row.codes if isinstance(row, Drawn) else row.generated), row.scores


def finish(decoder: Decoder) -> None:
    while len(decoder):
        decoder.step()


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_rows_of_all_kinds_that_come_and_go_have_the_bits_that_they_have_alone(
    tiny_model: Make, threads: int
) -> None:
    model, before = tiny_model(noise=0.1, tied=False), torch.get_num_threads()
    prompts = [*prompts_of(model, 11), [7] * 3, list(range(2, 200)) * 3]
    captions = ["a red bus", "two dogs run on the beach", "a"]
    torch.set_num_threads(threads)
    try:
        alone: list[Scored | Drawn] = [*texts(model, prompts, HOT), *drawings(model, captions)]
        for row in alone:
            decoder = Decoder(model.network, exact=True)
            sampling = DRAW if isinstance(row, Drawn) else HOT
            decoder.join([row], sampling, log_probabilities=True)
            finish(decoder)
        together: list[Scored | Drawn] = [*texts(model, prompts, HOT), *drawings(model, captions)]
        decoder = Decoder(model.network, exact=True)
        # Others come first, last, and are dropped in between.
        other = TextOptions(temperature=0.5, max_tokens=90)
        gone: list[Row] = list(texts(model, prompts[4:9], other))
        decoder.join(gone, other)
        for number, row in enumerate(together):
            sampling = DRAW if isinstance(row, Drawn) else HOT
            decoder.join([row], sampling, log_probabilities=True)
            for _ in range(number % 4):
                decoder.step()
            if number == 6:
                decoder.drop(gone[1:4])
        finish(decoder)
    finally:
        torch.set_num_threads(before)
    for row, same in zip(together, alone, strict=True):
        assert numbers_of(row) == numbers_of(same)
    assert len({len(row.scores) for row in alone}) > 1


def test_exact_rows_are_those_of_plain_decoding_but_for_the_last_bits(tiny_model: Make) -> None:
    model = tiny_model(noise=0.1, tied=False)
    results = []
    for exact in (False, True):
        rows = texts(model, prompts_of(model, 5), HOT)
        decoder = Decoder(model.network, exact)
        decoder.join(rows, HOT, log_probabilities=True)
        finish(decoder)
        results.append(rows)
    for plain, exact_row in zip(*results, strict=True):
        assert plain.generated == exact_row.generated
        assert plain.scores == pytest.approx(exact_row.scores, abs=1e-4)


def test_a_member_that_leaves_early_and_one_that_cannot_join_change_nothing(
    tiny_model: Make,
) -> None:
    model = tiny_model(noise=0.1, tied=False)
    (alone,), (row,) = (texts(model, [[1, 2, 3]], HOT) for _ in range(2))
    decoder = Decoder(model.network, exact=True)
    decoder.join([alone], HOT, log_probabilities=True)
    finish(decoder)
    decoder.join([row], HOT, log_probabilities=True)
    with pytest.raises(ValueError, match="reads at most"):
        decoder.join(texts(model, [[5] * 5000], HOT), HOT)
    decoder.drop(texts(model, [[1]], HOT))  # it never joined
    assert decoder.rows == [row]
    finish(decoder)
    assert numbers_of(row) == numbers_of(alone)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kept", [0, 1 << 24])
def test_prompts_that_are_read_together_have_the_bits_that_they_have_alone(
    tiny_model: Make, threads: int, kept: int
) -> None:
    """The matrices are the starter's in size. Some begin alike, and one pass does not hold all."""
    small, before = tiny_model(), torch.get_num_threads()
    parts = small.text_tokenizer, small.image_tokenizer, small.config.objectives
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model.new("mini", *parts)
    dice = random.Random(0)
    lengths = [1, 7, 8, 9, 17, 50, 51, 64, 90, 120, 200, 700, 30]
    prompts = [[dice.randrange(2, 200) for _ in range(length)] for length in lengths]
    prompts += [prompts[9][:40] + prompts[5], prompts[9][:40] + prompts[6], prompts[5]]
    ends = [[len(prompt) // 2] for prompt in prompts[:13]] + [[40], [40, 60], [20]]

    def rows_of(numbers: range) -> list[Scored]:
        rows = [texts(model, [prompts[number]], HOT)[0] for number in numbers]
        for row, number in zip(rows, numbers, strict=True):
            row.ends = ends[number]
        return rows

    torch.set_num_threads(threads)
    try:
        alone = [rows_of(range(number, number + 1))[0] for number in range(len(prompts))]
        for row in alone:
            decoder = Decoder(model.network, exact=True)
            decoder.join([row], HOT, log_probabilities=True)
            finish(decoder)
        together, prefixes = rows_of(range(len(prompts))), PrefixCache(kept)
        decoder = Decoder(model.network, exact=True, prefixes=prefixes)
        cold = TextOptions(temperature=0.0, max_tokens=9)
        decoder.join_together([
            Joining(together[:6], HOT, log_probabilities=True),
            Joining(texts(model, prompts[3:5], cold), cold),
            Joining(together[6:], HOT, log_probabilities=True),
        ])  # fmt: skip
        finish(decoder)
    finally:
        torch.set_num_threads(before)
    for row, same in zip(together, alone, strict=True):
        assert numbers_of(row) == numbers_of(same)
    assert (prefixes.hits > 0) == bool(kept)
