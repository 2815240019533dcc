"""Beginnings of prompts that are kept: the same bits as without, under a limit."""

from collections.abc import Callable

import pytest
import torch

from multimodal.api import Model
from multimodal.inference.batch import MIN_SHARED, DecodeBatch, pieces_of
from multimodal.inference.decode import Decoder
from multimodal.model.layers.graphs import StepGraphs
from multimodal.model.layers.prefixes import PrefixCache
from tests.inference.test_exact import HOT, Scored, finish, texts

Make = Callable[..., Model]
FIRST, SECOND = list(range(5, 45)), list(range(60, 90))  # an image and a text, or two texts
PROMPTS = [[*FIRST, 7, 8], [*FIRST, *SECOND, 9], [*FIRST, *SECOND], [*SECOND, 3], [*FIRST, 7, 8]]
ENDS = [[40], [40, 70], [40], [30], [40]]


def rows_of(model: Model) -> list[Scored]:
    rows = texts(model, PROMPTS, HOT)
    for row, ends in zip(rows, ENDS, strict=True):
        row.ends = ends
    return rows


def numbers(model: Model, prefixes: PrefixCache | None, together: bool) -> list[object]:
    """The tokens and exact scores of all rows."""
    rows, decoder = rows_of(model), Decoder(model.network, exact=True, prefixes=prefixes)
    for part in [rows] if together else [[row] for row in rows]:
        decoder.join(part, HOT, log_probabilities=True)
        if not together:
            finish(decoder)
    finish(decoder)
    return [(row.generated, row.scores) for row in rows]


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_not_one_bit_depends_on_what_was_kept(
    tiny_model: Make, one_thread: None, threads: int
) -> None:
    torch.set_num_threads(threads)
    model = tiny_model(noise=0.3)
    expected = numbers(model, None, together=False)
    prefixes = PrefixCache(1 << 20)
    assert numbers(model, prefixes, together=False) == expected
    assert prefixes.hits == 4, "FIRST three times more, and SECOND after it"
    assert prefixes.tokens_kept == 40 * 3 + 30
    assert numbers(model, prefixes, together=True) == expected
    assert numbers(model, PrefixCache(30_000), together=True) == expected, "some have to go"
    # The same numbers as of prompts that are read whole, but for rounding.
    plain = texts(model, PROMPTS, HOT)
    decoder = Decoder(model.network)
    decoder.join(plain, HOT, log_probabilities=True)
    finish(decoder)
    for row, found in zip(plain, expected, strict=True):
        assert (row.generated, pytest.approx(row.scores, abs=1e-3)) == found


def test_a_network_with_graphs_keeps_them_too(tiny_model: Make, one_thread: None) -> None:
    """Exact rows have caches of their own, and other rows of the network have lent ones."""
    plain, graphed = tiny_model(noise=0.3), tiny_model(noise=0.3)
    graphed.network.graphs = StepGraphs(lambda run: run)
    expected, prefixes = numbers(plain, None, together=False), PrefixCache(1 << 20)
    exact, rows = Decoder(graphed.network, exact=True, prefixes=prefixes), rows_of(graphed)
    other, others = Decoder(graphed.network), texts(graphed, PROMPTS, HOT)
    for row, beside in zip(rows, others, strict=True):  # all join, and are decoded in turn
        exact.join([row], HOT, log_probabilities=True)
        other.join([beside], HOT, log_probabilities=True)
        exact.step()
        other.step()
    finish(exact)
    finish(other)
    assert [(row.generated, row.scores) for row in rows] == expected and prefixes.hits == 4
    for row, found in zip(others, expected, strict=True):
        assert (row.generated, pytest.approx(row.scores, abs=1e-3)) == found


def test_another_network_has_prefixes_of_its_own(tiny_model: Make, one_thread: None) -> None:
    one, other = tiny_model(noise=0.3), tiny_model(noise=0.3, seed=1)
    prefixes = PrefixCache(1 << 20)
    first, again = (numbers(model, prefixes, together=False) for model in (one, other))
    assert again == numbers(other, None, together=False) and first != again


def test_where_prompts_are_cut() -> None:
    prompt = list(range(100))
    for ends, lengths in (
        ((), [100]),
        ((40, 80), [40, 40, 20]),
        ((MIN_SHARED - 1, 40, 41), [40, 60]),  # too short to be worth a pass
        ((100, 300), [100]),
    ):
        pieces = pieces_of(prompt, ends)
        assert list(map(len, pieces)) == lengths and sum(pieces, []) == prompt


def test_the_least_recently_used_make_room(tiny_model: Make) -> None:
    network = tiny_model(noise=0.1).network
    prompts = [list(range(start, start + 20)) for start in (5, 30, 60)]

    def read(number: int, prefixes: PrefixCache) -> None:
        with torch.inference_mode():
            DecodeBatch(network, [prompts[number]], 1, True, [()], prefixes)

    measured = PrefixCache(1 << 20)
    read(0, measured)
    prefixes = PrefixCache(2 * measured.bytes)
    for number in (0, 1, 0, 2, 0, 1):  # 2 takes the place of 1
        read(number, prefixes)
    assert (prefixes.hits, prefixes.misses, len(prefixes)) == (2, 4, 2)
    assert prefixes.bytes <= prefixes.max_bytes
    small = PrefixCache(measured.bytes - 1)
    for _ in range(2):
        read(0, small)
    assert (small.hits, small.bytes, len(small)) == (0, 0, 0)
