# mypy: allow-untyped-defs
"""What the SVD adapter's kernels are made of: one block of rows or one tile of a ``[T, d]`` matrix.

Shapes and names are those of `svd_adapter`. T, r and sizes of grids are run-time values. A matrix
of h or u is ``[T, r]`` with rows `stride_t` apart, one of several parts that are `stride_c` apart.
"""

import triton
import triton.language as tl

from .dropout import keep_block

# Arguments that one compiled kernel serves any value of; and pointers, any address.
RUN_TIME = (
    "T", "r", "parts", "programs_u", "programs_dp", "blocks", "splits", "threshold",
    "stride_ht", "stride_hc", "stride_sum", "stride_ut", "stride_uc",
)  # fmt: skip
ANYWHERE = ("h", "h_sum", "u", "lam")
FREE = {"do_not_specialize": RUN_TIME, "do_not_specialize_on_alignment": ANYWHERE}


@triton.jit
def rank_rows(p_h, stride_t, stride_c, parts, T, r, o_t, o_r):
    """Σ_c h[c] for a block of rows, [BT, R] float32; without `parts`, h. Padding is zero."""
    m = (o_t < T)[:, None] & (o_r < r)[None, :]
    p_h += o_t.to(tl.int64)[:, None] * stride_t + o_r[None, :]
    b_h = tl.load(p_h, mask=m, other=0.0)
    if parts is not None:
        for _ in range(1, parts):
            p_h += stride_c.to(tl.int64)
            b_h += tl.load(p_h, mask=m, other=0.0)
    return b_h


@triton.jit
def rank_zeros(BT: tl.constexpr, R: tl.constexpr):
    """The zero of `rank_dot`'s sum."""
    return tl.zeros([R, BT] if R >= 64 else [BT, R], tl.float32)


@triton.jit
def rank_dot(b_x, b_p, b_h, PRECISION: tl.constexpr):
    """b_h + b_x·b_pᵀ for b_x [BT, BK], b_p [R, BK]; for wide R its transpose.

    The longer of BT and R belongs on the left: warps share out its rows, and the right operand is
    the same in all of them.
    """
    if b_p.shape[0] >= 64:
        return tl.dot(b_p.to(b_x.dtype), tl.trans(b_x), b_h, input_precision=PRECISION)
    else:
        return tl.dot(b_x, tl.trans(b_p.to(b_x.dtype)), b_h, input_precision=PRECISION)


@triton.jit
def store_rank_rows(p_h, stride_t, b_h, T, r, o_t, R: tl.constexpr):
    """Store what `rank_dot` summed as rows ``o_t`` of a [T, r] matrix."""
    o_r = tl.arange(0, R)
    if R >= 64:
        p_h += o_t.to(tl.int64)[None, :] * stride_t + o_r[:, None]
        tl.store(p_h, b_h, mask=(o_r < r)[:, None] & (o_t < T)[None, :])
    else:
        p_h += o_t.to(tl.int64)[:, None] * stride_t + o_r[None, :]
        tl.store(p_h, b_h, mask=(o_t < T)[:, None] & (o_r < r)[None, :])


@triton.jit
def scaled_lam(lam, scaling, r, o_r):
    """s·Λ, [1, R] float32."""
    b_lam = tl.load(lam + o_r, mask=o_r < r, other=0.0).to(tl.float32)
    return (b_lam * scaling)[None, :]


@triton.jit
def gradient_weights(lam, scaling, tangent, r, o_r):
    """What weighs the directions in dP and dQ before their product, [1, R] float32, and after it.

    s·Λ and 1; for tangent gradients 1 and c: a small c would cost 16-bit operands their bits.
    """
    b_lam = tl.where(tangent != 0.0, 1.0, scaled_lam(lam, scaling, r, o_r))
    return b_lam, tl.where(tangent != 0.0, tangent, 1.0)


