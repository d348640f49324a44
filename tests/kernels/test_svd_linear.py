"""The SVD linear layer's kernels: values, gradients, which of them run; and the operator."""

import pytest
import torch
from ops.tangent_contract import TANGENT
from ops.util import assert_same, laid_out, relative_error, values

from hal_kernels.ops import svd_linear as operator
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
    allowed,
    backward_kernels,
    check,
    dispatched,
    expected,
    gpu_like,
    keep_of,
    make,
    recorded,
    run,
    seed,
    upstream,
)

# Paths forward and backward: each of them, in as few pairs.
PATHS = [("prepare", "add"), ("add", "prepare"), ("fused", "prepare")]
TWO_PATHS = [("prepare", "add"), ("fused", "prepare")]


@pytest.mark.parametrize("widths", [(48, 32), (37, 29)], ids=["even", "odd"])
@pytest.mark.parametrize("rank, rows", ROWS_OF_RANK.items())
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_rows_and_dtypes(dtype, rank, rows, widths):
    """Dropout by one path or the other."""
    inputs = make(rows, *widths, rank, dtype)
    for (forward, backward), dropout in zip(TWO_PATHS, (0.3 * (rank % 2), 0.3), strict=True):
        log = check("svd_linear", inputs, dropout=dropout, forward=forward, backward=backward)
        first = ["fused"] if forward == "fused" else SHRINK_EXPAND
        assert log == first + backward_kernels(rank, rows)


@pytest.mark.parametrize("forward, backward", PATHS)
@pytest.mark.parametrize(
    "T, dropout, dtype",
    [
        (1, 0.0, torch.float32),
        (17, 0.3, torch.float32),
        (128, 0.3, torch.bfloat16),
        (300, 0.0, torch.float32),
        (300, 0.3, torch.bfloat16),
        (300, 0.3, torch.float16),
    ],
)
def test_rows(monkeypatch, T, dropout, dtype, forward, backward):
    gpu_like(monkeypatch, svd=LARGE)
    inputs = make(T, 64, 48, dtype=dtype)
    log = check("svd_linear", inputs, dropout=dropout, forward=forward, backward=backward)
    first = ["fused"] if forward == "fused" else SHRINK_EXPAND
    assert log == first + ONE_BLOCK + (["reduce"] if T > 64 else [])


@pytest.mark.parametrize("rank", [3, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype, rank):
    """Nothing is launched, and gradients of nothing are zero."""
    inputs = make(0, rank=rank, dtype=dtype)
    dy = upstream(inputs)
    with recorded() as log:
        out = run("svd_linear", inputs, dy)
    assert log == []
    assert_same(out, expected("svd_linear", inputs, dy), 0.0)


@pytest.mark.parametrize(
    "dtype, dropout, rank",
    [
        (torch.float32, 0.3, 3),
        (torch.float32, 0.0, 40),
        (torch.bfloat16, 0.0, 3),
        (torch.bfloat16, 0.3, 40),
    ],
)
def test_rows_and_columns_shared_out(monkeypatch, dtype, dropout, rank):
    """Partial h, u, dP and dQ, several blocks of rows to a program, a last one that is not full."""
    gpu_like(monkeypatch, svd=LARGE, multiprocessors=12, row_splits=2, block_splits=(2, 2))
    inputs = make(300, 256, 144, rank, dtype)
    log = check("svd_linear", inputs, dropout=dropout, forward="prepare")
    apart = "_apart" if rank > 32 else ""
    assert log == [*SHRINK_EXPAND, "gradients_dy" + apart, "gradients_x", "reduce"]


@pytest.mark.parametrize("rank", [3, 40])
def test_h_and_u_may_be_columns_of_wider_matrices(monkeypatch, rank):
    """What a group of layers does; the other columns stay as they are, and so do equal bits."""
    gpu_like(monkeypatch, svd=LARGE, multiprocessors=12, row_splits=2, block_splits=(2, 2))
    inputs = make(150, 256, 144, rank)
    x, p, lam, q = (inputs[n] for n in ("x", *FACTORS))
    dy, parts = upstream(inputs), kernels.shrink(x, p)
    assert len(parts) > 1

    def launch(parts, total, u):
        y, dx = torch.empty_like(inputs["y"]), torch.empty_like(x)
        kernels.expand_(y, parts, lam, q, SCALING, h_sum=total)
        dq = kernels.gradients_dy(dy, total, u, lam, q, SCALING)
        sums = kernels.gradients_x(x, total, u, p, lam, SCALING, dx=dx)
        return dict(enumerate([y, total, u, dx, *kernels.reduce([*sums, dq], [p, lam, q])]))

    def wide(*leading):
        """Columns of a matrix that is NaN everywhere else."""
        return torch.full((*leading, rank + 9), float("nan"), device=DEVICE)[..., 5:-4]

    # As many parts of u as the widest layer of a group wants: those beyond dy's columns are zero.
    shapes = [tuple(parts.shape[:2]), (150,), (5, 150)]
    narrow = launch(parts, *(torch.empty(*s, rank, device=DEVICE) for s in shapes[1:]))
    assert (narrow[2][3:] == 0).all() and (narrow[2][2] != 0).any()  # three tiles of 64
    columns = [wide(*s) for s in shapes]
    columns[0].copy_(parts)
    assert_same(launch(*columns), narrow, 0.0)
    for matrix in columns:
        whole = matrix._base
        assert whole.isnan().sum() == whole[..., 0].numel() * 9
    ref = expected("svd_linear", inputs, dy)
    found = {"h": narrow[1], "dp": narrow[4], "dlam": narrow[5], "dq": narrow[6]}
    assert_same(found, {n: ref[n] for n in found}, allowed(torch.float32, None, ref))


def test_equal_inputs_give_equal_bits(monkeypatch):
    """No atomics."""
    gpu_like(monkeypatch, svd=LARGE)
    inputs = make(130, 64, 48)
    dy = upstream(inputs)
    one, two = (run("svd_linear", inputs, dy, 0.3, 2) for _ in range(2))
    assert_same(two, one, 0.0)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "rows_sliced", "expanded"])
