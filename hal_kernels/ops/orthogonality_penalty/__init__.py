"""The orthogonality penalty of all layers at once [eq. 7].

With F = the rows of one factor (Pᵀ or Q, one singular direction a row) and R = FFᵀ − I:

    squared:    weight · Σ_F ‖R‖²_F        dF = weight · 4·R·F
    frobenius:  weight · Σ_F ‖R‖_F         dF = weight · 2·R·F / ‖R‖_F     (0 where R = 0)

"squared" is the paper's, with weight = 1 / (number of layers); "frobenius" is what PEFT's AdaLoRA
adds, with weight = 1 / (number of matrices). Each list entry holds all matrices of one width, so
the number of calls does not depend on the number of layers.

Backends: default (plain PyTorch, every device), cpu (csrc/penalty.cpp), cuda
(`triton`); in float32 for 16-bit factors.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .._library import (
    accumulation_dtype,
    define,
    expect_dtype,
    expect_floating,
    expect_number,
    expect_same_device,
    expect_tensors,
)
from ..ragged import pad, unpad

KINDS = ("squared", "frobenius")


def orthogonality_penalty(
    factors: Sequence[torch.Tensor],
    *,
    offsets: Sequence[torch.Tensor] | None = None,
    max_ranks: Sequence[int] | None = None,
    kind: str = "squared",
    weight: float = 1.0,
) -> torch.Tensor:
    """Penalty of every matrix in `factors`, summed: a scalar in float32 (float64 for float64).

    Args:
        factors: packed factors, one entry per width: ``[G, r, d]``, or ``[R, d]`` with `offsets`.
        offsets: for each ``[R, d]`` entry the first row of each matrix, and R (int64 ``[G + 1]``).
        max_ranks: for each entry the largest number of rows of one matrix; required with `offsets`.
        kind: "squared" [eq. 7] or "frobenius" (PEFT).
        weight: multiplies the sum.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {KINDS}")
    expect_tensors("factors", factors)
    weight = expect_number("weight", weight)
    if (offsets is None) != (max_ranks is None):
        raise ValueError("offsets and max_ranks come together: one of them is None")
    for index, factor in enumerate(factors):
        expect_floating(f"factors[{index}]", factor)
        if accumulation_dtype(factor.dtype) != accumulation_dtype(factors[0].dtype):
            raise TypeError(
                f"factors[{index}] has dtype {factor.dtype}, expected {factors[0].dtype}"
                " (the dtype of factors[0])"
            )
        expect_same_device("factors[0]", factors[0], **{f"factors[{index}]": factor})
        expected = 3 if offsets is None else 2
        if factor.dim() != expected:
            raise ValueError(
                f"factors[{index}] has shape {tuple(factor.shape)}, expected "
                + ("[G, r, d]" if offsets is None else "[R, d]")
            )
    if offsets is None or max_ranks is None:
        offsets = [
            torch.arange(0, f.shape[0] * f.shape[1] + 1, max(f.shape[1], 1), device=f.device)
            for f in factors
        ]
        max_ranks = [f.shape[1] for f in factors]
        factors = [f.reshape(f.shape[0] * f.shape[1], f.shape[2]) for f in factors]
    if not len(factors) == len(offsets) == len(max_ranks):
        raise ValueError(
            f"factors, offsets and max_ranks have {len(factors)}, {len(offsets)} and "
            f"{len(max_ranks)} entries, expected equally many"
        )
    for index, (offset, rank) in enumerate(zip(offsets, max_ranks, strict=True)):
        expect_dtype(f"offsets[{index}]", offset, torch.int64, "row numbers")
        expect_same_device("factors[0]", factors[0], **{f"offsets[{index}]": offset})
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"max_ranks[{index}] is {rank!r}, expected an int")
        rows = factors[index].shape[0]
        if rank > rows > 0:
            raise ValueError(f"max_ranks[{index}] is {rank}, expected at most {rows} (its rows)")
    with torch.autocast(factors[0].device.type, enabled=False):
        return _orthogonality_penalty(
            list(factors), list(offsets), list(max_ranks), kind == "squared", weight
        )[0]


def orthogonality_penalty_reference(
    matrices: Sequence[torch.Tensor], kind: str = "squared", weight: float = 1.0
) -> torch.Tensor:
    """The formula over single matrices ``[r, d]``, differentiable by autograd."""
    total = matrices[0].new_zeros(())
    for f in matrices:
        residual = f @ f.t() - torch.eye(f.shape[0], dtype=f.dtype, device=f.device)
        total = total + (residual.square().sum() if kind == "squared" else residual.norm())
    return weight * total


