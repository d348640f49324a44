# mypy: allow-untyped-defs
"""The SVD linear layer and its orthogonality penalty, in Triton.

    h = dropout(x)·P,   y = xWᵀ + b + s·(h ⊙ Λ)Q,   penalty = ‖PᵀP − I‖² + ‖QQᵀ − I‖²

As `svd_linear` by its paths "prepare" and "add"; the first programs of shrink and of expand also
multiply a share of the columns of P and of Q, which then are in the cache, with themselves. Their
partial sums ``[parts, r, r]``, of at most as many parts as those of h, one small kernel adds up.

Launches beyond the base GEMM: forward 3 (shrink, expand, finish). Backward is `svd_linear`'s and
the gradient of `orthogonality_penalty`: 3 + 1, and the sum of both gradients.
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..ops.svd_adapter_add import flat
from ..ops.svd_linear_penalty import Outputs, _forward
from .cases import Case
from .configs import ARCHITECTURES, HIGHEST_RANK, architecture_of, chunk_of
from .dropout import thresholds
from .launch import DTYPES, aligned, dot_precision, on_device_of, padded
from .svd_adapter import factors_of, rows_of, supported, total_of
from .svd_blocks import FREE, expand_block, gram_block, shrink_block
from .svd_variants import adapter_case, variants

FINISH = {"BR": 16, "num_warps": 4}


@triton.jit(**FREE)
def shrink_gram_kernel(
    x, p, h, gram, p_seed,
    scale, T, r, d, chunk, gram_chunk, splits, threshold, stride_x, stride_p, stride_ht, stride_hc,
    BT: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
    GRAM: tl.constexpr,
):  # fmt: skip
    """`shrink_kernel`, of which the first `splits` programs give the Gram matrix of P too."""
    i_t, i_c = tl.program_id(0), tl.program_id(1)
    shrink_block(
        x, p, h, p_seed,
        scale, T, r, d, chunk, threshold, stride_x, stride_p, stride_ht, stride_hc, i_t, i_c,
        BT, BK, R, PRECISION,
    )  # fmt: skip
    i = i_t * tl.num_programs(1) + i_c
    if i < splits:
        gram_block(p, gram, r, d, gram_chunk, stride_p, i, R, GRAM)


@triton.jit(**FREE)
def expand_gram_kernel(
    h, lam, q, bias, base, y, h_sum, gram,
    scaling, T, r, d, parts, gram_chunk, splits, stride_q, stride_base,
    stride_ht, stride_hc, stride_sum,
    BT: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
    GRAM: tl.constexpr,
):  # fmt: skip
    """`expand_kernel`, of which the first `splits` programs give the Gram matrix of Q too."""
    i_t, i_n = tl.program_id(0), tl.program_id(1)
    expand_block(
        h, lam, q, bias, base, y, h_sum, None,
        scaling, 1.0, T, r, d, parts, 0, stride_q, stride_base,
        stride_ht, stride_hc, stride_sum, i_t, i_n, BT, BN, R, PRECISION,
    )  # fmt: skip
    i = i_t * tl.num_programs(1) + i_n
    if i < splits:
        gram_block(q, gram, r, d, gram_chunk, stride_q, i, R, GRAM)


@triton.jit
def residual_of(gram, residual, r, splits, BR: tl.constexpr, R: tl.constexpr):
    """R = Σ_c gram[c] − I, [r, r], BR rows at a time; returns ‖R‖²_F."""
    o_c = tl.arange(0, R)
    b_square = tl.zeros([BR], tl.float32)
    for first in range(0, r, BR):
        o_r = first + tl.arange(0, BR)
        m = (o_r < r)[:, None] & (o_c < r)[None, :]
        o_gram = o_r[:, None] * r + o_c[None, :]
        b_sum = tl.zeros([BR, R], tl.float32)
        for c in range(0, splits):
            b_sum += tl.load(gram + c * r * r + o_gram, mask=m, other=0.0)
        b_sum -= tl.where(m & (o_r[:, None] == o_c[None, :]), 1.0, 0.0)
        tl.store(residual + o_gram, b_sum, mask=m)
        b_square += tl.sum(b_sum * b_sum, 1)
    return tl.sum(b_square)


@triton.jit(do_not_specialize=["r", "splits_p", "splits_q"])
def finish_kernel(
    gram_p, gram_q, residual_p, residual_q, penalty, r, splits_p, splits_q,
    BR: tl.constexpr, R: tl.constexpr, SQUARED: tl.constexpr,
):  # fmt: skip
    """Both residuals, and the penalty: ‖R_P‖² + ‖R_Q‖², or the norms. One program."""
    square_p = residual_of(gram_p, residual_p, r, splits_p, BR, R)
    square_q = residual_of(gram_q, residual_q, r, splits_q, BR, R)
    if SQUARED:
        tl.store(penalty, square_p + square_q)
    else:
        tl.store(penalty, tl.sqrt(square_p) + tl.sqrt(square_q))


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
    squared: bool,
    *,
    path: str | None = None,
) -> Outputs:
    """(y, h, penalty, [R_P, R_Q]): `hal::svd_linear_penalty`. `path`: "prepare" or "add"."""
    if not (supported(x, p, q) and p.dtype == q.dtype and p.dtype in DTYPES):
        return _forward(x, weight, bias, p, lam, q, scaling, dropout, seed, squared)
    p, lam, q = factors_of(p, lam, q)
    bias = None if bias is None else bias.contiguous()
    rows, r = rows_of(x), p.shape[0]
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    y, prepare = flat(out), architecture_of(x.device).prepare if path is None else path == "prepare"
    if not prepare:
        torch.mm(rows, weight.t(), out=y)
    parts, gram_p = _shrink(rows, p, dropout, seed)
    h = total_of(parts)
    gram_q = _expand_(y, parts, lam, q, scaling, h, bias, None if prepare else y)
    residuals = [h.new_empty(1, r, r) for _ in range(2)]
    penalty = h.new_empty(())
    with on_device_of(x):
        finish_kernel[(1,)](
            gram_p, gram_q, *residuals, penalty, r, len(gram_p), len(gram_q),
            R=padded(r), SQUARED=squared, **FINISH,
        )  # fmt: skip
    if prepare:
        y.addmm_(rows, weight.t())
    return out, h, penalty, residuals


def _shrink(
    x: torch.Tensor, p: torch.Tensor, dropout: float, seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`svd_adapter.shrink`, and partial sums ``[splits, r, r]`` of PᵀP. One launch."""
    (T, d), r, gpu = x.shape, p.shape[0], architecture_of(x.device)
    tile = gpu.svd_tiles(r, aligned(x, p)).shrink
    columns, blocks = tile.columns_of(x.dtype), triton.cdiv(T, tile.rows)
    parts = gpu.column_parts_of(blocks, d, columns)
    h = x.new_empty(parts, T, r, dtype=torch.float32)
    gram, gram_chunk = _gram(h, d, columns, blocks * parts)
    threshold, scale = thresholds(dropout, seed)
    with on_device_of(x):
        shrink_gram_kernel[(blocks, parts)](
            x, p, h, gram, seed, scale, T, r, d, chunk_of(d, columns, parts), gram_chunk, len(gram),
            threshold, x.stride(0), p.stride(0), h.stride(1), h.stride(0),
            BT=tile.rows, BK=columns, R=padded(r), PRECISION=dot_precision(x.dtype),
            GRAM=dot_precision(p.dtype), **tile.options,
        )  # fmt: skip
    return h, gram


