"""Which of an adapter's layers a model calls.

Some modules read a linear layer's weight and never call it (attention that hands its projections to
`F.multi_head_attention_forward`). An adapter there has no effect and no gradient, so it must not
become part of the weight either, when the model is merged or exported.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .notices import shortened

if TYPE_CHECKING:
    from .adapter import HyperAdapter

PATIENCE = 8
"""Optimizer steps before a layer counts as never called that may merely have had no turn: an
expert that nothing was routed to, a block that layer-drop left out."""

_TEXT = (
    "the model reads the weight of {} without calling the layer, so the adapter has no effect "
    "there and will be left out when it is merged or exported; leave such layers unadapted "
    "(exclude=[…])"
)


class Calls:
    """Layers, by index, that were not called so far.

    Args:
        names: of the layers.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.idle = set(range(len(names)))
        self._noted = 0  # how many were idle when stock was taken
        self._told: set[int] = set()

    def forward_ended(self, adapter: "HyperAdapter") -> None:
        """Take stock after a whole forward pass in training."""
        if len(self.idle) != self._noted:
            if adapter.steps > 0:  # a checkpoint knows what was called before this process began
                self.idle &= set(adapter.never_called.nonzero().flatten().tolist())
            self._noted = len(self.idle)
            idle = torch.zeros(len(self.names), dtype=torch.bool)
            idle[list(self.idle)] = True
            adapter.never_called.copy_(idle)
            self._tell(adapter, self._beside_called())
        if adapter.steps == PATIENCE and self.idle - self._told:
            self._tell(adapter, self.idle)

    def _beside_called(self) -> set[int]:
        """Idle layers whose own module did call another of its layers: it won't call them.

        Of a list's members each may have its turn at another time.
        """
        places = [name.rpartition(".") for name in self.names]
        called = {parent for i, (parent, _, _) in enumerate(places) if i not in self.idle}
        return {i for i in self.idle if places[i][0] in called and not places[i][2].isdecimal()}

    def _tell(self, adapter: "HyperAdapter", layers: set[int]) -> None:
        new = sorted(layers - self._told)
        self._told |= layers
        if new:
            adapter.notices.warn(_TEXT.format(shortened([self.names[i] for i in new])))
