"""What a GPU writes, draws and embeds is what a CPU does: every path, with and without CUDA graphs.

pytest -m gpu                     on a machine with a GPU
TEST_DEVICE=cpu pytest -m gpu     anywhere, to see that the tests themselves work
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from multimodal.api import Model
from multimodal.export.quantize import quantized_network
from multimodal.inference.batch import DecodeBatch
from multimodal.inference.codec import decode_images, encode_images
from multimodal.inference.drawing import draw_codes
from multimodal.inference.embedding import embed_codes, embed_texts
from multimodal.inference.json_schema import Schema
from multimodal.inference.likelihoods import choice_likelihoods, text_likelihoods
from multimodal.inference.text import answer_codes, caption_codes, generate_ids
from multimodal.model.layers.compiled import ROOM_MULTIPLE
from multimodal.model.layers.experts import ExpertsConfig
from multimodal.model.layers.graphs import StepGraphs
from multimodal.options import AnswerOptions, DrawOptions, EditOptions, TextOptions
from tests.prompts import prompts_of

pytestmark = pytest.mark.gpu
Make = Callable[..., Model]
TEXTS = ["a red bus", "two dogs run on the beach", "a cat"]
SCHEMA = {
    "type": "object",
    "properties": {"word": {"type": "string", "maxLength": 6}, "ok": {"type": "boolean"}},
    "required": ["word", "ok"],
    "additionalProperties": False,
}


def codes_of(count: int = 3) -> Tensor:
    return torch.randint(64, (count, 16), generator=torch.Generator().manual_seed(0))


def photo(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC)


def pixels_of(model: Model) -> Tensor:
    images = [np.asarray(photo(n).resize((32, 32))) for n in range(3)]
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return (stacked.float() / 127.5 - 1).to(model.device)


def ids(**options: Any) -> Callable[[Model], Any]:
    """Texts after prompts; options: of TextOptions, and batch_size."""
    size = options.pop("batch_size", 0)
    return lambda model: generate_ids(
        model, prompts_of(model), TextOptions(max_tokens=12, **options), batch_size=size
    )


def drawn(**options: Any) -> Callable[[Model], Any]:
    return lambda model: draw_codes(model, TEXTS, DrawOptions(**{"steps": 4, **options}))


def schema_texts(model: Model) -> Any:
    options = TextOptions(max_tokens=40, temperature=1.0)
    return generate_ids(model, prompts_of(model)[:3], options, schema=Schema(model, SCHEMA))


def mixed(model: Model) -> Any:
    options = {"output": "any", "max_tokens": 24, "temperature": 1.0, "seed": 3}
    return model.generate([photo(), " and "], **options)  # type: ignore[arg-type]


def streamed(model: Model) -> Any:
    return [str(piece) for piece in model.stream([photo(), "a "], max_tokens=12)]


WORK: dict[str, Callable[[Model], Any]] = {
    "greedy": ids(),
    "sampled": ids(temperature=1.0, top_k=20, top_p=0.9, seed=3),
    "penalty": ids(repetition_penalty=1.3),
    "one by one": ids(batch_size=1),
    "others join": ids(batch_size=3),
    "beams": ids(beams=3),
    "schema": schema_texts,
    "captions": lambda model: caption_codes(model, codes_of()),
    "choices": lambda model: answer_codes(
        model, codes_of(), ["is it?"] * 3, AnswerOptions(), choices=["yes", "no"]
    ),
    "caption of an image": lambda model: model.caption(photo(), max_tokens=8),
    "mixed": mixed,
    "stream": streamed,
    "draw causal": drawn(method="causal"),
    "draw masked": drawn(method="masked"),
    "draw masked, rising guidance": drawn(method="masked", guidance_schedule="rising"),
    "draw without guidance": drawn(method="causal", guidance_scale=1.0),
    "draw candidates": drawn(method="masked", candidates=2),
    "edit": lambda model: model.edit(photo(), (8, 8, 40, 30), "a cat", steps=3),
    "outpaint": lambda model: model.outpaint(photo(), (8, 0, 8, 0), "a cat", steps=3),
    "vary": lambda model: model.vary(photo(), 0.5, "a cat", steps=3),
    "likelihoods of texts": lambda model: text_likelihoods(model, codes_of(), TEXTS),
    "likelihoods of choices": lambda model: choice_likelihoods(
        model, codes_of(1), ["is it?"], [["yes", "no"]]
    ),
    "embed texts": lambda model: embed_texts(model, TEXTS),
    "embed codes": lambda model: embed_codes(model, codes_of()),
    "encode images": lambda model: encode_images(model, pixels_of(model)).cpu(),
    "decode images": lambda model: decode_images(model, codes_of().to(model.device)).cpu(),
}
STEPS = ("greedy", "sampled", "others join", "beams", "schema", "mixed", "draw causal")


def same(ours: Any, theirs: Any) -> bool:
    """Equal, and numbers that were computed nearly so. A pixel may be rounded to its neighbour."""
    if isinstance(ours, Tensor):
        assert ours.device.type == "cpu" and ours.shape == theirs.shape
        return torch.allclose(ours.float(), theirs.float(), atol=2e-4, rtol=1e-3)
    if isinstance(ours, Image.Image):
        a, b = (np.asarray(image, np.int16) for image in (ours, theirs))
        return a.shape == b.shape and int(abs(a - b).max()) <= 2
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def graphs(device: torch.device) -> StepGraphs:
    """CUDA graphs. On a CPU the same steps, not recorded."""
    return StepGraphs() if device.type == "cuda" else StepGraphs(lambda run: run)


@pytest.fixture
def on_cpu(tiny_model: Make) -> Model:
    return tiny_model(seed=2, noise=0.1)


@pytest.fixture
def there(tiny_model: Make, device: torch.device) -> Model:
    """The same model on the device, with graphs."""
    model = tiny_model(seed=2, noise=0.1).to(device)
    model.network.graphs = graphs(device)
    return model


@pytest.mark.parametrize("name", WORK)
def test_a_gpu_gives_what_a_cpu_gives(name: str, there: Model, on_cpu: Model) -> None:
    """Twice: the second time steps of the first one are played again."""
    expected = WORK[name](on_cpu)
    assert same(WORK[name](there), expected)
    assert same(WORK[name](there), expected)


@pytest.mark.parametrize("name", STEPS)
def test_and_without_graphs(name: str, there: Model, on_cpu: Model) -> None:
    there.network.graphs = None
    assert same(WORK[name](there), WORK[name](on_cpu))


def test_a_loaded_model_has_graphs_and_they_are_recorded(
    there: Model, device: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    there.to(device)
    assert (there.network.graphs is not None) == (device.type == "cuda")
    there.network.graphs = graphs(device)
    for _ in range(2):
        ids()(there)
    memories = there.network.graphs._memories.values()
    runs = [step._runs for memory in memories for step in memory.steps.values()]
    assert max(runs) > 10
    assert "CUDA graph" not in capsys.readouterr().err, "none of them failed"


@torch.inference_mode()
def test_graphs_of_many_rows_that_leave_and_outgrow_their_cache(
    there: Model, on_cpu: Model
) -> None:
    prompts = prompts_of(on_cpu, 40)
    batches = [DecodeBatch(model.network, prompts, 8) for model in (there, on_cpu)]
    for number in range(ROOM_MULTIPLE + 8):
        if number in (5, 60, 90):
            for batch in batches:
                batch.keep(list(range(0, len(batch.hidden), 3)))
        for batch in batches:
            batch.step((torch.arange(len(batch.hidden)) + number).to(batch.hidden.device))
        ours, theirs = (batch.hidden.cpu() for batch in batches)
        assert torch.allclose(ours, theirs, atol=1e-3, rtol=1e-3), number


@torch.inference_mode()
def test_two_batches_decode_in_turn(there: Model, on_cpu: Model) -> None:
    """Each has memory of its own, though both have the same shape."""
    prompts = prompts_of(on_cpu, 4)
    pairs = [
        [DecodeBatch(m.network, prompts[n : n + 2], 8) for n in (0, 2)] for m in (there, on_cpu)
    ]
    for number in range(5):
        for ours, theirs in zip(*pairs, strict=True):
            for batch in (ours, theirs):
                batch.step(torch.tensor([number, 7], device=batch.hidden.device))
            assert torch.allclose(ours.hidden.cpu(), theirs.hidden, atol=1e-3, rtol=1e-3)


def test_bfloat16_is_near_float32(there: Model, on_cpu: Model) -> None:
    there.network.to(torch.bfloat16)
    ours, expected = (embed_texts(model, TEXTS) for model in (there, on_cpu))
    assert (ours * expected).sum(-1).min() > 0.99
    batch = DecodeBatch(there.network, prompts_of(on_cpu), 4)
    plain = DecodeBatch(on_cpu.network, prompts_of(on_cpu), 4)
    for token in (7, 8, 9):
        for each in (batch, plain):
            each.step(torch.full((6,), token, device=each.hidden.device))
    distance = batch.logits().cpu().softmax(-1) - plain.logits().softmax(-1)
    assert distance.abs().sum(-1).max() < 0.1


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_models_write_the_same(there: Model, on_cpu: Model, bits: Any) -> None:
    """A GPU multiplies with floats, a CPU with integers: the scores are near."""
    smaller = [quantized_network(on_cpu.network, bits) for _ in range(2)]
    smaller[0].to(there.device).graphs = graphs(there.device)
    batches = [DecodeBatch(network, prompts_of(on_cpu), 8) for network in smaller]
    for token in (7, 8, 9):
        for batch in batches:
            batch.step(torch.full((6,), token, device=batch.hidden.device))
    ours, theirs = (batch.logits().cpu().softmax(-1) for batch in batches)
    assert (ours - theirs).abs().sum(-1).max() < 0.1


def test_experts_write_the_same_without_graphs(tiny_model: Make, device: torch.device) -> None:
    plain, model = (tiny_model(noise=0.1, experts=ExpertsConfig(4, 2)) for _ in range(2))
    model.to(device)
    assert model.network.graphs is None
    assert ids()(model) == ids()(plain)


def test_options_of_edits_are_those_of_a_cpu(there: Model, on_cpu: Model) -> None:
    options = EditOptions(steps=3, temperature=1.0, seed=5, negative="a dog")
    known = codes_of()
    known[:, 4:12] = -1
    ours, theirs = (
        draw_codes(model, TEXTS, DrawOptions(method="masked", **vars(options)), known=known)
        for model in (there, on_cpu)
    )
    assert torch.equal(ours, theirs)
    assert torch.equal(ours[:, :4], known[:, :4])
