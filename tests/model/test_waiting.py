"""A training step never waits for a GPU: no tensor is read by the host, and none is searched.

On a GPU each of these operations stops the host until the card has done all that it was given.
Then the card waits for the host. Here they are counted on a CPU. ``-m gpu`` lets torch itself
refuse them (tests/test_gpu_training.py).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from multimodal.api import Model
from multimodal.devices import moved
from multimodal.inference.sampling import choose, generators, penalise
from multimodal.model.distillation import Teaching
from multimodal.model.layers.attention import attention_mask, block_mask
from multimodal.model.layers.transformer import Transformer
from multimodal.model.network import MultimodalLM
from multimodal.model.objectives import OBJECTIVES, Predicted
from multimodal.model.sequences import NO_LOSS
from multimodal.model.training_batch import TrainingBatch, TrainingSample
from multimodal.options import Sampling
from multimodal.tokenizers.detail import make_quantizer
from multimodal.tokenizers.quantizers.quantizer import CodebookUsage
from multimodal.tokenizers.text import TextTokenizer
from multimodal.train.examples import Examples
from multimodal.train.sharding import clip_gradients
from multimodal.train.tokenizers.semantic import SemanticLoss
from tests.samples import samples_of

Make = Callable[..., Model]
READS = ("_local_scalar_dense", "item", "is_nonzero", "equal")
SEARCHES = ("nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "bincount")
BY_INDEX = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
FROM_HOST = ("lift_fresh",)  # torch.tensor(1.0, device=...)
CUDA = torch.device("cuda", 0)
HOT = Sampling(temperature=1.0)
HANDED_OVER = ("tolist", "numpy", "cpu", "item", "__array__", "__bool__", "__int__", "__float__")


class Operations(TorchDispatchMode):
    """Notes operations that read, search, or bring numbers from the host, by name."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in BY_INDEX:
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            self.names += [f"{name} by a mask"] * bool(masks)
        elif name in (*READS, *SEARCHES, *FROM_HOST) or (
            name == "repeat_interleave" and func._overloadname == "Tensor"
        ):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Notes methods that hand the memory of a tensor over. On a CPU they are no operation."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in HANDED_OVER:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


class CopiesToCard(TorchDispatchMode):
    """Notes copies to and from a card that the host waits for.

    For ``FakeTensorMode``: its tensors have no memory, and can be on a card that is not here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("_to_copy", "copy_"):
            source = args[0] if len(args) == 1 else args[1]
            blocks = not (kwargs or {}).get("non_blocking") and True not in args[2:]
            if blocks and source.device.type != result.device.type:
                self.names.append(f"{source.device.type} to {result.device.type}")
        return result


class Kernels(TorchDispatchMode):
    """Notes the operations on a card that are more than another view."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        on_card = isinstance(result, Tensor) and result.device.type == "cuda"
        if on_card and not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return result


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of what makes the host wait for a card, which need not be here."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    with FakeTensorMode(allow_non_fake_inputs=True), CopiesToCard() as copies:
        monkeypatch.setattr(Tensor, "__bool__", lambda _: copies.names.append("bool") or True)
        yield copies.names


@contextmanager
def waits() -> Iterator[list[str]]:
    """The names of what is called inside, and would make the host wait for a GPU."""
    names: list[str] = []
    with Methods(names), Operations(names):
        yield names


def batch_of(model: Model) -> TrainingBatch:
    """Captions, questions, drawings of both kinds, documents."""
    turns = [("what?", "a cat"), ("where?", "there")]
    samples = samples_of(
        [{"captions": ["a cat", "two dogs"], "questions": turns}, {"captions": ["a red bus"]}] * 4
    )
    document = ["see", None, "and this"]
    samples.append(TrainingSample("d", {}, np.arange(16)[None], 5, document))
    return model.batch_builder(96).build(samples)


