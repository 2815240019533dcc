"""Compiled passes write and draw the same as plain ones, and are compiled for few shapes."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from multimodal.api import Model
from multimodal.inference.batch import DecodeBatch
from multimodal.inference.drawing import draw_codes
from multimodal.inference.text import generate_ids
from multimodal.model.layers.compiled import (
    RECOMPILE_LIMIT,
    ROOM_MULTIPLE,
    CompiledForward,
)
from multimodal.options import DrawOptions, TextOptions
from tests.prompts import prompts_of

Make = Callable[..., Model]
COMPILER = any(map(shutil.which, ("g++", "clang++")))


@pytest.mark.skipif(not COMPILER, reason="compiling on a CPU needs a C++ compiler")
def test_compiled_passes_give_the_same(tiny_model: Make) -> None:
    model = tiny_model(noise=0.1)
    prompts, drawings = prompts_of(model), ("a red bus", "two small green crosses on grey")

    def draw() -> list[Tensor]:
        causal = draw_codes(model, drawings[:1], DrawOptions(method="causal"))
        masked = DrawOptions(method="masked", steps=2)
        return [causal] + [draw_codes(model, [text], masked) for text in drawings]

    greedy, beams = TextOptions(max_tokens=16), TextOptions(beams=3, max_tokens=6)
    before, drawn = generate_ids(model, prompts, greedy), draw()
    searched = generate_ids(model, prompts, beams)
    model.compile_decoding()
    assert model.network.compiled is not None
    rows: dict[str, list[int]] = {name: [] for name in vars(model.network.compiled)}

    def counted(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda ids, *rest: (rows[name].append(len(ids)), function(ids, *rest))[1]

    passes = {name: counted(name, getattr(model.network.compiled, name)) for name in rows}
    model.network.compiled = CompiledForward(**passes)
    assert [generate_ids(model, [prompt], greedy)[0] for prompt in prompts] == before
    ones = [1] * len(prompts)
    assert rows == {"prompt": ones, "step": 15 * ones, "step_dynamic": [], "block": []}
    assert generate_ids(model, prompts, greedy) == before
    assert rows["step_dynamic"] == [6] * 15
    assert generate_ids(model, prompts, greedy, batch_size=4) == before, "others join"
    assert generate_ids(model, prompts, beams) == searched
    assert all(map(torch.equal, draw(), drawn))
    # A drawing and its guidance are two rows.
    assert set(rows["step"]) == {1, 2} and rows["block"] == [2] * 4


def test_a_compiled_step_of_few_rows_meets_few_shapes(tiny_model: Make) -> None:
    """torch recompiles for sizes, strides or numbers that it has not seen yet."""
    model, shapes = tiny_model(noise=0.1), set()
    transformer = model.network.transformer
    forward_token = transformer.forward_token

    def watched(*given: Any) -> Tensor:
        tensors = [x for part in given for x in (part if isinstance(part, list) else [part])]
        shapes.add(tuple((x.shape, x.stride()) for x in tensors))
        return forward_token(*given)

    model.network.compiled = CompiledForward(
        step=watched,
        step_dynamic=forward_token,
        prompt=transformer.forward_prompt,
        block=transformer.forward,
    )
    for count in range(2, 6):  # rows leave until two are left, and one
        batch = DecodeBatch(model.network, prompts_of(model)[:count], 16)
        for left in range(count, 0, -1):
            batch.keep(torch.arange(left))
            batch.step(torch.full((left,), 7))
    assert len(shapes) == 2
    assert batch.cache.capacity == ROOM_MULTIPLE
    while batch.cache.length < ROOM_MULTIPLE:
        batch.step(torch.tensor([7]))
    assert len(shapes) == 2, "up to the end of the cache"
    batch.step(torch.tensor([7]))
    assert len(shapes) == 3, "of the next size, not of any"
    assert batch.cache.capacity == 2 * ROOM_MULTIPLE


@pytest.mark.slow
# At its limit torch stops to compile in silence. (A setting that monkeypatch undoes is deleted.)
@torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, error_on_recompile=False)
def test_passes_for_any_shape_are_compiled_for_few(tiny_model: Make) -> None:
    """Compiled as far as torch's guards. That is quick."""
    model = tiny_model(noise=0.1)
    transformer = model.network.transformer
    any_shape = partial(torch.compile, dynamic=True, backend="eager")
    model.network.compiled = CompiledForward(
        step=transformer.forward_token,
        step_dynamic=any_shape(transformer.forward_token),
        prompt=any_shape(transformer.forward_prompt),
        block=any_shape(transformer.forward),
    )
    short, long = "a red bus", "two small green crosses above a blue ring"
    greedy, masked = TextOptions(max_tokens=16), DrawOptions(method="masked")
    unguided = replace(masked, guidance_scale=1.0)
    generate_ids(model, prompts_of(model), greedy)
    draw_codes(model, [short], masked)  # with its guidance: two rows
    draw_codes(model, [short], unguided)
    draw_codes(model, [short, long], masked)
    draw_codes(model, [long] * 2, unguided)  # a beginning in common
    torch._dynamo.config.error_on_recompile = True
    generate_ids(model, prompts_of(model), greedy, batch_size=4)
    for texts in ([short], [long], [long] * 3, [short] * 5):
        for steps in (1, 2, 3, 8):
            draw_codes(model, texts, replace(masked, steps=steps))
            draw_codes(model, texts, replace(unguided, steps=steps))
    generate_ids(model, prompts_of(model), TextOptions(beams=3, max_tokens=6))
    n = model.codes_per_image
    positions, valid = torch.arange(n)[None], torch.ones(1, n, dtype=torch.bool)
    ids = positions + model.vocabulary.image_start
    with torch.inference_mode():  # without padding, the cache would be full
        full = DecodeBatch(model.network, [[5] * (ROOM_MULTIPLE - n)], n)
        assert full.forward_block(ids, positions, valid, n).shape[1] == n
