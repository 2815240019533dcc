"""Quantizers: round trips, the papers' formulas, and what keeps a codebook alive."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.tokenizers.fsq import FSQ
from multimodal.tokenizers.ibq import IBQ
from multimodal.tokenizers.lfq import LFQ
from multimodal.tokenizers.quantizer import CodebookUsage
from multimodal.tokenizers.registry import make_quantizer
from multimodal.tokenizers.vq import VQ

# --- FSQ --------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [(7, 5, 5, 5, 5), (8, 8, 5, 4), (2,), (3, 2, 4)])
def test_fsq_round_trip_over_the_whole_codebook(levels: tuple[int, ...]) -> None:
    fsq = FSQ(levels)
    codes = torch.arange(fsq.codebook_size)
    vectors = fsq.lookup(codes)
    assert len(vectors.unique(dim=0)) == fsq.codebook_size == math.prod(levels)
    assert vectors.abs().max() <= 1
    # Each channel takes exactly its number of values, evenly spaced.
    for channel, count in zip(vectors.T, levels, strict=True):
        values = channel.unique()
        assert len(values) == count
        torch.testing.assert_close(values.diff(), torch.full((count - 1,), 1 / (count // 2)))
    # Latents that the bound maps to a code's own integers give back that code, and its vector.
    latents = inverse_of_bound(vectors, levels)
    result = fsq(latents)
    assert torch.equal(result.codes, codes)
    torch.testing.assert_close(result.vectors, vectors)


def inverse_of_bound(vectors: Tensor, levels: tuple[int, ...]) -> Tensor:
    sizes = torch.tensor(levels)
    half = (sizes - 1) * (1 + 1e-3) / 2
    offset = torch.where(sizes % 2 == 0, 0.5, 0.0)
    wanted = (vectors * (sizes // 2) + offset) / half
    return torch.atanh(wanted.clamp(-0.999999, 0.999999)) - torch.atanh(offset / half)


def reference_fsq(latents: list[float], levels: tuple[int, ...]) -> tuple[int, list[float]]:
    """Appendix A of arXiv:2309.15505, for one vector, in plain Python."""
    code, base, vector = 0, 1, []
    for z, count in zip(latents, levels, strict=True):
        half = (count - 1) * (1 + 1e-3) / 2
        offset = 0.0 if count % 2 else 0.5
        bounded = math.tanh(z + math.atanh(offset / half)) * half - offset
        integer = round(bounded)
        code += (integer + count // 2) * base
        base *= count
        vector.append(integer / (count // 2))
    return code, vector


@pytest.mark.parametrize("levels", [(7, 5, 5, 5, 5), (8, 8, 5, 4), (2, 3)])
def test_fsq_is_the_formula_of_the_paper(levels: tuple[int, ...]) -> None:
    latents = 2 * torch.randn(500, len(levels), generator=torch.Generator().manual_seed(1))
    result = FSQ(levels)(latents)
    expected = [reference_fsq(row, levels) for row in latents.tolist()]
    assert result.codes.tolist() == [code for code, _ in expected]
    torch.testing.assert_close(result.vectors, torch.tensor([vector for _, vector in expected]))
    assert result.codes.min() >= 0 and result.codes.max() < math.prod(levels)


def test_fsq_gradient_passes_as_if_nothing_were_rounded() -> None:
    fsq = FSQ((7, 4))
    latents = torch.randn(3, 2, 2, 2, requires_grad=True)
    (straight,) = torch.autograd.grad(fsq(latents).vectors.sum(), latents)
    smooth = (fsq._bound(latents) / torch.tensor([3, 2])).sum()
    (expected,) = torch.autograd.grad(smooth, latents)
    torch.testing.assert_close(straight, expected)
    assert straight.abs().min() > 0


# --- VQ ---------------------------------------------------------------------------------------


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def ready_vq(**options: Any) -> VQ:
    """A VQ whose codebook is random, not waiting for data."""
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
    assert not vq.initialised, "looking must not initialise"
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
def test_vq_codes_without_data_stay_however_long(normalise: bool) -> None:
    vq = ready_vq(codebook_size=2, decay=0.9, dead_after=0.0, normalise=normalise).train()
    set_codes(vq, [[1.0, 0, 0, 0], [-2.0, 0, 0, 0]])
    latents = torch.tensor([3.0, 3.0, 0, 0]).expand(8, 1, 1, 4)
    for _ in range(400):
        vq(latents)
    assert vq.codebook.weight[1].tolist() == [-2.0, 0, 0, 0]
    moved = F.normalize(latents[0, 0, 0], dim=0) if normalise else latents[0, 0, 0]
    torch.testing.assert_close(vq.codebook.weight[0], moved, atol=1e-3, rtol=1e-3)


def vq_of_a_rank(rank: int, file: str, learning: str, out: str) -> None:
    """One of two ranks: half of each batch. Saves the codebook after some steps."""
    import torch.distributed as dist

    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(rank)  # what a rank draws by itself must not matter
    vq = train_vq(learning, slice(rank, None, 2))
    before = vq.codebook.weight.detach().clone()
    vq.dead_after = 8.0  # about the mean: some are restarted, alike on both
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
    for mine, theirs in zip(first, second, strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(*first), "some were restarted"
    # Before that, it is what one rank makes of all data.
    torch.testing.assert_close(first[0], train_vq(learning, slice(None)).codebook.weight.detach())


def test_vq_restarts_dead_codes_from_the_data() -> None:
    vq = ready_vq(decay=0.5, dead_after=0.1)
    data = unit(4, 1, 1, 4, seed=3)
    for _ in range(6):
        used = vq.train()(data).codes.unique()
    assert len(used) == 4, "each of the four latents ends with a code of its own"
    nearest = (vq.codebook.weight @ data.view(4, 4).T).amax(1)
    assert nearest.min() > 0.9, "no code is left where no data is"
    assert (vq.counts >= 0.1).all()


def test_vq_gradient_passes_straight_and_commits() -> None:
    vq = ready_vq().eval()
    latents = unit(2, 2, 2, 4).requires_grad_()
    result = vq(latents)
    weights = torch.randn_like(result.vectors)
    (found,) = torch.autograd.grad((result.vectors * weights).sum(), latents, retain_graph=True)
    (expected,) = torch.autograd.grad((F.normalize(latents, dim=-1) * weights).sum(), latents)
    torch.testing.assert_close(found, expected)
    (pull,) = torch.autograd.grad(result.losses["commitment"], latents)
    closer = F.normalize(latents - 0.1 * pull, dim=-1)
    assert vq(closer).losses["commitment"] < result.losses["commitment"]
    distance = (latents - vq.lookup(result.codes)).square().sum(-1).mean()
    torch.testing.assert_close(result.losses["commitment"], 0.25 * distance)


def test_unknown_quantizers_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="quantizer 'vqq': expected one of fsq, ibq, lfq, vq"):
        make_quantizer("vqq")
    with pytest.raises(ValueError, match="each >= 2"):
        make_quantizer("fsq", levels=[7, 1])
    with pytest.raises(ValueError, match="both must be >= 2"):
        make_quantizer("vq", codebook_size=1)


@pytest.mark.parametrize(
    ("batches", "used", "perplexity"),
    [
        ([[0, 1, 2, 3]], 1.0, 4.0),
        ([[2, 2], [2]], 0.25, 1.0),
        ([[0, 0], [1, 1]], 0.5, 2.0),
        # p = 1/2, 1/4, 1/4: an entropy of 1.5 bits
        ([[0, 0, 1, 3]], 0.75, 2**1.5),
        ([], 0.0, 1.0),
    ],
)
def test_codebook_use(batches: list[list[int]], used: float, perplexity: float) -> None:
    use = CodebookUsage(4)
    for batch in batches:
        use.update(torch.tensor(batch).view(-1, 1, 1))
    assert use.used == used and use.perplexity == pytest.approx(perplexity, rel=1e-9)


# --- beside vector-quantize-pytorch ------------------------------------------------------------


def test_fsq_agrees_with_the_reference() -> None:
    from vector_quantize_pytorch import FSQ as Reference

    levels = [7, 5, 5, 4]
    latents = 2 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    vectors, codes = Reference(levels)(latents[None])
    ours = FSQ(levels)(latents)
    assert torch.equal(ours.codes, codes[0].long())
    torch.testing.assert_close(ours.vectors, vectors[0])


@pytest.mark.parametrize("normalise", [True, False])
def test_vq_agrees_with_the_reference(normalise: bool) -> None:
    from vector_quantize_pytorch import VectorQuantize

    vq = ready_vq(codebook_size=64, normalise=normalise).eval()
    if not normalise:
        vq.codebook.weight.mul_(1 + torch.rand(64, 1))  # codes of other lengths than one
    reference = VectorQuantize(dim=4, codebook_size=64, use_cosine_sim=normalise).eval()
    reference._codebook.embed.copy_(vq.codebook.weight[None])
    latents = torch.randn(2, 8, 8, 4)
    vectors, codes, _ = reference(latents.flatten(1, 2))
    result = vq(latents)
    assert torch.equal(result.codes.flatten(), codes.flatten())
    torch.testing.assert_close(result.vectors.flatten(0, 2), vectors.flatten(0, 1))


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_lfq_agrees_with_the_reference(temperature: float) -> None:
    from vector_quantize_pytorch import LFQ as Reference

    latents = torch.randn(4, 5, 5, 6, generator=torch.Generator().manual_seed(0))
    (_, codes, _), parts = Reference(dim=6).train()(
        latents.flatten(1, 2), inv_temperature=1 / temperature, return_loss_breakdown=True
    )
    lfq = LFQ(6, entropy_weight=1.0, temperature=temperature).train()
    result = lfq(latents)
    flipped = sum(((codes >> bit) & 1) << (5 - bit) for bit in range(6))  # first bit first here
    assert torch.equal(result.codes.flatten(1), flipped)
    expected = parts.per_sample_entropy - parts.batch_entropy
    torch.testing.assert_close(result.losses["entropy"], expected, atol=1e-3, rtol=0)


# --- LFQ and IBQ ------------------------------------------------------------------------------


def test_lfq_round_trip_over_the_whole_codebook() -> None:
    lfq = LFQ(10)
    codes = torch.arange(1024)
    vectors = lfq.lookup(codes)
    assert len(vectors.unique(dim=0)) == 1024 and set(vectors.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(lfq(0.3 * vectors).codes, codes)


def test_lfqs_entropy_by_bits_is_that_by_codes() -> None:
    """Exact while all bits fit one group; for more, groups count as independent: never less."""
    flat = torch.randn(300, 12, generator=torch.Generator().manual_seed(0))
    for channels in (3, 9, 12):
        lfq, latents = LFQ(channels), flat[:, :channels]
        every = lfq.lookup(torch.arange(lfq.codebook_size))
        p = (-torch.cdist(latents, every).square()).softmax(-1)
        each = -(p * p.log()).sum(-1).mean()
        together = -(p.mean(0) * p.mean(0).log()).sum()
        found = lfq.entropy(latents)
        if channels <= 9:
            torch.testing.assert_close(found, each - together, atol=1e-4, rtol=1e-4)
        else:
            assert each - together - 1 < found < each - together


def test_lfqs_entropy_loss_spreads_the_codes() -> None:
    latents = (0.5 + 0.1 * torch.randn(512, 4)).requires_grad_()  # all of one code
    lfq = LFQ(4, entropy_weight=1.0, commitment=0.0).train()
    optimizer = torch.optim.Adam([latents], 0.1)
    before = lfq(latents.view(8, 8, 8, 4)).codes.unique().numel()
    for _ in range(100):
        result = lfq(latents.view(8, 8, 8, 4))
        optimizer.zero_grad()
        result.losses["entropy"].backward()
        optimizer.step()
    assert before == 1 and result.usage == 1.0


def test_ibqs_gradient_reaches_every_code() -> None:
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
    same = ibq.eval()(latents)
    assert torch.equal(same.codes, result.codes)
    torch.testing.assert_close(same.vectors, result.vectors)


def test_ibq_puts_its_codes_where_the_data_are_and_uses_them() -> None:
    """Latents that crowd in a corner, as those of a young encoder do."""
    torch.manual_seed(0)
    ibq = IBQ(codebook_size=64, channels=4).train()
    data = torch.tensor([1.0, 0.2, -0.1, 0.0]) + 0.15 * torch.randn(64, 2, 2, 4)
    optimizer = torch.optim.Adam(ibq.parameters(), 1e-3)
    use = CodebookUsage(64)
    for step in range(40):
        result = ibq(data)
        optimizer.zero_grad()
        sum(result.losses.values()).backward()
        optimizer.step()
        if step >= 30:
            use.update(result.codes)
    assert use.used >= 0.9 and use.perplexity > 35
    error = 1 - (F.normalize(data, dim=-1) * ibq.eval()(data).vectors).sum(-1)
    assert error.mean() < 0.01


def test_vq_by_gradient_moves_codes_by_its_loss_alone() -> None:
    vq = ready_vq(codebook_size=8, learning="gradient", dead_after=0.0).train()
    before = vq.codebook.weight.detach().clone()
    result = vq(torch.randn(4, 3, 3, 4))
    assert torch.equal(vq.codebook.weight, before)
    sum(result.losses.values()).backward()
    used = torch.bincount(result.codes.flatten(), minlength=8) > 0
    assert torch.equal(vq.codebook.weight.grad.norm(dim=-1) > 0, used)


def test_vq_by_gradient_restarts_dead_codes_before_they_are_read() -> None:
    vq = ready_vq(learning="gradient", decay=0.5, dead_after=0.1).train()
    data = unit(4, 1, 1, 4, seed=3).requires_grad_()
    for _ in range(24):
        result = vq(data)
        sum(result.losses.values()).backward()
    unused = torch.ones(16, dtype=torch.bool)
    unused[result.codes.unique()] = False
    nearest = (F.normalize(vq.codebook.weight, dim=-1) @ data.view(4, 4).T).amax(1)
    assert nearest[unused].min() > 0.9, "where there is data, though no optimizer moved them"


# --- health -----------------------------------------------------------------------------------


def test_a_collapse_is_told_in_words() -> None:
    healthy, collapsed, early = CodebookUsage(64), CodebookUsage(64), CodebookUsage(64)
    healthy.update(torch.arange(64).repeat(10))
    collapsed.update(torch.randint(3, (640,)))
    early.update(torch.randint(3, (20,)))
    assert healthy.collapse_warning() is None and early.collapse_warning() is None
    said = collapsed.collapse_warning()
    assert said is not None and "of 64 codes 4.7% appeared" in said and "fsq" in said
    # All codes seen once, and one of them all the time: a collapse too.
    rare = CodebookUsage(64)
    rare.update(torch.arange(64))
    rare.update(torch.zeros(100_000, dtype=torch.int64))
    assert rare.collapse_warning() is not None
