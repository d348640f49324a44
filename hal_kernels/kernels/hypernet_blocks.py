# mypy: allow-untyped-defs
"""What the hypernetwork layer's kernels are made of: products, LayerNorm, GELU.

Rows of H columns are held as two tiles of a power of two, BH and BR: 312 = 256 + 56, of which 64.
"""

import triton
import triton.language as tl


@triton.jit
def gelu(f):
    """GELU(f) = f·Φ(f) and its derivative Φ(f) + f·φ(f)."""
    cdf = 0.5 * (1.0 + tl.erf(f * 0.7071067811865476))
    return f * cdf, cdf + f * 0.3989422804014327 * tl.exp(-0.5 * f * f)


@triton.jit
def product(
    acc, x, w, o_x, o_w, m_x, m_w, stride, K: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """acc [BT, BN] + x·wᵀ, both with K along a row; o_x and o_w are the rows' offsets.

    Or x·w with K down w's rows, `stride` apart: then o_w are the columns.
    """
    for k in tl.range(0, K, BK, disable_licm=True, num_stages=STAGES):
        o_k = k + tl.arange(0, BK)
        m_k = o_k < K
        b_x = tl.load(x + o_x[:, None] + o_k[None, :], mask=m_x[:, None] & m_k[None, :], other=0.0)
        if stride is None:
            p_w = w + o_w[:, None] + o_k[None, :]
            b_w = tl.trans(tl.load(p_w, mask=m_w[:, None] & m_k[None, :], other=0.0))
        else:
            p_w = w + o_k.to(tl.int64)[:, None] * stride + o_w[None, :]
            b_w = tl.load(p_w, mask=m_k[:, None] & m_w[None, :], other=0.0)  # [BK, BN]
        acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def row_product(
    acc_0, acc_1, x, w, o_x, o_0, o_1, m_x, m_0, m_1, stride, K: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`product` for both tiles of the columns, with x read once."""
    for k in tl.range(0, K, BK, disable_licm=True):
        o_k = k + tl.arange(0, BK)
        m_k = o_k < K
        b_x = tl.load(x + o_x[:, None] + o_k[None, :], mask=m_x[:, None] & m_k[None, :], other=0.0)
        if stride is None:
            m_w0 = m_0[:, None] & m_k[None, :]
            m_w1 = m_1[:, None] & m_k[None, :]
            b_w0 = tl.trans(tl.load(w + o_0[:, None] + o_k[None, :], mask=m_w0, other=0.0))
            b_w1 = tl.trans(tl.load(w + o_1[:, None] + o_k[None, :], mask=m_w1, other=0.0))
        else:
            p_w = w + o_k.to(tl.int64)[:, None] * stride
            b_w0 = tl.load(p_w + o_0[None, :], mask=m_k[:, None] & m_0[None, :], other=0.0)
            b_w1 = tl.load(p_w + o_1[None, :], mask=m_k[:, None] & m_1[None, :], other=0.0)
        acc_0 = tl.dot(b_x, b_w0, acc_0, input_precision=PRECISION)
        acc_1 = tl.dot(b_x, b_w1, acc_1, input_precision=PRECISION)
    return acc_0, acc_1


@triton.jit
def normed(z_0, z_1, m_0, m_1, H: tl.constexpr, eps):
    """(z − mean) / std of rows held in two tiles, and 1/std [BT]."""
    mean = (tl.sum(z_0, 1) + tl.sum(z_1, 1)) / H  # what lies outside of H is zero
    z_0 = tl.where(m_0[None, :], z_0 - mean[:, None], 0.0)
    z_1 = tl.where(m_1[None, :], z_1 - mean[:, None], 0.0)
    rstd = tl.rsqrt((tl.sum(z_0 * z_0, 1) + tl.sum(z_1 * z_1, 1)) / H + eps)
    return z_0 * rstd[:, None], z_1 * rstd[:, None], rstd


@triton.jit
def moments(x, o_x, m_x, H: tl.constexpr, eps, BT: tl.constexpr, BK: tl.constexpr):
    """Mean and 1/std [BT] of rows of H columns, BK at a time; o_x are the rows' offsets."""
    mean = tl.zeros([BT], dtype=tl.float32)
    for k in tl.range(0, H, BK, disable_licm=True):
        o_k = k + tl.arange(0, BK)
        m_k = m_x[:, None] & (o_k < H)[None, :]
        b_x = tl.load(x + o_x[:, None] + o_k[None, :], mask=m_k, other=0.0).to(tl.float32)
        mean += tl.sum(b_x, 1)
    mean /= H
    square = tl.zeros([BT], dtype=tl.float32)
    for k in tl.range(0, H, BK, disable_licm=True):
        o_k = k + tl.arange(0, BK)
        m_k = m_x[:, None] & (o_k < H)[None, :]
        b_x = tl.load(x + o_x[:, None] + o_k[None, :], mask=m_k, other=0.0).to(tl.float32)
        b_x = tl.where(m_k, b_x - mean[:, None], 0.0)
        square += tl.sum(b_x * b_x, 1)
    return mean, tl.rsqrt(square / H + eps)


@triton.jit
def pair(pointer, row, o_0, o_1, m_0, m_1):
    """Two tiles of a vector of H elements, in float32."""
    b_0 = tl.load(pointer + row + o_0, mask=m_0, other=0.0).to(tl.float32)
    b_1 = tl.load(pointer + row + o_1, mask=m_1, other=0.0).to(tl.float32)
    return b_0, b_1
