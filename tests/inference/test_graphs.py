"""Steps over memory that stays where it is write and draw the same as plain ones.

A CUDA graph is played on a card only (tests/test_gpu_inference.py). Here the recorded function is
the function itself, so everything but the recording is what a card does.
"""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from multimodal.api import Model
from multimodal.inference.batch import DecodeBatch
from multimodal.inference.drawing import draw_codes
from multimodal.inference.text import generate_ids
from multimodal.model.layers import graphs
from multimodal.model.layers.attention import KVCache
from multimodal.model.layers.compiled import ROOM_MULTIPLE
from multimodal.model.layers.graphs import MAX_FREE, Run, StepGraphs, power_of_two
from multimodal.options import DrawOptions, TextOptions
from tests.prompts import prompts_of

Make = Callable[..., Model]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def itself(run: Run) -> Run:
    return run


@pytest.fixture
def graphed(tiny_model: Make) -> Model:
    model = tiny_model(noise=0.1)
    model.network.graphs = StepGraphs(itself)
    return model


@pytest.mark.parametrize("batch_size", [1, 4, 0], ids=["one by one", "others join", "all at once"])
def test_texts_are_those_of_plain_steps(graphed: Model, tiny_model: Make, batch_size: int) -> None:
    plain, prompts = tiny_model(noise=0.1), prompts_of(graphed)
    for options in (
        TextOptions(max_tokens=16),
        TextOptions(max_tokens=16, temperature=1.0, seed=3),
        TextOptions(max_tokens=6, beams=3),
    ):
        expected = generate_ids(plain, prompts, options, batch_size=batch_size)
        assert generate_ids(graphed, prompts, options, batch_size=batch_size) == expected


@pytest.mark.parametrize("method", ["causal", "masked"])
def test_drawings_are_those_of_plain_steps(graphed: Model, tiny_model: Make, method: str) -> None:
    options = DrawOptions(method=method, steps=3)  # type: ignore[arg-type]
    texts = ["a red bus", "two dogs", "a cat"]
    expected = draw_codes(tiny_model(noise=0.1), texts, options)
    assert torch.equal(draw_codes(graphed, texts, options), expected)


def test_states_are_those_of_plain_steps_when_rows_leave_join_and_outgrow_the_cache(
    graphed: Model, tiny_model: Make
) -> None:
    plain, prompts = tiny_model(noise=0.1), prompts_of(graphed)
    batches = [DecodeBatch(model.network, prompts[:3], 4) for model in (graphed, plain)]

    def step(count: int) -> None:
        for number in range(count):
            for batch in batches:
                batch.step(torch.arange(len(batch.hidden)) + number)
            ours, theirs = (batch.hidden for batch in batches)
            assert torch.allclose(ours, theirs, atol=1e-5)

    step(3)
    for batch in batches:
        batch.keep([0, 2])
    step(3)
    for model, batch in zip((graphed, plain), batches, strict=True):
        batch.join(DecodeBatch(model.network, prompts[3:], 4), 4)
    step(2)
    for batch in batches:
        batch.keep([0, 1, 1, 4, 4, 4, 2, 3, 0])  # as beams do
    step(2 * ROOM_MULTIPLE)
    assert batches[0].cache.capacity >= 2 * ROOM_MULTIPLE


def test_a_shape_is_run_once_recorded_once_and_played_from_then_on(tiny_model: Make) -> None:
    model, recorded, played = tiny_model(noise=0.1), list[Run](), list[int]()

    def record(run: Run) -> Run:
        recorded.append(run)

        def play() -> Tensor:
            played.append(len(recorded))
            return run()

        return play

    model.network.graphs = StepGraphs(record)
    prompts = prompts_of(model)
    for _ in range(3):  # three batches, one after the other
        batch = DecodeBatch(model.network, prompts[:3], 20)
        for _ in range(10):
            batch.step(torch.tensor([7, 8, 9]))
        del batch
    assert len(recorded) == 1 and len(played) == 29
    batch = DecodeBatch(model.network, prompts[:4], 20)  # padded rows: the same shape
    batch.step(torch.tensor([7, 8, 9, 10]))
    assert len(recorded) == 1 and len(played) == 30
    beside = DecodeBatch(model.network, prompts[:4], 20)  # while the other one is in use
    before = batch.hidden.clone()
    for _ in range(2):
        beside.step(torch.tensor([1, 2, 3, 4]))
    assert len(recorded) == 2 and torch.equal(batch.hidden, before)


