"""Where each layer's factors lie in the packed tensors.

All layers' P rows of one width are one tensor ``[R_w, d_w]``, likewise Q; Λ and mask are ``[R]``
with R = Σ ranks. Λ follows the order of the layers; P and Q are grouped by width, so each has a
row order of its own.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import torch

from ..ops._library import expect_number


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One adapted layer.

    Attributes:
        name: in the model.
        d_in, d_out: its widths.
        rank: its current rank.
        init_rank: the rank that it started with.
        scaling: s = alpha / rank of the configuration.
    """

    name: str
    d_in: int
    d_out: int
    rank: int
    init_rank: int
    scaling: float

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name is {self.name!r}, expected a layer's name")
        for field, least in (("d_in", 1), ("d_out", 1), ("rank", 0), ("init_rank", 0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{field} of layer {self.name!r} is {value!r}, expected an int of at least "
                    f"{least}"
                )
        expect_number(f"scaling of layer {self.name!r}", self.scaling, above=0.0)


@dataclasses.dataclass(frozen=True)
class Group:
    """All matrices of one width on one side (P or Q), in packed order."""

    width: int
    layers: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(self.ranks)

    @property
    def offsets(self) -> list[int]:
        """First row of each matrix, and the number of rows."""
        return _offsets(self.ranks)


class Side:
    """The groups of one side, and how its row order relates to the order of Λ."""

    def __init__(self, layers: Sequence[LayerSpec], widths: Sequence[int]) -> None:
        self.groups = []
        for width in sorted(set(widths)):
            members = [i for i, w in enumerate(widths) if w == width]
            self.groups.append(Group(width, tuple(members), tuple(layers[i].rank for i in members)))
        self.counts = [len(group.layers) for group in self.groups]
        self.sizes = [group.rows for group in self.groups]
        self.order = [i for group in self.groups for i in group.layers]
        self.offsets = _offsets([layers[i].rank for i in self.order])
        starts = _offsets([layer.rank for layer in layers])
        self.rows = [row for i in self.order for row in range(starts[i], starts[i + 1])]
        """``rows[k]``: the row of Λ that belongs to row k of this side."""
        self.positions = sorted(range(len(self.rows)), key=self.rows.__getitem__)
        """``positions[i]``: the row of this side that belongs to row i of Λ."""

    def split(self, packed: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Every layer's own rows, by layer: views of the packed tensors."""
        views: list[torch.Tensor] = [packed[0]] * len(self.order)
        for group, tensor in zip(self.groups, packed, strict=True):
            for layer, view in zip(group.layers, tensor.split_with_sizes(group.ranks), strict=True):
                views[layer] = view
        return views


class Layout:
    """The packed order of all adapted layers."""

    def __init__(self, layers: Sequence[LayerSpec]) -> None:
        self.layers = tuple(layers)
        self.ranks = [layer.rank for layer in layers]
        self.rows = sum(self.ranks)
        self.offsets = _offsets(self.ranks)
        self.max_rank = max(self.ranks)
        self.initial_rows = sum(layer.init_rank for layer in layers)
        self.narrowest = {layer.name: min(layer.d_in, layer.d_out) for layer in layers}
        """Each layer's narrower side, by name."""
        self.p = Side(layers, [layer.d_in for layer in layers])
        self.q = Side(layers, [layer.d_out for layer in layers])

    def with_ranks(self, ranks: Sequence[int]) -> "Layout":
        """The same layers with other ranks."""
        return Layout(
            [dataclasses.replace(s, rank=r) for s, r in zip(self.layers, ranks, strict=True)]
        )


def _offsets(ranks: Sequence[int]) -> list[int]:
    """First row of each matrix, and the number of rows."""
    return list(itertools.accumulate(ranks, initial=0))
