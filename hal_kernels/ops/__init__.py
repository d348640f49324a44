"""The operators as functions, each with its reference beside it.

One file or folder an operator: formula, public function, reference, default backend, gradient,
schema.
"""

from ..backends import load_native
from .importance_scores import importance_scores, importance_scores_reference
from .orthogonality_penalty import orthogonality_penalty, orthogonality_penalty_reference
from .ragged import Slots
from .rank_allocation import (
    prune_smallest,
    prune_smallest_reference,
    update_importance_,
    update_importance_reference,
)
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
    "importance_scores_reference",
    "orthogonality_penalty",
    "orthogonality_penalty_reference",
    "prune_smallest",
    "prune_smallest_reference",
    "spectral_step_",
    "spectral_step_reference",
    "svd_adapter_add",
    "svd_adapter_add_reference",
    "svd_linear",
    "svd_linear_group",
    "svd_linear_group_reference",
    "svd_linear_reference",
    "update_importance_",
    "update_importance_reference",
]

load_native()
