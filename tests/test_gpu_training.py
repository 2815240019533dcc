"""A training step on a GPU is that of a CPU, in every form, and the host never waits in it.

pytest -m gpu                     on a machine with a GPU
TEST_DEVICE=cpu pytest -m gpu     anywhere, to see that the tests themselves work
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from multimodal.api import Model
from multimodal.cli import main
from multimodal.model.distillation import Teaching
from multimodal.model.layers.attention import attention_mask, block_mask
from multimodal.model.layers.experts import ExpertsConfig
from multimodal.model.network import MultimodalLM
from multimodal.model.objectives import PolicyConfig, PolicyTokens
from multimodal.model.sequences import OBJECTIVES
from multimodal.model.training_batch import TrainingBatch, TrainingSample
from multimodal.tokenizers.detail import make_quantizer
from multimodal.tokenizers.text import TextTokenizer
from multimodal.train.examples import Examples
from multimodal.train.optim import muon
from multimodal.train.sharding import clip_gradients, full_state_dict, shard
from multimodal.train.tokenizers.semantic import SemanticLoss
from tests.launches import launch, logged
from tests.samples import samples_of

pytestmark = pytest.mark.gpu
Make = Callable[..., Model]
Step = tuple[float, dict[str, float], dict[str, Tensor]]
HALF = dict.fromkeys(OBJECTIVES, 0.5)  # of what is learned is the teacher's
CARD = "needs a CUDA device: a CPU compiles in another way"


def batch_of(model: Model) -> TrainingBatch:
    """Captions, questions, drawings of both kinds, a document. Rows of a whole block of flex."""
    samples = samples_of(
        [{"captions": ["a cat"], "questions": [("what?", "a cat")]}, {"captions": ["a red bus"]}]
        * 4
    )
    document = ["see", None, "and this"]
    samples.append(TrainingSample("d", {}, np.arange(16)[None], 5, document))
    return model.batch_builder(128).build(samples)


def step_of(network: MultimodalLM, batch: TrainingBatch) -> Step:
    """The loss, its parts and the gradients of a step, on the CPU."""
    total, parts = network.train()(batch.to(network.device))
    total.backward()
    gradients = {n: p.grad.cpu() for n, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    return total.item(), {name: part.item() for name, part in parts.items()}, gradients


def assert_same(ours: Step, theirs: Step, tolerance: float = 1e-4) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    assert ours[1] == pytest.approx(theirs[1], rel=10 * tolerance, abs=10 * tolerance)
    assert ours[2].keys() == theirs[2].keys()
    for name, gradient in ours[2].items():
        distance = (gradient - theirs[2][name]).norm() / theirs[2][name].norm().clamp(min=1e-6)
        assert distance < 10 * tolerance, name


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """torch raises for what makes the host wait for a GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def models(tiny_model: Make, device: torch.device) -> tuple[Model, Model]:
    """On the device, and on the CPU."""
    return tiny_model(noise=0.1).to(device), tiny_model(noise=0.1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_step_is_that_of_a_cpu(models: tuple[Model, Model], smoothing: float) -> None:
    for model in models:
        model.network.label_smoothing = smoothing
    assert_same(*(step_of(model.network, batch_of(model)) for model in models))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", ["siglip", "clip"])
def test_a_step_of_other_networks(
    tiny_model: Make, device: torch.device, tied: bool, form: str
) -> None:
    models = [tiny_model(noise=0.1, tied=tied, alignment_form=form) for _ in range(2)]
    models[0].to(device)
    assert_same(*(step_of(model.network, batch_of(model)) for model in models))


def test_a_step_with_experts(tiny_model: Make, device: torch.device) -> None:
    models = [tiny_model(noise=0.1, experts=ExpertsConfig(4, 2)) for _ in range(2)]
    models[0].to(device)
    assert_same(*(step_of(model.network, batch_of(model)) for model in models), 1e-3)


def test_a_step_with_flex_attention(models: tuple[Model, Model], device: torch.device) -> None:
    """FlexAttention is compiled, and so is its mask of blocks."""
    if device.type != "cuda":
        pytest.skip(CARD)
    models[0].network.attention_backend = "flex"
    assert_same(*(step_of(model.network, batch_of(model)) for model in models), 1e-3)


def test_the_compiled_mask_of_blocks_is_the_rule(device: torch.device) -> None:
    for rows in (4, 8):
        documents = torch.randint(1, 4, (rows, 256), device=device).sort(-1).values
        blocks = (torch.rand(rows, 256, device=device) < 0.3).long()
        branches = torch.randint(0, 2, (rows, 256), device=device)
        mask = attention_mask(documents, blocks, branches)
        tiles = mask.view(rows, 1, 2, 128, 2, 128).any(-1).any(-2)
        assert torch.equal(block_mask(documents, blocks, branches).to_dense().bool(), tiles)


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_a_step_of_compiled_layers(
    models: tuple[Model, Model], device: torch.device, attention: Any
) -> None:
    if device.type != "cuda":
        pytest.skip(CARD)
    models[0].network.attention_backend = attention
    models[0].network.transformer.compile_layers()
    assert_same(*(step_of(model.network, batch_of(model)) for model in models), 1e-3)


def test_a_recomputed_step(models: tuple[Model, Model]) -> None:
    models[0].network.transformer.recompute = len(models[0].network.transformer.layers)
    assert_same(*(step_of(model.network, batch_of(model)) for model in models))


def test_a_step_under_autocast_is_near(models: tuple[Model, Model], device: torch.device) -> None:
    with torch.autocast(device.type, torch.bfloat16):
        ours = step_of(models[0].network, batch_of(models[0]))
    theirs = step_of(models[1].network, batch_of(models[1]))
    assert ours[0] == pytest.approx(theirs[0], rel=2e-2)
    for name, gradient in ours[2].items():
        if gradient.ndim == 2:
            assert torch.cosine_similarity(gradient.flatten(), theirs[2][name].flatten(), 0) > 0.98


def test_a_step_with_a_teacher(
    models: tuple[Model, Model], tiny_model: Make, device: torch.device
) -> None:
    steps = []
    for model in models:
        teacher, batch = tiny_model(seed=1, noise=0.1).to(model.device).network, batch_of(model)
        with torch.no_grad():
            hidden = teacher.hidden(batch.packed.to(model.device)).flatten(0, 1)
        teaching = Teaching(hidden, teacher.transformer.lm_head.weight, 2.0, HALF)
        steps.append(step_of(model.network, replace(batch, teaching=teaching)))
    assert_same(*steps)


def test_a_step_with_written_captions(models: tuple[Model, Model]) -> None:
    steps = []
    for model in models:
        policy = PolicyTokens(
            torch.arange(5, 12),
            torch.arange(7),
            torch.linspace(-1, 1, 7),
            (((0, model.config.vocabulary.size),),),
            PolicyConfig(joint_weight=0.5),
        )
        steps.append(step_of(model.network, replace(batch_of(model), policy=policy)))
    assert_same(*steps)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_five_steps_of_training(models: tuple[Model, Model], kind: str) -> None:
    losses: list[list[float]] = []
    for model in models:
        network, batch = model.network.train(), batch_of(model)
        weights = [p for p in network.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer = muon(network, [], 1e-3, 0.1)
        if kind == "adamw":
            fused = model.device.type == "cuda"
            optimizer = torch.optim.AdamW(weights, 1e-3, fused=fused)
        losses.append([])
        for _ in range(5):
            total, _ = network(batch.to(model.device))
            total.backward()
            clip_gradients(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(total.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if kind == "adamw" else 2e-2)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("form", ["plain", "autocast", "flex", "teacher", "muon"])
def test_the_host_never_waits_in_a_step(
    models: tuple[Model, Model], tiny_model: Make, device: torch.device, form: str
) -> None:
    """From a batch on the host to new weights."""
    if form == "flex" and device.type != "cuda":
        pytest.skip(CARD)
    model, _ = models
    network, batch = model.network.train(), batch_of(model)
    network.attention_backend = "flex" if form == "flex" else "sdpa"
    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(weights, fused=device.type == "cuda")
    if form == "muon":
        optimizer = muon(network, [], 1e-3, 0.1)
    teacher = tiny_model(seed=1).to(device).network

    def step() -> Tensor:
        moved = batch.to(device)
        if form == "teacher":
            with torch.no_grad():
                hidden = teacher.hidden(moved.packed).flatten(0, 1)
            head = teacher.transformer.lm_head.weight
            moved = replace(moved, teaching=Teaching(hidden, head, 2.0, HALF))
        with torch.autocast(device.type, torch.bfloat16, enabled=form == "autocast"):
            total, _ = network(moved)
        total.backward()
        clip_gradients(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total.detach()

    step()  # libraries set themselves up, compilers compile
    with no_waiting(device):
        loss = step()
    assert loss.isfinite()


def test_the_host_never_waits_for_pixels_and_captions(device: torch.device) -> None:
    """Of a step that learns words from the codes of images."""
    torch.manual_seed(0)
    semantic = SemanticLoss(TextTokenizer.train(["a red bus"], 300), 4, 16).to(device)
    quantizer = make_quantizer("vq", codebook_size=16, channels=4).train().to(device)
    images, records = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), [{"captions": ["a red bus"]}] * 2
    batch = Examples(["a", "b"], images, records, [0, 1], [0, 0], [[], []], [True, True])
    latents = torch.randn(2, 3, 3, 4, device=device)

    def step() -> Tensor:
        pixels = batch.to(device).pixels()
        targets = semantic.targets(batch.keys, batch.records, batch.seeds)
        result = quantizer(latents + pixels.mean())
        losses = [*result.losses.values(), *semantic(result.vectors, targets).values()]
        total = torch.stack(losses).sum()
        total.backward()
        return total.detach()

    step()  # it draws a codebook
    with no_waiting(device):
        loss = step()
    assert loss.isfinite()


@pytest.fixture
def one_rank(device: torch.device, tmp_path: Path) -> Iterator[None]:
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp2_on_one_rank(
    models: tuple[Model, Model], device: torch.device, one_rank: None
) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    model, on_cpu = models
    network = model.network.train()
    shard(network, init_device_mesh(device.type, (1,)))
    total, _ = network(batch_of(model).to(device))
    total.backward()
    norm = clip_gradients(list(network.parameters()), 1.0)
    expected = step_of(on_cpu.network, batch_of(on_cpu))
    assert total.item() == pytest.approx(expected[0], rel=1e-4)
    squares = sum(float(gradient.square().sum()) for gradient in expected[2].values())
    assert float(norm) == pytest.approx(squares**0.5, rel=1e-3)
    state = full_state_dict(network)
    for name, weight in on_cpu.network.state_dict().items():
        assert torch.equal(state[name], weight), name


def test_a_killed_run_resumes(work: Path, tmp_path: Path, device: torch.device) -> None:
    """On a GPU sums differ in their last bits from run to run, so the losses are near."""
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    fit = ["fit", "--config", str(work / "joint.yaml"), "--trainer.accelerator", accelerator]
    fit += ["--trainer.max_steps", "6", "--trainer.devices", "1"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    launch([*fit, "--output", str(run)], dies_at=4)
    launch([*fit, "--output", str(whole)])
    resume = ["--output", str(run), "--ckpt_path", str(run / "checkpoints/last.ckpt")]
    assert main([*fit, *resume]) == 0
    resumed, uninterrupted = (
        {step: float(loss) for step, loss in logged(folder).items()} for folder in (run, whole)
    )
    assert len(resumed) == 6 and resumed == pytest.approx(uninterrupted, rel=2e-2)
