# mypy: allow-untyped-defs
"""Triton kernels of the hypernetwork's transformer layer, for all sets of weights and all tokens.

Each product is one kernel with what follows it, so that a token's row stays on the chip until it is
needed whole elsewhere. H is the hidden width, D the inner one; S·N tokens of N = G·r a set.

    forward    qkv = tW_qkvᵀ + b, attention      per block of matrices and head
               z₁ = t + cW_oᵀ + b, n = LN₁(z₁)   per block of rows
               f = nW₁ᵀ + b, a = GELU(f)         per block of rows and of columns
               z₂ = n + aW₂ᵀ + b, out = LN₂(z₂)  per block of rows
    backward   dz₂                               per block of rows
               df = dz₂W₂ ⊙ GELU′(f)             per block of rows and of columns
               dz₁ from dn = dz₂ + df·W₁         per block of rows
               dqkv from dc = dz₁W_o             per block of matrices and head
               dt = dz₁ + dqkv·W_qkv, dW         vendor GEMMs
               biases and affines                sums of a row of partial results a block

With `norm_first` they are the same kernels: attention normalises the rows of t that it reads, the
second writes n = LN₂(z₁), and the last z₂ = z₁ + aW₂ᵀ + b, which is the output. In the backward
dz₂ is the upstream gradient, so that its kernel comes last instead, and gives dt from dqkv·W_qkv.

The kernels of attention are in `hypernet_attention`, the others here.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .cases import POINTERS, Case
from .configs import ARCHITECTURES, Tile, architecture_of
from .hypernet_attention import attention_backward_kernel, attention_kernel
from .hypernet_blocks import gelu, normed, pair, product, row_product
from .launch import DTYPES, dot_precision, on_device_of, padded

MAX_HIDDEN = 512
MAX_HEAD = 64


@triton.jit(do_not_specialize=["N"])
def linear_norm_kernel(
    x, weight, bias, residual, gamma, beta, z, out, N, eps, K: tl.constexpr, H: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """z = residual + xWᵀ + b and, unless out is None, out = LN(z): BT rows of H columns.

    x: [S, N, K]; weight: [S, H, K]; residual, z, out: [S, N, H]; the rest [S, H].
    """
    i_t, i_s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_t = i_t * BT + tl.arange(0, BT)
    m_t = o_t < N
    o_row = i_s * N + o_t
    o_0, o_1 = tl.arange(0, BH), BH + tl.arange(0, BR)
    m_0, m_1 = o_0 < H, o_1 < H
    m_z0, m_z1 = m_t[:, None] & m_0[None, :], m_t[:, None] & m_1[None, :]

    b_0, b_1 = row_product(
        tl.zeros([BT, BH], dtype=tl.float32), tl.zeros([BT, BR], dtype=tl.float32),
        x, weight, o_row * K, (i_s * H + o_0) * K, (i_s * H + o_1) * K, m_t, m_0, m_1, None, K,
        BK, PRECISION,
    )  # fmt: skip
    b_b0, b_b1 = pair(bias, i_s * H, o_0, o_1, m_0, m_1)
    o_z0, o_z1 = (o_row * H)[:, None] + o_0[None, :], (o_row * H)[:, None] + o_1[None, :]
    b_0 += b_b0[None, :] + tl.load(residual + o_z0, mask=m_z0, other=0.0).to(tl.float32)
    b_1 += b_b1[None, :] + tl.load(residual + o_z1, mask=m_z1, other=0.0).to(tl.float32)
    dtype = z.dtype.element_ty
    tl.store(z + o_z0, b_0.to(dtype), mask=m_z0)
    tl.store(z + o_z1, b_1.to(dtype), mask=m_z1)
    if out is not None:
        # What is normalised is what is saved: backward sees the same rounded rows.
        b_0, b_1 = b_0.to(dtype).to(tl.float32), b_1.to(dtype).to(tl.float32)
        b_0, b_1, _ = normed(b_0, b_1, m_0, m_1, H, eps)
        b_g0, b_g1 = pair(gamma, i_s * H, o_0, o_1, m_0, m_1)
        b_b0, b_b1 = pair(beta, i_s * H, o_0, o_1, m_0, m_1)
        tl.store(out + o_z0, (b_0 * b_g0[None, :] + b_b0[None, :]).to(dtype), mask=m_z0)
        tl.store(out + o_z1, (b_1 * b_g1[None, :] + b_b1[None, :]).to(dtype), mask=m_z1)


@triton.jit(do_not_specialize=["N"])
def linear_gelu_kernel(
    x, weight, bias, f, a, N, H: tl.constexpr, D: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """f = xWᵀ + b,  a = GELU(f): BT rows of BN columns.

    x: [S, N, H]; weight: [S, D, H]; bias: [S, D]; f, a: [S, N, D].
    """
    i_t, i_n, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_t, o_n = i_t * BT + tl.arange(0, BT), i_n * BN + tl.arange(0, BN)
    m_t, m_n = o_t < N, o_n < D
    o_row = i_s * N + o_t
    b_f = product(
        tl.zeros([BT, BN], dtype=tl.float32), x, weight, o_row * H, (i_s * D + o_n) * H, m_t, m_n,
        None, H, BK, PRECISION, None,
    )  # fmt: skip
    b_f += tl.load(bias + i_s * D + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    b_f = b_f.to(f.dtype.element_ty)
    o_f = (o_row * D)[:, None] + o_n[None, :]
    m_f = m_t[:, None] & m_n[None, :]
    tl.store(f + o_f, b_f, mask=m_f)
    b_a, _ = gelu(b_f.to(tl.float32))
    tl.store(a + o_f, b_a.to(f.dtype.element_ty), mask=m_f)


@triton.jit(do_not_specialize=["N"])
def norm_backward_kernel(
    dx, weight, dresidual, z, gamma, beta, dz, out, sums, N, eps, K: tl.constexpr, H: tl.constexpr,
    FIRST: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dz = rstd·(g − mean(g) − ẑ·mean(g⊙ẑ)),  g = dy⊙γ,  dy = dresidual + dx·W: BT rows.

    If the LayerNorm came FIRST, dresidual has gone past it: it adds to dz instead of to dy.
    dx: [S, N, K]; weight: [S, K, H]; K = 0 without a product. dresidual, z, dz: [S, N, H].
    out = LN(z), unless None. sums: [S, blocks, 3H], this block's Σ dy⊙ẑ (dγ), Σ dy (dβ), Σ dz;
    if FIRST [S, blocks, 4H], the last Σ dresidual.
    """
    i_t, i_s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_t = i_t * BT + tl.arange(0, BT)
    m_t = o_t < N
    o_row = i_s * N + o_t
    o_0, o_1 = tl.arange(0, BH), BH + tl.arange(0, BR)
    m_0, m_1 = o_0 < H, o_1 < H
    m_z0, m_z1 = m_t[:, None] & m_0[None, :], m_t[:, None] & m_1[None, :]

    b_dy0, b_dy1 = row_product(
        tl.zeros([BT, BH], dtype=tl.float32), tl.zeros([BT, BR], dtype=tl.float32),
        dx, weight + i_s * K * H, o_row * K, o_0, o_1, m_t, m_0, m_1, H, K, BK, PRECISION,
    )  # fmt: skip
    o_z0, o_z1 = (o_row * H)[:, None] + o_0[None, :], (o_row * H)[:, None] + o_1[None, :]
    if not FIRST:
        b_dy0 += tl.load(dresidual + o_z0, mask=m_z0, other=0.0).to(tl.float32)
        b_dy1 += tl.load(dresidual + o_z1, mask=m_z1, other=0.0).to(tl.float32)
    b_0 = tl.load(z + o_z0, mask=m_z0, other=0.0).to(tl.float32)
    b_1 = tl.load(z + o_z1, mask=m_z1, other=0.0).to(tl.float32)
    b_0, b_1, rstd = normed(b_0, b_1, m_0, m_1, H, eps)
    b_g0, b_g1 = pair(gamma, i_s * H, o_0, o_1, m_0, m_1)
    dtype = dz.dtype.element_ty
    if out is not None:
        b_b0, b_b1 = pair(beta, i_s * H, o_0, o_1, m_0, m_1)
        tl.store(out + o_z0, (b_0 * b_g0[None, :] + b_b0[None, :]).to(dtype), mask=m_z0)
        tl.store(out + o_z1, (b_1 * b_g1[None, :] + b_b1[None, :]).to(dtype), mask=m_z1)

    p_sums = sums + (i_s * tl.num_programs(0) + i_t) * (4 if FIRST else 3) * H
    tl.store(p_sums + o_0, tl.sum(b_dy0 * b_0, 0), mask=m_0)
    tl.store(p_sums + o_1, tl.sum(b_dy1 * b_1, 0), mask=m_1)
    tl.store(p_sums + H + o_0, tl.sum(b_dy0, 0), mask=m_0)
    tl.store(p_sums + H + o_1, tl.sum(b_dy1, 0), mask=m_1)
    b_dy0, b_dy1 = b_dy0 * b_g0[None, :], b_dy1 * b_g1[None, :]
    mean = (tl.sum(b_dy0, 1) + tl.sum(b_dy1, 1)) / H
    slope = (tl.sum(b_dy0 * b_0, 1) + tl.sum(b_dy1 * b_1, 1)) / H
    b_0 = (b_dy0 - mean[:, None] - b_0 * slope[:, None]) * rstd[:, None]
    b_1 = (b_dy1 - mean[:, None] - b_1 * slope[:, None]) * rstd[:, None]
    if FIRST:
        b_dy0 = tl.load(dresidual + o_z0, mask=m_z0, other=0.0).to(tl.float32)
        b_dy1 = tl.load(dresidual + o_z1, mask=m_z1, other=0.0).to(tl.float32)
        tl.store(p_sums + 3 * H + o_0, tl.sum(b_dy0, 0), mask=m_0)
        tl.store(p_sums + 3 * H + o_1, tl.sum(b_dy1, 0), mask=m_1)
        b_0, b_1 = b_0 + b_dy0, b_1 + b_dy1
    tl.store(dz + o_z0, b_0.to(dtype), mask=m_z0)
    tl.store(dz + o_z1, b_1.to(dtype), mask=m_z1)
    tl.store(p_sums + 2 * H + o_0, tl.sum(b_0, 0), mask=m_0)
    tl.store(p_sums + 2 * H + o_1, tl.sum(b_1, 0), mask=m_1)


