# mypy: allow-untyped-defs
"""The SVD layers' kernels: each program takes a block of rows or a tile of columns and loops.

    shrink:        h = dropout(x)·P
    expand:        y = s·(h ⊙ Λ)Q + b
    gradients_dy:  u = dy·Qᵀ,  dQ = s·(h ⊙ Λ)ᵀ dy
    gradients_x:   dP = s·xᵀ(u ⊙ Λ),  dΛ = s·Σ_t h ⊙ u,  dx = s·(u ⊙ Λ)Pᵀ
    fused:         y = xWᵀ + b + s·(h ⊙ Λ)Q, and h

Each reads its ``[T, d]`` matrix once (gradients_dy of ranks above 32: twice, see there). There are
no atomics: where the columns of a block of rows are shared out, each program writes a partial h or
u ``[parts, T, r]`` that its reader sums; where rows are, a partial dP or dQ ``[splits, r, d]`` that
`triton_sums` adds up. Parts and splits are bounded, and so are the buffers. Λ is the effective one,
Λ⊙mask.

Triton loads ahead, by asynchronous copies, in innermost loops alone: so the number of parts is a
constant, a power of two, and their sum is unrolled. P and Q are converted where they are used, in
the shadow of x's loads: 16-bit copies of them would be two launches more, or a second P and Q in
the operators' signatures, for some 10 % of a loop's instructions, which bound no kernel.

With c = `tangent` other than 0, dQ = c·hᵀdy, dP = c·xᵀu, and there is no dΛ.

P is ``[r, d_in]``, one direction a row. R is r padded to a power of two. Products take operands in
x's dtype, as the default backend does, and accumulate in float32. T, r and sizes of grids are
run-time values. A matrix of h or u is ``[T, r]`` with rows `stride_t` apart, one of several parts
that are `stride_c` apart.
"""

import triton
import triton.language as tl

from ...kernels.dropout import keep_block

# Arguments that one compiled kernel serves any value of; and pointers, any address.
RUN_TIME = (
    "T", "r", "parts", "programs_u", "programs_dp", "blocks", "splits", "chunks", "threshold",
    "stride_ht", "stride_hc", "stride_sum", "stride_ut", "stride_uc", "gram_chunk", "gram_splits",
)  # fmt: skip
ANYWHERE = ("h", "h_sum", "u", "lam")
FREE = {"do_not_specialize": RUN_TIME, "do_not_specialize_on_alignment": ANYWHERE}


