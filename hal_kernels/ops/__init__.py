"""The operators as functions, each with its reference beside it, and rank allocation.

One file or folder an operator: formula, public function, reference, default backend, gradient,
schema. Rank allocation is plain PyTorch.
"""

from ..backends import load_native
from .orthogonality_penalty import orthogonality_penalty, orthogonality_penalty_reference
from .ragged import Slots
from .rank_allocation import importance_scores, prune_smallest, update_importance_
from .spectral_step import spectral_step_, spectral_step_reference
from .svd_linear import (
    svd_adapter_add,
    svd_adapter_add_reference,
    svd_linear,
    svd_linear_group,
    svd_linear_group_reference,
    svd_linear_reference,
)

__all__ = [
    "Slots",
    "importance_scores",
    "orthogonality_penalty",
    "orthogonality_penalty_reference",
    "prune_smallest",
    "spectral_step_",
    "spectral_step_reference",
    "svd_adapter_add",
    "svd_adapter_add_reference",
    "svd_linear",
    "svd_linear_group",
    "svd_linear_group_reference",
    "svd_linear_reference",
    "update_importance_",
]

load_native()
