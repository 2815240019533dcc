"""q4_k, the format of llama.cpp with 4.5 bits a weight. The package gguf reads it, and writes none.

256 numbers of a row are a block, and 32 of them a group. A number is d * s * q - e * m, where q is
0 to 15, s and m are 0 to 63 and of the group, and d and e are float16 and of the block. A block is
144 bytes: d, e, 12 bytes of s and m, 128 bytes of q.

The step and the offset of a group are searched as llama.cpp does (``make_qkx2_quants``): from each
of some grids, the least squares of the numbers that they give.

Shapes: B blocks, G = 8 groups of a block, K = 32 numbers of a group.
"""

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

BLOCK, GROUP = 256, 32
LARGEST, LARGEST_SCALE = 15, 63
ROWS = 512  # at a time: the search needs many times their memory
GRIDS = np.linspace(-1, 1, 21)  # what is added to the 15 steps between the ends of a group

Floats = NDArray[np.float32]


def quantize_q4_k(data: Floats) -> NDArray[np.uint8]:
    """Round a matrix.

    Args:
        data: float32[N, a multiple of BLOCK].

    Returns:
        uint8[N, 144 for each block].
    """
    parts = [_rounded(data[start : start + ROWS]) for start in range(0, len(data), ROWS)]
    return np.concatenate(parts)


def _rounded(data: Floats) -> NDArray[np.uint8]:
    groups = rearrange(data, "n (b g k) -> (n b) g k", g=BLOCK // GROUP, k=GROUP)
    steps, offsets = _fitted(groups)
    d, s = _scaled(steps)
    e, m = _scaled(offsets)
    step, offset = (d[:, None] * s)[..., None], (e[:, None] * m)[..., None]
    safe = np.where(step > 0, step, 1)
    q = np.where(step > 0, np.clip(np.rint((groups + offset) / safe), 0, LARGEST), 0)
    low, high = rearrange(q.astype(np.uint8), "b (g two) k -> two b (g k)", two=2)
    parts = [
        d.astype(np.float16)[:, None].view(np.uint8),
        e.astype(np.float16)[:, None].view(np.uint8),
        _packed(s.astype(np.uint8), m.astype(np.uint8)),
        low | high << 4,
    ]
    return np.concatenate(parts, 1).reshape(len(data), -1)


def _fitted(groups: Floats) -> tuple[Floats, Floats]:
    """The step and the offset of each group, both 0 or more: float32[B, G]."""
    x = groups.astype(np.float64)
    # Large numbers matter more, as in llama.cpp.
    weight = np.abs(x) + np.sqrt(np.square(x).mean(-1, keepdims=True))
    low, high = np.minimum(x.min(-1), 0), x.max(-1)
    width = np.where(high > low, high - low, 1)
    best = np.full(low.shape, np.inf)
    steps, offsets = np.zeros_like(low), -low

    def total(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return (weight * values).sum(-1)

    for more in GRIDS:
        inverse = (LARGEST + more) / width
        q = np.clip(np.rint(inverse[..., None] * (x - low[..., None])), 0, LARGEST)
        ones, sum_q, sum_qq = total(np.ones_like(x)), total(q), total(q * q)
        sum_x, sum_xq = total(x), total(x * q)
        spread = ones * sum_qq - sum_q**2
        flat = spread <= 1e-12 * ones * sum_qq  # all q are equal
        divided_by = np.where(flat, 1, spread)
        only = sum_xq / np.where(sum_qq > 0, sum_qq, 1)  # without an offset
        step = np.where(flat, only, (ones * sum_xq - sum_x * sum_q) / divided_by)
        start = np.where(flat, low, (sum_qq * sum_x - sum_q * sum_xq) / divided_by)
        step, start = np.where(start > 0, only, step), np.minimum(start, 0)
        error = total(np.square(step[..., None] * q + start[..., None] - x))
        better = (error < best) & (step >= 0)
        best = np.where(better, error, best)
        steps, offsets = np.where(better, step, steps), np.where(better, -start, offsets)
    return steps.astype(np.float32), offsets.astype(np.float32)


def _scaled(values: Floats) -> tuple[Floats, Floats]:
    """Of values of groups one float16 for each block, and 0 to 63: float32[B], float32[B, G]."""
    unit = (values.max(1) / LARGEST_SCALE).astype(np.float16).astype(np.float32)
    safe = np.where(unit > 0, unit, 1)[:, None]
    numbers = np.where(unit[:, None] > 0, np.clip(np.rint(values / safe), 0, LARGEST_SCALE), 0)
    return unit, numbers.astype(np.float32)


def _packed(s: NDArray[np.uint8], m: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """6 bits each in 12 bytes: the upper bits of the last four lie above the first four."""
    first = s[:, :4] | (s[:, 4:] >> 4) << 6
    second = m[:, :4] | (m[:, 4:] >> 4) << 6
    return np.concatenate([first, second, s[:, 4:] & 15 | (m[:, 4:] & 15) << 4], 1)
