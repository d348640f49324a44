"""The penalty's kernels against the formula in float64, one matrix at a time."""

import importlib

import pytest
import torch
from ops.util import laid_out, relative_error

from hal_kernels.ops import orthogonality_penalty, orthogonality_penalty_reference

from .harness import DEVICE, EXACT, Guarded, launches

kernels = importlib.import_module("hal_kernels.ops.orthogonality_penalty.triton")
default = importlib.import_module("hal_kernels.ops.orthogonality_penalty")

KINDS = {"squared": True, "frobenius": False}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNEQUAL = [
    [([3, 1, 2], 10)],
    [([0, 4, 0, 2, 0], 9)],
    [([0, 0], 5), ([2, 1], 6)],
    [([5], 3), ([2, 2], 8), ([1, 0, 3], 4), ([17, 1], 300)],
    [([2], 0), ([2, 3], 33)],
]


def packed(groups, dtype=torch.float32):
    """Rows of norm about 1, neither orthogonal nor near it."""
    rows = [torch.randn(sum(r), d, dtype=torch.float64) / max(d, 1) ** 0.5 + 0.1 for r, d in groups]
    return [t.to(DEVICE, dtype) for t in rows]


def offsets_of(groups):
    starts = [[sum(r[:g]) for g in range(len(r) + 1)] for r, _ in groups]
    return [torch.tensor(s, device=DEVICE) for s in starts]


def run(factors, groups, squared, weight=0.3, dvalue=1.7):
    """Value, residuals and gradients, from kernels that stay within their outputs."""
    offsets, max_ranks = offsets_of(groups), [max(r) for r, _ in groups]
    dvalue = torch.tensor(dvalue, device=DEVICE)
    with launches(kernels) as log, Guarded() as guarded:
        value, residuals = kernels.forward(factors, offsets, max_ranks, squared, weight)
        gradients = kernels.backward(
            dvalue, factors, residuals, offsets, max_ranks, squared, weight
        )
    return value, residuals, gradients, log, guarded.calls


def check(factors, groups, kind, weight=0.3, dvalue=1.7):
    value, residuals, gradients, log, calls = run(factors, groups, KINDS[kind], weight, dvalue)
    assert log == ["residual", "sum", "gradient"]
    assert not calls or not all(f.is_contiguous() for f in factors)
    leaves = [f.detach().double().requires_grad_() for f in factors]
    matrices = [m for f, (r, _) in zip(leaves, groups, strict=True) for m in f.split(r)]
    reference = orthogonality_penalty_reference(matrices, kind, weight)
    (dvalue * reference).backward()
    assert value.dtype == torch.float32
    assert relative_error(value, reference) <= EXACT
    for gradient, leaf, factor in zip(gradients, leaves, factors, strict=True):
        assert gradient.dtype == factor.dtype
        # Sums of exact inputs in float32: only the result is rounded, each element by eps/2.
        rounding = 0.0 if factor.dtype == torch.float32 else torch.finfo(factor.dtype).eps / 2
        assert relative_error(gradient, leaf.grad) <= EXACT + rounding
    theirs = default._forward(
        factors, offsets_of(groups), [max(r) for r, _ in groups], KINDS[kind], weight
    )
    for ours, wanted in zip(residuals, theirs[1], strict=True):
        assert ours.dtype == torch.float32
        assert torch.allclose(ours, wanted, rtol=0.0, atol=EXACT * 4)  # elements of about 1


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 17, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_rank(dtype, rank):
    groups = [([rank] * 2, 37), ([rank], 20)]
    for kind in KINDS if dtype == torch.float32 else ("squared",):
        check(packed(groups, dtype), groups, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", UNEQUAL)
def test_unequal_ranks_and_widths(groups, kind):
    check(packed(groups), groups, kind)


def test_as_many_groups_as_a_model_may_have():
    """One launch whatever the widths."""
    groups = [([2, 2], 8 + i) for i in range(12)]
    check(packed(groups), groups, "squared")


@pytest.mark.parametrize("layout", ["transposed", "sliced", "rows_sliced"])
def test_any_layout(layout):
    groups = [([2, 3], 6)]
    check([laid_out(f, layout) for f in packed(groups)], groups, "frobenius")


def test_upstream_gradient_of_stride_zero_and_negative_weight():
    groups = [([2, 3], 6)]
    check(packed(groups), groups, "squared", weight=-2.0, dvalue=-0.5)


@pytest.mark.parametrize("squared", KINDS.values())
def test_orthonormal_rows_cost_nothing(squared):
    rows = torch.cat([torch.eye(3, 5), torch.eye(1, 5)]).to(DEVICE)
    value, _, gradients, *_ = run([rows], [([3, 1], 5)], squared)
    assert value == 0
    assert torch.equal(gradients[0], torch.zeros_like(rows))


def test_a_matrix_that_is_not_finite_leaves_the_others_alone():
    groups = [([1, 3, 2], 6), ([2], 9)]
    factors = packed(groups)
    _, good, expected, *_ = run(factors, groups, True)
    factors[0][1:4] = float("nan")
    value, residuals, gradients, *_ = run(factors, groups, True)
    assert value.isnan()
    assert gradients[0][1:4].isnan().all()
    assert torch.equal(gradients[0][[0, 4, 5]], expected[0][[0, 4, 5]])
    assert torch.equal(gradients[1], expected[1])
    assert torch.equal(residuals[0][[0, 2]], good[0][[0, 2]])


def test_no_matrices():
    rows, offsets = torch.empty(0, 5, device=DEVICE), torch.zeros(1, dtype=torch.int64)
    with launches(kernels) as log:
        value, residuals = kernels.forward([rows], [offsets.to(DEVICE)], [3], True, 1.0)
    assert value == 0 and residuals[0].shape == (0, 3, 3) and log == ["sum"]
    value, residuals, gradients, log, _ = run([rows], [([0], 5)], True)
    assert value == 0 and residuals[0].shape == (1, 0, 0) and gradients[0].shape == (0, 5)
    assert log == ["residual", "sum", "gradient"]


@pytest.mark.parametrize("groups, dtype", [([([2, 3], 6)], torch.float64), ([([129], 7)], None)])
def test_what_the_default_implementation_keeps(groups, dtype):
    factors, dvalue = packed(groups, dtype or torch.float32), torch.tensor(1.7, device=DEVICE)
    arguments = offsets_of(groups), [max(r) for r, _ in groups], True, 0.3
    with launches(kernels) as log:
        value, residuals = default._forward_cuda(factors, *arguments)
        gradients = default._backward_cuda(dvalue, factors, residuals, *arguments)
    assert log == []
    assert torch.equal(value, default._forward(factors, *arguments)[0])
    expected = default._backward_default(dvalue, factors, residuals, *arguments)
    assert torch.equal(gradients[0], expected[0])


def test_registered_for_cuda():
    for name in ("orthogonality_penalty", "orthogonality_penalty_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"hal::{name}", "CUDA")


@pytest.mark.gpu
def test_in_a_cuda_graph():
    """Captured with nothing read on the host; replayed on other numbers."""
    factor = torch.randn(24, 5, 768, device=DEVICE).requires_grad_()

    def step():
        factor.grad = None
        orthogonality_penalty([factor]).backward()
        return factor.grad

    for _ in range(2):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        factor.copy_(torch.randn_like(factor))
    graph.replay()
    replayed = captured.clone()
    assert torch.equal(replayed, step())
