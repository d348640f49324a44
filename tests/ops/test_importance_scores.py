"""Scores of singular directions against the formula."""

import pytest
import torch

from hal_kernels.ops import importance_scores, importance_scores_reference

from .util import DEVICE, count_calls, laid_out, relative_error


def make(p=((4, 7), (3, 5)), q=((7, 6),), dtype=torch.float32):
    """Averages of P by width, Λ and Q by width, and two random orders of the rows."""
    rows = sum(n for n, _ in p)
    shapes = [*p, (rows,), *q]
    importance, uncertainty = (
        [torch.rand(shape, device=DEVICE).to(dtype) for shape in shapes] for _ in range(2)
    )
    return {
        "importance": importance,
        "uncertainty": uncertainty,
        "positions_p": torch.randperm(rows, device=DEVICE),
        "positions_q": torch.randperm(rows, device=DEVICE),
        "count_p": len(p),
    }


def exact(inputs):
    wide = {n: [t.double() for t in inputs[n]] for n in ("importance", "uncertainty")}
    return importance_scores_reference(**(inputs | wide))


# A 16-bit result is rounded once, and its three terms; products of 16 bits before that.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-14}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    "p, q",
    [
        (((4, 7), (3, 5)), ((7, 6),)),
        (((1, 1),), ((1, 1),)),
        (((130, 64),), ((30, 33), (0, 9), (100, 1500))),
    ],
)
def test_matches_the_formula(dtype, p, q):
    inputs = make(p, q, dtype)
    out = importance_scores(**inputs)
    assert out.dtype == dtype
    assert relative_error(out, exact(inputs)) <= BOUNDS[dtype]


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bool])
def test_pruned_directions_score_minus_infinity(mask_dtype):
    inputs = make()
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 0], device=DEVICE).to(mask_dtype)
    out, plain = importance_scores(**inputs, mask=mask), importance_scores(**inputs)
    assert torch.equal(out[mask > 0], plain[mask > 0])
    assert (out[mask == 0] == -torch.inf).all()


def test_no_directions():
    assert importance_scores(**make(((0, 3),), ((0, 4),))).shape == (0,)


def test_any_layout():
    inputs = make()
    for name in ("importance", "uncertainty"):
        inputs[name] = [laid_out(t, "sliced") for t in inputs[name]]
    assert relative_error(importance_scores(**inputs), exact(inputs)) <= BOUNDS[torch.float32]


def test_calls_do_not_grow_with_rows():
    few, many = (
        count_calls(lambda n=n: importance_scores(**make(((n, 4),), ((n, 4),)))) for n in (2, 200)
    )
    assert few == many


def test_opcheck():
    inputs = make()
    mask = torch.ones(7, device=DEVICE)
    torch.library.opcheck(
        torch.ops.hal.importance_scores.default, (*inputs.values(), mask), test_utils=(
            "test_schema", "test_faketensor", "test_aot_dispatch_dynamic",
        ),
    )  # fmt: skip


BAD = [
    ({"count_p": 0}, ValueError, r"count_p is 0, expected 1 to 2"),
    ({"count_p": 3}, ValueError, r"count_p is 3, expected 1 to 2"),
    ({"count_p": 1}, ValueError, r"importance\[1\] has shape \(3, 5\), expected \[R\]"),
    ({"uncertainty": []}, ValueError, r"uncertainty is empty, expected"),
    ({"positions_p": torch.zeros(7)}, TypeError, r"positions_p has dtype torch.float32"),
    ({"positions_q": torch.zeros(6).long()}, ValueError, r"positions_q has shape \(6,\)"),
    ({"mask": torch.ones(6)}, ValueError, r"mask has shape \(6,\), expected \(7,\)"),
]


@pytest.mark.parametrize("changes, exception, message", BAD)
def test_bad_arguments(changes, exception, message):
    with pytest.raises(exception, match=message):
        importance_scores(**(make() | changes))


def test_shapes_that_do_not_fit_each_other():
    inputs = make()
    inputs["uncertainty"][0] = inputs["uncertainty"][0][:, 1:]
    with pytest.raises(ValueError, match=r"uncertainty\[0\] has shape \(4, 6\), expected \(4, 7\)"):
        importance_scores(**inputs)
    with pytest.raises(ValueError, match=r"importance has \[7\] rows for positions_q, expected 6"):
        importance_scores(**make(((4, 7), (2, 5)), ((7, 6),)) | {"positions_q": torch.arange(6)})
