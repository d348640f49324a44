"""The kernels that add the SVD adapter to an output. What they share with the linear layer's, and
its shapes, are tested there."""

import pytest
import torch
from ops.tangent_contract import TANGENT
from ops.util import assert_same, laid_out, values

from hal_kernels.ops import svd_adapter_add as operator
from hal_kernels.ops.svd_linear import triton as kernels

from .harness import DEVICE, Guarded, launches
from .svd_cases import (
    DTYPES,
    FACTORS,
    LARGE,
    ONE_BLOCK,
    ROWS_OF_RANK,
    SCALING,
    SHRINK_EXPAND,
    backward_kernels,
    check,
    dispatched,
    expected,
    gpu_like,
    make,
    recorded,
    run,
    seed,
    upstream,
)


@pytest.mark.parametrize("widths", [(48, 32), (37, 29)], ids=["even", "odd"])
@pytest.mark.parametrize("rank, rows", ROWS_OF_RANK.items())
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_rows_and_dtypes(dtype, rank, rows, widths):
    log = check("svd_adapter_add", make(rows, *widths, rank, dtype), dropout=0.3 * (rank % 2))
    assert log == SHRINK_EXPAND + backward_kernels(rank, rows)


@pytest.mark.parametrize("T, dropout", [(1, 0.0), (17, 0.3), (128, 0.3), (300, 0.0)])
def test_rows(monkeypatch, T, dropout):
    gpu_like(monkeypatch, svd=LARGE)
    log = check("svd_adapter_add", make(T, 64, 48), dropout=dropout)
    assert log == SHRINK_EXPAND + ONE_BLOCK + (["reduce"] if T > 64 else [])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank, rows, dropout", [(3, 70, 0.3), (64, 17, 0.0)])
def test_tangent_gradients(rank, rows, dtype, dropout):
    inputs = make(rows, 48, 72, rank, dtype, torch.float32)
    log = check("svd_adapter_add", inputs, dropout=dropout, tangent=TANGENT)
    assert log == SHRINK_EXPAND + backward_kernels(rank, rows)


def test_no_rows():
    inputs = make(0)
    dy = upstream(inputs)
    with recorded() as log:
        out = run("svd_adapter_add", inputs, dy)
    assert log == []
    assert_same(out, expected("svd_adapter_add", inputs, dy), 0.0)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "rows_sliced", "expanded"])
@pytest.mark.parametrize("what", ["x", "y", "dy"])
def test_layouts(what, layout):
    inputs = make(20, 32, 48, 5)
    if what != "dy":
        inputs[what] = laid_out(inputs[what], layout)
    check("svd_adapter_add", inputs, layout if what == "dy" else "contiguous")


@pytest.mark.parametrize("leading", [(2, 3, 4), (1, 5), ()])
def test_leading_dimensions_and_the_base_output(leading):
    """Also of a base output that is permuted; it stays as it was."""
    inputs = make(24)
    inputs["x"] = values(*leading, 48).to(DEVICE)
    y = values(*leading, 32).to(DEVICE)
    inputs["y"] = laid_out(y, "permuted") if len(leading) > 1 else y
    before, dy = inputs["y"].clone(), values(*leading, 32).to(DEVICE)
    out = run("svd_adapter_add", inputs, dy)
    assert torch.equal(inputs["y"], before)
    assert_same(out, expected("svd_adapter_add", inputs, dy), 1e-6 if DEVICE == "cpu" else 4e-6)


@pytest.mark.parametrize(
    "dtype, factors", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_factors_of_another_dtype(dtype, factors):
    check("svd_adapter_add", make(80, 48, 32, 5, dtype, factors), coarse=torch.bfloat16)


@pytest.mark.parametrize(
    "needs, kernels",
    [
        ((True, True), [*ONE_BLOCK, "reduce"]),
        ((True, False), SHRINK_EXPAND),
        ((False, True), [*ONE_BLOCK, "reduce"]),
        ((False, False), []),
    ],
)
def test_only_what_is_asked_is_computed(needs, kernels):
    inputs = make(70)
    dy, both = upstream(inputs), ("dx",) * needs[0] + ("dp", "dlam", "dq") * needs[1]
    with recorded() as log:
        out = run("svd_adapter_add", inputs, dy, 0.3, 4, needs)
    assert log == SHRINK_EXPAND + kernels
    ref = expected("svd_adapter_add", inputs, dy, 0.3, 4)
    bound = 1e-6 if DEVICE == "cpu" else 4e-6
    assert_same({n: out[n] for n in both}, {n: ref[n] for n in both}, bound)
    assert all(out[n].numel() == 0 for n in ("dx", "dp", "dlam", "dq") if n not in both)


def test_launch_budget():
    """Two launches forward and three backward, and nothing else."""
    inputs = make(70, dtype=torch.bfloat16, factors=torch.float32)
    dy = upstream(inputs)
    with launches(kernels) as log, Guarded() as guarded:
        run("svd_adapter_add", inputs, dy, 0.3, 4)
    assert log == [*SHRINK_EXPAND, *ONE_BLOCK, "reduce"]
    assert guarded.calls == []


@pytest.mark.parametrize("options", [{"dtype": torch.float64}, {"rank": 0}])
def test_what_the_default_implementation_computes(options):
    inputs = make(**options)
    dy = upstream(inputs)
    with recorded() as log:
        out = run("svd_adapter_add", inputs, dy)
    assert log == []
    assert_same(out, expected("svd_adapter_add", inputs, dy), 1e-5)


@pytest.fixture
def through_the_operator():
    with dispatched("svd_linear"):
        yield


def test_autograd(through_the_operator):
    inputs = make(14, rank=5)
    names = ("y", "x", *FACTORS)
    leaves = [inputs[n].requires_grad_() for n in names]
    with recorded() as log:
        out = operator(*leaves, scaling=SCALING)
        dy = torch.randn_like(out)
        gradients = torch.autograd.grad(out, leaves, dy)
    assert log == SHRINK_EXPAND + ONE_BLOCK
    assert torch.equal(gradients[0], dy)
    ref = expected("svd_adapter_add", inputs, dy)
    out = dict(zip(("dx", "dp", "dlam", "dq"), gradients[1:], strict=True))
    assert_same(out, {n: ref[n] for n in out}, 1e-6 if DEVICE == "cpu" else 4e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_opcheck(through_the_operator, dropout):
    inputs = make(6, d_in=16, d_out=32, dtype=torch.bfloat16, factors=torch.float32)
    y, x, *factors = (inputs[n] for n in ("y", "x", *FACTORS))
    more = (SCALING, dropout, seed(2) if dropout else None)
    h = torch.randn(6, 3, device=DEVICE)
    torch.library.opcheck(
        torch.ops.hal.svd_linear_backward.default,
        (upstream(inputs), x, h, None, *factors, *more, 0.0, True, True),
    )
    torch.library.opcheck(torch.ops.hal.svd_linear.default, (x, None, y, *factors, *more))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, d_in, d_out, rank", [(4096, 1024, 1536, 16), (777, 520, 1001, 64)])
def test_large(T, d_in, d_out, rank, dtype):
    check("svd_adapter_add", make(T, d_in, d_out, rank, dtype, torch.float32), dropout=0.1)