@triton.jit
def shrink_block(
    x, p, h, p_seed,
    scale, T, r, d, chunk, threshold, stride_x, stride_p, stride_ht, stride_hc, i_t, i_c,
    BT: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h[c] = dropout(x)[:, columns of c] · P[columns of c] for one block of rows."""
    o_t = i_t * BT + tl.arange(0, BT)
    o_r = tl.arange(0, R)
    m_t, m_r = o_t < T, o_r < r
    p_x = x + o_t.to(tl.int64)[:, None] * stride_x
    p_p = p + o_r.to(tl.int64)[:, None] * stride_p
    b_h = rank_zeros(BT, R)
    first = i_c * chunk
    for k in range(first, min(first + chunk, d), BK):
        o_k = k + tl.arange(0, BK)
        m_k = o_k < d
        b_x = tl.load(p_x + o_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0)  # [BT, BK]
        b_p = tl.load(p_p + o_k[None, :], mask=m_r[:, None] & m_k[None, :], other=0.0)  # [R, BK]
        if p_seed is not None:
            b_x = tl.where(keep_block(p_seed, threshold, o_t, k, BT, BK), b_x, 0.0)
        b_h = rank_dot(b_x, b_p, b_h, PRECISION)
    store_rank_rows(h + i_c * stride_hc.to(tl.int64), stride_ht, b_h * scale, T, r, o_t, R)


@triton.jit
def expand_block(
    h, lam, q, bias, base, y, h_sum, p_seed,
    scaling, scale, T, r, d, parts, threshold, stride_q, stride_base,
    stride_ht, stride_hc, stride_sum, i_t, i_n,
    BT: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = base + b + s·dropout((Σ_c h[c] ⊙ Λ) Q) for one tile; h_sum = Σ_c h[c]."""
    RANKS: tl.constexpr = R if R < 64 else 64  # at a time: their operands fit the registers
    o_t = i_t * BT + tl.arange(0, BT)
    o_n = i_n * BN + tl.arange(0, BN)
    m_t, m_n = o_t < T, o_n < d
    m = m_t[:, None] & m_n[None, :]
    b_y = tl.zeros([BT, BN], tl.float32)
    for first in tl.range(0, R, RANKS, num_stages=1):
        o_r = first + tl.arange(0, RANKS)
        m_r = o_r < r
        b_h = rank_rows(h, stride_ht, stride_hc, parts, T, r, o_t, o_r)
        if h_sum is not None:  # noqa: SIM102
            if i_n == 0:
                p_sum = h_sum + o_t.to(tl.int64)[:, None] * stride_sum + o_r[None, :]
                tl.store(p_sum, b_h, mask=m_t[:, None] & m_r[None, :])
        b_hl = (b_h * scaled_lam(lam, scaling, r, o_r)).to(y.dtype.element_ty)
        p_q = q + o_r.to(tl.int64)[:, None] * stride_q + o_n[None, :]
        b_q = tl.load(p_q, mask=m_r[:, None] & m_n[None, :], other=0.0)  # [RANKS, BN]
        b_y = tl.dot(b_hl, b_q.to(b_hl.dtype), b_y, input_precision=PRECISION)
    if p_seed is not None:
        b_y = tl.where(keep_block(p_seed, threshold, o_t, i_n * BN, BT, BN), b_y * scale, 0.0)
    if bias is not None:
        b_y += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if base is not None:
        p_base = base + o_t.to(tl.int64)[:, None] * stride_base + o_n[None, :]
        b_y += tl.load(p_base, mask=m, other=0.0).to(tl.float32)
    tl.store(y + o_t.to(tl.int64)[:, None] * d + o_n[None, :], b_y.to(y.dtype.element_ty), mask=m)


@triton.jit
def gradient_block(
    x, u, h, lam, dp, dlam, p_seed,
    scaling, scale, tangent, T, r, d, parts, blocks, threshold, stride_x,
    stride_ut, stride_uc, stride_ht, i_s, i_k,
    BT: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dP[i] = s·dropout(x)ᵀ(u ⊙ Λ) over the rows of split i, for one tile of columns.

    With u = Σ_c u[c]; and if `dlam` is there, dΛ[i] = s·Σ_t h ⊙ u. With c = `tangent` other than 0
    dP[i] = c·dropout(x)ᵀu instead.
    """
    o_k = i_k * BK + tl.arange(0, BK)
    o_r = tl.arange(0, R)
    m_k, m_r = o_k < d, o_r < r
    b_lam, after = gradient_weights(lam, scaling, tangent, r, o_r)
    b_dp = tl.zeros([R, BK], tl.float32)
    first = i_s * blocks
    last = min(first + blocks, tl.cdiv(T, BT))
    for i in range(first, last):
        o_t = i * BT + tl.arange(0, BT)
        p_x = x + o_t.to(tl.int64)[:, None] * stride_x + o_k[None, :]
        b_x = tl.load(p_x, mask=(o_t < T)[:, None] & m_k[None, :], other=0.0)  # [BT, BK]
        if p_seed is not None:
            b_x = tl.where(keep_block(p_seed, threshold, o_t, i_k * BK, BT, BK), b_x, 0.0)
        b_u = rank_rows(u, stride_ut, stride_uc, parts, T, r, o_t, o_r)
        b_ul = (b_u * b_lam).to(b_x.dtype)  # [BT, R]
        b_dp = tl.dot(tl.trans(b_ul), b_x, b_dp, input_precision=PRECISION)
    p_dp = dp + (i_s.to(tl.int64) * r + o_r[:, None]) * d + o_k[None, :]
    b_dp = (b_dp * (scale * after)).to(dp.dtype.element_ty)
    tl.store(p_dp, b_dp, mask=m_r[:, None] & m_k[None, :])
    if dlam is not None:  # noqa: SIM102
        if i_k == 0:
            b_dlam = tl.zeros([R], tl.float32)
            for i in range(first, last):
                o_t = i * BT + tl.arange(0, BT)
                b_u = rank_rows(u, stride_ut, stride_uc, parts, T, r, o_t, o_r)
                b_h = rank_rows(h, stride_ht, 0, None, T, r, o_t, o_r)
                b_dlam += tl.sum(b_h * b_u, 0)
            p_dlam = dlam + i_s.to(tl.int64) * r + o_r
            tl.store(p_dlam, (b_dlam * scaling).to(dlam.dtype.element_ty), mask=m_r)


@triton.jit
def gram_block(
    f, gram, r, d, chunk, stride_f, i_c, R: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """gram[c] = F[:, columns of c] · F[:, columns of c]ᵀ, [r, r]."""
    BR: tl.constexpr = R if R < 32 else 32  # rows and columns at a time: they fit the registers
    BK: tl.constexpr = 32 if R <= 32 else 16
    o_c = tl.arange(0, R)
    p_c = f + o_c.to(tl.int64)[:, None] * stride_f
    first = i_c * chunk
    last = min(first + chunk, d)
    for i in tl.range(0, R, BR, num_stages=1):
        o_r = i + tl.arange(0, BR)
        p_r = f + o_r.to(tl.int64)[:, None] * stride_f
        b_gram = tl.zeros([BR, R], tl.float32)
        for k in tl.range(first, last, BK, num_stages=1):
            o_k = k + tl.arange(0, BK)
            m_k = (o_k < last)[None, :]
            b_r = tl.load(p_r + o_k[None, :], mask=(o_r < r)[:, None] & m_k, other=0.0)  # [BR, BK]
            b_c = tl.load(p_c + o_k[None, :], mask=(o_c < r)[:, None] & m_k, other=0.0)  # [R, BK]
            b_gram = tl.dot(b_r, tl.trans(b_c), b_gram, input_precision=PRECISION)
        p_gram = gram + (i_c * r + o_r[:, None]) * r + o_c[None, :]
        tl.store(p_gram, b_gram, mask=(o_r < r)[:, None] & (o_c < r)[None, :])
