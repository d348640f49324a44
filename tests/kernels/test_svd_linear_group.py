"""The kernels of layers that share an input: values, gradients, which of them run; the operator."""

import pytest
import torch
from ops.tangent_contract import TANGENT, tangent_results
from ops.util import assert_same, laid_out, values

from hal_kernels.ops import svd_linear_group as operator
from hal_kernels.ops import svd_linear_group_reference
from hal_kernels.ops._library import TRITON
from hal_kernels.ops.svd_linear import triton as kernels

from .harness import DEVICE, Guarded, launches
from .svd_cases import DTYPES, LARGE, SCALING, allowed, dispatched, gpu_like

NAMES = ("p", "lam", "q")


def make(T=17, d_in=48, d_out=(32, 16, 16), ranks=(3, 3, 3), dtype=torch.float32, factors=None):
    """Lists by name; P and Λ are rows of packed tensors, one value in three pruned."""
    factors, total = factors or dtype, sum(ranks)
    lam = 0.5 + torch.rand(total, dtype=torch.float64)
    lam[1::3] = 0
    every = {
        "x": values(T, d_in, dtype=dtype),
        "weight": [(values(d, d_in) / d_in**0.5).to(dtype) for d in d_out],
        "bias": [values(d, dtype=dtype) for d in d_out],
        "p": (values(total, d_in) / d_in**0.5).to(DEVICE, factors).split(ranks),
        "lam": lam.to(DEVICE, factors).split(ranks),
        "q": [(values(r, d) / d**0.5).to(factors) for r, d in zip(ranks, d_out, strict=True)],
    }
    return {n: t if torch.is_tensor(t) else list(t) for n, t in every.items()}


def upstream(inputs, layout="contiguous"):
    x = inputs["x"]
    shapes = [(*x.shape[:-1], w.shape[0]) for w in inputs["weight"]]
    return [laid_out(values(*shape, dtype=x.dtype), layout) for shape in shapes]