def _expand_(
    y: torch.Tensor,
    h: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    scaling: float,
    h_sum: torch.Tensor,
    bias: torch.Tensor | None,
    base: torch.Tensor | None,
) -> torch.Tensor:
    """`svd_adapter.expand_`; returns partial sums ``[splits, r, r]`` of QQᵀ. One launch."""
    (T, d), (parts, _, r) = y.shape, h.shape
    tile = architecture_of(y.device).svd_tiles(r, aligned(y, q)).expand
    columns, blocks = tile.columns_of(y.dtype), triton.cdiv(T, tile.rows)
    tiles = triton.cdiv(d, columns)
    gram, gram_chunk = _gram(h, d, columns, blocks * tiles)
    several = parts > 1
    with on_device_of(y):
        expand_gram_kernel[(blocks, tiles)](
            h, lam, q, bias, base, y, h_sum if several else None, gram,
            scaling, T, r, d, parts if several else None, gram_chunk, len(gram), q.stride(0),
            0 if base is None else base.stride(0), h.stride(1), h.stride(0), h_sum.stride(0),
            BT=tile.rows, BN=columns, R=padded(r), PRECISION=dot_precision(y.dtype),
            GRAM=dot_precision(q.dtype), **tile.options,
        )  # fmt: skip
    return gram


def _gram(h: torch.Tensor, d: int, columns: int, programs: int) -> tuple[torch.Tensor, int]:
    """A buffer for partial Gram matrices of d columns, and the columns of each of them."""
    gpu, r = architecture_of(h.device), h.shape[-1]
    splits = min(gpu.column_parts, programs, triton.cdiv(d, columns))
    chunk = chunk_of(d, columns, splits)
    return h.new_empty(triton.cdiv(d, chunk), r, r), chunk


def cases() -> Iterator[Case]:
    """What is compiled ahead of time: every kernel in every shipped config."""
    for name, tiles, dtype, even, constants in variants():
        if "p_seed" in constants:
            continue  # None: without dropout
        constants["GRAM"] = "ieee" if name.startswith("gfx") else "tf32x3"
        tile = tiles.shrink
        sizes = {"BT": tile.rows, "BK": tile.columns_of(dtype), **constants}
        yield adapter_case(shrink_gram_kernel, name, tile, dtype, even, **sizes)
        tile = tiles.expand
        sizes = {"BT": tile.rows, "BN": tile.columns_of(dtype), **constants}
        absent = {"parts": None} if even else {"bias": None}
        yield adapter_case(expand_gram_kernel, name, tile, dtype, even, **sizes, **absent)
    for name, rank in itertools.product(ARCHITECTURES, (16, HIGHEST_RANK)):
        pointers = ("gram_p", "gram_q", "residual_p", "residual_q", "penalty")
        types = dict.fromkeys(pointers, "*fp32")
        types |= dict.fromkeys(("r", "splits_p", "splits_q"), "i32")
        constants = {"BR": FINISH["BR"], "R": rank, "SQUARED": False}
        options = {"num_warps": FINISH["num_warps"], "num_stages": 3}
        yield Case(finish_kernel, types, constants, options, pointers, name)
