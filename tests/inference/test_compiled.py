"""Rows come and go, and a compiled step serves them all: what is said and drawn stays the same."""

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from multimodal.api import Model
from multimodal.inference.batch import DecodeBatch, compact_rows
from multimodal.inference.drawing import draw_codes
from multimodal.inference.text import generate_ids
from multimodal.model.compiled import (
    RECOMPILE_LIMIT,
    ROOM_MULTIPLE,
    CompiledForward,
    read_prompt,
    read_token,
)
from multimodal.options import Sampling
from tests.prompts import prompts_of

Make = Callable[..., Model]
COMPILER = any(map(shutil.which, ("g++", "clang++")))


def test_rows_that_are_done_make_room_for_others(tiny_model: Make) -> None:
    """Of different lengths, some ending early; the random numbers are those of the prompt."""
    eager = tiny_model(noise=0.1, tied=False)
    prompts = prompts_of(eager, 11) + [[1, 2, 3], [4] * 40]
    logits = eager.network.transformer.logits

    def ending(hidden: Tensor, ids: slice) -> Tensor:
        """<eos> comes when a dimension of the state says so."""
        scores = logits(hidden, ids)
        scores[:, eager.vocabulary.eos] += 9 * hidden[:, 0]
        return scores

    eager.network.transformer.logits = ending  # type: ignore[method-assign]
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=2)):
        together = generate_ids(eager, prompts, 16, sampling)
        assert len({len(text) for text in together}) > 2, "or nobody makes room"
        for size in (1, 2, 4, 12):
            assert generate_ids(eager, prompts, 16, sampling, batch_size=size) == together
    eager.network.transformer.logits = logits  # type: ignore[method-assign]
    beams = Sampling(beams=3)
    assert generate_ids(eager, prompts, 6, beams, batch_size=4) == generate_ids(
        eager, prompts, 6, beams
    )


def test_the_last_rows_move_into_the_holes() -> None:
    assert compact_rows([0, 1, 2]) == [0, 1, 2] and compact_rows([]) == []
    assert compact_rows([1, 3, 4]) == [4, 1, 3]
    assert compact_rows([2, 5, 6, 0]) == [0, 6, 2, 5]


@pytest.mark.parametrize("kept", [[4, 1, 3], [0], [2, 2, 0], [5, 4, 3, 2, 1, 0], [1] * 9])
def test_kept_rows_go_on_as_if_they_were_alone(tiny_model: Make, kept: list[int]) -> None:
    model = tiny_model(noise=0.1)
    prompts, ids = prompts_of(model), torch.tensor([7, 8])
    with torch.inference_mode():
        batch = DecodeBatch(model.network, prompts, 4)
        batch.step(ids[:1].expand(6))
        batch.keep(torch.tensor(kept))
        batch.step(ids[1:].expand(len(kept)))
        for row, number in enumerate(kept):
            alone = DecodeBatch(model.network, [prompts[number]], 4)
            for one in ids:
                alone.step(one[None])
            assert (batch.logits()[row] - alone.logits()[0]).abs().max() < 1e-5


@pytest.mark.skipif(not COMPILER, reason="compiling on a CPU needs a C++ compiler")
def test_a_compiled_step_says_the_same(tiny_model: Make) -> None:
    model = tiny_model(noise=0.1)
    prompts, drawings = prompts_of(model), ("a red bus", "two small green crosses on grey")

    def draw() -> list[Tensor]:
        causal = draw_codes(model, drawings[:1], method="causal")
        return [causal] + [draw_codes(model, [text], steps=2) for text in drawings]

    before, drawn = generate_ids(model, prompts, 16), draw()
    beams = Sampling(beams=3)
    searched = generate_ids(model, prompts, 6, beams)
    model.compile_decoding()
    assert model.network.compiled is not None
    rows: dict[str, list[int]] = {name: [] for name in vars(model.network.compiled)}

    def counted(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda ids, *rest: (rows[name].append(len(ids)), function(ids, *rest))[1]

    made = {name: counted(name, getattr(model.network.compiled, name)) for name in rows}
    model.network.compiled = CompiledForward(**made)
    assert [generate_ids(model, [prompt], 16)[0] for prompt in prompts] == before
    ones = [1] * len(prompts)
    assert rows == {"prompt": ones, "step": 15 * ones, "step_dynamic": [], "block": []}
    assert generate_ids(model, prompts, 16) == before
    assert rows["step_dynamic"] == [6] * 15
    assert generate_ids(model, prompts, 16, batch_size=4) == before, "others join"
    assert generate_ids(model, prompts, 6, beams) == searched
    assert all(map(torch.equal, draw(), drawn))
    # A drawing and its guidance are two rows.
    assert set(rows["step"]) == {1, 2} and rows["block"] == [2] * 4


def test_a_compiled_step_of_few_rows_meets_few_shapes(tiny_model: Make) -> None:
    """torch compiles anew where sizes, strides or numbers differ from all it has seen."""
    model, met = tiny_model(noise=0.1), set()
    real = partial(read_token, model.network.transformer)

    def watched(*given: Any) -> Tensor:
        tensors = [one for part in given for one in (part if isinstance(part, list) else [part])]
        met.add(tuple((one.shape, one.stride()) for one in tensors))
        return real(*given)

    model.network.compiled = CompiledForward(
        watched,
        real,
        partial(read_prompt, model.network.transformer),
        model.network.transformer.forward,
    )
    for count in range(2, 6):  # rows leave until two are left, and one
        batch = DecodeBatch(model.network, prompts_of(model)[:count], 16)
        for left in range(count, 0, -1):
            batch.keep(torch.arange(left))
            batch.step(torch.full((left,), 7))
    assert len(met) == 2
    batch.grow(ROOM_MULTIPLE)
    batch.step(torch.tensor([7]))
    assert len(met) == 3, "of the next size, not of any"


def test_what_serves_any_shape_is_compiled_for_few(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CompiledForward as far as its conditions go, which is soon done."""
    model = tiny_model(noise=0.1)
    monkeypatch.setattr(
        torch._dynamo.config, "recompile_limit", RECOMPILE_LIMIT
    )  # or it stops in silence
    step, prompt = (partial(one, model.network.transformer) for one in (read_token, read_prompt))
    any_shape = partial(torch.compile, dynamic=True, backend="eager")
    model.network.compiled = CompiledForward(
        step, *map(any_shape, (step, prompt, model.network.transformer.forward))
    )
    short, long = "a red bus", "two small green crosses above a blue ring"
    generate_ids(model, prompts_of(model), 16)
    draw_codes(model, [short])  # with its guidance: two rows
    draw_codes(model, [short], guidance_scale=1.0)
    draw_codes(model, [short, long])
    draw_codes(model, [long] * 2, guidance_scale=1.0)  # a beginning in common
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    generate_ids(model, prompts_of(model), 16, batch_size=4)
    for texts in ([short], [long], [long] * 3, [short] * 5):
        for steps in (1, 2, 3, 8):
            draw_codes(model, texts, steps=steps)
            draw_codes(model, texts, steps=steps, guidance_scale=1.0)
    generate_ids(model, prompts_of(model), 6, Sampling(beams=3))
    n = model.image_tokenizer.config.grid**2
    places, real = torch.arange(n)[None], torch.ones(1, n, dtype=torch.bool)
    with torch.inference_mode():  # the room is just as long, but for padding
        full = DecodeBatch(model.network, [[5] * (ROOM_MULTIPLE - n)], n)
        assert (
            full.forward_block(places + model.vocabulary.image_start, places, real, n).shape[1] == n
        )