def step_of(network: MultimodalLM, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
    total, parts = network.train()(batch)
    total.backward()
    clip_gradients(list(network.parameters()), 1.0)
    return total, parts


def test_the_counter_sees_what_waits() -> None:
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, True])
    for number, wait in enumerate(
        (
            lambda: x.sum().item(),
            lambda: bool(mask.any()),
            lambda: x.tolist(),
            lambda: mask.nonzero(),
            lambda: x[mask],
            lambda: x.masked_select(mask),
            lambda: x.clone().__setitem__(mask, torch.ones(3)),
            lambda: torch.tensor(3.0),
            lambda: x.repeat_interleave(torch.arange(4)),
        )
    ):
        with waits() as names:
            wait()
        assert names, number
    with waits() as names:
        x[torch.arange(2)].sum() + torch.full((), 3.0)
        x.clone().masked_fill(mask, 0.0)[1:] = 2
    assert names == []


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_step_waits_for_nothing(tiny_model: Make, smoothing: float) -> None:
    model = tiny_model(noise=0.1)
    network, batch = model.network, batch_of(model)
    network.label_smoothing = smoothing
    network.transformer.dropout = 0.1
    assert batch.predicted is not None
    present = {name for name, count in batch.predicted.counts.items() if count}
    assert {"caption", "text", "image", "reconstruct", "log_z"} <= present
    with waits() as names:
        step_of(network, batch)
    assert names == []


def test_a_step_with_a_teacher_waits_for_nothing(tiny_model: Make) -> None:
    model, teacher = tiny_model(noise=0.1), tiny_model(seed=1, noise=0.1).network
    batch = batch_of(model)
    with waits() as names:
        with torch.no_grad():
            hidden = teacher.hidden(batch.packed).flatten(0, 1)
        head = teacher.transformer.lm_head.weight
        for taught in (OBJECTIVES, ["text"]):
            teaching = Teaching(hidden, head, 2.0, dict.fromkeys(taught, 0.5))
            step_of(model.network, replace(batch, teaching=teaching))
    assert names == []


def test_the_copies_to_a_card_that_wait_are_seen(on_a_card: list[str]) -> None:
    x = torch.zeros(3)
    there = moved(x, CUDA)
    assert on_a_card == [] and there.device.type == "cuda"
    for number, wait in enumerate(
        (
            lambda: x.to(there),
            lambda: x.to(there.device),
            lambda: there.cpu(),
            lambda: there.copy_(x),
            lambda: torch.tensor([1.0], device=CUDA),
            lambda: bool(there.any()),
        )
    ):
        wait()
        assert len(on_a_card) == number + 1


def test_pixels_and_captions_reach_a_card_without_a_wait(on_a_card: list[str]) -> None:
    """A step of an image tokenizer that learns to predict words."""
    with torch.device(CUDA):
        semantic = SemanticLoss(TextTokenizer.train(["a red bus"], 300), 4, 16)
    batch = Examples(
        ["a", "b"],
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        [{"captions": ["a red bus", "a bus"]}, {"captions": ["a cat"]}],
        [0, 1],
        [0, 0],
        [[], []],
        [True, True],
    )
    pixels = batch.to(CUDA).pixels()
    targets = semantic.targets(batch.keys, batch.records, batch.seeds)
    vectors = pixels.mean((1, 2, 3))[:, None, None, None].expand(2, 3, 3, 4)
    losses = semantic(vectors, targets).values()
    used = [pixels, targets.bag, targets.caption, *losses]
    assert on_a_card == [] and {tensor.device for tensor in used} == {CUDA}


def test_a_step_that_learns_words_from_codes_waits_for_nothing() -> None:
    semantic = SemanticLoss(TextTokenizer.train(["a red bus"], 300), 4, 16)
    quantizer = make_quantizer("vq", codebook_size=16, channels=4).train()
    latents = torch.randn(2, 3, 3, 4, requires_grad=True)
    quantizer(latents)  # the first step draws a codebook
    targets = semantic.targets(["a", "b"], [{"captions": ["a red bus", "a cat"]}] * 2, [0, 1])
    with waits() as names:
        result = quantizer(latents)
        losses = [*result.losses.values(), *semantic(result.vectors, targets).values()]
        torch.stack(losses).sum().backward()
    assert names == [] and latents.grad is not None


@pytest.mark.parametrize("rows", [2, 9])
def test_a_choice_waits_once_and_its_penalty_never(rows: int, on_a_card: list[str]) -> None:
    """Whatever the rows, the penalty is a handful of kernels."""
    logits, dice = torch.zeros(rows, 5, device=CUDA), generators(HOT, range(rows))
    with Kernels() as kernels:
        logits = penalise(logits, [[0, 3], *[[1, 1, 4]] * (rows - 1)], 1.5)
    assert on_a_card == [] and len(kernels.names) <= 10, kernels.names
    assert choose(logits, HOT, dice).shape == (rows,)
    assert on_a_card == ["bool"]


