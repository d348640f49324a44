"""Importance of singular directions, from the moving averages of their elements.

    score_i = Ī_λi·Ū_λi + mean_j(Ī·Ū)_Pij + mean_j(Ī·Ū)_Qij        [AdaLoRA, eqs. 7, 11]

over the packed tensors of all layers, with −inf for directions that are pruned already. State,
without a derivative.

Backends: default (plain PyTorch, every device), cuda (`kernels.importance_scores`, in Triton).
"""

from collections.abc import Sequence
from typing import Any

import torch

from ._library import (
    define,
    expect_dtype,
    expect_floating,
    expect_same_device,
    expect_shape,
    expect_tensors,
)


def importance_scores(
    importance: Sequence[torch.Tensor],
    uncertainty: Sequence[torch.Tensor],
    positions_p: torch.Tensor,
    positions_q: torch.Tensor,
    *,
    count_p: int,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """One score per direction.

    Args:
        importance, uncertainty: Ī and Ū (`update_importance_`) of P by width ``[R_w, d_w]``, of Λ
            ``[R]`` and of Q by width, in this order; Σ R_w = R on either side.
        positions_p, positions_q: int64 ``[R]``, the row of each direction in the P (Q) tensors, one
            behind the other.
        count_p: how many tensors are P's.
        mask: ``[R]``; where it is 0 the score is −inf.

    Returns:
        ``[R]`` in the dtype of Λ's importance.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    expect_tensors("importance", importance)
    expect_tensors("uncertainty", uncertainty)
    if isinstance(count_p, bool) or not isinstance(count_p, int):
        raise TypeError(f"count_p is {count_p!r}, expected an int")
    if not 0 < count_p < len(importance) - 1:
        raise ValueError(
            f"count_p is {count_p}, expected 1 to {len(importance) - 2}: importance has "
            f"{len(importance)} tensors, P's, Λ's and Q's"
        )
    if len(uncertainty) != len(importance):
        raise ValueError(
            f"uncertainty has {len(uncertainty)} tensors, expected {len(importance)} "
            "(as importance)"
        )
    for index, (one, other) in enumerate(zip(importance, uncertainty, strict=True)):
        expect_floating(f"importance[{index}]", one)
        shape = "as importance's"
        expect_floating(f"uncertainty[{index}]", other)
        expect_shape(f"uncertainty[{index}]", other, tuple(one.shape), shape)
        if one.dim() != (1 if index == count_p else 2):
            raise ValueError(
                f"importance[{index}] has shape {tuple(one.shape)}, expected "
                + ("[R]" if index == count_p else "[R_w, d_w]")
            )
    named = {"mask": mask, "positions_p": positions_p, "positions_q": positions_q}
    for name, tensors in (("importance", importance), ("uncertainty", uncertainty)):
        named |= {f"{name}[{index}]": tensor for index, tensor in enumerate(tensors)}
    rows = importance[count_p].shape[0]
    for name, positions, side in (
        ("positions_p", positions_p, importance[:count_p]),
        ("positions_q", positions_q, importance[count_p + 1 :]),
    ):
        expect_dtype(name, positions, torch.int64, "row numbers")
        expect_shape(name, positions, (rows,), "[R]")
        if sum(t.shape[0] for t in side) != rows:
            raise ValueError(
                f"importance has {[t.shape[0] for t in side]} rows for {name}, "
                f"expected {rows} in all"
            )
    if mask is not None:
        expect_shape("mask", mask, (rows,), "[R]")
    expect_same_device("importance[0]", importance[0], **named)
    with torch.no_grad():
        scores: torch.Tensor = _importance_scores(
            list(importance), list(uncertainty), positions_p, positions_q, count_p, mask
        )
    return scores


def importance_scores_reference(
    importance: Sequence[torch.Tensor],
    uncertainty: Sequence[torch.Tensor],
    positions_p: torch.Tensor,
    positions_q: torch.Tensor,
    *,
    count_p: int,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The formula, one direction after the other."""
    products = [i * u for i, u in zip(importance, uncertainty, strict=True)]
    p = [row.mean() for t in products[:count_p] for row in t]
    q = [row.mean() for t in products[count_p + 1 :] for row in t]
    scores = products[count_p].clone()
    for i, (at_p, at_q) in enumerate(zip(positions_p.tolist(), positions_q.tolist(), strict=True)):
        scores[i] += p[at_p] + q[at_q]
        if mask is not None and mask[i] == 0:
            scores[i] = -torch.inf
    return scores


def _default(
    importance: list[torch.Tensor],
    uncertainty: list[torch.Tensor],
    positions_p: torch.Tensor,
    positions_q: torch.Tensor,
    count_p: int,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    products = torch._foreach_mul(importance, uncertainty)
    scores = products[count_p]
    for side, positions in (
        (products[:count_p], positions_p),
        (products[count_p + 1 :], positions_q),
    ):
        scores = scores + torch.cat([t.mean(1) for t in side])[positions]
    return scores if mask is None else torch.where(mask > 0, scores, -torch.inf)


def _fake(
    importance: list[torch.Tensor],
    uncertainty: list[torch.Tensor],
    positions_p: torch.Tensor,
    positions_q: torch.Tensor,
    count_p: int,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    return importance[count_p].new_empty(importance[count_p].shape)


def _cuda(
    importance: list[torch.Tensor], uncertainty: list[torch.Tensor], *rest: Any
) -> torch.Tensor:
    from ..kernels import importance_scores as kernels

    forward = kernels.importance_scores if kernels.supported(importance, uncertainty) else _default
    return forward(importance, uncertainty, *rest)


_importance_scores = define(
    "importance_scores(Tensor[] importance, Tensor[] uncertainty, Tensor positions_p,"
    " Tensor positions_q, int count_p, Tensor? mask) -> Tensor",
    default=_default,
    cuda=_cuda,
    fake=_fake,
)