def test_a_step_is_recorded_and_played_on_the_device_of_its_memory(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step launches on another device than the current one is not in the graph."""
    current, found = list[torch.device](), list[tuple[str, list[torch.device]]]()

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor.device)
        yield
        current.pop()

    def record(run: Run) -> Run:
        found.append(("recorded", current.copy()))

        def play() -> Tensor:
            found.append(("played", current.copy()))
            return run()

        return play

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    model = tiny_model(noise=0.1)
    model.network.graphs = StepGraphs(record)
    batch = DecodeBatch(model.network, prompts_of(model)[:3], 20)
    for _ in range(2):
        batch.step(torch.tensor([7, 8, 9]))
    here = [model.device]
    assert found == [("recorded", here), ("played", here)] and not current


def test_what_cannot_be_recorded_is_run(
    tiny_model: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(run: Run) -> Run:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    model, prompts = tiny_model(noise=0.1), prompts_of(tiny_model())
    expected = generate_ids(model, prompts, TextOptions(max_tokens=8))
    model.network.graphs = StepGraphs(fails)
    assert generate_ids(model, prompts, TextOptions(max_tokens=8)) == expected
    said = capsys.readouterr().err
    assert "no CUDA graph" in said and "capturing" in said and "and more" not in said


def test_memory_is_lent_to_one_at_a_time_and_little_of_it_is_kept(graphed: Model) -> None:
    graphs, transformer = graphed.network.graphs, graphed.network.transformer
    assert graphs is not None
    one = graphs.cache(transformer, 3, 100)
    other = graphs.cache(transformer, 3, 100)
    assert one.address != other.address
    assert (one.most_rows, one.capacity) == (4, ROOM_MULTIPLE)
    address = one.address
    one.keys[0].fill_(torch.nan)
    del one
    again = graphs.cache(transformer, 4, 90)
    assert again.address == address and not again.keys[0].any()
    larger = graphs.cache(transformer, 4, ROOM_MULTIPLE + 1)
    assert larger.capacity == 2 * ROOM_MULTIPLE and len(graphs._memories) == 3
    del again, other, larger
    graphs.cache(transformer, 8, 8 * ROOM_MULTIPLE)
    assert len(graphs._memories) == 1, "it has room for what the others had"
    for rows in (16, 32, 64, 128, 256):  # less room in each row, so none replaces another
        graphs.cache(transformer, rows, 512 * 8 * ROOM_MULTIPLE // rows**2)
    assert len(graphs._memories) <= MAX_FREE + 1


def test_weights_that_moved_are_not_read_where_they_were(graphed: Model, tiny_model: Make) -> None:
    prompts, options = prompts_of(graphed), TextOptions(max_tokens=8)
    before = generate_ids(graphed, prompts, options)
    other = tiny_model(seed=1, noise=0.1)
    graphed.network.transformer.load_state_dict(other.network.transformer.state_dict())
    expected = generate_ids(other, prompts, options)
    assert generate_ids(graphed, prompts, options) == expected != before, "in place"
    graphed.network.double().float()
    assert generate_ids(graphed, prompts, options) == expected


def test_a_copy_has_graphs_of_its_own(graphed: Model) -> None:
    prompts, options = prompts_of(graphed), TextOptions(max_tokens=8)
    expected = generate_ids(graphed, prompts, options)
    assert graphed.network.graphs is not None and graphed.network.graphs._memories
    for network in (copy.deepcopy(graphed.network), pickle.loads(pickle.dumps(graphed.network))):
        assert network.graphs is not None and not network.graphs._memories
        assert network.graphs._record is itself
        twin = Model(network, graphed.text_tokenizer, graphed.image_tokenizer)
        assert generate_ids(twin, prompts, options) == expected


class Card:
    """Stands for torch.cuda: what is recorded where, on a card that is not here."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.pools: list[int] = []  # of each graph
        self.streams: list[Any] = []  # on which each graph was recorded
        self.now = self.first = self.Stream(0)
        card = self

        class Graph:
            def capture_begin(self, pool: int, capture_error_mode: str) -> None:
                self.used = pool
                card.pools.append(pool)
                card.streams.append(card.now)

            def capture_end(self) -> None:
                self.ended = True

            def pool(self) -> int:
                return self.used

            def replay(self) -> None:
                pass

        @contextmanager
        def on(stream: Any) -> Iterator[None]:
            before, card.now = card.now, stream
            yield
            card.now = before

        handles = iter(range(100, 200))
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "Stream", self.Stream)
        patch.setattr(torch.cuda, "stream", on)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "current_stream", lambda *_: card.now)

    class Stream:
        def __init__(self, device: int) -> None:
            self.waited_for: list[Any] = []

        def wait_stream(self, other: Any) -> None:
            self.waited_for.append(other)