@pytest.mark.parametrize("name", ["vq", "ibq"])
@pytest.mark.parametrize("first", [True, False])
def test_a_learned_codebook_waits_in_its_first_step_alone(name: str, first: bool) -> None:
    options = {"codebook_size": 16, "channels": 4}
    quantizer, usage = make_quantizer(name, **options).train(), CodebookUsage(16)
    if not first:
        quantizer(torch.randn(2, 3, 3, 4))
    with waits() as names:
        result = quantizer(torch.randn(2, 3, 3, 4))
        usage.update(result.codes)
    assert bool(names) == first
    assert usage.counts.sum() == 18 and usage.used > 0


def test_the_move_to_a_device_keeps_what_was_found_on_the_host(tiny_model: Make) -> None:
    batch = batch_of(tiny_model())
    with waits() as names:
        there = replace(batch.to(torch.device("meta")), cut=())
    assert names == []
    assert there.predicted is not None and batch.predicted is not None
    assert there.predicted.counts is batch.predicted.counts
    assert there.predicted.positions.device.type == there.packed.ids.device.type == "meta"


def test_what_is_found_is_what_the_rows_say(tiny_model: Make) -> None:
    """Against a plain loop over the positions."""
    packed = batch_of(tiny_model()).packed
    found, positions = Predicted.of(packed), []
    counts = dict.fromkeys(found.counts, 0)
    flat = zip(packed.objectives.flatten().tolist(), packed.unknown.flatten().tolist(), strict=True)
    for position, (objective, unknown) in enumerate(flat):
        if objective == NO_LOSS:
            continue
        positions.append(position)
        counts[OBJECTIVES[objective]] += 1
        counts["log_z"] += 1
        if OBJECTIVES[objective] == "reconstruct":
            (name,) = (
                f"reconstruct/{low:.2f}-{low + 0.25:.2f}"
                for low in (0.0, 0.25, 0.5, 0.75)
                if low < unknown <= low + 0.25
            )
            counts[name] += 1
    assert found.counts == counts and counts["reconstruct"]
    assert found.positions[: len(positions)].tolist() == positions
    assert len(found.positions) % 256 == 0 and not found.positions[len(positions) :].any()


def test_the_mask_of_blocks_is_compiled_for_few_shapes(tiny_model: Make) -> None:
    """As far as torch's guards: every batch brings other tensors, and rows in multiples of four."""
    from torch._dynamo.testing import CompileCounter
    from torch.nn.attention.flex_attention import create_block_mask

    import multimodal.model.layers.attention as attention

    counter = CompileCounter()
    made = torch.compile(create_block_mask, backend=counter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_create_block_mask", lambda compiled: made)
        for rows in (4, 8, 12, 8, 16, 4):
            documents = torch.randint(1, 4, (rows, 256)).sort(-1).values
            blocks = (torch.rand(rows, 256) < 0.3).long()
            branches = torch.randint(0, 2, (rows, 256))
            blocked = block_mask(documents, blocks, branches)
            expected = attention_mask(documents, blocks, branches)
            tiles = expected.view(rows, 1, 2, 128, 2, 128).any(-1).any(-2)
            assert torch.equal(blocked.to_dense().bool(), tiles)
            before = counter.frame_count
            block_mask(documents + 1, blocks, branches)
            assert counter.frame_count == before
    assert counter.frame_count <= 4


def test_layers_that_are_alike_are_compiled_once(tiny_model: Make) -> None:
    """What each layer is given beside its weights, its number for one, must not be guarded."""
    from torch._dynamo.testing import CompileCounter

    model = tiny_model(noise=0.1)
    config = replace(model.config.transformer, num_hidden_layers=5)
    transformer, packed = Transformer(config), batch_of(model).packed
    mask = attention_mask(packed.documents, packed.blocks, packed.branches)
    expected = transformer(packed.ids, packed.positions, mask)
    counter = CompileCounter()
    for layer in transformer.layers:
        layer.compile(backend=counter)
    for _ in range(2):
        hidden = transformer(packed.ids, packed.positions, mask)
        hidden.sum().backward()
    assert torch.allclose(hidden, expected, atol=1e-5)
    assert counter.frame_count == 1
