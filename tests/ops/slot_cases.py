"""Layers of all kinds, and where their rows lie (`ops.Slots`)."""

import torch

from hal_kernels.nn.layout import LayerSpec, Layout
from hal_kernels.ops import Slots

from .util import DEVICE

# Layers as (d_in, d_out, rank): equal ranks, unequal ones, and ranks of zero wherever they may be.
EQUAL = [(7, 5, 2), (4, 5, 2), (7, 9, 2)]
UNEQUAL = [(7, 5, 3), (4, 5, 1), (7, 9, 2), (4, 6, 3)]
EMPTY = [(7, 5, 0), (4, 9, 2), (7, 5, 0), (4, 5, 3), (3, 9, 0)]  # P of widths 3 and 7 has no row
ALONE = [(1, 33, 5)]
LAYERS = {"equal": EQUAL, "unequal": UNEQUAL, "empty": EMPTY, "alone": ALONE}


def slots_of(layers) -> Slots:
    layout = Layout([LayerSpec(f"l{i}", *layer, layer[2], 1.0) for i, layer in enumerate(layers)])

    def indices(*values):
        return tuple(torch.tensor(v, dtype=torch.int64, device=DEVICE) for v in values)

    return Slots(
        indices(layout.p.rows, layout.q.rows),
        indices(layout.p.offsets, layout.offsets, layout.q.offsets),
        (layout.p.counts, layout.q.counts),
        (layout.p.sizes, layout.q.sizes),
        layout.max_rank,
    )