@triton.jit
def rank_rows(p_h, stride_t, stride_c, T, r, o_t, o_r, PARTS: tl.constexpr):
    """Σ_c h[c] for a block of rows, [BT, R] float32. Padding is zero."""
    m = (o_t < T)[:, None] & (o_r < r)[None, :]
    p_h += o_t.to(tl.int64)[:, None] * stride_t + o_r[None, :]
    b_h = tl.load(p_h, mask=m, other=0.0)
    if PARTS * o_r.shape[0] <= 256:
        for _ in tl.static_range(1, PARTS):  # all loads at once
            p_h += stride_c.to(tl.int64)
            b_h += tl.load(p_h, mask=m, other=0.0)
    else:
        for _ in range(1, PARTS):
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
    scaling, scale, T, r, d, chunk, threshold, stride_q, stride_base,
    stride_ht, stride_hc, stride_sum, i_t, i_c,
    BT: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = base + b + s·dropout((Σ_c h[c] ⊙ Λ) Q) for one block of rows and one chunk of columns.

    h_sum = Σ_c h[c], from the first chunk.
    """
    o_t = i_t * BT + tl.arange(0, BT)
    o_r = tl.arange(0, R)
    m_t, m_r = o_t < T, o_r < r
    b_h = rank_rows(h, stride_ht, stride_hc, T, r, o_t, o_r, PARTS)
    if h_sum is not None:  # noqa: SIM102
        if i_c == 0:
            p_sum = h_sum + o_t.to(tl.int64)[:, None] * stride_sum + o_r[None, :]
            tl.store(p_sum, b_h, mask=m_t[:, None] & m_r[None, :])
    b_hl = (b_h * scaled_lam(lam, scaling, r, o_r)).to(y.dtype.element_ty)
    p_q = q + o_r.to(tl.int64)[:, None] * stride_q
    p_base = base
    if base is not None:
        p_base += o_t.to(tl.int64)[:, None] * stride_base
    p_y = y + o_t.to(tl.int64)[:, None] * d
    first = i_c * chunk
    # With stages stated, what enters no product is loaded ahead too. A bias alone is not worth it.
    AHEAD: tl.constexpr = None if base is None else STAGES
    for n in tl.range(first, min(first + chunk, d), BN, num_stages=AHEAD):
        o_n = n + tl.arange(0, BN)
        m_n = o_n < d
        m = m_t[:, None] & m_n[None, :]
        b_q = tl.load(p_q + o_n[None, :], mask=m_r[:, None] & m_n[None, :], other=0.0)  # [R, BN]
        b_y = tl.dot(b_hl, b_q.to(b_hl.dtype), input_precision=PRECISION)
        if p_seed is not None:
            b_y = tl.where(keep_block(p_seed, threshold, o_t, n, BT, BN), b_y * scale, 0.0)
        if bias is not None:
            b_y += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        if base is not None:
            b_y += tl.load(p_base + o_n[None, :], mask=m, other=0.0).to(tl.float32)
        tl.store(p_y + o_n[None, :], b_y.to(y.dtype.element_ty), mask=m)


@triton.jit
def gradient_block(
    x, u, lam, dp, p_seed,
    scaling, scale, tangent, T, r, d, blocks, threshold, stride_x, stride_ut, stride_uc, i_s, i_k,
    BT: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dP[i] = s·dropout(x)ᵀ(u ⊙ Λ) over the rows of split i, for one tile of columns.

    With u = Σ_c u[c]. With c = `tangent` other than 0 dP[i] = c·dropout(x)ᵀu instead.
    """
    # Of few parts the loads overlap with the products; there are more where there are few rows.
    STAGES: tl.constexpr = 1 if PARTS > 4 or PARTS * R > 128 else None
    o_k = i_k * BK + tl.arange(0, BK)
    o_r = tl.arange(0, R)
    m_k, m_r = o_k < d, o_r < r
    b_lam, after = gradient_weights(lam, scaling, tangent, r, o_r)
    b_dp = tl.zeros([R, BK], tl.float32)
    first = i_s * blocks
    for i in tl.range(first, min(first + blocks, tl.cdiv(T, BT)), num_stages=STAGES):
        o_t = i * BT + tl.arange(0, BT)
        p_x = x + o_t.to(tl.int64)[:, None] * stride_x + o_k[None, :]
        b_x = tl.load(p_x, mask=(o_t < T)[:, None] & m_k[None, :], other=0.0)  # [BT, BK]
        if p_seed is not None:
            b_x = tl.where(keep_block(p_seed, threshold, o_t, i_k * BK, BT, BK), b_x, 0.0)
        b_u = rank_rows(u, stride_ut, stride_uc, T, r, o_t, o_r, PARTS)
        b_ul = (b_u * b_lam).to(b_x.dtype)  # [BT, R]
        b_dp = tl.dot(tl.trans(b_ul), b_x, b_dp, input_precision=PRECISION)
    p_dp = dp + (i_s.to(tl.int64) * r + o_r[:, None]) * d + o_k[None, :]
    b_dp = (b_dp * (scale * after)).to(dp.dtype.element_ty)
    tl.store(p_dp, b_dp, mask=m_r[:, None] & m_k[None, :])


