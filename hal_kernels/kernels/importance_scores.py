# mypy: allow-untyped-defs
"""The scores of all directions in one launch: a program a direction, which finds its own rows."""

import itertools

import torch
import triton
import triton.language as tl

from .launch import DTYPES, on_device_of

COLUMNS = 1024  # of a row at a time


@triton.jit
def row_mean(importance, uncertainty, k, width, here, BN: tl.constexpr):
    """mean_j(Ī·Ū) of row k, a scalar; zero unless `here`."""
    b_sum = tl.zeros([BN], tl.float32)
    at = k.to(tl.int64) * width
    for n in range(0, width, BN):
        o_n = n + tl.arange(0, BN)
        m = (o_n < width) & here
        b_i = tl.load(importance + at + o_n, mask=m, other=0.0).to(tl.float32)
        b_sum += b_i * tl.load(uncertainty + at + o_n, mask=m, other=0.0).to(tl.float32)
    return tl.sum(b_sum, 0) / width


@triton.jit
def importance_scores_kernel(
    importance, uncertainty, starts, sizes, widths, positions_p, positions_q, mask, scores,
    P: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """scores [R]: Λ is tensor P of M; tensors before it are P's by width, those behind it Q's.

    `starts` are the tensors' first rows, counted anew on either side.
    """
    i = tl.program_id(0)
    score = tl.load(importance[P] + i).to(tl.float32)
    score *= tl.load(uncertainty[P] + i).to(tl.float32)
    for m in tl.static_range(M):
        if m != P:
            k = tl.load((positions_p if m < P else positions_q) + i) - starts[m]
            here = (k >= 0) & (k < sizes[m])
            score += row_mean(importance[m], uncertainty[m], k, widths[m], here, BN)
    if mask is not None:
        score = tl.where(tl.load(mask + i).to(tl.float32) > 0, score, float("-inf"))
    tl.store(scores + i, score.to(scores.dtype.element_ty))


def supported(importance: list[torch.Tensor], uncertainty: list[torch.Tensor]) -> bool:
    """Whether all averages are contiguous, as the adapter's are, in one of the kernels' dtypes."""
    return all(t.dtype in DTYPES and t.is_contiguous() for t in (*importance, *uncertainty))


def importance_scores(
    importance: list[torch.Tensor],
    uncertainty: list[torch.Tensor],
    positions_p: torch.Tensor,
    positions_q: torch.Tensor,
    count_p: int,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """`hal::importance_scores`. One launch."""
    scores = torch.empty_like(importance[count_p])
    if not scores.numel():
        return scores
    sides = importance[:count_p], importance[count_p + 1 :]
    p, q = ([0, *itertools.accumulate(t.shape[0] for t in side)][:-1] for side in sides)
    shapes = [(1, 1) if t.dim() == 1 else t.shape for t in importance]
    with on_device_of(scores):
        importance_scores_kernel[(scores.shape[0],)](
            tuple(importance), tuple(uncertainty), (*p, 0, *q), tuple(n for n, _ in shapes),
            tuple(d for _, d in shapes), positions_p.contiguous(), positions_q.contiguous(),
            None if mask is None else mask.contiguous(), scores,
            P=count_p, M=len(importance), BN=COLUMNS, num_warps=4,
        )  # fmt: skip
    return scores
