# mypy: allow-untyped-defs
"""Kernels that add up what the SVD layers' kernels leave in parts.

reduce:   the sums of partial dP, dQ and dΛ
penalty:  ‖PᵀP − I‖² + ‖QQᵀ − I‖², of Gram matrices that shrink and expand leave
"""

import triton
import triton.language as tl


@triton.jit
def sum_parts(parts, out, i, n, splits, BS: tl.constexpr, BE: tl.constexpr):
    """out[e] = Σ_c parts[c, e] for the i-th block of e; BS parts are loaded at a time."""
    o_e = i * BE + tl.arange(0, BE)
    o_s = tl.arange(0, BS)
    p_parts = parts + o_s.to(tl.int64)[:, None] * n + o_e[None, :]
    b_sum = tl.zeros([BS, BE], tl.float32)
    for c in range(0, splits, BS):
        m = (c + o_s < splits)[:, None] & (o_e < n)[None, :]
        b_sum += tl.load(p_parts, mask=m, other=0.0)
        p_parts += BS * n
    tl.store(out + o_e, tl.sum(b_sum, 0).to(out.dtype.element_ty), mask=o_e < n)


@triton.jit
def reduce_kernel(
    parts, outputs, starts, sizes, odds, M: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr
):
    """Σ_i parts[i] for M lists of partial sums of any size and dtype, always in the same order.

    parts: M × [splits, size]; outputs: M × [size]. A program finds its list by comparing its index
    with the lists' first programs. `odds` are 2·splits + 1: numbers in a tuple that are 1 or
    divisible by 16 would each have a kernel compiled for them, and splits change with T.
    """
    pid = tl.program_id(0)
    for m in tl.static_range(M):
        i = pid - starts[m]
        if (i >= 0) & (i * BE < sizes[m]):
            sum_parts(parts[m], outputs[m], i, sizes[m], odds[m] // 2, BS, BE)


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
def penalty_kernel(
    gram_p, gram_q, residual_p, residual_q, penalty, r, splits_p, splits_q,
    BR: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Both residuals, and the penalty ‖R_P‖² + ‖R_Q‖². One program."""
    square_p = residual_of(gram_p, residual_p, r, splits_p, BR, R)
    tl.store(penalty, square_p + residual_of(gram_q, residual_q, r, splits_q, BR, R))