@triton.jit(do_not_specialize=["N"])
def gelu_backward_kernel(
    dz, weight, f, df, a, sums, N, H: tl.constexpr, D: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """df = dz·W ⊙ GELU′(f),  a = GELU(f): BT rows of BN columns.

    dz: [S, N, H]; weight: [S, H, D]; f, df, a: [S, N, D]; sums: [S, blocks, D], Σ df.
    """
    i_t, i_n, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_t, o_n = i_t * BT + tl.arange(0, BT), i_n * BN + tl.arange(0, BN)
    m_t, m_n = o_t < N, o_n < D
    o_row = i_s * N + o_t
    b_da = product(
        tl.zeros([BT, BN], dtype=tl.float32), dz, weight + i_s * H * D, o_row * H, o_n, m_t, m_n,
        D, H, BK, PRECISION, None,
    )  # fmt: skip
    o_f = (o_row * D)[:, None] + o_n[None, :]
    m_f = m_t[:, None] & m_n[None, :]
    b_a, b_slope = gelu(tl.load(f + o_f, mask=m_f, other=0.0).to(tl.float32))
    tl.store(a + o_f, b_a.to(a.dtype.element_ty), mask=m_f)
    b_df = b_da * b_slope
    tl.store(df + o_f, b_df.to(df.dtype.element_ty), mask=m_f)
    p_sums = sums + (i_s * tl.num_programs(0) + i_t) * D + o_n
    tl.store(p_sums, tl.sum(b_df, 0), mask=m_n)


@triton.jit
def reduce_kernel(
    sums, outputs, starts, firsts, strides, widths, counts,
    M: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Σ over the blocks of a set, for M vectors of one set each, BN elements by one program.

    sums: M × [S, count, stride], of which `width` columns from `first` on; outputs: M × [S, width].
    """
    pid, i_s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p_sums, p_out, start, first = sums[0], outputs[0], starts[0], firsts[0]
    stride, width, count = strides[0], widths[0], counts[0]
    for i in tl.static_range(1, M):
        here = pid >= starts[i]
        p_sums = tl.where(here, sums[i], p_sums)
        p_out = tl.where(here, outputs[i], p_out)
        start = tl.where(here, starts[i], start)
        first = tl.where(here, firsts[i], first)
        stride = tl.where(here, strides[i], stride)
        width = tl.where(here, widths[i], width)
        count = tl.where(here, counts[i], count)
    o_n = (pid - start) * BN + tl.arange(0, BN)
    m_n = o_n < width
    b_sum = tl.zeros([BT, BN], dtype=tl.float32)
    for t in range(0, count, BT):
        o_t = t + tl.arange(0, BT)
        p_in = p_sums + ((i_s * count + o_t) * stride)[:, None] + (first + o_n)[None, :]
        b_sum += tl.load(p_in, mask=(o_t < count)[:, None] & m_n[None, :], other=0.0)
    b_out = tl.sum(b_sum, 0).to(p_out.dtype.element_ty)
    tl.store(p_out + i_s * width + o_n, b_out, mask=m_n)


def forward(
    tokens: torch.Tensor,
    keys: torch.Tensor,
    parameters: list[torch.Tensor],
    heads: int,
    eps: float,
    norm_first: bool,
) -> tuple[torch.Tensor, ...]:
    """Four launches."""
    if not _suits(tokens, parameters, heads):
        from ..ops.hypernet_layer import _forward

        return _forward(tokens, keys, parameters, heads, eps, norm_first)
    w_qkv, b_qkv, w_o, b_o, g1, s1, w1, b1, w2, b2, g2, s2 = (p.contiguous() for p in parameters)
    sets, matrices, rank, hidden = tokens.shape
    count, inner = matrices * rank, w1.shape[1]
    t = tokens.contiguous()
    qkv = t.new_empty(sets, count, 3 * hidden)
    attention = t.new_empty(sets * matrices * heads, rank, rank)
    context, z1, n = (t.new_empty(sets, count, hidden) for _ in range(3))
    f, a = (t.new_empty(sets, count, inner) for _ in range(2))
    out = t.new_empty(tokens.shape)
    z2 = out if norm_first else torch.empty_like(z1)
    results = (out, qkv, attention, context, z1, f, n if norm_first else z2)
    if not t.numel():
        return results

    tiles = architecture_of(t.device).hypernet_tiles(sets * count)
    precision = dot_precision(t.dtype)
    whole = _whole_rows(hidden)
    with on_device_of(t):
        tile = tiles.attention
        block = _block(rank, tile.rows)
        attention_kernel[(triton.cdiv(count, block), heads, sets)](
            t, keys.contiguous().view(torch.uint8), *((g1, s1) if norm_first else (None, None)),
            w_qkv, b_qkv, qkv, attention, context,
            count, block, rank, 1.0 / math.sqrt(hidden // heads), eps,
            H=hidden, HEAD=hidden // heads, HEADS=heads, BT=tile.rows, BD=padded(hidden // heads),
            BK=_depth(tile, t.dtype, norm_first), PRECISION=precision, STAGES=tile.num_stages,
            num_warps=tile.num_warps, num_stages=1,
        )  # fmt: skip
        tile = tiles.rows
        grid = (triton.cdiv(count, tile.rows), sets)
        options = {"BT": tile.rows, **whole, "BK": tile.depth, **tile.options}
        linear_norm_kernel[grid](
            context, w_o, b_o, t, *((g2, s2) if norm_first else (g1, s1)), z1, n, count, eps,
            K=hidden, H=hidden, PRECISION=precision, **options,
        )  # fmt: skip
        tile = tiles.columns
        linear_gelu_kernel[(triton.cdiv(count, tile.rows), triton.cdiv(inner, tile.columns), sets)](
            n, w1, b1, f, a, count, H=hidden, D=inner, BT=tile.rows, BN=tile.columns, BK=tile.depth,
            PRECISION=precision, **tile.options,
        )  # fmt: skip
        linear_norm_kernel[grid](
            a, w2, b2, *((z1, None, None, z2, None) if norm_first else (n, g2, s2, z2, out)),
            count, eps, K=inner, H=hidden, PRECISION=precision, **options,
        )  # fmt: skip
    return results


def backward(
    dout: torch.Tensor,
    tokens: torch.Tensor,
    parameters: list[torch.Tensor],
    saved: list[torch.Tensor],
    heads: int,
    eps: float,
    norm_first: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Five launches and five vendor GEMMs, or four with `norm_first`."""
    if not _suits(tokens, parameters, heads):
        from ..ops.hypernet_layer import _backward_default

        return _backward_default(dout, tokens, parameters, saved, heads, eps, norm_first)
    w_qkv, _, w_o, _, g1, s1, w1, _, w2, _, g2, s2 = (p.contiguous() for p in parameters)
    qkv, attention, context, z1, f, last = (t.contiguous() for t in saved)
    sets, matrices, rank, hidden = tokens.shape
    count, inner = matrices * rank, w1.shape[1]
    if not tokens.numel():
        return tokens.new_empty(tokens.shape), [p.new_zeros(p.shape) for p in parameters]
    t, dout = tokens.reshape(sets, count, hidden).contiguous(), dout.contiguous()

    tiles = architecture_of(t.device).hypernet_tiles(sets * count)
    precision = dot_precision(t.dtype)
    tile = tiles.rows
    grid = (triton.cdiv(count, tile.rows), sets)
    options = {
        "BT": tile.rows, **_whole_rows(hidden), "BK": tile.depth, "PRECISION": precision,
        **tile.options,
    }  # fmt: skip
    sums = functools.partial(torch.empty, dtype=torch.float32, device=t.device)
    norm2, norm1 = (sums(sets, grid[0], (3 + norm_first) * hidden) for _ in range(2))
    dz1, normed1 = (t.new_empty(sets, count, hidden) for _ in range(2))
    dz2 = dout.view(z1.shape) if norm_first else torch.empty_like(z1)
    n = last if norm_first else normed1
    df, a = torch.empty_like(f), torch.empty_like(f)
    dqkv = torch.empty_like(qkv)
    with on_device_of(t):
        if not norm_first:
            norm_backward_kernel[grid](
                dout, w2, dout, last, g2, s2, dz2, None, norm2, count, eps, K=0, H=hidden,
                FIRST=False, **options,
            )  # fmt: skip
        tile = tiles.columns
        blocks = triton.cdiv(count, tile.rows)
        up = sums(sets, blocks, inner)
        gelu_backward_kernel[(blocks, triton.cdiv(inner, tile.columns), sets)](
            dz2, w2, f, df, a, up, count, H=hidden, D=inner, BT=tile.rows, BN=tile.columns,
            BK=tile.depth, PRECISION=precision, **tile.options,
        )  # fmt: skip
        norm_backward_kernel[grid](
            df, w1, dz2, z1,
            *((g2, s2, dz1, None, norm2) if norm_first else (g1, s1, dz1, n, norm1)),
            count, eps, K=inner, H=hidden, FIRST=norm_first, **options,
        )  # fmt: skip
        tile = tiles.attention
        block = _block(rank, tile.rows)
        blocks = triton.cdiv(count, block)
        heads_sums = sums(sets, blocks, 3 * hidden)
        attention_backward_kernel[(blocks, heads, sets)](
            dz1, w_o, qkv, attention, context, dqkv, heads_sums,
            count, block, rank, 1.0 / math.sqrt(hidden // heads),
            H=hidden, HEAD=hidden // heads, HEADS=heads, BT=tile.rows, BD=padded(hidden // heads),
            BK=tile.depth, PRECISION=precision, STAGES=tile.num_stages,
            num_warps=tile.num_warps, num_stages=1,
        )  # fmt: skip
        if norm_first:
            dt = torch.empty_like(t)
            norm_backward_kernel[grid](
                dqkv, w_qkv, dz1, t, g1, s1, dt, normed1, norm1, count, eps, K=3 * hidden, H=hidden,
                FIRST=True, **options,
            )  # fmt: skip
            dg2, ds2, db_o, db2, db1, dg1, ds1, db_qkv = _reduced(
                [(norm2, 4, 4), (up, 1, 1), (norm1, 4, 2), (heads_sums, 1, 1)], t.dtype
            )
        else:
            dg2, ds2, db2, db1, dg1, ds1, db_o, db_qkv = _reduced(
                [(norm2, 3, 3), (up, 1, 1), (norm1, 3, 3), (heads_sums, 1, 1)], t.dtype
            )
        dw2, dw1 = torch.bmm(dz2.transpose(1, 2), a), torch.bmm(df.transpose(1, 2), n)
        dw_o = torch.bmm(dz1.transpose(1, 2), context)
        dw_qkv = torch.bmm(dqkv.transpose(1, 2), normed1 if norm_first else t)
        if not norm_first:
            dt = dz1.baddbmm_(dqkv, w_qkv)
    gradients = [dw_qkv, db_qkv, dw_o, db_o, dg1, ds1, dw1, db1, dw2, db2, dg2, ds2]
    return dt.view(tokens.shape), gradients


def _reduced(
    sums: Sequence[tuple[torch.Tensor, int, int]], dtype: torch.dtype
) -> list[torch.Tensor]:
    """The sums over their blocks of partial sums [S, blocks, parts · width], as [S, width] each.

    With each tensor: how many parts it has, and how many of them are wanted.
    """
    pieces = [(t, i, t.shape[2] // parts) for t, parts, wanted in sums for i in range(wanted)]
    outputs = [t.new_empty(t.shape[0], width, dtype=dtype) for t, _, width in pieces]
    tiles = [triton.cdiv(width, 64) for _, _, width in pieces]
    reduce_kernel[(sum(tiles), outputs[0].shape[0])](
        tuple(t for t, _, _ in pieces), tuple(outputs),
        tuple(itertools.accumulate(tiles[:-1], initial=0)),
        tuple(i * width for _, i, width in pieces), tuple(t.shape[2] for t, _, _ in pieces),
        tuple(width for _, _, width in pieces), tuple(t.shape[1] for t, _, _ in pieces),
        M=len(pieces), BT=16, BN=64, num_warps=4,
    )  # fmt: skip
    return outputs


def _suits(tokens: torch.Tensor, parameters: Sequence[torch.Tensor], heads: int) -> bool:
    """float64, mixed dtypes and very wide layers are left to the default implementation.

    Rows of more than 512 columns would not fit a program, offsets of 2³¹ elements within a set not
    an int32.
    """
    _, matrices, rank, hidden = tokens.shape
    count, inner = matrices * rank, parameters[6].shape[1]
    return (
        tokens.dtype in DTYPES
        and all(p.dtype == tokens.dtype for p in parameters)
        and hidden <= MAX_HIDDEN
        and hidden // heads <= MAX_HEAD
        and max(count * max(3 * hidden, inner), count * heads * rank) < 2**31
    )


def _whole_rows(hidden: int) -> dict[str, int]:
    """The two tiles that hold a row of `hidden` columns."""
    first = max(16, 1 << (hidden.bit_length() - 1))
    return {"BH": first, "BR": padded(max(1, hidden - first))}


def _block(rank: int, rows: int) -> int:
    """Tokens of one program: of as many whole matrices as a tile holds, or of one matrix."""
    return max(1, rows // rank) * rank


def _depth(tile: Tile, dtype: torch.dtype, norm_first: bool) -> int:
    """Of attention's first product: rows to normalise need registers that 32 bits do not leave."""
    halved = norm_first and dtype == torch.float32
    return max(16, tile.depth // 2) if halved else tile.depth


_POINTERS = (
    "tokens", "weight", "bias", "qkv", "attention", "context", "x", "residual", "gamma", "beta",
    "z", "out", "f", "a", "dx", "dresidual", "dz", "df", "dqkv",
)  # fmt: skip


def _case(
    kernel: Any, arch: str, dtype: torch.dtype, tile: Tile, *, stages: int = 0, **sizes: Any
) -> Case:
    pointers = dict.fromkeys(_POINTERS, POINTERS[dtype]) | {"keys": "*u8", "sums": "*fp32"}
    full = "ieee" if arch.startswith("gfx") else "tf32x3"
    sizes |= {
        "PRECISION": full if dtype == torch.float32 else "tf32",
        "BT": tile.rows, "BN": tile.columns, "BK": tile.depth, "STAGES": tile.num_stages,
    }  # fmt: skip
    constants = {n: v for n, v in sizes.items() if n in kernel.arg_names}
    aligned = tuple(n for n in kernel.arg_names if n in pointers and n not in constants)
    numbers = {"eps": "fp32", "scale": "fp32"} | dict.fromkeys(("N", "rows", "rank"), "i32")
    options = tile.options | ({"num_stages": stages} if stages else {})
    return Case(kernel, pointers | numbers, constants, options, aligned, arch)


def cases() -> Iterator[Case]:
    """The layer of `hal_kernels.nn.hypernet`: hidden 312, 12 heads, inner 1200."""
    hidden, inner, heads = 312, 1200, 12
    head = {"HEAD": hidden // heads, "HEADS": heads, "BD": padded(hidden // heads)}
    sizes = {"H": hidden, "D": inner, **head, **_whole_rows(hidden)}
    for gpu, dtype in itertools.product(ARCHITECTURES.values(), (torch.float32, torch.bfloat16)):
        arch = gpu.name
        bare: dict[str, Any] = {"gamma": None, "beta": None}  # without a LayerNorm
        for tile in dict.fromkeys(tiles.attention for tiles in gpu.hypernet):
            yield _case(attention_kernel, arch, dtype, tile, stages=1, **sizes, **bare)
            first = dataclasses.replace(tile, depth=_depth(tile, dtype, True))
            yield _case(attention_kernel, arch, dtype, first, stages=1, **sizes)
            yield _case(attention_backward_kernel, arch, dtype, tile, stages=1, **sizes)
        for tile in dict.fromkeys(tiles.rows for tiles in gpu.hypernet):
            whole = sizes | {"K": inner}  # the longest product
            yield _case(linear_norm_kernel, arch, dtype, tile, **whole)
            yield _case(linear_norm_kernel, arch, dtype, tile, **whole, **bare, out=None)
            for norm_first in (False, True):
                yield _case(norm_backward_kernel, arch, dtype, tile, **whole, FIRST=norm_first)
        for tile in dict.fromkeys(tiles.columns for tiles in gpu.hypernet):
            for kernel in (linear_gelu_kernel, gelu_backward_kernel):
                yield _case(kernel, arch, dtype, tile, **sizes)
        M = 8
        names = ("starts", "firsts", "strides", "widths", "counts")
        types: dict[str, Any] = dict.fromkeys(names, ("i32",) * M)
        types |= {"sums": ("*fp32",) * M, "outputs": (POINTERS[dtype],) * M}
        constants, options = {"M": M, "BT": 16, "BN": 64}, {"num_warps": 4, "num_stages": 3}
        yield Case(reduce_kernel, types, constants, options, ("sums", "outputs"), arch)
