"""The operators as functions, each with its reference beside it.

One file an operator: formula, public function, reference, default backend, gradient, schema.
"""

from .hypernet_layer import hypernet_layer, hypernet_layer_reference
from .orthogonality_penalty import orthogonality_penalty, orthogonality_penalty_reference
from .rank_allocation import (
    prune_smallest,
    prune_smallest_reference,
    update_importance_,
    update_importance_reference,
)
from .svd_adapter_add import svd_adapter_add, svd_adapter_add_reference
from .svd_linear import svd_linear, svd_linear_reference

__all__ = [
    "hypernet_layer",
    "hypernet_layer_reference",
    "orthogonality_penalty",
    "orthogonality_penalty_reference",
    "prune_smallest",
    "prune_smallest_reference",
    "svd_adapter_add",
    "svd_adapter_add_reference",
    "svd_linear",
    "svd_linear_reference",
    "update_importance_",
    "update_importance_reference",
]
