# mypy: allow-untyped-defs
"""Shared by the kernels between packed rows and padded tokens (`ops.ragged.Slots`).

An entry is what one pair of linear maps serves: N entries are the P rows of one width each, then
the Q rows of one width each; one more is Λ, whose maps are vectors. All are one launch: addresses
and sizes of the entries are tuples of arguments, and a program finds its entry by comparing its
index with the entries' first programs. Loops keep what does not change inside them
(`disable_licm`): outside, it would cost registers that a tf32x3 product needs.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl

from .cases import POINTERS, Case
from .configs import ARCHITECTURES, SlotTiles, Tile, architecture_of
from .launch import DTYPES, dot_precision

T = TypeVar("T")


@triton.jit
def entry_of(pid, starts, N: tl.constexpr):
    """The entry whose programs include `pid`; N is Λ."""
    entry = (pid >= starts[1]).to(tl.int32)
    for i in tl.static_range(2, N + 1):
        entry += (pid >= starts[i]).to(tl.int32)
    return entry


@triton.jit
def chosen(values, entry, COUNT: tl.constexpr):
    """The element of a tuple that belongs to `entry`."""
    value = values[0]
    for i in tl.static_range(1, COUNT):
        value = tl.where(entry == i, values[i], value)
    return value


@triton.jit
def slots_of(entry, firsts, counts, matrices, rank, N: tl.constexpr, NP: tl.constexpr):
    """The first slot of an entry among all tokens (int64), and how many it has."""
    side = tl.where(entry < NP, 0, tl.where(entry < N, 2, 1))
    matrix = side * matrices + chosen(firsts, entry, N + 1)
    return matrix.to(tl.int64) * rank, chosen(counts, entry, N + 1) * rank


@triton.jit
def rows_of(
    slot, slots, entry, offsets, firsts, skips, rank,
    N: tl.constexpr, NP: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Which row of the entry lies in each of its slots (int64), and whether one does.

    `firsts` is the entry's first matrix among those of its side, `skips` the side's rows before it.
    """
    row, holds = slot.to(tl.int64), slot < slots
    if RAGGED:
        p_offsets = tl.where(entry < NP, offsets[0], tl.where(entry < N, offsets[2], offsets[1]))
        p_offsets += chosen(firsts, entry, N + 1) + slot // rank
        start = tl.load(p_offsets, mask=holds, other=0)
        end = tl.load(p_offsets + 1, mask=holds, other=0)
        row = start + slot % rank
        holds = holds & (row < end)
        row -= chosen(skips, entry, N + 1)
    return row, holds


@dataclasses.dataclass(frozen=True)
class Entries:
    """The entries of one launch, for the host; lists of factors are P by width, Λ, Q by width."""

    offsets: Sequence[torch.Tensor]
    counts_p: Sequence[int]
    counts_q: Sequence[int]
    rank: int

    def ordered(self, values: Sequence[T]) -> tuple[T, ...]:
        """One value for each factor, in the order of the entries."""
        lam = len(self.counts_p)
        return *values[:lam], *values[lam + 1 :], values[lam]

    def maps(
        self, tensors: Sequence[torch.Tensor]
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Tensors of the entries with a width, and that of Λ; contiguous."""
        *several, lam = (t.contiguous() for t in self.ordered(tensors))
        return tuple(several), lam

    def tiles(self, rows: int) -> list[int]:
        """How many tiles of `rows` slots each entry has."""
        counts = (*self.counts_p, *self.counts_q, self.offsets[0].shape[0] - 1)
        return [triton.cdiv(count * self.rank, rows) for count in counts]

    def arguments(self, heights: Sequence[int]) -> dict[str, Any]:
        """What every kernel takes; `heights` are the factors' rows."""
        matrices, lam = self.offsets[0].shape[0] - 1, len(self.counts_p)
        return {
            "offsets": tuple(o.contiguous() for o in self.offsets),
            "firsts": (*starts_of(self.counts_p), *starts_of(self.counts_q), 0),
            "counts": (*self.counts_p, *self.counts_q, matrices),
            "skips": (*starts_of(heights[:lam]), *starts_of(heights[lam + 1 :]), 0),
            "matrices": matrices,
            "rank": self.rank,
            "N": lam + len(self.counts_q),
            "NP": lam,
            "RAGGED": heights[lam] != matrices * self.rank,
        }


def starts_of(counts: Sequence[int]) -> tuple[int, ...]:
    """Where each of several runs begins that follow each other."""
    return tuple(itertools.accumulate(counts[:-1], initial=0))


def suits(tensors: Sequence[torch.Tensor], tokens: Sequence[int]) -> bool:
    """float64, mixed dtypes, no hidden columns and 2³⁰ slots are left to the default."""
    dtypes = {t.dtype for t in tensors}
    return (
        len(dtypes) == 1
        and dtypes <= set(DTYPES)
        and tokens[-1] > 0
        and math.prod(tokens[:-1]) < 2**30
    )


def tiles_for(device: torch.device, tokens: Sequence[int]) -> SlotTiles:
    """By architecture and number of slots."""
    return architecture_of(device).slot_tiles(math.prod(tokens[:-1]))


def options(tile: Tile, dtype: torch.dtype) -> dict[str, Any]:
    """The constants and options of a launch."""
    return {
        "BT": tile.rows, "BH": tile.columns, "BD": tile.depth, "PRECISION": dot_precision(dtype),
        **tile.options,
    }  # fmt: skip


def slot_cases(
    kernel: Any,
    kind: str,
    several: Sequence[str],
    types: Mapping[str, str] | None = None,
) -> Iterator[Case]:
    """A kernel with every tile of one kind, two widths a side, hidden 312, ranks equal or not.

    `several` are the tuples of pointers to numbers, `types` those of arguments that are neither
    pointers to numbers nor common to all kernels.
    """
    n = 4
    ints = dict.fromkeys(("starts", "firsts", "counts", "skips"), ("i32",) * (n + 1))
    scalars: dict[str, Any] = {**ints, "matrices": "i32", "rank": "i32"}
    for gpu, dtype, ragged in itertools.product(
        ARCHITECTURES.values(), (torch.float32, torch.bfloat16), (False, True)
    ):
        pointer, arch = POINTERS[dtype], gpu.name
        full = "ieee" if arch.startswith("gfx") else "tf32x3"
        signature = dict.fromkeys(kernel.arg_names, pointer) | dict(types or {}) | scalars
        signature |= dict.fromkeys(several, (pointer,) * n)
        signature |= {"widths": ("i32",) * n, "offsets": ("*i64",) * 3}
        for tile in dict.fromkeys(getattr(tiles, kind) for tiles in gpu.slots):
            constants = {
                "H": 312, "N": n, "NP": 2, "RAGGED": ragged,
                "BT": tile.rows, "BH": tile.columns, "BD": tile.depth,
                "PRECISION": full if dtype == torch.float32 else "tf32",
            }  # fmt: skip
            aligned = tuple(
                name
                for name in kernel.arg_names
                if name not in constants and (name == "widths" or "*" in signature[name][0])
            )
            yield Case(kernel, signature, constants, tile.options, aligned, arch)
