"""Importance of singular directions, and pruning of the least important ones over all layers.

    update_importance_:  I = |v·∇v|                       sensitivity of every element
                         Ī ← β₁Ī + (1−β₁)I                smoothed sensitivity
                         Ū ← β₂Ū + (1−β₂)|I − Ī|          uncertainty        [AdaLoRA, eqs. 8-10]
    prune_smallest:      mask = 0 for the `count` smallest scores, else 1

Both run on the device without a host synchronisation. Ties are broken by index, so every
data-parallel process that holds equal scores selects equal directions. They update or select state;
neither has a derivative.

Backends: default (plain PyTorch, every device), cpu (csrc/allocation.cpp), cuda
(`kernels.rank_allocation`, in Triton).
"""

from collections.abc import Sequence
from typing import Any

import torch

from ._library import (
    define,
    expect_floating,
    expect_number,
    expect_same_device,
    expect_tensors,
)


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
        values, gradients: the factors' elements and their gradients, shapes as `importance`.
        beta1, beta2: decay of the two averages, each in (0, 1).

    Raises:
        TypeError, ValueError: empty lists or lists of unequal length, unequal shapes, several
            devices, a beta outside (0, 1).
    """
    expect_number("beta1", beta1, above=0.0, below=1.0)
    expect_number("beta2", beta2, above=0.0, below=1.0)
    expect_tensors("importance", importance)
    for index, tensor in enumerate(importance):
        expect_floating(f"importance[{index}]", tensor)
        expect_same_device("importance[0]", importance[0], **{f"importance[{index}]": tensor})
    lists = {"uncertainty": uncertainty, "values": values, "gradients": gradients}
    for name, tensors in lists.items():
        expect_tensors(name, tensors)
        if len(tensors) != len(importance):
            raise ValueError(
                f"{name} has {len(tensors)} tensors, expected {len(importance)} (as importance)"
            )
        for index, (tensor, like) in enumerate(zip(tensors, importance, strict=True)):
            expect_floating(f"{name}[{index}]", tensor)
            if tensor.shape != like.shape:
                raise ValueError(
                    f"{name}[{index}] has shape {tuple(tensor.shape)}, expected "
                    f"{tuple(like.shape)} (as importance[{index}])"
                )
            expect_same_device("importance[0]", importance[0], **{f"{name}[{index}]": tensor})
    with torch.no_grad():
        torch.ops.hal.update_importance_(
            list(importance), list(uncertainty), list(values), list(gradients), beta1, beta2
        )


def update_importance_reference(
    importance: torch.Tensor,
    uncertainty: torch.Tensor,
    value: torch.Tensor,
    gradient: torch.Tensor,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula for one tensor: returns the new (Ī, Ū)."""
    sensitivity = (value * gradient).abs()
    importance = beta1 * importance + (1 - beta1) * sensitivity
    uncertainty = beta2 * uncertainty + (1 - beta2) * (sensitivity - importance).abs()
    return importance, uncertainty


def prune_smallest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mask that prunes the `count` smallest of all scores.

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
    return _prune_smallest(scores, count)


def prune_smallest_reference(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The same by sorting (score, index) pairs on the host."""
    values = scores.tolist()
    order = sorted(range(len(values)), key=lambda i: (values[i] != values[i], values[i], i))
    mask = torch.ones_like(scores)
    mask[order[:count]] = 0
    return mask


def _update_importance(
    importance: list[torch.Tensor],
    uncertainty: list[torch.Tensor],
    values: list[torch.Tensor],
    gradients: list[torch.Tensor],
    beta1: float,
    beta2: float,
) -> None:
    values = [v.to(i.dtype) for v, i in zip(values, importance, strict=True)]
    gradients = [g.to(i.dtype) for g, i in zip(gradients, importance, strict=True)]
    sensitivity = torch._foreach_abs(torch._foreach_mul(values, gradients))
    torch._foreach_mul_(importance, beta1)
    torch._foreach_add_(importance, sensitivity, alpha=1 - beta1)
    torch._foreach_sub_(sensitivity, importance)
    torch._foreach_abs_(sensitivity)
    torch._foreach_mul_(uncertainty, beta2)
    torch._foreach_add_(uncertainty, sensitivity, alpha=1 - beta2)


def _prune_smallest_default(scores: torch.Tensor, count: int) -> torch.Tensor:
    order = torch.sort(scores, stable=True).indices
    return torch.ones_like(scores).index_fill_(0, order[:count], 0.0)


def _update_importance_cuda(*args: Any) -> None:
    from ..kernels import rank_allocation as kernels

    supported = all(kernels.supported(tensors) for tensors in args[:4])
    (kernels.update_importance if supported else _update_importance)(*args)


def _prune_smallest_cuda(scores: torch.Tensor, count: int) -> torch.Tensor:
    from ..kernels import rank_allocation as kernels

    forward = kernels.prune_smallest if kernels.supported([scores]) else _prune_smallest_default
    return forward(scores, count)


define(
    "update_importance_(Tensor(a!)[] importance, Tensor(b!)[] uncertainty, Tensor[] values,"
    " Tensor[] gradients, float beta1, float beta2) -> ()",
    default=_update_importance,
    cuda=_update_importance_cuda,
    fake=None,
)
_prune_smallest = define(
    "prune_smallest(Tensor scores, int count) -> Tensor",
    default=_prune_smallest_default,
    cuda=_prune_smallest_cuda,
    fake=lambda scores, count: scores.new_empty(scores.shape),
)
