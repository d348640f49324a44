"""The linear layer's kernels that give its penalty too. What all share, `test_svd_linear` tests."""

import pytest
import torch
from ops.util import assert_same, laid_out, relative_error

from hal_kernels.kernels import svd_linear_penalty as kernels
from hal_kernels.ops import orthogonality_penalty_reference
from hal_kernels.ops import svd_linear_penalty as operator

from .harness import DEVICE, EXACT, Guarded, launches
from .svd_cases import (
    DTYPES,
    FACTORS,
    LARGE,
    ROWS_OF_RANK,
    SCALING,
    allowed,
    dispatched,
    expected,
    gpu_like,
    make,
    seed,
    upstream,
)

LAUNCHED = ["shrink_gram", "expand_gram", "finish"]


def run(inputs, dropout=0.0, squared=True, path=None):
    factors = [inputs[n] for n in FACTORS]
    with launches(kernels) as log, Guarded() as guarded:
        outputs = kernels.forward(
            inputs["x"], inputs["weight"], inputs["bias"], *factors, SCALING, dropout,
            seed(5) if dropout else None, squared, path=path,
        )  # fmt: skip
    return *outputs, log, guarded.calls


def check(inputs, dropout=0.0, squared=True, path=None):
    """y and h as of `svd_linear`; residuals and penalty within float32 sums of the formula's."""
    y, h, penalty, residuals, log, calls = run(inputs, dropout, squared, path)
    assert log == LAUNCHED
    assert path is None or calls == [{"prepare": "addmm_", "add": "mm"}[path]]
    dy, dtype = upstream(inputs), inputs["x"].dtype
    ref = expected("svd_linear", inputs, dy, dropout, 5)
    plain = None
    if dtype != torch.float32:
        plain = expected("svd_linear", inputs, dy, dropout, 5, dtype)
    bound = allowed(dtype, plain, ref)
    if isinstance(bound, dict):
        bound = {n: bound[n] for n in ("out", "h")}
    assert_same({"out": y, "h": h}, {n: ref[n] for n in ("out", "h")}, bound)
    matrices = [inputs[n].double() for n in ("p", "q")]
    kind = "squared" if squared else "frobenius"
    assert penalty.dtype == torch.float32
    assert relative_error(penalty, orthogonality_penalty_reference(matrices, kind)) <= EXACT
    for residual, f in zip(residuals, matrices, strict=True):
        eye = torch.eye(f.shape[0], dtype=torch.float64, device=DEVICE)
        # Absolute: elements near 1 − 1 keep the error of the sums they are left of.
        assert residual.shape == (1, *eye.shape)
        assert torch.allclose(residual[0].double(), f @ f.t() - eye, rtol=0.0, atol=EXACT * 8)


@pytest.mark.parametrize("widths", [(48, 32), (37, 29)], ids=["even", "odd"])
@pytest.mark.parametrize("rank, rows", ROWS_OF_RANK.items())
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_rows_and_dtypes(dtype, rank, rows, widths):
    squared = rank in (1, 8, 17, 128)
    inputs, path = make(rows, *widths, rank, dtype), "prepare" if squared else "add"
    check(inputs, 0.3 * (rank % 2), squared=squared, path=path)


@pytest.mark.parametrize("rank", [3, 40])
@pytest.mark.parametrize("parts", [2, 16])
def test_columns_shared_out(monkeypatch, rank, parts):
    """Among more programs than there are columns for, or fewer; the last share is not full."""
    gpu_like(monkeypatch, svd=LARGE, multiprocessors=8, column_parts=parts)
    inputs = make(70, 600, 400, rank)
    check(inputs)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "rows_sliced"])
def test_layouts(layout):
    inputs = make(20, 32, 48, 5)
    for name in ("x", "weight", "p", "q"):
        inputs[name] = laid_out(inputs[name], layout)
    check(inputs)


def test_factors_of_sixteen_bits():
    """They are multiplied as they are, and summed in float32."""
    check(make(20, 48, 32, 5, torch.float32, torch.bfloat16))


@pytest.mark.parametrize("squared", [True, False])
def test_orthonormal_factors_cost_nothing(squared):
    inputs = make(9, 48, 32, 3)
    inputs["p"], inputs["q"] = torch.eye(3, 48, device=DEVICE), torch.eye(3, 32, device=DEVICE)
    assert run(inputs, squared=squared)[2] == 0


@pytest.mark.parametrize(
    "options",
    [{"T": 0}, {"dtype": torch.float64}, {"rank": 0}, {"factors": torch.float64}],
    ids=["no rows", "float64", "no rank", "factors in float64"],
)
def test_what_the_default_implementation_computes(options):
    inputs = make(**options)
    y, h, penalty, residuals, log, _ = run(inputs)
    assert log == []
    ref = expected("svd_linear", inputs, upstream(inputs))
    assert_same({"out": y, "h": h}, {n: ref[n] for n in ("out", "h")}, 1e-5)
    matrices = [inputs[n].double() for n in ("p", "q")]
    assert relative_error(penalty, orthogonality_penalty_reference(matrices)) <= EXACT
    assert all(r.shape == (1, *[len(inputs["p"])] * 2) for r in residuals)


def test_operator():
    """Through autograd, from what these kernels saved."""
    inputs = make(14, rank=5)
    leaves = [inputs[n].requires_grad_() for n in ("x", "weight", "bias", *FACTORS)]
    with dispatched("svd_linear_penalty", kernels):
        y, penalty = operator(*leaves, scaling=SCALING)
        assert type(y.grad_fn).__name__ == "hal_svd_linear_penaltyBackward"
        gradients = torch.autograd.grad(y.sum() + 3 * penalty, leaves)
    x, weight, bias, p, lam, q = double = [t.detach().double().requires_grad_() for t in leaves]
    ref = (x @ weight.t() + bias + SCALING * ((x @ p.t()) * lam) @ q).sum()
    wanted = torch.autograd.grad(ref + 3 * orthogonality_penalty_reference([p, q]), double)
    bound = 1e-6 if DEVICE == "cpu" else 4e-6
    assert_same(dict(enumerate(gradients)), dict(enumerate(wanted)), bound)


def test_opcheck():
    inputs = make(6, d_in=16, d_out=32, dtype=torch.bfloat16, factors=torch.float32)
    tensors = [inputs[n].requires_grad_() for n in ("x", "weight", "bias", *FACTORS)]
    with dispatched("svd_linear_penalty", kernels):
        torch.library.opcheck(
            torch.ops.hal.svd_linear_penalty.default, (*tensors, SCALING, 0.3, seed(2), True)
        )


def test_registered_for_cuda():
    name = "hal::svd_linear_penalty"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, d_in, d_out, rank", [(4096, 1024, 1536, 16), (777, 520, 1001, 64)])
def test_large(T, d_in, d_out, rank, dtype):
    for path in ("prepare", "add"):
        check(make(T, d_in, d_out, rank, dtype, torch.float32), dropout=0.1, path=path)
