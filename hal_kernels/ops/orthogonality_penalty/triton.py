# mypy: allow-untyped-defs
"""Triton kernels of the orthogonality penalty: every matrix of every width in one launch.

A list entry holds all matrices of one width. The entries' addresses and sizes are tuples of
arguments; a program finds its entry by comparing its index with the entries' first programs. So
nothing is copied to the device, and a captured CUDA graph holds no table that could go stale.
"""

import itertools

import torch
import triton
import triton.language as tl

from ...kernels.configs import HIGHEST_RANK, architecture_of
from ...kernels.launch import DTYPES, dot_precision, on_device_of


@triton.jit
def _residual_kernel(
    factors, offsets, residuals, starts, widths, ranks, norms,
    N: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    SQUARED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """R = FFᵀ − I of one matrix F [r, d] by one program, and ‖R‖²_F (or ‖R‖_F).

    factors: N × [R, d]; offsets: N × [G + 1]; residuals: N × [G, rank, rank]; norms: [Σ G].
    """
    pid = tl.program_id(0)
    p_factor, p_offset, p_residual = factors[0], offsets[0], residuals[0]
    start, width, rank = starts[0], widths[0], ranks[0]
    for i in tl.static_range(1, N):
        here = pid >= starts[i]
        p_factor = tl.where(here, factors[i], p_factor)
        p_offset = tl.where(here, offsets[i], p_offset)
        p_residual = tl.where(here, residuals[i], p_residual)
        start = tl.where(here, starts[i], start)
        width = tl.where(here, widths[i], width)
        rank = tl.where(here, ranks[i], rank)
    matrix = (pid - start).to(tl.int64)
    first = tl.load(p_offset + matrix)
    own = tl.load(p_offset + matrix + 1) - first

    o_r = tl.arange(0, BR)
    m_r = o_r < own
    p_rows = p_factor + (first + o_r)[:, None] * width  # [BR, 1]
    b_gram = tl.zeros([BR, BR], dtype=tl.float32)
    for k in range(0, width, BK):
        o_k = k + tl.arange(0, BK)
        mask = m_r[:, None] & (o_k < width)[None, :]
        b_f = tl.load(p_rows + o_k[None, :], mask=mask, other=0.0)  # [BR, BK]
        b_gram = tl.dot(b_f, tl.trans(b_f), b_gram, input_precision=PRECISION)

    identity = (o_r[:, None] == o_r[None, :]).to(tl.float32)
    b_residual = tl.where(m_r[:, None] & m_r[None, :], b_gram - identity, 0.0)  # [BR, BR]
    p_out = p_residual + matrix * rank * rank + o_r[:, None] * rank + o_r[None, :]
    tl.store(p_out, b_residual, mask=(o_r < rank)[:, None] & (o_r < rank)[None, :])
    norm = tl.sum(b_residual * b_residual)
    if not SQUARED:
        norm = tl.sqrt(norm)
    tl.store(norms + pid, norm)


@triton.jit(do_not_specialize=["count"])
def _sum_kernel(norms, value, count, weight, BLOCK: tl.constexpr):
    """value = weight · Σ norms, by one program and in one order."""
    o_n = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for n in range(0, count, BLOCK):
        b_sum += tl.load(norms + n + o_n, mask=n + o_n < count, other=0.0)
    tl.store(value, tl.sum(b_sum) * weight)


@triton.jit
def _gradient_kernel(
    dvalue, factors, offsets, residuals, gradients, starts, widths, ranks, weight,
    N: tl.constexpr, BR: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
    SQUARED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dF = dvalue · weight · 4RF (or · 2RF/‖R‖_F): BK columns of one matrix by one program."""
    pid = tl.program_id(0)
    p_factor, p_offset, p_residual = factors[0], offsets[0], residuals[0]
    p_gradient, start, width, rank = gradients[0], starts[0], widths[0], ranks[0]
    for i in tl.static_range(1, N):
        here = pid >= starts[i]
        p_factor = tl.where(here, factors[i], p_factor)
        p_offset = tl.where(here, offsets[i], p_offset)
        p_residual = tl.where(here, residuals[i], p_residual)
        p_gradient = tl.where(here, gradients[i], p_gradient)
        start = tl.where(here, starts[i], start)
        width = tl.where(here, widths[i], width)
        rank = tl.where(here, ranks[i], rank)
    tiles = tl.cdiv(width, BK)
    matrix = ((pid - start) // tiles).to(tl.int64)
    o_k = (pid - start) % tiles * BK + tl.arange(0, BK)
    first = tl.load(p_offset + matrix)
    own = (tl.load(p_offset + matrix + 1) - first).to(tl.int32)

    o_r = tl.arange(0, BR)
    m_r = o_r < own
    m_k = (o_k < width)[None, :]
    b_gradient = tl.zeros([BR, BK], dtype=tl.float32)
    b_square = tl.zeros([BR], dtype=tl.float32)
    for j in range(0, own, BJ):
        o_j = j + tl.arange(0, BJ)
        m_j = o_j < own
        p_in = p_residual + matrix * rank * rank + o_r[:, None] * rank + o_j[None, :]
        b_r = tl.load(p_in, mask=m_r[:, None] & m_j[None, :], other=0.0)  # [BR, BJ]
        p_rows = p_factor + (first + o_j)[:, None] * width + o_k[None, :]
        b_f = tl.load(p_rows, mask=m_j[:, None] & m_k, other=0.0).to(tl.float32)  # [BJ, BK]
        b_gradient = tl.dot(b_r, b_f, b_gradient, input_precision=PRECISION)
        if not SQUARED:
            b_square += tl.sum(b_r * b_r, 1)

    scale = tl.load(dvalue).to(tl.float32) * weight
    if SQUARED:
        scale = scale * 4.0
    else:
        norm = tl.sqrt(tl.sum(b_square))
        some = norm > 0.0
        scale = tl.where(some, scale * 2.0 / tl.where(some, norm, 1.0), 0.0)
    p_out = p_gradient + (first + o_r)[:, None] * width + o_k[None, :]
    b_gradient = (b_gradient * scale).to(p_gradient.dtype.element_ty)
    tl.store(p_out, b_gradient, mask=m_r[:, None] & m_k)


def supported(factors: list[torch.Tensor], max_ranks: list[int]) -> bool:
    """Whether factors have one of the kernels' dtypes, and ranks up to 128."""
    dtypes = {f.dtype for f in factors}
    return len(dtypes) == 1 and dtypes <= set(DTYPES) and max(max_ranks) <= HIGHEST_RANK


def forward(
    factors: list[torch.Tensor],
    offsets: list[torch.Tensor],
    max_ranks: list[int],
    squared: bool,
    weight: float,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Residuals and norms of all matrices, and the norms' sum: two launches."""
    factors = [f.contiguous() for f in factors]
    counts = [o.shape[0] - 1 for o in offsets]
    residuals = [
        f.new_empty(g, r, r, dtype=torch.float32)
        for f, g, r in zip(factors, counts, max_ranks, strict=True)
    ]
    value = factors[0].new_empty((), dtype=torch.float32)
    norms = value.new_empty(sum(counts))
    rank, tiles = architecture_of(value.device).penalty_tiles(max(max_ranks))
    tile = tiles.residual
    with on_device_of(value):
        if sum(counts):
            _residual_kernel[(sum(counts),)](
                tuple(factors), tuple(o.contiguous() for o in offsets), tuple(residuals),
                _starts(counts), tuple(f.shape[1] for f in factors), tuple(max_ranks), norms,
                N=len(factors), BR=rank, BK=tile.columns, SQUARED=squared,
                PRECISION=dot_precision(factors[0].dtype), **tile.options,
            )  # fmt: skip
        _sum_kernel[(1,)](norms, value, sum(counts), weight, BLOCK=1024, num_warps=4)
    return value, residuals


def backward(
    dvalue: torch.Tensor,
    factors: list[torch.Tensor],
    residuals: list[torch.Tensor],
    offsets: list[torch.Tensor],
    max_ranks: list[int],
    squared: bool,
    weight: float,
) -> list[torch.Tensor]:
    """One launch."""
    factors = [f.contiguous() for f in factors]
    gradients = [torch.empty_like(f) for f in factors]
    rank, tiles = architecture_of(dvalue.device).penalty_tiles(max(max_ranks))
    tile = tiles.gradient
    counts = [
        (o.shape[0] - 1) * -(-f.shape[1] // tile.columns)
        for f, o in zip(factors, offsets, strict=True)
    ]
    if sum(counts):
        with on_device_of(dvalue):
            _gradient_kernel[(sum(counts),)](
                dvalue, tuple(factors), tuple(o.contiguous() for o in offsets),
                tuple(r.contiguous() for r in residuals), tuple(gradients), _starts(counts),
                tuple(f.shape[1] for f in factors), tuple(max_ranks), weight,
                N=len(factors), BR=rank, BJ=tile.depth, BK=tile.columns, SQUARED=squared,
                PRECISION=dot_precision(torch.float32), **tile.options,
            )  # fmt: skip
    return gradients


def _starts(counts: list[int]) -> tuple[int, ...]:
    """Each entry's first program."""
    return tuple(itertools.accumulate(counts[:-1], initial=0))