def _forward(
    factors: list[torch.Tensor],
    offsets: list[torch.Tensor],
    max_ranks: list[int],
    squared: bool,
    weight: float,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    residuals = []
    for rows, offset, rank in zip(factors, offsets, max_ranks, strict=True):
        f = pad(rows.to(accumulation_dtype(rows.dtype)), offset, rank)
        residual = torch.bmm(f, f.transpose(1, 2))
        # Padding rows are zero, and so is their residual: only own rows subtract the identity.
        diagonal = residual.diagonal(dim1=1, dim2=2)
        diagonal -= (torch.arange(rank, device=f.device) < offset.diff()[:, None]).to(f.dtype)
        residuals.append(residual)
    norms = torch.cat([torch.linalg.matrix_norm(r) for r in residuals])
    total = torch.linalg.vecdot(norms, norms) if squared else norms.sum()
    return total * weight, residuals


def _forward_fake(
    factors: list[torch.Tensor],
    offsets: list[torch.Tensor],
    max_ranks: list[int],
    squared: bool,
    weight: float,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    dtypes = [accumulation_dtype(f.dtype) for f in factors]
    residuals = [
        f.new_empty(o.shape[0] - 1, r, r, dtype=t)
        for f, o, r, t in zip(factors, offsets, max_ranks, dtypes, strict=True)
    ]
    return factors[0].new_empty((), dtype=dtypes[0]), residuals


def _backward_default(
    dvalue: torch.Tensor,
    factors: list[torch.Tensor],
    residuals: list[torch.Tensor],
    offsets: list[torch.Tensor],
    max_ranks: list[int],
    squared: bool,
    weight: float,
) -> list[torch.Tensor]:
    gradients = []
    for rows, residual, offset, rank in zip(factors, residuals, offsets, max_ranks, strict=True):
        f = pad(rows.to(residual.dtype), offset, rank)
        scale = dvalue * weight * (4.0 if squared else 2.0)
        if not squared:
            norm = torch.linalg.matrix_norm(residual)[:, None, None]
            scale = torch.where(norm > 0, scale / norm, 0.0)
        gradients.append(
            unpad(torch.bmm(residual * scale, f), offset, rows.shape[0]).to(rows.dtype)
        )
    return gradients


def _backward_fake(
    dvalue: torch.Tensor,
    factors: list[torch.Tensor],
    residuals: list[torch.Tensor],
    offsets: list[torch.Tensor],
    max_ranks: list[int],
    squared: bool,
    weight: float,
) -> list[torch.Tensor]:
    return [f.new_empty(f.shape) for f in factors]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    factors, offsets, ctx.max_ranks, ctx.squared, ctx.weight = inputs
    residuals = output[1]
    ctx.mark_non_differentiable(*residuals)
    ctx.count = len(factors)
    ctx.save_for_backward(*factors, *residuals, *offsets)


def _autograd_backward(ctx: Any, dvalue: torch.Tensor, _dresiduals: Any) -> tuple[Any, ...]:
    saved, n = ctx.saved_tensors, ctx.count
    gradients = _orthogonality_penalty_backward(
        dvalue, saved[:n], saved[n : 2 * n], saved[2 * n :], ctx.max_ranks, ctx.squared, ctx.weight
    )
    return list(gradients), [None] * n, None, None, None


def _forward_cuda(
    factors: list[torch.Tensor], offsets: list[torch.Tensor], max_ranks: list[int], *rest: Any
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    from . import triton as kernels

    forward = kernels.forward if kernels.supported(factors, max_ranks) else _forward
    return forward(factors, offsets, max_ranks, *rest)


def _backward_cuda(
    dvalue: torch.Tensor,
    factors: list[torch.Tensor],
    residuals: list[torch.Tensor],
    offsets: list[torch.Tensor],
    max_ranks: list[int],
    *rest: Any,
) -> list[torch.Tensor]:
    from . import triton as kernels

    backward = kernels.backward if kernels.supported(factors, max_ranks) else _backward_default
    return backward(dvalue, factors, residuals, offsets, max_ranks, *rest)


_orthogonality_penalty = define(
    "orthogonality_penalty(Tensor[] factors, Tensor[] offsets, int[] max_ranks, bool squared,"
    " float weight) -> (Tensor, Tensor[])",
    default=_forward,
    cuda=_forward_cuda,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_autograd_backward,
    first_only=True,
)
_orthogonality_penalty_backward = define(
    "orthogonality_penalty_backward(Tensor dvalue, Tensor[] factors, Tensor[] residuals,"
    " Tensor[] offsets, int[] max_ranks, bool squared, float weight) -> Tensor[]",
    default=_backward_default,
    cuda=_backward_cuda,
    fake=_backward_fake,
)
