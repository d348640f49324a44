"""Rows of many matrices in one tensor, and the same matrices padded to equal height.

A packed tensor ``[R, d]`` holds matrix g in rows ``offsets[g]:offsets[g + 1]``. Batched products
want ``[G, max_rank, d]``. While all matrices have the same rank (before compaction) that is a view;
afterwards rows are gathered on the device, without a host synchronisation.
"""

import math
from typing import NamedTuple

import torch

from ._library import expect_dtype, expect_same_device, expect_shape


class Slots(NamedTuple):
    """Where the rows of all layers' P, Λ and Q lie, packed ``[R, …]`` and padded ``[3, G, r, …]``.

    P and Q have a row order of their own, by width; Λ has that of the layers. A padded matrix has r
    slots, of which its rows take the first.
    """

    rows: tuple[torch.Tensor, torch.Tensor]
    """For P and Q: the row of Λ (and of the mask) that belongs to each row, int64 ``[R]``."""
    offsets: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """For P, Λ and Q: the first row of each matrix, and R, int64 ``[G + 1]``."""
    counts: tuple[list[int], list[int]]
    """For P and Q: how many matrices each width has."""
    sizes: tuple[list[int], list[int]]
    """For P and Q: how many rows each width has."""
    max_rank: int
    """r, the largest number of rows of one matrix."""

    @property
    def heights(self) -> list[int]:
        """Rows of each factor: P by width, Λ, Q by width."""
        return [*self.sizes[0], sum(self.sizes[0]), *self.sizes[1]]


def expect_slots(slots: Slots, reference: str, like: torch.Tensor) -> None:
    """Raise TypeError or ValueError naming the field unless all of `slots` fits together.

    What the offsets hold isn't looked at: that would make the host wait for the device.
    """
    if not isinstance(slots, Slots):
        raise TypeError(f"slots is a {type(slots).__name__}, expected hal_kernels.ops.Slots")
    for name, field in zip(Slots._fields[:4], slots[:4], strict=True):
        expected = 3 if name == "offsets" else 2
        if len(field) != expected:
            raise ValueError(f"slots.{name} has {len(field)} entries, expected {expected}")
    for name, tensors in (("rows", slots.rows), ("offsets", slots.offsets)):
        for index, tensor in enumerate(tensors):
            label = f"slots.{name}[{index}]"
            expect_dtype(label, tensor, torch.int64, "row numbers")
            expect_shape(label, tensor, (tensors[0].numel(),), f"as slots.{name}[0]")
            expect_same_device(reference, like, **{label: tensor})
    total, matrices = slots.rows[0].shape[0], slots.offsets[0].shape[0] - 1
    if matrices < 0:
        raise ValueError("slots.offsets[0] is empty, expected int64 [G + 1]")
    for side, (counts, sizes) in enumerate(zip(slots.counts, slots.sizes, strict=True)):
        if len(counts) != len(sizes) or not counts:
            raise ValueError(
                f"slots.counts[{side}] and slots.sizes[{side}] have {len(counts)} and {len(sizes)} "
                "entries, expected one each for every width"
            )
        if sum(counts) != matrices:
            raise ValueError(
                f"slots.counts[{side}] is {counts}, expected a sum of G = {matrices}"
                " (slots.offsets[0] is [G + 1])"
            )
        if sum(sizes) != total:
            raise ValueError(
                f"slots.sizes[{side}] is {sizes}, expected a sum of R = {total}"
                " (slots.rows[0] is [R])"
            )
        for count, size in zip(counts, sizes, strict=True):
            if not 0 <= size <= count * slots.max_rank:
                raise ValueError(
                    f"slots.sizes[{side}] is {sizes}, expected at most max_rank = {slots.max_rank} "
                    f"rows for each of the {counts} matrices"
                )


def pad(rows: torch.Tensor, offsets: torch.Tensor, max_rank: int) -> torch.Tensor:
    """``[R, ...]`` -> ``[G, max_rank, ...]``, zeros below each matrix's own rows."""
    count = offsets.shape[0] - 1
    if rows.shape[0] == count * max_rank:
        return rows.view(count, max_rank, *rows.shape[1:])
    index = offsets[:-1, None] + torch.arange(max_rank, device=rows.device)
    filled = index < offsets[1:, None]
    index = index.clamp_(max=rows.shape[0] - 1)
    filled = filled.view(count, max_rank, *[1] * (rows.dim() - 1))
    return torch.where(filled, rows[index], rows.new_zeros(()))


def unpad(padded: torch.Tensor, offsets: torch.Tensor, total: int) -> torch.Tensor:
    """``[G, max_rank, ...]`` -> ``[R, ...]``, the inverse of `pad`; `total` is R."""
    count, max_rank = padded.shape[:2]
    if total == count * max_rank:
        return padded.reshape(total, *padded.shape[2:])
    row = torch.arange(total, device=padded.device)
    matrix = torch.searchsorted(offsets, row, right=True) - 1
    return padded[matrix, row - offsets[matrix]]


def padded_places(slots: Slots) -> torch.Tensor | None:
    """Where the rows of P, Λ and Q, one after another, lie once padded: of ``[3·G·r]``, ``[3R]``.

    None where every matrix has r rows: all stay where they are.
    """
    total, matrices = slots.rows[0].shape[0], slots.offsets[0].shape[0] - 1
    if total == matrices * slots.max_rank:
        return None
    starts = torch.cat([offsets[:-1] for offsets in slots.offsets])
    ranks = torch.cat([offsets.diff() for offsets in slots.offsets])
    padded = torch.arange(3 * matrices, device=starts.device) * slots.max_rank
    shift = (padded - starts).repeat_interleave(ranks, output_size=3 * total)
    return torch.arange(total, device=starts.device).repeat(3) + shift


def pad_sides(rows: torch.Tensor, places: torch.Tensor | None, slots: Slots) -> torch.Tensor:
    """Rows of P, Λ and Q ``[3R, ...]`` -> ``[3, G, r, ...]``, zeros below each matrix's own rows.

    Args:
        places: `padded_places` of the slots.
    """
    shape = 3, slots.offsets[0].shape[0] - 1, slots.max_rank
    if places is not None:
        rows = rows.new_zeros(math.prod(shape), *rows.shape[1:]).index_copy(0, places, rows)
    return rows.view(*shape, *rows.shape[1:])


def unpad_sides(padded: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """The inverse of `pad_sides`."""
    rows = padded.flatten(0, 2)
    return rows if places is None else rows.index_select(0, places)
