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

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], count_p: int) -> "Packed":
        """From tensors in the order of `tensors()`, of which the first `count_p` are P's."""
        return cls(tuple(tensors[:count_p]), tensors[count_p], tuple(tensors[count_p + 1 :]))

    def like(self, tensors: Sequence[torch.Tensor]) -> "Packed":
        """The same structure around other tensors."""
        return Packed.of(tensors, len(self.p))

    def detach(self) -> "Packed":
        return self.like([t.detach() for t in self.tensors()])


class Generation(NamedTuple):
    """What one forward pass works with."""

    factors: Packed  # Λ as generated, before the mask
    effective: Packed  # Λ_eff = Λ⊙mask: what the layers compute with
    views: list[LayerFactors]  # of `effective`, by layer
