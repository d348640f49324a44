# mypy: allow-untyped-defs
"""Adapter dropout inside the kernels: the mask is a function of seed, row and column.

    keep(t, k) = bits(seed, t, k) ≥ threshold,   threshold = round(dropout · 2¹⁶)

with 16 random bits an element, so that one Philox call (7 rounds, the fewest that pass every test
of BigCrush) serves eight neighbouring columns. What is kept is scaled by 2¹⁶/(2¹⁶ − threshold), the
exact inverse of its probability. No tile size enters: all kernels see one mask.
"""

import torch
import triton
import triton.language as tl

from .launch import on_device_of

LEVELS = 1 << 16
TILE = {"BT": 32, "BK": 128}


@triton.jit
def keep_block(p_seed, threshold, o_t, first, BT: tl.constexpr, BK: tl.constexpr):
    """Whether elements of rows `o_t` and columns ``first ... first + BK`` are kept, [BT, BK]."""
    o_g = first // 8 + tl.arange(0, BK // 8)
    b_zero = tl.zeros([BT, BK // 8], tl.int32)
    b_row = b_zero + o_t[:, None]
    b_group = b_zero + o_g[None, :]
    b_0, b_1, b_2, b_3 = tl.philox(tl.load(p_seed), b_group, b_row, b_zero, b_zero, n_rounds=7)
    b_bits = tl.interleave(tl.interleave(b_0, b_2), tl.interleave(b_1, b_3))  # [BT, BK / 2]
    b_bits = tl.interleave(b_bits & 0xFFFF, b_bits >> 16)  # [BT, BK]
    return b_bits.to(tl.int32) >= threshold


@triton.jit(do_not_specialize=["n", "first", "threshold"])
def keep_kernel(keep, p_seed, n, d, first, threshold, scale, BT: tl.constexpr, BK: tl.constexpr):
    """keep [n, d] for rows first ... first + n: 0, or `scale` where an element is kept."""
    i_t, i_k = tl.program_id(0), tl.program_id(1)
    o_t = i_t * BT + tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    b_keep = tl.where(keep_block(p_seed, threshold, first + o_t, i_k * BK, BT, BK), scale, 0.0)
    p_keep = keep + o_t.to(tl.int64)[:, None] * d + o_k[None, :]
    m = (o_t < n)[:, None] & (o_k < d)[None, :]
    tl.store(p_keep, b_keep.to(keep.dtype.element_ty), mask=m)


def thresholds(dropout: float, seed: object) -> tuple[int, float]:
    """(threshold, scale) of a dropout probability; (0, 1) without a seed."""
    if seed is None:
        return 0, 1.0
    threshold = min(round(dropout * LEVELS), LEVELS - 1)
    return threshold, LEVELS / (LEVELS - threshold)


def fill_keep_(keep: torch.Tensor, first: int, dropout: float, seed: torch.Tensor) -> torch.Tensor:
    """Fill keep ``[n, d]`` (contiguous) with the mask of rows first ... first + n of ``[T, d]``.

    The very mask the kernels use, for implementations in plain PyTorch on the same device.
    """
    n, d = keep.shape
    if keep.numel():
        with on_device_of(keep):
            keep_kernel[(-(-n // TILE["BT"]), -(-d // TILE["BK"]))](
                keep, seed, n, d, first, *thresholds(dropout, seed), **TILE, num_warps=4
            )
    return keep
