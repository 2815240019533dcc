"""Quantizers with a learned codebook: VQ and IBQ. How codes move, and what keeps them in use."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.tokenizers.detail import make_quantizer
from multimodal.tokenizers.quantizers.ibq import IBQ
from multimodal.tokenizers.quantizers.quantizer import CodebookUsage
from multimodal.tokenizers.quantizers.vq import VQ

# --- VQ -------------------------------------------------------------------------------------------


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def ready_vq(**options: Any) -> VQ:
    """A VQ with a random codebook, marked as initialised."""
    vq = VQ(**{"codebook_size": 16, "channels": 4, **options})
    with torch.no_grad():
        vq.codebook.weight.copy_(unit(vq.codebook_size, vq.channels, seed=1))
    vq.initialised.fill_(True)
    return vq


def set_codes(vq: VQ, rows: list[list[float]]) -> None:
    with torch.no_grad():
        vq.codebook.weight.copy_(torch.tensor(rows))


def test_vq_codes_are_the_nearest_neighbours() -> None:
    vq = ready_vq().eval()
    latents = torch.randn(5, 3, 3, 4)
    result = vq(latents)
    flat, codebook = F.normalize(latents, dim=-1).view(-1, 4), vq.codebook.weight
    nearest = [min(range(16), key=lambda k: float((z - codebook[k]).norm())) for z in flat]
    assert result.codes.flatten().tolist() == nearest
    torch.testing.assert_close(result.vectors, vq.lookup(result.codes))
    torch.testing.assert_close(vq.codebook.weight.norm(dim=-1), torch.ones(16))


def test_vq_starts_from_the_data() -> None:
    vq = VQ(codebook_size=32, channels=4, decay=1.0)
    corner = F.normalize(torch.ones(64, 1, 1, 4) + 0.01 * torch.randn(64, 1, 1, 4), dim=-1)
    vq.eval()(corner)
    assert not vq.initialised, "evaluation must not initialise"
    vq.train()(corner)
    assert vq.initialised
    assert (vq.codebook.weight @ F.normalize(torch.ones(4), dim=0)).min() > 0.98
    before = vq.codebook.weight.clone()
    vq.eval()(unit(64, 1, 1, 4))
    assert torch.equal(vq.codebook.weight, before), "evaluation changes nothing"


def test_vq_codes_move_towards_their_data() -> None:
    vq = ready_vq(codebook_size=2, decay=0.9, dead_after=0.0)
    set_codes(vq, [[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])
    target = F.normalize(torch.tensor([1.0, 1.0, 0, 0]), dim=0)
    latents = target.expand(8, 1, 1, 4)
    angles = []
    for _ in range(40):
        vq.train()(latents)
        angles.append(float(vq.codebook.weight[0] @ target))
    assert angles == sorted(angles) and angles[-1] > 0.999
    assert torch.equal(vq.codebook.weight[1], torch.tensor([-1.0, 0, 0, 0])), "no data, no move"
    # One step by hand: decay * count * code + (1 - decay) * sum of its data, normalised.
    vq = ready_vq(codebook_size=2, decay=0.9, dead_after=0.0)
    set_codes(vq, [[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])
    vq.train()(latents)
    by_hand = F.normalize(0.9 * torch.tensor([1.0, 0, 0, 0]) + 0.1 * 8 * target, dim=0)
    torch.testing.assert_close(vq.codebook.weight[0], by_hand)
    torch.testing.assert_close(vq.counts, torch.tensor([0.9 + 0.1 * 8, 0.9]))


@pytest.mark.parametrize("normalise", [True, False])
def test_vq_codes_without_data_never_move(normalise: bool) -> None:
    vq = ready_vq(codebook_size=2, decay=0.9, dead_after=0.0, normalise=normalise).train()
    set_codes(vq, [[1.0, 0, 0, 0], [-2.0, 0, 0, 0]])
    latents = torch.tensor([3.0, 3.0, 0, 0]).expand(8, 1, 1, 4)
    for _ in range(400):
        vq(latents)
    assert vq.codebook.weight[1].tolist() == [-2.0, 0, 0, 0]
    moved = F.normalize(latents[0, 0, 0], dim=0) if normalise else latents[0, 0, 0]
    torch.testing.assert_close(vq.codebook.weight[0], moved, atol=1e-3, rtol=1e-3)


def vq_of_a_rank(rank: int, file: str, learning: str, out: str) -> None:
    """Train on half of each batch, as one of two ranks. Save the codebook."""
    import torch.distributed as dist

    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(rank)  # random numbers of one rank must not matter
    vq = train_vq(learning, slice(rank, None, 2))
    before = vq.codebook.weight.detach().clone()
    vq.dead_after = 8.0  # about the mean count, so that some codes are restarted
    for step in range(9, 14):
        vq(unit(16, 2, 2, 4, seed=step)[rank::2])
    torch.save((before, vq.codebook.weight.detach()), f"{out}-{rank}")
    dist.destroy_process_group()


def train_vq(learning: str, share: slice) -> VQ:
    vq = ready_vq(codebook_size=8, learning=learning, decay=0.9, dead_after=0.0).train()
    for step in range(5):
        vq(unit(16, 2, 2, 4, seed=step)[share])
    return vq


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_vq_has_one_codebook_on_all_ranks(learning: str, tmp_path: Path) -> None:
    import torch.multiprocessing as mp

    arguments = (str(tmp_path / "meet"), learning, str(tmp_path / "codebook"))
    mp.spawn(vq_of_a_rank, args=arguments, nprocs=2)
    first, second = (torch.load(tmp_path / f"codebook-{rank}") for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(*first), "some were restarted"
    # Before the restarts the codebook equals that of one rank with all data.
    torch.testing.assert_close(first[0], train_vq(learning, slice(None)).codebook.weight.detach())


def codebooks_of_an_uneven_rank(rank: int, file: str, out: str) -> None:
    """Steps in which the first rank has no latents, in which the other one has none, and both."""
    import torch.distributed as dist

    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    made = []
    for make in (VQ, IBQ):
        torch.manual_seed(rank)
        quantizer = make(codebook_size=8, channels=4).train()
        for step, share in enumerate((slice(8 * rank), slice(8 - 8 * rank), slice(4), slice(4))):
            if make is VQ and step > 1:
                quantizer.dead_after = 2.0
            quantizer(unit(8, 2, 2, 4, seed=10 * step + rank)[share])
            made.append((quantizer.codebook.weight.detach().clone(), bool(quantizer.initialised)))
    torch.save(made, f"{out}-{rank}")
    dist.destroy_process_group()


def test_ranks_without_latents_keep_the_codebook_of_the_others(tmp_path: Path) -> None:
    import torch.multiprocessing as mp

    arguments = (str(tmp_path / "meet"), str(tmp_path / "made"))
    mp.spawn(codebooks_of_an_uneven_rank, args=arguments, nprocs=2)
    first, second = (torch.load(tmp_path / f"made-{rank}") for rank in (0, 1))
    for step, ((ours, begun), (theirs, too)) in enumerate(zip(first, second, strict=True)):
        assert begun == too == (step % 4 > 0), "it starts where the first rank has latents"
        assert not begun or torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["fsq", "ibq", "lfq", "vq"])
def test_no_latents_change_nothing(name: str) -> None:
    options = {"levels": [3] * 4} if name == "fsq" else {"channels": 4}
    quantizer = make_quantizer(name, **options).train()
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    assert quantizer(torch.zeros(0, 1, 1, 4)).codes.shape == (0, 1, 1)
    moved = {k for k, v in quantizer.state_dict().items() if not torch.equal(v, before[k])}
    assert moved <= {"counts"}, "of VQ, which decay"


def test_vq_restarts_dead_codes_from_the_data() -> None:
    vq = ready_vq(decay=0.5, dead_after=0.1)
    data = unit(4, 1, 1, 4, seed=3)
    for _ in range(6):
        used = vq.train()(data).codes.unique()
    assert len(used) == 4, "each of the four latents ends with another code"
    nearest = (vq.codebook.weight @ data.view(4, 4).T).amax(1)
    assert nearest.min() > 0.9, "no code is left far from the data"
    assert (vq.counts >= 0.1).all()


def test_vq_gradient_passes_straight_and_latents_commit() -> None:
    vq = ready_vq().eval()
    latents = unit(2, 2, 2, 4).requires_grad_()
    result = vq(latents)
    weights = torch.randn_like(result.vectors)
    (gradient,) = torch.autograd.grad((result.vectors * weights).sum(), latents, retain_graph=True)
    (expected,) = torch.autograd.grad((F.normalize(latents, dim=-1) * weights).sum(), latents)
    torch.testing.assert_close(gradient, expected)
    (gradient,) = torch.autograd.grad(result.losses["commitment"], latents)
    closer = F.normalize(latents - 0.1 * gradient, dim=-1)
    assert vq(closer).losses["commitment"] < result.losses["commitment"]
    distance = (latents - vq.lookup(result.codes)).square().sum(-1).mean()
    torch.testing.assert_close(result.losses["commitment"], 0.25 * distance)


@pytest.mark.parametrize("normalise", [True, False])
def test_vq_agrees_with_the_reference(normalise: bool) -> None:
    from vector_quantize_pytorch import VectorQuantize

    vq = ready_vq(codebook_size=64, normalise=normalise).eval()
    if not normalise:
        vq.codebook.weight.mul_(1 + torch.rand(64, 1))  # codes without unit norm
    reference = VectorQuantize(dim=4, codebook_size=64, use_cosine_sim=normalise).eval()
    reference._codebook.embed.copy_(vq.codebook.weight[None])
    latents = torch.randn(2, 8, 8, 4)
    vectors, codes, _ = reference(latents.flatten(1, 2))
    result = vq(latents)
    assert torch.equal(result.codes.flatten(), codes.flatten())
    torch.testing.assert_close(result.vectors.flatten(0, 2), vectors.flatten(0, 1))


def test_vq_by_gradient_moves_codes_by_its_loss_only() -> None:
    vq = ready_vq(codebook_size=8, learning="gradient", dead_after=0.0).train()
    before = vq.codebook.weight.detach().clone()
    result = vq(torch.randn(4, 3, 3, 4))
    assert torch.equal(vq.codebook.weight, before)
    sum(result.losses.values()).backward()
    used = torch.bincount(result.codes.flatten(), minlength=8) > 0
    assert torch.equal(vq.codebook.weight.grad.norm(dim=-1) > 0, used)


def test_vq_by_gradient_restarts_dead_codes_before_the_lookup() -> None:
    vq = ready_vq(learning="gradient", decay=0.5, dead_after=0.1).train()
    data = unit(4, 1, 1, 4, seed=3).requires_grad_()
    for _ in range(24):
        result = vq(data)
        sum(result.losses.values()).backward()
    unused = torch.ones(16, dtype=torch.bool)
    unused[result.codes.unique()] = False
    nearest = (F.normalize(vq.codebook.weight, dim=-1) @ data.view(4, 4).T).amax(1)
    assert nearest[unused].min() > 0.9, "near the data, although no optimizer moved them"


# --- IBQ ------------------------------------------------------------------------------------------


def test_ibq_gradient_reaches_every_code() -> None:
    torch.manual_seed(0)
    ibq = IBQ(codebook_size=32, channels=4, entropy_weight=0.0).train()
    latents = torch.randn(2, 3, 3, 4, requires_grad=True)
    result = ibq(latents)
    torch.testing.assert_close(result.vectors, ibq.lookup(result.codes))
    cosines = F.normalize(latents, dim=-1) @ F.normalize(ibq.codebook.weight, dim=-1).T
    assert torch.equal(result.codes, cosines.argmax(-1))
    assert result.codes.unique().numel() < 18
    (result.vectors * torch.randn(4)).sum().backward()
    assert (ibq.codebook.weight.grad.norm(dim=-1) > 0).all(), "chosen or not"
    assert latents.grad is not None and latents.grad.abs().sum() > 0
    evaluated = ibq.eval()(latents)
    assert torch.equal(evaluated.codes, result.codes)
    torch.testing.assert_close(evaluated.vectors, result.vectors)


def test_ibq_codes_move_to_the_data_and_are_used() -> None:
    """The latents are close to each other, as those of an untrained encoder are."""
    torch.manual_seed(0)
    ibq = IBQ(codebook_size=64, channels=4).train()
    data = torch.tensor([1.0, 0.2, -0.1, 0.0]) + 0.15 * torch.randn(64, 2, 2, 4)
    optimizer = torch.optim.Adam(ibq.parameters(), 1e-3)
    usage = CodebookUsage(64)
    for step in range(40):
        result = ibq(data)
        optimizer.zero_grad()
        sum(result.losses.values()).backward()
        optimizer.step()
        if step >= 30:
            usage.update(result.codes)
    assert usage.used >= 0.9 and usage.perplexity > 35
    error = 1 - (F.normalize(data, dim=-1) * ibq.eval()(data).vectors).sum(-1)
    assert error.mean() < 0.01