def test_graphs_of_a_card_share_memory_and_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not the memory of graphs that are all gone, which torch refuses."""
    card = Card(monkeypatch)
    monkeypatch.setattr(graphs, "_shared", cache(graphs._shared.__wrapped__))
    plays = [graphs.cuda_graph(lambda: torch.ones(2)) for _ in range(3)]
    assert card.pools == [100, 100, 100] and len(set(map(id, card.streams))) == 1
    assert card.streams[0] is not card.first
    card.now = other = card.Stream(0)
    for play in plays:
        assert torch.equal(play(), torch.ones(2))
    assert other.waited_for == [card.first], "once: a graph may use what the last one used"
    plays.clear()
    del play
    gc.collect()
    graphs.cuda_graph(lambda: torch.ones(2))
    assert card.pools[-1] == 101 and card.streams[-1] is card.streams[0]


def test_no_step_of_another_thread_comes_between_a_result_and_its_copy(tiny_model: Make) -> None:
    """Graphs share memory, so it would write over the result."""

    class Result:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def __getitem__(self, rows: slice) -> "Result":
            return Result(self.tensor[rows])

        def clone(self) -> Tensor:
            assert graphs.ONE_AT_A_TIME.locked()
            return self.tensor.clone()

    def record(run: Run) -> Any:
        assert graphs.ONE_AT_A_TIME.locked()
        return lambda: Result(run())

    model = tiny_model(noise=0.1)
    model.network.graphs = StepGraphs(record)
    expected = generate_ids(tiny_model(noise=0.1), prompts_of(model), TextOptions(max_tokens=4))
    assert generate_ids(model, prompts_of(model), TextOptions(max_tokens=4)) == expected
    assert not graphs.ONE_AT_A_TIME.locked()


def test_where_memory_is_short_free_caches_are_given_back(graphed: Model) -> None:
    lender, transformer = graphed.network.graphs, graphed.network.transformer
    assert lender is not None
    batch = DecodeBatch(graphed.network, prompts_of(graphed)[:3], ROOM_MULTIPLE)
    batch.step(torch.tensor([7, 8, 9]))
    lent = lender.cache(transformer, 2, 100)
    free = weakref.ref(lender._memories[batch.cache.address].keys[0])
    del batch
    found, empty_cache = list[bool](), transformer.empty_cache

    def short(rows: int, columns: int) -> KVCache:
        found.append(free() is not None)
        if len(found) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty_cache(rows, columns)

    transformer.empty_cache = short  # type: ignore[method-assign]
    # More rows and fewer columns than what is free has, which is kept where there is room.
    made = lender.cache(transformer, 64, 1)
    assert made.most_rows == 64 and found == [True, False]
    assert set(lender._memories) == {lent.address, made.address}


def test_what_has_graphs_is_not_compiled(graphed: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    graphed.compile_decoding()
    assert graphed.network.compiled is None
    # Experts on a card have none: how many tokens each gets is known only when it runs.
    graphed.network.graphs = None
    monkeypatch.setattr(Model, "device", torch.device("cuda"))
    graphed.compile_decoding()
    assert graphed.network.compiled is not None


@pytest.mark.parametrize(("number", "expected"), [(1, 1), (2, 2), (3, 4), (4, 4), (129, 256)])
def test_powers_of_two(number: int, expected: int) -> None:
    assert power_of_two(number) == expected


def test_graphs_are_not_used_with_gradients_nor_under_autocast(graphed: Model) -> None:
    prompts = prompts_of(graphed)
    with torch.autocast("cpu", torch.bfloat16):
        assert DecodeBatch(graphed.network, prompts, 4).graphs is None
    with torch.enable_grad():
        assert DecodeBatch(graphed.network, prompts, 4).graphs is None
    assert DecodeBatch(graphed.network, prompts, 4, exact=True).graphs is None
    assert DecodeBatch(graphed.network, prompts, 4).graphs is graphed.network.graphs
