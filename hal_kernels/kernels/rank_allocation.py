# mypy: allow-untyped-defs
"""Triton kernels of rank allocation: importance of every element, and the mask of the directions.

Both are one launch. The moving averages are a stream over six arrays, where a call for each
operation would read and write them eighteen times. The mask is found by counting, for every score,
the scores that go before it: R² comparisons of integers that stay in the cache. From a few ten
thousand directions on that is more work than sorting (an estimated 0.1 ms a call at R = 20 000, and
one call in a hundred steps). But it is one launch, where sort, fill and scatter are at least three,
and exact about ties, signed zeros and the sign of a NaN, which a radix sort orders by its bits.
"""

import itertools

import torch
import triton
import triton.language as tl

from .launch import DTYPES, on_device_of

BLOCK = 1024  # elements of one program of the averages
ROWS, COLUMNS = 64, 128  # scores of one program, and those they are compared with at a time


@triton.jit(do_not_specialize=["beta1", "beta2"])
def _importance_kernel(
    importance, uncertainty, values, gradients, starts, sizes, beta1, beta2,
    N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """I = |v·∇v|,  Ī ← β₁Ī + (1−β₁)I,  Ū ← β₂Ū + (1−β₂)|I − Ī|, for N tensors of any size.

    A program finds its tensor by comparing its index with the tensors' first programs.
    """
    pid = tl.program_id(0)
    p_i, p_u, p_v, p_g = importance[0], uncertainty[0], values[0], gradients[0]
    start, size = starts[0], sizes[0]
    for i in tl.static_range(1, N):
        here = pid >= starts[i]
        p_i = tl.where(here, importance[i], p_i)
        p_u = tl.where(here, uncertainty[i], p_u)
        p_v = tl.where(here, values[i], p_v)
        p_g = tl.where(here, gradients[i], p_g)
        start = tl.where(here, starts[i], start)
        size = tl.where(here, sizes[i], size)
    o_n = (pid - start).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_n < size
    b_v = tl.load(p_v + o_n, mask=mask, other=0.0).to(tl.float32)
    b_g = tl.load(p_g + o_n, mask=mask, other=0.0).to(tl.float32)
    b_i = tl.load(p_i + o_n, mask=mask, other=0.0).to(tl.float32)
    b_u = tl.load(p_u + o_n, mask=mask, other=0.0).to(tl.float32)
    sensitivity = tl.abs(b_v * b_g)
    b_i = beta1 * b_i + (1.0 - beta1) * sensitivity
    b_i = b_i.to(p_i.dtype.element_ty)
    b_u = beta2 * b_u + (1.0 - beta2) * tl.abs(sensitivity - b_i.to(tl.float32))
    tl.store(p_i + o_n, b_i, mask=mask)
    tl.store(p_u + o_n, b_u.to(p_u.dtype.element_ty), mask=mask)


@triton.jit
def _order(scores, o_n, size):
    """Integers in the order of the scores: zeros of either sign alike, NaN last."""
    b_s = tl.load(scores + o_n, mask=o_n < size, other=0.0).to(tl.float32)
    b_bits = tl.where(b_s == 0.0, 0.0, b_s).to(tl.int32, bitcast=True)
    b_bits = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    return tl.where(b_s != b_s, 0x7FFFFFFF, b_bits)


@triton.jit(do_not_specialize=["size", "count"])
def _prune_kernel(scores, mask, size, count, BT: tl.constexpr, BN: tl.constexpr):
    """mask = 0 where fewer than `count` scores go before a score, else 1. scores, mask: [size]."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    b_own = _order(scores, o_t, size)
    b_rank = tl.zeros([BT], dtype=tl.int32)
    for n in range(0, size, BN):
        o_n = n + tl.arange(0, BN)
        b_other = _order(scores, o_n, size)
        before = b_other[None, :] < b_own[:, None]
        tied = (b_other[None, :] == b_own[:, None]) & (o_n[None, :] < o_t[:, None])
        before = (before | tied) & (o_n < size)[None, :]  # [BT, BN]
        b_rank += tl.sum(before.to(tl.int32), 1)
    b_mask = tl.where(b_rank < count, 0.0, 1.0).to(mask.dtype.element_ty)
    tl.store(mask + o_t, b_mask, mask=o_t < size)


def supported(tensors: list[torch.Tensor]) -> bool:
    """Whether a whole list has one of the kernels' dtypes."""
    dtypes = {t.dtype for t in tensors}
    return len(dtypes) == 1 and dtypes <= set(DTYPES)


def update_importance(
    importance: list[torch.Tensor],
    uncertainty: list[torch.Tensor],
    values: list[torch.Tensor],
    gradients: list[torch.Tensor],
    beta1: float,
    beta2: float,
) -> None:
    """One launch, in place."""
    lists = (importance, uncertainty, values, gradients)
    packed = [tuple(t.contiguous() for t in tensors) for tensors in lists]
    sizes = tuple(t.numel() for t in importance)
    blocks = [triton.cdiv(n, BLOCK) for n in sizes]
    if sum(blocks):
        with on_device_of(importance[0]):
            _importance_kernel[(sum(blocks),)](
                *packed, tuple(itertools.accumulate(blocks[:-1], initial=0)), sizes, beta1, beta2,
                N=len(sizes), BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    for state, written in zip(lists[:2], packed[:2], strict=True):
        for tensor, copy in zip(state, written, strict=True):
            if copy is not tensor:  # a view with strides of its own
                tensor.copy_(copy)


def prune_smallest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """One launch. float64 is not `supported`: its order does not fit 32 bits."""
    scores = scores.contiguous()
    mask, size = torch.empty_like(scores), scores.shape[0]
    if size:
        with on_device_of(scores):
            _prune_kernel[(triton.cdiv(size, ROWS),)](
                scores, mask, size, count, BT=ROWS, BN=COLUMNS, num_warps=4
            )
    return mask
