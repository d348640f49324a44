# mypy: allow-untyped-defs
"""Attention among the tokens of a matrix, with the projections before it: forward and backward.

A program has one head of a block of matrices, and goes through their rows in square tiles, so a
matrix may have any number of tokens. Shapes are those of `hypernet_layer`.
"""

import triton
import triton.language as tl

from .hypernet_blocks import moments, product


@triton.jit
def rows_of(i_b, first, rows, rank, N, BT: tl.constexpr):
    """BT rows of a block of whole matrices: which, do they exist, and whose are they."""
    o_t = first + tl.arange(0, BT)
    row = i_b * rows + o_t
    return row, (o_t < rows) & (row < N), o_t // rank


@triton.jit
def attention_tile(attention, i_s, i_h, row, row_k, rank, N, HEADS: tl.constexpr):
    """Pointers to the weights of queries `row` for keys `row_k` of the same matrix [BT, BT]."""
    o_a = (row // rank * HEADS + i_h) * rank + row % rank
    return attention + i_s * (N * HEADS * rank) + (o_a * rank)[:, None] + (row_k % rank)[None, :]


@triton.jit
def scores(
    b_q, key, p_keys, some, own, m_t, i_b, first, rows, rank, N, scale, o_d, m_d,
    BT: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale · q·kᵀ [BT, BT] of rows `own` against keys `first` on, −inf where one isn't seen."""
    row_k, m_k, own_k = rows_of(i_b, first, rows, rank, N, BT)
    p_k = key + (row_k * (3 * H))[:, None] + o_d[None, :]
    b_k = tl.load(p_k, mask=m_k[:, None] & m_d[None, :], other=0.0)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    m_key = tl.load(p_keys + row_k, mask=m_k, other=0) != 0
    same = (own[:, None] == own_k[None, :]) & m_t[:, None] & m_k[None, :]
    seen = same & (m_key[None, :] | (some == 0)[:, None])
    return tl.where(seen, b_s, -float("inf")), same, row_k


@triton.jit(do_not_specialize=["N", "rows"])
def attention_kernel(
    tokens, keys, gamma, beta, weight, bias, qkv, attention, context,
    N, rows, rank, scale, eps, H: tl.constexpr, HEAD: tl.constexpr, HEADS: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """qkv = tWᵀ + b,  A = softmax(scale · q·kᵀ + keys),  c = A·v: one head of `rows` tokens.

    Unless gamma and beta ([S, H]) are None, qkv = LN(t)Wᵀ + b: each head normalises the rows anew.
    A block is several matrices whose rows fit one tile of BT, or one matrix of any number of rows.
    tokens, context: [S, N, H]; keys: [S, N]; weight: [S, 3H, H]; qkv: [S, N, 3H];
    attention: [S · G · HEADS, rank, rank].
    """
    i_b, i_h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_d = i_h * HEAD + tl.arange(0, BD)  # columns of q and c; of k and v beyond H and 2H
    m_d = tl.arange(0, BD) < HEAD
    dtype = qkv.dtype.element_ty
    p_x, p_keys, p_qkv = tokens + i_s * N * H, keys + i_s * N, qkv + i_s * N * 3 * H
    p_w, o_w = weight + i_s * 3 * H * H, o_d * H
    p_bias = bias + i_s * 3 * H + o_d

    for first in tl.range(0, rows, BT, disable_licm=True):
        row, m_t, _ = rows_of(i_b, first, rows, rank, N, BT)
        b_q = tl.zeros([BT, BD], dtype=tl.float32)
        b_k = tl.zeros([BT, BD], dtype=tl.float32)
        b_v = tl.zeros([BT, BD], dtype=tl.float32)
        if gamma is not None:
            mean, rstd = moments(p_x, row * H, m_t, H, eps, BT, BK)
        for k in tl.range(0, H, BK, disable_licm=True, num_stages=STAGES):
            o_k = k + tl.arange(0, BK)
            m_k = o_k < H
            m_x, m_w = m_t[:, None] & m_k[None, :], m_d[:, None] & m_k[None, :]
            b_x = tl.load(p_x + (row * H)[:, None] + o_k[None, :], mask=m_x, other=0.0)
            if gamma is not None:
                b_g = tl.load(gamma + i_s * H + o_k, mask=m_k, other=0.0).to(tl.float32)
                b_b = tl.load(beta + i_s * H + o_k, mask=m_k, other=0.0).to(tl.float32)
                b_n = (b_x.to(tl.float32) - mean[:, None]) * rstd[:, None]
                b_x = (b_n * b_g[None, :] + b_b[None, :]).to(dtype)
            p_tile = p_w + o_w[:, None] + o_k[None, :]
            b_w = tl.load(p_tile, mask=m_w, other=0.0)  # [BD, BK]
            b_q = tl.dot(b_x, tl.trans(b_w), b_q, input_precision=PRECISION)
            b_w = tl.load(p_tile + H * H, mask=m_w, other=0.0)
            b_k = tl.dot(b_x, tl.trans(b_w), b_k, input_precision=PRECISION)
            b_w = tl.load(p_tile + 2 * H * H, mask=m_w, other=0.0)
            b_v = tl.dot(b_x, tl.trans(b_w), b_v, input_precision=PRECISION)
        b_q += tl.load(p_bias, mask=m_d, other=0.0).to(tl.float32)[None, :]
        b_k += tl.load(p_bias + H, mask=m_d, other=0.0).to(tl.float32)[None, :]
        b_v += tl.load(p_bias + 2 * H, mask=m_d, other=0.0).to(tl.float32)[None, :]
        p_tile = p_qkv + (row * (3 * H))[:, None] + o_d[None, :]
        m_tile = m_t[:, None] & m_d[None, :]
        tl.store(p_tile, b_q.to(dtype), mask=m_tile)
        tl.store(p_tile + H, b_k.to(dtype), mask=m_tile)
        tl.store(p_tile + 2 * H, b_v.to(dtype), mask=m_tile)
    tl.debug_barrier()  # below, other threads of this program read what was stored above

    for first in tl.range(0, rows, BT, disable_licm=True):
        row, m_t, own = rows_of(i_b, first, rows, rank, N, BT)
        m_tile = m_t[:, None] & m_d[None, :]
        b_q = tl.load(p_qkv + (row * (3 * H))[:, None] + o_d[None, :], mask=m_tile, other=0.0)
        some = tl.zeros([BT], dtype=tl.int32)  # whether a row's matrix has a key at all
        for j in tl.range(0, rows, BT, disable_licm=True):
            row_k, m_k, own_k = rows_of(i_b, j, rows, rank, N, BT)
            m_key = tl.load(p_keys + row_k, mask=m_k, other=0) != 0
            seen = (own[:, None] == own_k[None, :]) & m_key[None, :]
            some = tl.maximum(some, tl.max(seen.to(tl.int32), 1))
        largest = tl.full([BT], -float("inf"), dtype=tl.float32)
        total = tl.zeros([BT], dtype=tl.float32)
        for j in tl.range(0, rows, BT, disable_licm=True):
            b_s, _, _ = scores(
                b_q, p_qkv + H, p_keys, some, own, m_t, i_b, j, rows, rank, N, scale, o_d, m_d,
                BT, H, PRECISION,
            )  # fmt: skip
            larger = tl.maximum(largest, tl.max(b_s, 1))
            base = tl.where(larger == -float("inf"), 0.0, larger)  # no key seen so far
            total = total * tl.exp(largest - base) + tl.sum(tl.exp(b_s - base[:, None]), 1)
            largest = larger
        largest = tl.where(m_t, largest, 0.0)  # rows beyond the block see no key
        total = tl.where(m_t, total, 1.0)
        b_c = tl.zeros([BT, BD], dtype=tl.float32)
        for j in tl.range(0, rows, BT, disable_licm=True):
            b_s, same, row_k = scores(
                b_q, p_qkv + H, p_keys, some, own, m_t, i_b, j, rows, rank, N, scale, o_d, m_d,
                BT, H, PRECISION,
            )  # fmt: skip
            b_a = (tl.exp(b_s - largest[:, None]) / total[:, None]).to(dtype)
            p_a = attention_tile(attention, i_s, i_h, row, row_k, rank, N, HEADS)
            tl.store(p_a, b_a, mask=same)
            p_v = p_qkv + 2 * H + (row_k * (3 * H))[:, None] + o_d[None, :]
            m_v = ((j + tl.arange(0, BT) < rows) & (row_k < N))[:, None] & m_d[None, :]
            b_v = tl.load(p_v, mask=m_v, other=0.0)
            b_c = tl.dot(b_a, b_v, b_c, input_precision=PRECISION)
        p_c = context + i_s * N * H + (row * H)[:, None] + o_d[None, :]
        tl.store(p_c, b_c.to(dtype), mask=m_tile)


@triton.jit
def score_gradient(
    b_dc, b_c, p_v, attention, i_s, i_h, i_b, row, own, m_t, first, rows, rank, N, scale, o_d, m_d,
    BT: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dS = scale · A⊙(dc·vᵀ − Σ dc⊙c) and A [BT, BT], for keys `first` on."""
    row_k, m_k, own_k = rows_of(i_b, first, rows, rank, N, BT)
    p_tile = p_v + (row_k * (3 * H))[:, None] + o_d[None, :]
    b_v = tl.load(p_tile, mask=m_k[:, None] & m_d[None, :], other=0.0)
    b_da = tl.dot(b_dc, tl.trans(b_v), input_precision=PRECISION)
    same = (own[:, None] == own_k[None, :]) & m_t[:, None] & m_k[None, :]
    p_a = attention_tile(attention, i_s, i_h, row, row_k, rank, N, HEADS)
    b_a = tl.load(p_a, mask=same, other=0.0)
    mean = tl.sum(b_dc.to(tl.float32) * b_c.to(tl.float32), 1)  # Σ A⊙dA
    b_ds = b_a.to(tl.float32) * (b_da - mean[:, None]) * scale
    return b_ds.to(b_a.dtype), b_a


@triton.jit(do_not_specialize=["N", "rows"])
def attention_backward_kernel(
    dz, weight, qkv, attention, context, dqkv, sums,
    N, rows, rank, scale, H: tl.constexpr, HEAD: tl.constexpr, HEADS: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dc = dz·W,  dv = Aᵀdc,  dS = scale · A⊙(dc·vᵀ − Σ dc⊙c),  dk = dSᵀq,  dq = dS·k.

    dz, context: [S, N, H]; weight: [S, H, H]; qkv, dqkv: [S, N, 3H]; attention:
    [S · G · HEADS, rank, rank]; sums: [S, blocks, 3H], Σ dqkv. Blocks as in `attention_kernel`.
    Until dq takes its place, dqkv holds dc.
    """
    i_b, i_h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_d = i_h * HEAD + tl.arange(0, BD)
    m_d = tl.arange(0, BD) < HEAD
    dtype = dqkv.dtype.element_ty
    p_qkv, p_dqkv, p_c = qkv + i_s * N * 3 * H, dqkv + i_s * N * 3 * H, context + i_s * N * H
    for first in tl.range(0, rows, BT, disable_licm=True):
        row, m_t, _ = rows_of(i_b, first, rows, rank, N, BT)
        b_dc = product(
            tl.zeros([BT, BD], dtype=tl.float32), dz + i_s * N * H, weight + i_s * H * H, row * H,
            o_d, m_t, m_d, H, H, BK, PRECISION, STAGES,
        )  # fmt: skip
        p_tile = p_dqkv + (row * (3 * H))[:, None] + o_d[None, :]
        tl.store(p_tile, b_dc.to(dtype), mask=m_t[:, None] & m_d[None, :])
    tl.debug_barrier()  # below, other threads of this program read what was stored above

    b_sum = tl.zeros([BD], dtype=tl.float32)
    b_ksum = tl.zeros([BD], dtype=tl.float32)
    b_vsum = tl.zeros([BD], dtype=tl.float32)
    for j in tl.range(0, rows, BT, disable_licm=True):
        b_dk = tl.zeros([BT, BD], dtype=tl.float32)
        b_dv = tl.zeros([BT, BD], dtype=tl.float32)
        for first in tl.range(0, rows, BT, disable_licm=True):
            row, m_t, own = rows_of(i_b, first, rows, rank, N, BT)
            m_tile = m_t[:, None] & m_d[None, :]
            o_tile = (row * (3 * H))[:, None] + o_d[None, :]
            b_dc = tl.load(p_dqkv + o_tile, mask=m_tile, other=0.0)
            b_c = tl.load(p_c + (row * H)[:, None] + o_d[None, :], mask=m_tile, other=0.0)
            b_ds, b_a = score_gradient(
                b_dc, b_c, p_qkv + 2 * H, attention, i_s, i_h, i_b, row, own, m_t, j, rows, rank, N,
                scale, o_d, m_d, BT, H, HEADS, PRECISION,
            )  # fmt: skip
            b_dv = tl.dot(tl.trans(b_a), b_dc, b_dv, input_precision=PRECISION)
            b_q = tl.load(p_qkv + o_tile, mask=m_tile, other=0.0)
            b_dk = tl.dot(tl.trans(b_ds), b_q, b_dk, input_precision=PRECISION)
        row, m_t, _ = rows_of(i_b, j, rows, rank, N, BT)
        p_tile = p_dqkv + (row * (3 * H))[:, None] + o_d[None, :]
        tl.store(p_tile + H, b_dk.to(dtype), mask=m_t[:, None] & m_d[None, :])
        tl.store(p_tile + 2 * H, b_dv.to(dtype), mask=m_t[:, None] & m_d[None, :])
        b_ksum += tl.sum(b_dk, 0)
        b_vsum += tl.sum(b_dv, 0)

    for first in tl.range(0, rows, BT, disable_licm=True):
        row, m_t, own = rows_of(i_b, first, rows, rank, N, BT)
        m_tile = m_t[:, None] & m_d[None, :]
        p_tile = p_dqkv + (row * (3 * H))[:, None] + o_d[None, :]
        b_dc = tl.load(p_tile, mask=m_tile, other=0.0)
        b_c = tl.load(p_c + (row * H)[:, None] + o_d[None, :], mask=m_tile, other=0.0)
        b_dq = tl.zeros([BT, BD], dtype=tl.float32)
        for j in tl.range(0, rows, BT, disable_licm=True):
            b_ds, _ = score_gradient(
                b_dc, b_c, p_qkv + 2 * H, attention, i_s, i_h, i_b, row, own, m_t, j, rows, rank, N,
                scale, o_d, m_d, BT, H, HEADS, PRECISION,
            )  # fmt: skip
            row_k, m_k, _ = rows_of(i_b, j, rows, rank, N, BT)
            p_k = p_qkv + H + (row_k * (3 * H))[:, None] + o_d[None, :]
            b_k = tl.load(p_k, mask=m_k[:, None] & m_d[None, :], other=0.0)
            b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION)
        tl.debug_barrier()  # every thread has read its part of dc
        tl.store(p_tile, b_dq.to(dtype), mask=m_tile)
        b_sum += tl.sum(b_dq, 0)
    p_sums = sums + (i_s * tl.num_programs(0) + i_b) * 3 * H + o_d
    tl.store(p_sums, b_sum, mask=m_d)
    tl.store(p_sums + H, b_ksum, mask=m_d)
    tl.store(p_sums + 2 * H, b_vsum, mask=m_d)
