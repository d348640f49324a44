"""The penalty of a layer that stands alone, from the pass of its own forward kernels."""

import importlib

import pytest
import torch
from ops.util import assert_same, laid_out, relative_error

from hal_kernels import HALLinear
from hal_kernels.ops import orthogonality_penalty_reference, svd_linear
from hal_kernels.ops.svd_linear import layer_output, layer_penalty
from hal_kernels.ops.svd_linear import triton as kernels

from .harness import DEVICE, EXACT, Guarded, launches
from .svd_cases import (
    DTYPES,
    FACTORS,
    LARGE,
    ROWS_OF_RANK,
    SCALING,
    dispatched,
    gpu_like,
    make,
    run,
    seed,
    upstream,
)


def check(inputs, dropout=0.0, path=None):
    """y and h are those without a penalty; residuals and penalty within float32 sums of exact."""
    layer, grams = [[inputs[n]] for n in ("weight", "bias", *FACTORS)], []
    options = (SCALING, dropout, seed(5) if dropout else None)
    with launches(kernels) as log, Guarded() as guarded:
        (y,), h = kernels.forward(inputs["x"], *layer, *options, path=path, grams=grams)
        penalty, residuals = kernels.penalty_of(grams)
    assert log == ["shrink", "expand", "penalty"]
    assert guarded.calls == ["mm" if path == "add" else "addmm_"]
    plain = run("svd_linear", inputs, upstream(inputs), dropout, 5, forward=path or "prepare")
    assert_same({"out": y, "h": h}, {n: plain[n] for n in ("out", "h")}, 0.0)
    matrices = [inputs[n].double() for n in ("p", "q")]
    assert penalty.dtype == torch.float32
    assert relative_error(penalty, orthogonality_penalty_reference(matrices)) <= EXACT
    for residual, f in zip(residuals, matrices, strict=True):
        eye = torch.eye(f.shape[0], dtype=torch.float64, device=DEVICE)
        # Absolute: elements near 1 − 1 keep the error of the sums they are left of.
        assert residual.shape == (1, *eye.shape)
        assert torch.allclose(residual[0].double(), f @ f.t() - eye, rtol=0.0, atol=EXACT * 8)
    return penalty


@pytest.mark.parametrize("widths", [(48, 32), (37, 29)], ids=["even", "odd"])
@pytest.mark.parametrize("rank, rows", ROWS_OF_RANK.items())
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_rows_and_dtypes(dtype, rank, rows, widths):
    path = "prepare" if rank in (1, 8, 17, 128) else "add"
    check(make(rows, *widths, rank, dtype), 0.3 * (rank % 2), path)


@pytest.mark.parametrize("rank", [3, 40])
@pytest.mark.parametrize("parts", [2, 16])
def test_columns_shared_out(monkeypatch, rank, parts):
    """Among more programs than there are columns for, or fewer; the last share is not full."""
    gpu_like(monkeypatch, svd=LARGE, multiprocessors=8, column_parts=parts)
    check(make(70, 600, 400, rank))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "rows_sliced"])
def test_layouts(layout):
    inputs = make(20, 32, 48, 5)
    for name in ("x", "weight", "p", "q"):
        inputs[name] = laid_out(inputs[name], layout)
    check(inputs)


def test_factors_of_sixteen_bits():
    """They are multiplied as they are, and summed in float32."""
    check(make(20, 48, 32, 5, torch.float32, torch.bfloat16))


def test_orthonormal_factors_cost_nothing():
    inputs = make(9, 48, 32, 3)
    inputs["p"], inputs["q"] = torch.eye(3, 48, device=DEVICE), torch.eye(3, 32, device=DEVICE)
    assert check(inputs) == 0


def test_gradients(monkeypatch):
    """Through autograd, with those of y; and of a penalty that is asked for twice."""
    module = importlib.import_module("hal_kernels.ops.svd_linear")  # behind the function's name
    monkeypatch.setattr(module, "_gives_grams", lambda *tensors: True)
    inputs, grams = make(14, rank=5), []
    leaves = [inputs[n].requires_grad_() for n in ("x", "weight", "bias", *FACTORS)]
    with dispatched("svd_linear"):
        y = layer_output(*leaves, SCALING, grams=grams)
        assert len(grams) == 2 and relative_error(y, svd_linear(*leaves, scaling=SCALING)) <= EXACT
        penalty = [layer_penalty(leaves[3], leaves[5], grams) for _ in range(2)]
        gradients = torch.autograd.grad(y.sum() + 2 * penalty[0] + penalty[1], leaves)
    x, weight, bias, p, lam, q = double = [t.detach().double().requires_grad_() for t in leaves]
    ref = (x @ weight.t() + bias + SCALING * ((x @ p.t()) * lam) @ q).sum()
    wanted = torch.autograd.grad(ref + 3 * orthogonality_penalty_reference([p, q]), double)
    bound = 1e-6 if DEVICE == "cpu" else 4e-6
    assert_same(dict(enumerate(gradients)), dict(enumerate(wanted)), bound)


@pytest.mark.gpu
def test_of_a_layer():
    """One launch more; anew once P has changed, in evaluation and of factors in float64."""
    layer = HALLinear(256, 128, device=DEVICE)
    layer(torch.randn(64, 256, device=DEVICE))
    for count in (1, 0):
        with launches(kernels) as log:
            value = layer.penalty
        exact = orthogonality_penalty_reference([layer.p.double(), layer.q.double()])
        assert log == ["penalty"] * count and relative_error(value, exact) <= EXACT
        with torch.no_grad():
            layer.p *= 2
    layer.eval()(torch.randn(64, 256, device=DEVICE))
    assert layer.penalty.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, d_in, d_out, rank", [(4096, 1024, 1536, 16), (777, 520, 1001, 64)])
def test_large(T, d_in, d_out, rank, dtype):
    for path in ("prepare", "add"):
        check(make(T, d_in, d_out, rank, dtype, torch.float32), dropout=0.1, path=path)