def expected(inputs, dy, dtype=torch.float64, tangent=0.0):
    """Outputs, h and gradients of the formula, by autograd, computed in `dtype`."""

    def leaf(t):
        return t.detach().to(dtype).requires_grad_()

    leaves = {n: leaf(t) if torch.is_tensor(t) else list(map(leaf, t)) for n, t in inputs.items()}
    outputs = svd_linear_group_reference(**leaves, scaling=SCALING)
    wanted = [leaves["x"], *(t for n in NAMES for t in leaves[n])]
    used = [i for i, g in enumerate(dy) if g is not None]
    dx, *rest = torch.autograd.grad(
        [outputs[i] for i in used], wanted, [dy[i].to(dtype) for i in used],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    n, x = len(dy), leaves["x"].detach()
    dp, dlam, dq = (rest[i * n : (i + 1) * n] for i in range(3))
    h = x.reshape(-1, x.shape[-1]) @ torch.cat(leaves["p"]).detach().t()
    if tangent:
        of_layer = [
            {"p": torch.zeros_like(p), "q": torch.zeros_like(q)} if g is None
            else tangent_results({"x": x, "p": p, "q": q}, g, dtype, tangent=tangent)
            for g, p, q in zip(dy, leaves["p"], leaves["q"], strict=True)
        ]  # fmt: skip
        dp, dq = ([found[n] for found in of_layer] for n in "pq")
        dlam = [x.new_empty(0)]
    named = {"h": h, "dx": dx, "dp": torch.cat(dp), "dlam": torch.cat(dlam)}
    named |= {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    return named | {f"dq{i}": g for i, g in enumerate(dq)}


def run(inputs, dy, needs=(True, True), tangent=0.0):
    """The same by the launch functions."""
    factors = [inputs[n] for n in NAMES]
    more = (SCALING, 0.0, None)
    outputs, h = TRITON["svd_linear_group"](
        inputs["x"], inputs["weight"], inputs["bias"], *factors, *more
    )
    dx, dp, dlam, dq = TRITON["svd_linear_group_backward"](
        dy, inputs["x"], h, inputs["weight"], *factors, *more, tangent, *needs
    )
    named = {"h": h, "dx": dx, "dp": dp, "dlam": dlam}
    named |= {f"y{i}": y for i, y in enumerate(outputs)}
    return named | {f"dq{i}": g for i, g in enumerate(dq)}


def check(inputs, dy=None, layout="contiguous", tangent=0.0):
    """Everything against the formula in float64, within bands; returns the kernels' names."""
    dy = upstream(inputs, layout) if dy is None else dy
    inputs_of_formula = inputs | {
        "bias": [torch.zeros(w.shape[0], device=DEVICE) if b is None else b
                 for b, w in zip(inputs["bias"], inputs["weight"], strict=True)]
    }  # fmt: skip
    with launches(kernels) as log, Guarded():
        out = run(inputs, dy, tangent=tangent)
    ref, dtype = expected(inputs_of_formula, dy, tangent=tangent), inputs["x"].dtype
    plain = None if dtype == torch.float32 else expected(inputs_of_formula, dy, dtype, tangent)
    assert_same(out, ref, allowed(dtype, plain, ref))
    return log


APART = {"svd": LARGE, "gemm_slowdown": 1e9}  # no fused path


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """Few programs, for the interpreter; and no fused path unless a test wants it."""
    gpu_like(monkeypatch, **APART)


EXPANDED = ["shrink", *["expand"] * 3]
BACKWARD = [*["gradients_dy"] * 3, "gradients_x"]


@pytest.mark.parametrize("ranks", [(1, 1, 1), (3, 5, 8), (17, 1, 30), (64, 32, 32)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_and_dtypes(dtype, ranks):
    log = check(make(17, ranks=ranks, dtype=dtype))
    apart = [f"gradients_dy{'_apart' if r > 32 else ''}" for r in ranks]
    assert log == [*EXPANDED, *apart, "gradients_x"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_widths_and_mixed_dtypes(dtype):
    check(make(9, 37, (29, 7, 33), dtype=dtype, factors=torch.float32))


@pytest.mark.parametrize("T", [1, 128, 300])
def test_rows(T):
    log = check(make(T, 64, (48, 16, 16)))
    assert log == EXPANDED + BACKWARD + (["reduce"] if T > 64 else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_columns_shared_out(monkeypatch, dtype):
    """Partial h, u, dP and dQ; the layers' widths give u different numbers of parts."""
    gpu_like(monkeypatch, **APART, multiprocessors=12, row_splits=2, block_splits=(2, 2))
    log = check(make(200, 256, (272, 16, 144), dtype=dtype))
    assert log == [*EXPANDED, *BACKWARD, "reduce"]


@pytest.mark.parametrize("unused", [(), (1,)])
@pytest.mark.parametrize("T, dtype", [(17, torch.float32), (200, torch.float16)])
def test_tangent_gradients(T, dtype, unused):
    """K and L of each layer, also where Λ is zero, in as many launches."""
    inputs = make(T, 64, (48, 16, 144), (3, 40, 8), dtype, torch.float32)
    dy = [None if i in unused else g for i, g in enumerate(upstream(inputs))]
    log = check(inputs, dy, tangent=TANGENT)
    apart = ["gradients_dy", "gradients_dy_apart", "gradients_dy"]
    apart = [name for i, name in enumerate(apart) if i not in unused]
    assert log == [*EXPANDED, *apart, "gradients_x"] + (["reduce"] if T > 64 else [])


@pytest.mark.parametrize("prepare", [True, False])
def test_gemm_first_or_last(monkeypatch, prepare):
    gpu_like(monkeypatch, **APART, prepare=prepare)
    check(make(20))


@pytest.mark.parametrize("without", [(), (1,), (0, 2)])
def test_fused(monkeypatch, without):
    """One launch a layer, which writes its columns of h."""
    gpu_like(monkeypatch, svd=LARGE, gemm_slowdown=0.0)
    inputs = make(40, ranks=(3, 5, 8))
    for i in without:
        inputs["bias"][i] = None
    assert check(inputs) == ["fused"] * 3 + BACKWARD


@pytest.mark.parametrize("unused", [(0,), (2,), (0, 1)])
def test_layers_that_are_not_used(unused):
    inputs = make(20, ranks=(3, 5, 8))
    dy = [None if i in unused else g for i, g in enumerate(upstream(inputs))]
    log = check(inputs, dy)
    assert log == EXPANDED + BACKWARD[len(unused) :]


@pytest.mark.parametrize(
    "layout", ["transposed", "sliced", "rows_sliced", "expanded", "all_expanded"]
)
def test_layouts(layout):
    inputs = make(20, 32)
    if layout != "all_expanded":
        inputs["x"] = laid_out(inputs["x"], layout)
        for name in ("weight", "p", "q"):
            inputs[name] = [laid_out(t, layout) for t in inputs[name]]
    check(inputs, layout=layout)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_is_asked(needs):
    inputs = make(20)
    dy = upstream(inputs)
    out, every = run(inputs, dy, needs), run(inputs, dy)
    kept = ["h", "y0", "y1", "y2"] + (["dx"] if needs[0] else ["dp", "dlam", "dq0", "dq1", "dq2"])
    # Without the factors dx is summed layer by layer.
    assert_same({n: out[n] for n in kept}, {n: every[n] for n in kept}, 1e-6)
    assert all(out[n].numel() == 0 for n in set(out) - set(kept))


@pytest.mark.parametrize("ranks", [(64, 64, 64), (3, 0, 3)])
def test_what_has_no_tile_is_computed_by_the_default(ranks):
    assert check(make(5, 16, (8, 8, 8), ranks)) == []


def test_no_rows():
    assert check(make(0)) == []


def test_equal_inputs_give_equal_bits():
    inputs = make(130)
    dy = upstream(inputs)
    assert_same(run(inputs, dy), run(inputs, dy), 0.0)


def test_factors_are_not_copied():
    inputs = make(20)
    dy = upstream(inputs)
    with launches(kernels), Guarded() as guard:
        run(inputs, dy)
    assert set(guard.calls) == {"addmm_"}


def test_the_operator_runs_them():
    inputs = make(20)
    leaves = inputs | {"x": inputs["x"].requires_grad_()}
    leaves["q"] = [q.requires_grad_() for q in inputs["q"]]
    with dispatched("svd_linear_group"), launches(kernels) as log:
        outputs = operator(**leaves, scaling=SCALING)
        torch.cat(outputs, -1).sum().backward()
    assert log == EXPANDED + BACKWARD
    ones = [torch.ones_like(y) for y in outputs]
    ref = expected(inputs, ones)
    assert_same({"dx": inputs["x"].grad}, {"dx": ref["dx"]}, allowed(torch.float32, None, ref))