@pytest.mark.parametrize("what", ["x", "dy", "weight", "bias", "factors"])
def test_layouts(what, layout):
    inputs = make(20, 32, 48, 5)
    for name in {"factors": FACTORS, "dy": ()}.get(what, (what,)):
        if inputs[name].dim() > 1:
            inputs[name] = laid_out(inputs[name], layout)
        else:
            inputs[name] = torch.stack([inputs[name]] * 2, 1)[:, 0]
    for forward, backward in TWO_PATHS:
        dy_layout = layout if what == "dy" else "contiguous"
        check("svd_linear", inputs, dy_layout, forward=forward, backward=backward)


def test_gradient_of_a_sum():
    """Its strides are all 0."""
    check("svd_linear", make(20), "all_expanded")


@pytest.mark.parametrize("leading", [(2, 3, 4), (1, 5), (4,), ()])
def test_leading_dimensions(leading):
    inputs = make(24)
    inputs["x"] = values(*leading, 48).to(DEVICE)
    inputs["y"] = values(*leading, 32).to(DEVICE)
    dy = values(*leading, 32).to(DEVICE)
    out = run("svd_linear", inputs, dy)
    assert out["out"].shape == (*leading, 32) and out["dx"].shape == (*leading, 48)
    flat = {**inputs, "x": inputs["x"].reshape(-1, 48)}
    ref = run("svd_linear", flat, dy.reshape(-1, 32))
    out, ref = ({n: t.flatten() for n, t in results.items()} for results in (out, ref))
    assert_same(out, ref, 0.0)


@pytest.mark.parametrize("d_in, d_out", [(1, 1), (1, 40), (40, 1), (3, 130)])
def test_narrow_widths(d_in, d_out):
    for forward, backward in TWO_PATHS:
        check("svd_linear", make(9, d_in, d_out, 1), forward=forward, backward=backward)


@pytest.mark.parametrize(
    "dtype, factors",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
)
def test_factors_of_another_dtype(dtype, factors):
    inputs = make(80, 48, 32, 5, dtype, factors)
    coarse = max((dtype, factors), key=lambda d: torch.finfo(d).eps)
    for forward, backward in TWO_PATHS:
        check("svd_linear", inputs, coarse=coarse, forward=forward, backward=backward)


@pytest.mark.parametrize("forward", ["prepare", "add", "fused"])
def test_without_bias(forward):
    check("svd_linear", {**make(), "bias": None}, forward=forward)


@pytest.mark.parametrize("kind", ["ones", "zeros"])
def test_masks(kind):
    inputs = make(20, rank=5)
    inputs["lam"] = inputs["lam"] + 2 if kind == "ones" else inputs["lam"] * 0
    check("svd_linear", inputs)


@pytest.mark.parametrize("path", ["prepare", "add"])
@pytest.mark.parametrize(
    "rank, rows, dtype",
    [
        (3, 17, torch.float32), (5, 150, torch.float32), (40, 150, torch.float32),
        (128, 17, torch.float32), (5, 150, torch.bfloat16), (3, 17, torch.float16),
    ],
)  # fmt: skip
def test_tangent_gradients(rank, rows, dtype, path):
    """K and L where some Λ are zero, with dropout or without, in as many launches."""
    inputs = make(rows, 48, 72, rank, dtype, torch.float32)
    dropout = 0.3 * (path == "add")
    log = check("svd_linear", inputs, dropout=dropout, tangent=TANGENT, backward=path)
    assert log[-len(backward_kernels(rank, rows)) :] == backward_kernels(rank, rows)


