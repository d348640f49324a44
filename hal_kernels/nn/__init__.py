"""Modules: the adapted layer, and the adapter that serves all layers of a model."""

from .adapter import HyperAdapter
from .linear import HALLinear

__all__ = ["HALLinear", "HyperAdapter"]
