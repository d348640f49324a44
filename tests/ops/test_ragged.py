"""Packed rows of matrices of unequal height, and their padded form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hal_kernels.ops import Slots
from hal_kernels.ops.ragged import expect_slots, pad, pad_sides, padded_places, unpad, unpad_sides

from .slot_cases import EQUAL, LAYERS, slots_of
from .util import DEVICE, laid_out, packed_offsets

RANKS = [[2, 2, 2], [3, 1, 2], [0, 2, 3, 0, 0, 1], [4, 0, 0], [0, 0, 5], [0, 0], [7], [1, 2]]


def rows_of(ranks, *trailing, dtype=torch.float32):
    return torch.randn(sum(ranks), *trailing, dtype=torch.float64).to(DEVICE, dtype)


@pytest.mark.parametrize("trailing", [(), (5,), (2, 3)])
@pytest.mark.parametrize("ranks", RANKS)
def test_pad_puts_each_matrix_above_zeros(ranks, trailing):
    rows, offsets = rows_of(ranks, *trailing), packed_offsets(ranks)
    padded = pad(rows, offsets, max(ranks))
    assert padded.shape == (len(ranks), max(ranks), *trailing)
    for g, rank in enumerate(ranks):
        assert torch.equal(padded[g, :rank], rows[offsets[g] : offsets[g + 1]])
        assert (padded[g, rank:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("ranks", RANKS)
def test_unpad_is_the_inverse(ranks, dtype):
    rows, offsets = rows_of(ranks, 4, dtype=dtype), packed_offsets(ranks)
    back = unpad(pad(rows, offsets, max(ranks)), offsets, sum(ranks))
    assert back.dtype == dtype
    assert torch.equal(back, rows)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(0, 3))
def test_unpad_ignores_what_is_in_the_padding(ranks, width):
    rows, offsets = rows_of(ranks, width), packed_offsets(ranks)
    padded = pad(rows, offsets, max(ranks)).clone()
    for g, rank in enumerate(ranks):
        padded[g, rank:] = float("nan")
    assert torch.equal(unpad(padded, offsets, sum(ranks)), rows)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_padding_is_zero_beside_rows_that_are_not_finite(bad):
    """The rows below a matrix's own are another matrix's: its NaN must not leak."""
    ranks = [1, 3, 2]
    rows, offsets = rows_of(ranks, 4), packed_offsets(ranks)
    rows[1:4] = bad
    padded = pad(rows, offsets, 3)
    assert (padded[0, 1:] == 0).all()
    assert (padded[2, 2:] == 0).all()


@pytest.mark.parametrize("layout", ["transposed", "sliced", "rows_sliced", "expanded"])
@pytest.mark.parametrize("ranks", [[2, 2], [3, 1]])
def test_rows_of_any_layout(ranks, layout):
    rows, offsets = laid_out(rows_of(ranks, 6), layout), packed_offsets(ranks)
    padded = pad(rows, offsets, max(ranks))
    assert torch.equal(padded, pad(rows.contiguous(), offsets, max(ranks)))
    assert torch.equal(unpad(padded, offsets, 4), rows)


def test_equal_ranks_are_a_view():
    rows, offsets = rows_of([2, 2, 2], 5), packed_offsets([2, 2, 2])
    padded = pad(rows, offsets, 2)
    assert padded.data_ptr() == rows.data_ptr()
    assert unpad(padded, offsets, 6).data_ptr() == rows.data_ptr()


@pytest.mark.parametrize("total", [6, 4])
def test_no_host_synchronisation(total):
    """Tensors without data cannot be read: meta tensors pass through both ways."""
    rows = torch.empty(total, 5, device="meta")
    offsets = torch.empty(4, dtype=torch.int64, device="meta")
    assert pad(rows, offsets, 2).shape == (3, 2, 5)
    assert unpad(pad(rows, offsets, 2), offsets, total).shape == (total, 5)


# ---- P, Λ and Q together -----------------------------------------------------------------------


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_three_sides_are_padded_as_each_by_itself(layers):
    slots, total = slots_of(layers), sum(rank for *_, rank in layers)
    rows, places = torch.randn(3 * total, 4, device=DEVICE), padded_places(slots)
    padded = pad_sides(rows, places, slots)
    for side, (own, offsets) in enumerate(zip(rows.split(total), slots.offsets, strict=True)):
        assert torch.equal(padded[side], pad(own, offsets, slots.max_rank))
    assert torch.equal(unpad_sides(padded, places), rows)
    kept = rows[:, 0] > 0
    assert torch.equal(unpad_sides(pad_sides(kept, places, slots), places), kept)


@pytest.mark.parametrize("total", [6, 4])
def test_three_sides_without_host_synchronisation(total):
    whole, ends = (torch.empty(n, dtype=torch.int64, device="meta") for n in (total, 4))
    slots = Slots((whole, whole), (ends, ends, ends), ([3], [3]), ([total], [total]), 2)
    places = padded_places(slots)
    padded = pad_sides(torch.empty(3 * total, 5, device="meta"), places, slots)
    assert padded.shape == (3, 3, 2, 5)
    assert unpad_sides(padded, places).shape == (3 * total, 5)


def test_heights_of_the_factors():
    assert slots_of(EQUAL).heights == [2, 4, 6, 4, 2]


SHORT = torch.zeros(3, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize(
    "field, value, exception, message",
    [
        ("rows", (SHORT,), ValueError, r"slots.rows has 1 entries, expected 2"),
        ("rows", (SHORT, SHORT[1:]), ValueError, r"slots.rows\[1\] has shape \(2,\), expected \("),
        ("rows", (SHORT, None), TypeError, r"slots.rows\[1\] is a NoneType, expected a torch.Te"),
        ("rows", (SHORT.int(), SHORT), TypeError, r"slots.rows\[0\] has dtype torch.int32, expec"),
        ("rows", (SHORT, SHORT), ValueError, r"slots.sizes\[0\] is \[2, 4\], expected a sum of R "),
        ("rows", (SHORT.to("meta"),) * 2, ValueError, r"slots.rows\[0\] is on meta, expected cpu"),
        ("offsets", (SHORT,) * 2, ValueError, r"slots.offsets has 2 entries, expected 3"),
        ("offsets", (SHORT[:0],) * 3, ValueError, r"slots.offsets\[0\] is empty, expected int64"),
        ("offsets", (SHORT[None],) * 3, ValueError, r"slots.offsets\[0\] has shape \(1, 3\), exp"),
        ("counts", ([1, 2], [3, 1]), ValueError, r"slots.counts\[1\] is \[3, 1\], expected a sum"),
        ("counts", ([1, 2], [3]), ValueError, r"slots.counts\[1\] and slots.sizes\[1\] have 1 and"),
        ("counts", ([1, 2],), ValueError, r"slots.counts has 1 entries, expected 2"),
        ("sizes", ([2, 4], [4, 3]), ValueError, r"slots.sizes\[1\] is \[4, 3\], expected a sum of"),
        ("sizes", ([2, 4], [5, 1]), ValueError, r"slots.sizes\[1\] is \[5, 1\], expected at most "),
        (
            "sizes",
            ([7, -1], [4, 2]),
            ValueError,
            r"slots.sizes\[0\] is \[7, -1\], expected at most",
        ),
        ("max_rank", 1, ValueError, r"expected at most max_rank = 1 rows for each of the \[1, 2\]"),
    ],
)
def test_slots_that_do_not_fit_together(field, value, exception, message):
    like = torch.ones(1, device=DEVICE)
    good = slots_of(EQUAL)
    expect_slots(good, "tokens", like)
    with pytest.raises(exception, match=message):
        expect_slots(good._replace(**{field: value}), "tokens", like)


def test_slots_are_a_slots():
    with pytest.raises(TypeError, match=r"slots is a tuple, expected hal_kernels.ops.Slots"):
        expect_slots(tuple(slots_of(EQUAL)), "tokens", torch.ones(1, device=DEVICE))
    assert Slots._fields == ("rows", "offsets", "counts", "sizes", "max_rank")
