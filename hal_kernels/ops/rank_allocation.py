"""Importance of singular directions, and pruning of the least important ones over all layers.

    update_importance_:  I = |v·∇v|                       sensitivity of every element
                         Ī ← β₁Ī + (1−β₁)I                smoothed sensitivity
                         Ū ← β₂Ū + (1−β₂)|I − Ī|          uncertainty        [AdaLoRA, eqs. 8-10]
    importance_scores:   Ī_λi·Ū_λi + mean_j(Ī·Ū)_Pij + mean_j(Ī·Ū)_Qij      [AdaLoRA, eqs. 7, 11]
    prune_smallest:      mask = 0 for the `count` smallest scores, else 1

Plain PyTorch on packed tensors of all layers: a number of launches that does not depend on how many
layers there are, and no host synchronisation. They update or select state; none has a derivative.
"""

import math
from collections.abc import Sequence

import torch

from ._library import (
    expect_dtype,
    expect_floating,
    expect_number,
    expect_same_device,
    expect_shape,
    expect_tensors,
)


@torch.no_grad()
def update_importance_(
    importance: Sequence[torch.Tensor],
    uncertainty: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    *,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> None:
    """Advance the moving averages of AdaLoRA's importance in place.

    Args:
        importance, uncertainty: Ī and Ū, one pair of tensors per packed tensor; changed in place.
        values, gradients: the factors' elements and their gradients, shapes as `importance`; they
            are converted to its dtype.
        beta1, beta2: decay of the two averages, each in (0, 1).

    Raises:
        TypeError, ValueError: empty lists or lists of unequal length, unequal shapes, several
            devices, Ī and Ū of different dtypes, a beta outside (0, 1).
    """
    expect_number("beta1", beta1, above=0.0, below=1.0)
    expect_number("beta2", beta2, above=0.0, below=1.0)
    _expect_averages(importance, uncertainty)
    _expect_as_importance("values", values, importance)
    _expect_as_importance("gradients", gradients, importance)
    importance, uncertainty = list(importance), list(uncertainty)
    v, g = (
        [t.to(like.dtype) for t, like in zip(tensors, importance, strict=True)]
        for tensors in (values, gradients)
    )
    change = torch._foreach_mul(v, g)
    torch._foreach_abs_(change)
    torch._foreach_lerp_(importance, change, 1 - beta1)
    torch._foreach_sub_(change, importance)
    torch._foreach_abs_(change)
    torch._foreach_lerp_(uncertainty, change, 1 - beta2)


@torch.no_grad()
def importance_scores(
    importance: Sequence[torch.Tensor],
    uncertainty: Sequence[torch.Tensor],
    positions_p: torch.Tensor,
    positions_q: torch.Tensor,
    *,
    count_p: int,
) -> torch.Tensor:
    """One score per direction.

    Args:
        importance, uncertainty: Ī and Ū (`update_importance_`) of P by width ``[R_w, d_w]``, of Λ
            ``[R]`` and of Q by width, in this order; Σ R_w = R on either side.
        positions_p, positions_q: int64 ``[R]``, the row of each direction in the P (Q) tensors, one
            behind the other.
        count_p: how many tensors are P's.

    Returns:
        ``[R]`` in the dtype of Λ's importance.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    _expect_averages(importance, uncertainty)
    if isinstance(count_p, bool) or not isinstance(count_p, int):
        raise TypeError(f"count_p is {count_p!r}, expected an int")
    if not 0 < count_p < len(importance) - 1:
        raise ValueError(
            f"count_p is {count_p}, expected 1 to {len(importance) - 2}: importance has "
            f"{len(importance)} tensors, P's, Λ's and Q's"
        )
    for index, tensor in enumerate(importance):
        if tensor.dim() != (1 if index == count_p else 2):
            raise ValueError(
                f"importance[{index}] has shape {tuple(tensor.shape)}, expected "
                + ("[R]" if index == count_p else "[R_w, d_w]")
            )
    rows = importance[count_p].shape[0]
    for name, positions, side in (
        ("positions_p", positions_p, importance[:count_p]),
        ("positions_q", positions_q, importance[count_p + 1 :]),
    ):
        expect_dtype(name, positions, torch.int64, "row numbers")
        expect_shape(name, positions, (rows,), "[R]")
        heights = [t.shape[0] for t in side]
        if sum(heights) != rows:
            raise ValueError(f"importance has {heights} rows for {name}, expected {rows} in all")
        expect_same_device("importance[0]", importance[0], **{name: positions})

    products = torch._foreach_mul(list(importance), list(uncertainty))
    p, q = products[:count_p], products[count_p + 1 :]
    means = torch.cat([t.mean(1) for t in (*p, *q)])
    return products[count_p] + means[:rows][positions_p] + means[rows:][positions_q]


@torch.no_grad()
def prune_smallest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mask that prunes the `count` smallest of all scores.

    Data-parallel processes that hold equal scores select equal directions.

    Args:
        scores: ``[R]``, one per singular direction over all layers; −inf is pruned first, NaN last.
            Among equal scores the lower index goes first.
        count: how many to prune, 0 to R.

    Returns:
        ``[R]`` in the dtype of `scores`: 1 keeps, 0 prunes.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    expect_floating("scores", scores)
    if scores.dim() != 1:
        raise ValueError(f"scores has shape {tuple(scores.shape)}, expected [R]")
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"count is {count!r}, expected an int")
    if not 0 <= count <= scores.shape[0]:
        raise ValueError(
            f"count is {count}, expected 0 to {scores.shape[0]} (the number of scores)"
        )
    # A radix sort, as on a GPU, orders NaNs by their sign: all get the same one.
    comparable = scores.nan_to_num(nan=math.nan, posinf=math.inf, neginf=-math.inf)
    order = torch.sort(comparable, stable=True).indices
    return torch.ones_like(scores).index_fill_(0, order[:count], 0.0)


def _expect_averages(
    importance: Sequence[torch.Tensor], uncertainty: Sequence[torch.Tensor]
) -> None:
    expect_tensors("importance", importance)
    _expect_as_importance("importance", importance, importance)
    _expect_as_importance("uncertainty", uncertainty, importance)
    for index, (tensor, like) in enumerate(zip(uncertainty, importance, strict=True)):
        expect_dtype(f"uncertainty[{index}]", tensor, like.dtype, f"as importance[{index}]")


def _expect_as_importance(
    name: str, tensors: Sequence[torch.Tensor], importance: Sequence[torch.Tensor]
) -> None:
    """Raise unless these are floating-point tensors of the averages' shapes and device."""
    expect_tensors(name, tensors)
    if len(tensors) != len(importance):
        raise ValueError(
            f"{name} has {len(tensors)} tensors, expected {len(importance)} (as importance)"
        )
    for index, (tensor, like) in enumerate(zip(tensors, importance, strict=True)):
        entry = f"{name}[{index}]"
        expect_floating(entry, tensor)
        expect_shape(entry, tensor, tuple(like.shape), f"as importance[{index}]")
        expect_same_device("importance[0]", importance[0], **{entry: tensor})