@pytest.mark.parametrize("rank", [3, 40])
def test_tangent_gradients_shared_out_and_of_a_sum(monkeypatch, rank):
    """Partial sums; upstream gradients of stride 0; Λ is zero everywhere."""
    gpu_like(monkeypatch, svd=LARGE, multiprocessors=12, row_splits=2, block_splits=(2, 2))
    inputs = make(300, 256, 144, rank)
    inputs["lam"] = inputs["lam"] * 0
    check("svd_linear", inputs, "all_expanded", tangent=TANGENT)


def test_gradient_of_a_pruned_direction():
    """dΛ_eff is unmasked: not zero where Λ⊙mask is."""
    inputs = make(rank=4)
    dlam = run("svd_linear", inputs, upstream(inputs))["dlam"]
    assert inputs["lam"][1] == 0 and dlam[1] != 0


@pytest.mark.parametrize("path", ["prepare", "add"])
@pytest.mark.parametrize(
    "needs, kernels",
    [
        ((True, True), ["gradients_dy", "gradients_x", "reduce"]),
        ((True, False), SHRINK_EXPAND),
        ((False, True), ["gradients_dy", "gradients_x", "reduce"]),
        ((False, False), []),
    ],
)
def test_only_what_is_asked_is_computed(needs, kernels, path):
    """At most three launches beyond the GEMM of dx."""
    inputs = make(70)
    dy, both = upstream(inputs), ("dx",) * needs[0] + ("dp", "dlam", "dq") * needs[1]
    with recorded() as log:
        out = run("svd_linear", inputs, dy, 0.3, 4, needs, forward="add", backward=path)
    assert log == SHRINK_EXPAND + kernels
    ref = expected("svd_linear", inputs, dy, 0.3, 4)
    bound = 1e-6 if DEVICE == "cpu" else 4e-6
    assert_same({n: out[n] for n in both}, {n: ref[n] for n in both}, bound)
    assert all(out[n].numel() == 0 for n in ("dx", "dp", "dlam", "dq") if n not in both)


@pytest.mark.parametrize("path, gemm", [("prepare", "addmm_"), ("add", "mm")])
def test_launch_budget(path, gemm):
    """Two launches forward and three backward beside the GEMMs of y and dx, and nothing else."""
    inputs = make(70, dtype=torch.bfloat16, factors=torch.float32)
    dy = upstream(inputs)
    with launches(kernels) as log, Guarded() as guarded:
        run("svd_linear", inputs, dy, 0.3, 4, forward=path, backward=path)
    assert log == [*SHRINK_EXPAND, *ONE_BLOCK, "reduce"]
    assert guarded.calls == [gemm, gemm]


@pytest.mark.parametrize(
    "options", [{"dtype": torch.float64}, {"rank": 0}, {"rank": 129, "d_in": 130, "d_out": 130}]
)
def test_what_the_default_implementation_computes(options):
    inputs = make(**options)
    dy = upstream(inputs)
    with recorded() as log:
        out = run("svd_linear", inputs, dy)
    assert log == []
    assert_same(out, expected("svd_linear", inputs, dy), 1e-5)


def test_dropout_mask_is_the_same_in_every_kernel():
    """Forward by each path, dx, dP and `fill_keep_`; with tiles for even and for odd widths."""
    for width in (16, 19):
        inputs = make(70, width, width, width)
        eye = torch.eye(width, device=DEVICE)
        inputs.update(p=eye, q=eye, lam=torch.ones(width, device=DEVICE))
        inputs["weight"] = inputs["weight"] * 0
        inputs["bias"] = None
        inputs["x"] = torch.ones_like(inputs["x"])
        dy = torch.ones_like(inputs["y"])
        keep = keep_of(inputs["x"], 0.3, 6)
        for forward in ("prepare", "add", "fused"):
            out = run("svd_linear", inputs, dy, 0.3, 6, forward=forward)
            assert relative_error(out["out"], SCALING * keep) <= 1e-6
            assert relative_error(out["dx"], SCALING * keep) <= 1e-6
            assert relative_error(out["dp"], SCALING * keep.sum(0).expand(width, width)) <= 1e-5


