"""Packed rows of matrices of unequal height, and their padded form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hal_kernels.ops.ragged import pad, unpad

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
