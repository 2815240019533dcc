"""Quantizers without a learned codebook (FSQ, LFQ), and the statistics of a codebook.

Round trips, the formulas of the papers, and vector-quantize-pytorch as a reference.
"""

import math

import pytest
import torch
from torch import Tensor

from multimodal.tokenizers.detail import make_quantizer
from multimodal.tokenizers.quantizers.fsq import FSQ
from multimodal.tokenizers.quantizers.lfq import LFQ
from multimodal.tokenizers.quantizers.quantizer import CodebookUsage

# --- FSQ ------------------------------------------------------------------------------------------


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
    # Latents that the bound maps to the integers of a code give that code and its vector.
    latents = inverse_of_bound(vectors, levels)
    result = fsq(latents)
    assert torch.equal(result.codes, codes)
    torch.testing.assert_close(result.vectors, vectors)


def inverse_of_bound(vectors: Tensor, levels: tuple[int, ...]) -> Tensor:
    sizes = torch.tensor(levels)
    half = (sizes - 1) * (1 + 1e-3) / 2
    offset = torch.where(sizes % 2 == 0, 0.5, 0.0)
    bounded = (vectors * (sizes // 2) + offset) / half
    return torch.atanh(bounded.clamp(-0.999999, 0.999999)) - torch.atanh(offset / half)


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


@pytest.mark.parametrize("count", [1003, 2048, 2**16])
def test_fsq_of_many_values_keeps_to_its_codes(count: int) -> None:
    fsq, latents = FSQ((count,)), torch.linspace(-30, 30, 1000)[:, None]
    result = fsq(latents)
    assert (result.codes.min(), result.codes.max()) == (0, count - 1)
    torch.testing.assert_close(result.vectors, fsq.lookup(result.codes))


def test_fsq_gradient_ignores_the_rounding() -> None:
    fsq = FSQ((7, 4))
    latents = torch.randn(3, 2, 2, 2, requires_grad=True)
    (straight,) = torch.autograd.grad(fsq(latents).vectors.sum(), latents)
    smooth = (fsq._bound(latents) / torch.tensor([3, 2])).sum()
    (expected,) = torch.autograd.grad(smooth, latents)
    torch.testing.assert_close(straight, expected)
    assert straight.abs().min() > 0


def test_fsq_agrees_with_the_reference() -> None:
    from vector_quantize_pytorch import FSQ as Reference

    levels = [7, 5, 5, 4]
    latents = 2 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    vectors, codes = Reference(levels)(latents[None])
    ours = FSQ(levels)(latents)
    assert torch.equal(ours.codes, codes[0].long())
    torch.testing.assert_close(ours.vectors, vectors[0])


# --- LFQ ------------------------------------------------------------------------------------------


def test_lfq_round_trip_over_the_whole_codebook() -> None:
    lfq = LFQ(10)
    codes = torch.arange(1024)
    vectors = lfq.lookup(codes)
    assert len(vectors.unique(dim=0)) == 1024 and set(vectors.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(lfq(0.3 * vectors).codes, codes)


def test_lfq_entropy_by_bits_equals_the_entropy_by_codes() -> None:
    """Exact for one group of bits. Several groups count as independent, so no entropy is lost."""
    flat = torch.randn(300, 12, generator=torch.Generator().manual_seed(0))
    for channels in (3, 9, 12):
        lfq, latents = LFQ(channels), flat[:, :channels]
        codebook = lfq.lookup(torch.arange(lfq.codebook_size))
        p = (-torch.cdist(latents, codebook).square()).softmax(-1)
        per_latent = -(p * p.log()).sum(-1).mean()
        of_mean = -(p.mean(0) * p.mean(0).log()).sum()
        result = lfq.entropy(latents)
        if channels <= 9:
            torch.testing.assert_close(result, per_latent - of_mean, atol=1e-4, rtol=1e-4)
        else:
            assert per_latent - of_mean - 1 < result < per_latent - of_mean


def test_lfq_entropy_loss_spreads_the_codes() -> None:
    latents = (0.5 + 0.1 * torch.randn(512, 4)).requires_grad_()  # all have one code
    lfq = LFQ(4, entropy_weight=1.0, commitment=0.0).train()
    optimizer = torch.optim.Adam([latents], 0.1)
    before = lfq(latents.view(8, 8, 8, 4)).codes.unique().numel()
    for _ in range(100):
        result = lfq(latents.view(8, 8, 8, 4))
        optimizer.zero_grad()
        result.losses["entropy"].backward()
        optimizer.step()
    assert before == 1 and result.usage == 1.0


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_lfq_agrees_with_the_reference(temperature: float) -> None:
    from vector_quantize_pytorch import LFQ as Reference

    latents = torch.randn(4, 5, 5, 6, generator=torch.Generator().manual_seed(0))
    (_, codes, _), parts = Reference(dim=6).train()(
        latents.flatten(1, 2), inv_temperature=1 / temperature, return_loss_breakdown=True
    )
    lfq = LFQ(6, entropy_weight=1.0, temperature=temperature).train()
    result = lfq(latents)
    # The reference has the highest bit first.
    flipped = sum(((codes >> bit) & 1) << (5 - bit) for bit in range(6))
    assert torch.equal(result.codes.flatten(1), flipped)
    expected = parts.per_sample_entropy - parts.batch_entropy
    torch.testing.assert_close(result.losses["entropy"], expected, atol=1e-3, rtol=0)


# --- all quantizers -------------------------------------------------------------------------------


def test_unknown_quantizers_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="quantizer 'vqq': expected one of fsq, ibq, lfq, vq"):
        make_quantizer("vqq")
    with pytest.raises(ValueError, match=r"levels=\[7, 1\]: expected .* from 2"):
        make_quantizer("fsq", levels=[7, 1])
    with pytest.raises(ValueError, match="codebook_size=1: expected a whole number from 2"):
        make_quantizer("vq", codebook_size=1)


# --- usage of the codebook ------------------------------------------------------------------------


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
def test_codebook_usage(batches: list[list[int]], used: float, perplexity: float) -> None:
    usage = CodebookUsage(4)
    for batch in batches:
        usage.update(torch.tensor(batch).view(-1, 1, 1))
    assert usage.used == used and usage.perplexity == pytest.approx(perplexity, rel=1e-9)


def test_a_collapse_gives_a_warning() -> None:
    healthy, collapsed, early = CodebookUsage(64), CodebookUsage(64), CodebookUsage(64)
    healthy.update(torch.arange(64).repeat(10))
    collapsed.update(torch.randint(3, (640,)))
    early.update(torch.randint(3, (20,)))
    assert healthy.collapse_warning() is None and early.collapse_warning() is None
    warning = collapsed.collapse_warning()
    assert warning is not None and "4.7% of 64 codes appeared" in warning and "fsq" in warning
    # All codes appear once, and one of them most of the time: a collapse too.
    rare = CodebookUsage(64)
    rare.update(torch.arange(64))
    rare.update(torch.zeros(100_000, dtype=torch.int64))
    assert rare.collapse_warning() is not None