def test_dropout_mask_is_random():
    keep = keep_of(torch.empty(1500, 64), 0.25, 5)
    assert keep.unique().float().tolist() == [0.0, torch.tensor(1 / 0.75).item()]
    kept = (keep != 0).double()
    # Five standard deviations of a mean of n Bernoulli(3/4) numbers.
    for dim, n in ((0, 1500), (1, 64), ((0, 1), 96000)):
        assert (kept.mean(dim) - 0.75).abs().max() < 5 * (0.75 * 0.25 / n) ** 0.5
    other = keep_of(torch.empty(1500, 64), 0.25, 6)
    neighbours = [(keep[:, 1:], keep[:, :-1]), (keep[1:], keep[:-1]), (keep[:, 8:], keep[:, :-8])]
    for one, two in ((keep, other), *neighbours):
        agree = (one == two).double()
        assert (agree.mean() - 0.625).abs() < 5 * (0.625 * 0.375 / agree.numel()) ** 0.5


@pytest.mark.parametrize("prepare", [True, False])
def test_the_cheaper_path_is_chosen(monkeypatch, prepare):
    """Fused where `fused_tile` says so and the weight is dense, else what the config says."""
    inputs = make(20)
    gpu_like(monkeypatch, prepare=prepare, launch_us=1e9)
    assert check("svd_linear", inputs)[0] == "fused"
    sliced = laid_out(inputs["weight"], "sliced")
    assert check("svd_linear", {**inputs, "weight": sliced})[:2] == SHRINK_EXPAND
    gpu_like(monkeypatch, prepare=prepare, launch_us=0.0, gemm_slowdown=1e9)
    assert check("svd_linear", inputs)[:2] == SHRINK_EXPAND


@pytest.fixture
def through_the_operator():
    with dispatched("svd_linear"):
        yield


def test_autograd(through_the_operator):
    inputs = make(2, rank=5)
    inputs["x"] = values(2, 7, 48).to(DEVICE)
    mask = torch.tensor([1.0, 0, 1, 1, 0], device=DEVICE)
    names = ("x", "weight", "bias", *FACTORS)
    leaves = [inputs[n].requires_grad_() for n in names]
    with recorded() as log:
        y = operator(*leaves, mask=mask, scaling=SCALING)
        dy = torch.randn_like(y)
        gradients = torch.autograd.grad(y, leaves, dy)
    assert log == (["fused"] if log[0] == "fused" else SHRINK_EXPAND) + ONE_BLOCK
    double = [t.detach().double().requires_grad_() for t in leaves]
    x, weight, bias, p, lam, q = double
    ref = x @ weight.t() + bias + SCALING * ((x @ p.t()) * lam * mask) @ q
    wanted = torch.autograd.grad(ref, double, dy.double())
    bound = 1e-6 if DEVICE == "cpu" else 4e-6
    assert_same(dict(enumerate(gradients)), dict(enumerate(wanted)), bound)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_opcheck(through_the_operator, dropout):
    inputs = make(6, d_in=16, d_out=32, dtype=torch.bfloat16, factors=torch.float32)
    tensors = [inputs[n] for n in ("x", "weight", "bias", *FACTORS)]
    more = (SCALING, dropout, seed(2) if dropout else None)
    h = torch.randn(6, 3, device=DEVICE)
    torch.library.opcheck(
        torch.ops.hal.svd_linear_backward.default,
        (upstream(inputs), tensors[0], h, tensors[1], *tensors[3:], *more, 0.0, True, True),
    )
    torch.library.opcheck(torch.ops.hal.svd_linear.default, (*tensors, *more))


def test_compile(through_the_operator):
    inputs = make(6)
    leaves = [inputs[n].requires_grad_() for n in ("x", "weight", "bias", *FACTORS)]
    torch._dynamo.reset()
    compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
    with launches(kernels) as log:
        y = compiled(*leaves, scaling=SCALING)
        torch.autograd.grad(y.square().sum(), leaves)
    assert log[-2:] == ONE_BLOCK
    assert relative_error(y, operator(*leaves, scaling=SCALING)) <= 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "T, d_in, d_out, rank", [(4096, 1024, 1536, 16), (1000, 768, 768, 3), (777, 520, 1000, 64)]
)
def test_large(T, d_in, d_out, rank, dtype):
    inputs = make(T, d_in, d_out, rank, dtype, torch.float32)
    for forward, backward in PATHS:
        check("svd_linear", inputs, dropout=0.1, forward=forward, backward=backward)


@pytest.mark.gpu
def test_in_a_cuda_graph():
    inputs = make(256, 128, 192, 8, torch.bfloat16, torch.float32)
    dy, name = upstream(inputs), seed(3)
    run("svd_linear", inputs, dy, 0.1, name)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run("svd_linear", inputs, dy, 0.1, name)
    inputs["x"].normal_()
    graph.replay()
    assert_same(captured, run("svd_linear", inputs, dy, 0.1, name), 0.0)
