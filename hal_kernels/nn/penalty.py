"""The orthogonality penalty of all adapted layers."""

from typing import TYPE_CHECKING

import torch

from ..ops.orthogonality_penalty import orthogonality_penalty
from .packed import Packed

if TYPE_CHECKING:
    from .adapter import HyperAdapter


def packed_penalty(adapter: "HyperAdapter", packed: Packed) -> torch.Tensor:
    """γ · penalty [eq. 7] of packed factors: a scalar.

    "squared" averages over the layers, "frobenius" over their matrices, as PEFT's AdaLoRA does.
    """
    layout, count = adapter.layout, len(adapter.layout.layers)
    sides = (("p", layout.p.groups), ("q", layout.q.groups))
    groups = [group for _, members in sides for group in members]
    squared = adapter.config.penalty == "squared"
    return orthogonality_penalty(
        [*packed.p, *packed.q],
        offsets=[getattr(adapter, f"offsets_{s}_{g.width}") for s, gs in sides for g in gs],
        max_ranks=[max(group.ranks) for group in groups],
        kind=adapter.config.penalty,
        weight=adapter.config.gamma / (count if squared else 2 * count),
    )