@triton.jit
def lam_block(
    h, u, dlam, scaling, T, r, blocks, stride_ht, stride_ut, stride_uc, i_s,
    BT: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dΛ[i] = s·Σ_t h ⊙ u over the rows of split i, with u = Σ_c u[c]."""
    o_r = tl.arange(0, R)
    b_dlam = tl.zeros([R], tl.float32)
    first = i_s * blocks
    for i in range(first, min(first + blocks, tl.cdiv(T, BT))):
        o_t = i * BT + tl.arange(0, BT)
        b_u = rank_rows(u, stride_ut, stride_uc, T, r, o_t, o_r, PARTS)
        b_dlam += tl.sum(rank_rows(h, stride_ht, 0, T, r, o_t, o_r, 1) * b_u, 0)
    p_dlam = dlam + i_s.to(tl.int64) * r + o_r
    tl.store(p_dlam, (b_dlam * scaling).to(dlam.dtype.element_ty), mask=o_r < r)


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


@triton.jit(**FREE)
def shrink_kernel(
    x, p, h, p_seed, gram,
    scale, T, r, d, chunk, threshold, stride_x, stride_p, stride_ht, stride_hc,
    gram_chunk, gram_splits,
    BT: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
    GRAM: tl.constexpr,
):  # fmt: skip
    """h[c] = dropout(x)[:, columns of c] · P[columns of c], [T, r] for each part c.

    If `gram` is there, its first programs also give the Gram matrix of P.
    """
    i_t, i_c = tl.program_id(0), tl.program_id(1)
    shrink_block(
        x, p, h, p_seed,
        scale, T, r, d, chunk, threshold, stride_x, stride_p, stride_ht, stride_hc,
        i_t, i_c, BT, BK, R, PRECISION,
    )  # fmt: skip
    if gram is not None:
        i = i_t * tl.num_programs(1) + i_c
        if i < gram_splits:
            gram_block(p, gram, r, d, gram_chunk, stride_p, i, R, GRAM)


@triton.jit(**FREE)
def expand_kernel(
    h, lam, q, bias, base, y, h_sum, p_seed, gram,
    scaling, scale, T, r, d, chunk, threshold, stride_q, stride_base,
    stride_ht, stride_hc, stride_sum, gram_chunk, gram_splits,
    BT: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, GRAM: tl.constexpr,
):  # fmt: skip
    """y = base + b + s·dropout((Σ_c h[c] ⊙ Λ) Q), [T, d]; h_sum = Σ_c h[c].

    If `gram` is there, its first programs also give the Gram matrix of Q.
    """
    i_t, i_c = tl.program_id(0), tl.program_id(1)
    expand_block(
        h, lam, q, bias, base, y, h_sum, p_seed,
        scaling, scale, T, r, d, chunk, threshold, stride_q, stride_base,
        stride_ht, stride_hc, stride_sum, i_t, i_c, BT, BN, R, PARTS, STAGES, PRECISION,
    )  # fmt: skip
    if gram is not None:
        i = i_t * tl.num_programs(1) + i_c
        if i < gram_splits:
            gram_block(q, gram, r, d, gram_chunk, stride_q, i, R, GRAM)


@triton.jit(**FREE)
def gradients_dy_kernel(
    dy, q, h, lam, u, dq,
    scaling, tangent, T, r, d, chunk, blocks, stride_dy, stride_q, stride_ht, stride_ut, stride_uc,
    BT: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u[c] = dy[:, columns of c] · Q[columns of c]ᵀ;  dQ[i] = s·(h ⊙ Λ)ᵀ dy, rows of split i only.

    One pass over dy, for ranks up to 32: a program takes blocks of rows and adds each one's part of
    dQ[i] to memory, 8·R/BT bytes for each of dy's elements.
    """
    i_s, i_c = tl.program_id(0), tl.program_id(1)
    o_r = tl.arange(0, R)
    m_r = o_r < r
    b_lam, after = gradient_weights(lam, scaling, tangent, r, o_r)
    p_q = q + o_r.to(tl.int64)[:, None] * stride_q
    p_dq = dq + (i_s.to(tl.int64) * r + o_r[:, None]) * d
    first = i_c * chunk
    last = min(first + chunk, d)
    for i in range(0, min(blocks, tl.cdiv(T, BT) - i_s * blocks)):
        o_t = (i_s * blocks + i) * BT + tl.arange(0, BT)
        p_dy = dy + o_t.to(tl.int64)[:, None] * stride_dy
        b_h = rank_rows(h, stride_ht, 0, T, r, o_t, o_r, 1)
        b_hl = tl.trans((b_h * b_lam).to(dy.dtype.element_ty))  # [R, BT]
        b_u = rank_zeros(BT, R)
        for n in range(first, last, BN):
            o_n = n + tl.arange(0, BN)
            m_n = o_n < d
            m_q = m_r[:, None] & m_n[None, :]
            m_dy = (o_t < T)[:, None] & m_n[None, :]
            b_dy = tl.load(p_dy + o_n[None, :], mask=m_dy, other=0.0)  # [BT, BN]
            b_q = tl.load(p_q + o_n[None, :], mask=m_q, other=0.0)  # [R, BN]
            # What this very program stored for its earlier blocks of rows.
            b_sum = tl.load(p_dq + o_n[None, :], mask=m_q & (i > 0), other=0.0).to(tl.float32)
            b_u = rank_dot(b_dy, b_q, b_u, PRECISION)
            if dy.dtype.element_ty == tl.float32:
                # Each product takes float32 in a layout of its own: one copy could not be
                # asynchronous. The second comes from the cache.
                b_dy = tl.load(
                    p_dy + o_n[None, :], mask=m_dy, other=0.0, eviction_policy="evict_first"
                )
            b_dq = tl.dot(b_hl, b_dy, input_precision=PRECISION) * after + b_sum  # [R, BN]
            tl.store(p_dq + o_n[None, :], b_dq.to(dq.dtype.element_ty), mask=m_q)
        store_rank_rows(u + i_c * stride_uc.to(tl.int64), stride_ut, b_u, T, r, o_t, R)
        tl.debug_barrier()


@triton.jit(**FREE)
def gradients_dy_apart_kernel(
    dy, q, h, lam, u, dq,
    scaling, tangent, T, r, d, chunk, programs_u, parts, splits, blocks, stride_dy, stride_q,
    stride_ht, stride_ut, stride_uc,
    BT: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `gradients_dy_kernel`, for ranks above 32: some programs give u and others dQ.

    Both read dy, which costs less than sums in memory do: dQ[i] stays in registers.
    """
    i = tl.program_id(0)
    if i < programs_u:
        shrink_block(
            dy, q, u, None,
            1.0, T, r, d, chunk, 0, stride_dy, stride_q, stride_ut, stride_uc,
            i // parts, i % parts, BT, BN, R, PRECISION,
        )  # fmt: skip
    else:
        i -= programs_u
        gradient_block(
            dy, h, lam, dq, None,
            scaling, 1.0, tangent, T, r, d, blocks, 0, stride_dy, stride_ht, 0,
            i % splits, i // splits, BT, BN, R, 1, PRECISION,
        )  # fmt: skip


@triton.jit(**FREE)
def gradients_x_kernel(
    x, p, h, lam, u, dp, dlam, base, dx, p_seed,
    scaling, scale, tangent, T, r, d, programs_dp, splits, blocks, chunks, chunk, threshold,
    stride_x, stride_p, stride_ht, stride_ut, stride_uc,
    BT: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With u = Σ_c u[c], over the rows of split i:

    dΛ[i] = s·Σ_t h ⊙ u;  dP[i] = s·dropout(x)ᵀ(u ⊙ Λ);  dx = base + s·dropout((u ⊙ Λ)Pᵀ)

    The first programs, if there is dΛ, read h and u alone; others read x and give dP; others, if
    there is dx, write dx, which needs no x.
    """
    i = tl.program_id(0)
    if dlam is not None:
        i -= splits
    if i < 0:
        if dlam is not None:
            lam_block(
                h, u, dlam, scaling, T, r, blocks, stride_ht, stride_ut, stride_uc, i + splits,
                BT, R, PARTS,
            )  # fmt: skip
    elif i < programs_dp:
        gradient_block(
            x, u, lam, dp, p_seed,
            scaling, scale, tangent, T, r, d, blocks, threshold, stride_x,
            stride_ut, stride_uc, i % splits, i // splits, BT, BK, R, PARTS, PRECISION,
        )  # fmt: skip
    elif dx is not None:
        i -= programs_dp
        expand_block(
            u, lam, p, None, base, dx, None, p_seed,
            scaling, scale, T, r, d, chunk, threshold, stride_p, d,
            stride_ut, stride_uc, 0, i // chunks, i % chunks,
            BT, BK, R, PARTS, STAGES, PRECISION,
        )  # fmt: skip


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
