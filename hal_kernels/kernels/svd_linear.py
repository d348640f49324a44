# mypy: allow-untyped-defs
"""The SVD linear layer in Triton.

    h = dropout(x)·P,   y = xWᵀ + b + s·(h ⊙ Λ)Q

Three paths forward, of equal result up to rounding:

    prepare  shrink; expand writes s·(h ⊙ Λ)Q + b into y; the vendor's GEMM adds xWᵀ to it
             (beta = 1), so that y is read where matrix work hides the read. It adds in float32;
             what was prepared is rounded to y's dtype once.
    add      the vendor's GEMM; shrink; expand reads y, adds b and the adapter, and writes y.
    fused    one Triton GEMM with h as a second accumulator: x is read once, but multiplied with P
             in every column tile. For small T and narrow d_out: the rule is `configs.fused_tile`.

Without a `path` argument: fused where it pays, else what the architecture's config says. Backward
has the first two: prepare writes the adapter's part of dx, and dy·W is added to it.

Launches beyond the base GEMM (of y forward, of dx backward): forward 2, fused none (the one launch
is the base GEMM); backward 3 (gradients of dy, of x with dx, the reduction), 2 up to one block of
rows or where the factors are frozen.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..ops.svd_adapter_add import flat
from ..ops.svd_linear import _backward_default, _forward
from .cases import Case
from .configs import Tile, architecture_of, fused_tile
from .dropout import keep_block, thresholds
from .launch import aligned, dot_precision, on_device_of, padded
from .svd_adapter import (
    expand_,
    factors_of,
    gradients,
    rows_of,
    shrink,
    supported,
    total_of,
)
from .svd_blocks import FREE, scaled_lam
from .svd_variants import adapter_case, variants

PATHS = ("prepare", "add", "fused")


@triton.jit(**FREE)
def fused_kernel(
    x, weight, bias, p, lam, q, y, h, p_seed,
    scaling, scale, T, r, d_in, d_out, threshold,
    stride_x, stride_wn, stride_wk, stride_p, stride_q, stride_h,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y = xWᵀ + b + s·(h ⊙ Λ)Q, [T, d_out], with h = dropout(x)·P, [T, r].

    The low-rank product comes after the loop over d_in: no tile of Q is held while it runs.
    """
    tiles = tl.cdiv(d_out, BN)
    i_t, i_n = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    o_t = i_t * BT + tl.arange(0, BT)
    o_n = i_n * BN + tl.arange(0, BN)
    o_r = tl.arange(0, R)
    m_t, m_n, m_r = o_t < T, o_n < d_out, o_r < r
    p_x = x + o_t.to(tl.int64)[:, None] * stride_x
    p_w = weight + o_n.to(tl.int64)[None, :] * stride_wn
    p_p = p + o_r.to(tl.int64)[None, :] * stride_p
    b_y = tl.zeros([BT, BN], tl.float32)
    b_h = tl.zeros([BT, R], tl.float32)
    for k in range(0, d_in, BK):
        o_k = k + tl.arange(0, BK)
        m_k = o_k < d_in
        p_wk = p_w + o_k.to(tl.int64)[:, None] * stride_wk
        b_x = tl.load(p_x + o_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0)  # [BT, BK]
        b_w = tl.load(p_wk, mask=m_k[:, None] & m_n[None, :], other=0.0)  # [BK, BN]
        b_p = tl.load(p_p + o_k[:, None], mask=m_k[:, None] & m_r[None, :], other=0.0)  # [BK, R]
        b_y = tl.dot(b_x, b_w, b_y, input_precision=PRECISION)
        if p_seed is not None:
            b_x = tl.where(keep_block(p_seed, threshold, o_t, k, BT, BK), b_x, 0.0)
        b_h = tl.dot(b_x, b_p.to(b_x.dtype), b_h, input_precision=PRECISION)
    b_h *= scale
    if i_n == 0:
        p_h = h + o_t.to(tl.int64)[:, None] * stride_h + o_r[None, :]
        tl.store(p_h, b_h, mask=m_t[:, None] & m_r[None, :])
    b_hl = (b_h * scaled_lam(lam, scaling, r, o_r)).to(x.dtype.element_ty)
    p_q = q + o_r.to(tl.int64)[:, None] * stride_q + o_n[None, :]
    b_q = tl.load(p_q, mask=m_r[:, None] & m_n[None, :], other=0.0)  # [R, BN]
    b_y = tl.dot(b_hl, b_q.to(b_hl.dtype), b_y, input_precision=PRECISION)
    if bias is not None:
        b_y += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_y = y + o_t.to(tl.int64)[:, None] * d_out + o_n[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_t[:, None] & m_n[None, :])


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    p: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    scaling: float,
    dropout: float,
    seed: torch.Tensor | None,
    tangent: float,
    *,
    path: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, h [T, r]): `hal::svd_linear`. `path` is one of `PATHS`, to measure them."""
    if not supported(x, p, q):
        return _forward(x, weight, bias, p, lam, q, scaling, dropout, seed, tangent)
    p, lam, q = factors_of(p, lam, q)
    bias = None if bias is None else bias.contiguous()
    rows = rows_of(x)
    out = x.new_empty(*x.shape[:-1], weight.shape[0])  # a view may not be written to in place
    y, tile = flat(out), None
    if path in (None, "fused"):
        tile = tile_of_fused(rows, weight, p, q, always=path == "fused")
    if tile is not None:
        h = x.new_empty(rows.shape[0], p.shape[0], dtype=torch.float32)
        fused_(y, h, rows, weight, bias, p, lam, q, scaling, dropout, seed, tile)
    else:
        parts = shrink(rows, p, dropout, seed)
        h = total_of(parts)
        prepare = path == "prepare" or (path is None and architecture_of(x.device).prepare)
        linear_(y, rows, weight, bias, parts, h, lam, q, scaling, prepare)
    return out, h


def linear_(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    parts: torch.Tensor,
    h: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    scaling: float,
    prepare: bool,
) -> None:
    """Writes y ``[T, d_out]`` by "prepare" or "add", from partial sums of h, and h for the sum."""
    if not prepare:
        torch.mm(x, weight.t(), out=y)
    expand_(y, parts, lam, q, scaling, h_sum=h, bias=bias, base=None if prepare else y)
    if prepare:
        y.addmm_(x, weight.t())


def tile_of_fused(
    x: torch.Tensor,
    weight: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    *,
    always: bool = False,
) -> Tile | None:
    """The tile to compute y and h with in one launch; None where two kernels and a GEMM cost less.

    The rule is `configs.fused_tile`. A weight must have adjacent rows or adjacent columns.
    """
    if 1 not in weight.stride() and not always:
        return None
    gpu, matrix = architecture_of(x.device), weight if weight.stride(1) == 1 else weight.t()
    tiles = gpu.svd_tiles(p.shape[0], aligned(x, matrix, p, q)).fused
    size = (*x.shape, weight.shape[0], p.shape[0], x.dtype.itemsize)
    return fused_tile(gpu, tiles, *size, always=always)


def fused_(
    y: torch.Tensor,
    h: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    p: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    scaling: float,
    dropout: float,
    seed: torch.Tensor | None,
    tile: Tile,
) -> None:
    """Writes y ``[T, d_out]`` and h ``[T, r]``, or columns of a wider h. One launch."""
    (T, d_in), (d_out, r) = x.shape, (weight.shape[0], p.shape[0])
    columns = tile.columns_of(x.dtype)
    threshold, scale = thresholds(dropout, seed)
    with on_device_of(x):
        fused_kernel[(triton.cdiv(T, tile.rows) * triton.cdiv(d_out, columns),)](
            x, weight, bias, p, lam, q, y, h, seed, scaling, scale, T, r, d_in, d_out, threshold,
            x.stride(0), weight.stride(0), weight.stride(1), p.stride(0), q.stride(0), h.stride(0),
            BT=tile.rows, BN=columns, BK=tile.depth_of(x.dtype), R=padded(r),
            PRECISION=dot_precision(x.dtype), **tile.options,
        )  # fmt: skip


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    p: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    scaling: float,
    dropout: float,
    seed: torch.Tensor | None,
    tangent: float,
    needs_dx: bool,
    needs_factors: bool,
    *,
    path: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dP, dΛ, dQ): `hal::svd_linear_backward`. `path` is "prepare" or "add"."""
    if not supported(x, p, q):
        return _backward_default(
            dy, x, h, weight, p, lam, q, scaling, dropout, seed, tangent, needs_dx, needs_factors
        )
    p, lam, q = factors_of(p, lam, q)
    dy, rows = rows_of(dy), rows_of(x)
    prepare = path == "prepare" or (path is None and architecture_of(x.device).prepare)
    dx = x.new_empty(rows.shape if needs_dx else (0,))
    if needs_dx and not prepare:
        torch.mm(dy, weight, out=dx)
    dp, dlam, dq = gradients(
        dy, rows, h, p, lam, q, scaling, dropout, seed, tangent,
        dx if needs_dx else None, needs_factors, add=not prepare,
    )  # fmt: skip
    if needs_dx and prepare:
        dx.addmm_(dy, weight)
    return dx.view(x.shape) if needs_dx else dx, dp, dlam, dq


def cases() -> Iterator[Case]:
    """What is compiled ahead of time, the weight row-major and (Conv1D's, once) transposed."""
    for name, tiles, dtype, even, constants in variants():
        for tile in tiles.fused:
            sizes = {"BT": tile.rows, "BN": tile.columns_of(dtype), "BK": tile.depth_of(dtype)}
            both = dtype == torch.bfloat16 and "p_seed" in constants
            for unit in ("stride_wk", "stride_wn") if both else ("stride_wk",):
                consts = {**sizes, **constants, unit: 1}
                yield adapter_case(fused_kernel, name, tile, dtype, even, **consts)
