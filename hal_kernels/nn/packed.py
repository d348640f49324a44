"""All layers' factors in a few tensors, and what one forward pass works with."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

LayerFactors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""One layer's (P rows ``[r, d_in]``, Λ ``[r]``, Q rows ``[r, d_out]``)."""


class Packed(NamedTuple):
    """Factors of all layers: P and Q by width ``[R_w, d_w]``, Λ ``[R]``."""

    p: tuple[torch.Tensor, ...]
    lam: torch.Tensor
    q: tuple[torch.Tensor, ...]

    def tensors(self) -> list[torch.Tensor]:
        return [*self.p, self.lam, *self.q]

    def like(self, tensors: Sequence[torch.Tensor]) -> "Packed":
        """The same structure around other tensors, in the order of `tensors()`."""
        n = len(self.p)
        return Packed(tuple(tensors[:n]), tensors[n], tuple(tensors[n + 1 :]))

    def detach(self) -> "Packed":
        return self.like([t.detach() for t in self.tensors()])


class Generation(NamedTuple):
    """What one forward pass works with."""

    factors: Packed  # Λ as generated, before the mask
    effective: Packed  # Λ_eff = Λ⊙mask: what the layers compute with
    views: list[LayerFactors]  # of `effective`, by layer
