"""Layers of all kinds, and what `hypernet_tokens` and `hypernet_factors` take for them."""

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


def widths_of(layers) -> list[int]:
    """Of P, of Λ (1) and of Q: one for each factor."""
    return [*sorted({p for p, _, _ in layers}), 1, *sorted({q for _, q, _ in layers})]


def shapes_of(layers) -> list[tuple[int, ...]]:
    """Of the packed factors."""
    slots = slots_of(layers)
    shapes = [(n, d) for n, d in zip(slots.heights, widths_of(layers), strict=True)]
    lam = len(slots.counts[0])
    shapes[lam] = shapes[lam][:1]
    return shapes


def random(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def random_mask(rows: int, dtype=torch.float32) -> torch.Tensor:
    """Positive numbers, zeros, and negative ones, which are not kept either."""
    values = torch.tensor([1.0, 1.0, 0.5, 0.0, -1.0], dtype=dtype)
    return values[torch.randint(5, (rows,))].to(DEVICE)


def numbered(prefix: str, tensors) -> dict[str, torch.Tensor]:
    return {f"{prefix}{i}": t for i, t in enumerate(tensors)}


def listed(prefix: str, named: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The inverse of `numbered`."""
    return [t for name, t in named.items() if name.rstrip("0123456789") == prefix]
