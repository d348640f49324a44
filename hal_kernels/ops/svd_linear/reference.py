"""The formulas as they stand, differentiable by autograd: what every backend is held to."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F


def svd_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    p: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    scaling: float = 1.0,
) -> torch.Tensor:
    """``x·Wᵀ + b + scaling · (x·P ⊙ Λ) Q``."""
    return svd_adapter_add_reference(F.linear(x, weight, bias), x, p, lam, q, scaling)


def svd_linear_group_reference(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    p: Sequence[torch.Tensor],
    lam: Sequence[torch.Tensor],
    q: Sequence[torch.Tensor],
    scaling: float = 1.0,
) -> list[torch.Tensor]:
    """The same, one layer after the other."""
    layers = zip(weight, bias, p, lam, q, strict=True)
    return [svd_linear_reference(x, *layer, scaling) for layer in layers]


def svd_adapter_add_reference(
    y: torch.Tensor,
    x: torch.Tensor,
    p: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    scaling: float = 1.0,
) -> torch.Tensor:
    """``y + scaling · (x·P ⊙ Λ) Q``."""
    return y + scaling * ((x @ p.t()) * lam) @ q
