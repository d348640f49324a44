"""The native CPU operators (csrc/) beside the default ones: values, threads, instruction sets.

tests/ops holds every backend to the formulas; here is what is particular to this one. Without the
library these tests are skipped, and `hal_kernels.backends()` says why it is not there.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops.util import EXACT, assert_same, relative_error, values

import hal_kernels

OPERATORS = (
    "svd_linear", "svd_linear_backward", "svd_linear_group", "svd_linear_group_backward",
    "orthogonality_penalty", "orthogonality_penalty_backward",
)  # fmt: skip
STATE = hal_kernels.backends()["svd_linear"]["cpu"]
pytestmark = pytest.mark.skipif(STATE.name != "native", reason=STATE.reason)
HAL = torch.ops.hal
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def default(operator, *arguments):
    """The same operator in plain PyTorch."""
    return operator.default._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *arguments)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def adapter(rows, d_in, d_out, rank, dtype=torch.float32, factors=None):
    """(y, x, p, lam, q) of order 1."""
    factors = factors or dtype
    return (
        values(rows, d_out, dtype=dtype),
        values(rows, d_in, dtype=dtype),
        (values(rank, d_in) / d_in**0.5).to(factors),
        values(rank, dtype=factors),
        (values(rank, d_out) / d_out**0.5).to(factors),
    )


def added(y, x, *rest, run=lambda op, *a: op(*a)):
    """(out, h): the adapter added to y."""
    return run(HAL.svd_linear, x, None, y, *rest)


def added_backward(dout, x, h, *rest, run=lambda op, *a: op(*a)):
    return run(HAL.svd_linear_backward, dout, x, h, None, *rest)


def named(results):
    """Tensors by their place, those of lists too."""
    flat = [t for r in results for t in (r if isinstance(r, list | tuple) else (r,))]
    return {str(i): t for i, t in enumerate(flat)}


def group(rows, d_in, d_out, ranks, dtype=torch.float32, factors=None):
    """x and the lists that `svd_linear_group` takes."""
    parts = [adapter(rows, d_in, d, r, dtype, factors) for d, r in zip(d_out, ranks, strict=True)]
    weight = [(values(d, d_in) / d_in**0.5).to(dtype) for d in d_out]
    bias = [values(d, dtype=dtype) for d in d_out]
    bias[-1] = None
    return (parts[0][1], weight, bias, *([part[i] for part in parts] for i in (2, 3, 4)))


def group_results(x, weight, bias, p, lam, q, dy, tangent=0.0, run=lambda op, *a: op(*a)):
    """Outputs and gradients of a group, by `run(operator, *arguments)`."""
    y, h = run(HAL.svd_linear_group, x, weight, bias, p, lam, q, 0.5, 0.0, None)
    arguments = (dy, x, h, weight, p, lam, q, 0.5, 0.0, None, tangent, True, True)
    return named((*y, h, *run(HAL.svd_linear_group_backward, *arguments)))


# ---- what serves ---------------------------------------------------------------------------


def test_backends_says_native_where_a_kernel_is_registered():
    found = hal_kernels.backends()
    assert {n for n, where in found.items() if where["cpu"].name == "native"} == set(OPERATORS)
    assert re.fullmatch(r"\w+\.so, (AVX-512|AVX2|SSE2|NEON|portable)", STATE.reason)
    assert found["spectral_step_"]["cpu"] == ("default", "not written natively")


def test_the_native_kernel_runs():
    """The default would be seen to call torch."""
    y, x, *factors = adapter(4, 8, 6, 2)
    with torch.profiler.profile() as profile:
        added(y, x, *factors, 1.0, 0.0, None)
    called = {event.key for event in profile.key_averages()}
    assert "hal::svd_linear" in called
    assert not {"aten::mm", "aten::addmm_", "aten::matmul"} & called


# ---- values --------------------------------------------------------------------------------

# Rows: around the borders of blocks of 8. Widths: around those of vectors. Ranks above 24 are
# multiplied by torch.
SHAPES = [
    (1, 1, 1), (3, 7, 5), (16, 8, 16), (17, 31, 33), (33, 64, 32), (40, 67, 130), (5, 768, 300),
]  # fmt: skip


@pytest.mark.parametrize("rank", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 24, 25, 70])
@pytest.mark.parametrize("rows, d_in, d_out", [(0, 5, 7), *SHAPES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adapter_of_any_shape(dtype, rows, d_in, d_out, rank):
    y, x, *factors = adapter(rows, d_in, d_out, rank, dtype)
    exact = [t.double() for t in (y, x, *factors)]
    out, h = added(y, x, *factors, 0.5, 0.0, None)
    ref, h_ref = added(*exact, 0.5, 0.0, None, run=default)
    assert_same({"out": out, "h": h}, {"out": ref, "h": h_ref}, EXACT[dtype])
    rest = (0.5, 0.0, None, 0.0, True, True)
    gradients = added_backward(y, x, h, *factors, *rest)
    expected = added_backward(*exact[:2], h_ref, *exact[2:], *rest, run=default)
    # dΛ is a product of two such sums.
    assert_same(named(gradients), named(expected), 2 * EXACT[dtype])


@pytest.mark.parametrize("rank", [5, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_agrees_with_the_default(dtype, rank):
    _, x, p, lam, q = adapter(50, 72, 40, rank, dtype, torch.float32)
    weight, bias = values(40, 72).to(dtype) / 8, values(40, dtype=dtype)
    arguments = (x, weight, bias, p, lam, q, 0.5, 0.0, None)
    out, ref = HAL.svd_linear(*arguments), default(HAL.svd_linear, *arguments)
    bound = EXACT[torch.float32] if dtype.itemsize > 2 else 2 * torch.finfo(dtype).eps
    assert_same(named(out), named(ref), bound)
    dy = values(50, 40, dtype=dtype)
    arguments = (dy, x, out[1], weight, p, lam, q, 0.5, 0.0, None, 0.0, True, True)
    gradients = HAL.svd_linear_backward(*arguments)
    assert_same(named(gradients), named(default(HAL.svd_linear_backward, *arguments)), bound)


@pytest.mark.parametrize("used", [(0, 1, 2), (1,), (0, 2), ()])
@pytest.mark.parametrize("ranks", [(3, 5, 1), (0, 40, 2), (30, 64, 25)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_group_agrees_with_the_default(dtype, ranks, used):
    """Fused and wide layers side by side, some of them without an upstream gradient."""
    inputs = group(19, 72, (40, 17, 64), ranks, dtype, torch.float32)
    dy = [values(19, d, dtype=dtype) if i in used else None for i, d in enumerate((40, 17, 64))]
    bound = EXACT[torch.float32] if dtype.itemsize > 2 else 4 * torch.finfo(dtype).eps
    for tangent in (0.0, 0.25):
        ref = group_results(*inputs, dy, tangent, run=default)
        assert_same(group_results(*inputs, dy, tangent), ref, bound)


@pytest.mark.parametrize("rank", [0, 1, 5, 24, 25, 70])
@pytest.mark.parametrize("rows, d_in, d_out", [(0, 5, 7), (17, 31, 33), (5, 768, 300)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tangent_gradients_agree_with_the_default(dtype, rows, d_in, d_out, rank):
    """Λ = 0 does not show in them; nor does a small c where rows have 16 bits."""
    y, x, p, lam, q = adapter(rows, d_in, d_out, rank, dtype, torch.float32)
    exact = [t.double() for t in (y, x, p, lam * 0, q)]
    _, h = added(y, x, p, lam * 0, q, 0.5, 0.0, None)
    rest = (0.5, 0.0, None, 2.0**-30, True, True)
    _, dp, dlam, dq = added_backward(y, x, h, p, lam * 0, q, *rest)
    _, *ref = added_backward(*exact[:2], h.double(), *exact[2:], *rest, run=default)
    assert dlam.numel() == 0
    bound = EXACT[torch.float32] if dtype.itemsize > 2 else 2 * torch.finfo(dtype).eps
    assert_same(named([dp, dq]), named([ref[0], ref[2]]), bound)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "y", "p", "lam", "q", "masked"])
@pytest.mark.parametrize("rank", [3, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_spreads_as_by_default(dtype, rank, where, bad):
    """0·NaN and 0·Inf are NaN: a pruned direction does not hide what is wrong with its factors."""
    inputs = dict(zip(("y", "x", "p", "lam", "q"), adapter(11, 20, 21, rank, dtype), strict=True))
    if where == "masked":
        inputs["lam"][1] = 0.0
        inputs["p"][1, 2] = bad
    else:
        inputs[where].view(-1)[1] = bad
    y, x, *factors = inputs.values()
    runs = []
    for run in (lambda op, *a: op(*a), default):
        out, h = added(y, x, *factors, 0.5, 0.0, None, run=run)
        arguments = (y, x, h, *factors, 0.5, 0.0, None, 0.0, True, True)
        runs.append((out, h, *added_backward(*arguments, run=run)))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.isinf(), other.isinf())


def test_dropout_does_not_hide_what_is_not_finite():
    eye, one = torch.eye(40), torch.ones(40)
    x = torch.full((3, 40), float("inf"))
    out, _ = added(x * 0 + 0.0, x, eye, one, eye, 1.0, 0.5, torch.tensor(1))
    assert out.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_survives(dtype):
    """Widened and narrowed again (rank 0 adds nothing), NaN as NaN."""
    y = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(256, 256)
    empty = torch.empty(0, 256)
    out, _ = added(y, y, empty, torch.empty(0), empty, 1.0, 0.0, None)
    assert torch.equal(out.isnan(), y.isnan())
    kept = ~y.isnan()
    assert torch.equal(out.view(torch.int16)[kept], y.view(torch.int16)[kept])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits_is_torch_s(dtype):
    """float32 numbers of any bits, those half-way between two 16-bit ones among them."""
    bits = torch.randint(-(2**31), 2**31, (4096, 32), dtype=torch.int64).to(torch.int32)
    bits[:, 8:16] &= -(2**12)
    bits[:, 16:24] &= -(2**15)
    magnitudes = torch.exp2(torch.empty(4096, 8).uniform_(-27, 17))
    numbers = torch.cat([bits.view(torch.float32)[:, :24], magnitudes], 1).view(1, -1)
    one = torch.ones(1, 1, dtype=dtype)
    # out = 0 + 1·1·q, rounded once
    arguments = (torch.zeros(1, 1), one, torch.ones(1, 1), torch.ones(1), numbers)
    base = arguments[0].to(dtype).expand(1, numbers.shape[1])
    out, _ = added(base, *arguments[1:], 1.0, 0.0, None)
    expected = numbers.to(dtype)
    nan = expected.isnan()
    assert torch.equal(out.isnan(), nan)
    # 0 + (−0) is +0: signs of zeros are not compared.
    assert torch.equal(out[~nan], expected[~nan])


def test_dropout_mask_is_the_same_in_every_layout_and_block():
    """x = 1 and P = Q = identity show the mask; single rows of it are those of the whole."""
    eye, one = torch.eye(150), torch.ones(150)
    x, seed = torch.ones(70, 150), torch.tensor(9)
    whole, _ = added(x * 0, x, eye, one, eye, 1.0, 0.4, seed)
    part, _ = added(x[:21] * 0, x[:21], eye, one, eye, 1.0, 0.4, seed)
    strided = x.t().contiguous().t()
    other, _ = added(x * 0, strided, eye, one, eye, 1.0, 0.4, seed)
    assert torch.equal(part, whole[:21])
    assert torch.equal(other, whole)
    assert set(whole.unique().tolist()) == {0.0, torch.tensor(1 / 0.6).item()}


@pytest.mark.parametrize("squared", [True, False])
def test_penalty_of_rows_outside_of_every_matrix(squared):
    """Offsets need not cover all rows; those that they leave out have no gradient."""
    factor = values(7, 20) / 4
    offsets = torch.tensor([1, 4, 4, 6])
    value, residuals = HAL.orthogonality_penalty([factor], [offsets], [3], squared, 0.5)
    matrices = [factor[1:4].double(), factor[4:6].double()]
    kind = "squared" if squared else "frobenius"
    exact = hal_kernels.ops.orthogonality_penalty_reference(matrices, kind, 0.5)
    assert relative_error(value, exact) <= EXACT[torch.float32]
    (gradient,) = HAL.orthogonality_penalty_backward(
        torch.tensor(1.0), [factor], residuals, [offsets], [3], squared, 0.5
    )
    assert gradient[[0, 6]].eq(0).all() and gradient[1:6].ne(0).all()


# ---- threads -------------------------------------------------------------------------------


def adapter_run():
    # Enough work that it is split over four threads.
    arguments = adapter(515, 260, 190, 5)
    out, h = added(*arguments, 0.5, 0.0, None)
    y, *rest = arguments
    arguments = (y, rest[0], h, *rest[1:], 0.5, 0.0, None, 0.0, True, True)
    return (out, h, *added_backward(*arguments))


def wide_run():
    inputs = group(515, 260, (190, 64, 70), (40, 5, 25))
    return tuple(group_results(*inputs, [values(515, d) for d in (190, 64, 70)]).values())


def penalty_run():
    factors, offsets = [values(96, 300) / 17], [torch.arange(0, 97, 6)]
    value, residuals = HAL.orthogonality_penalty(factors, offsets, [6], True, 1.0)
    rest = (residuals, offsets, [6], True, 1.0)
    return (
        value, *residuals, *HAL.orthogonality_penalty_backward(torch.ones(()), factors, *rest)
    )  # fmt: skip


@pytest.mark.parametrize("run", [adapter_run, wide_run, penalty_run])
def test_results_do_not_depend_on_threads(run, threads):
    """Equal bits at an equal number of threads; within rounding at another one."""
    results = {}
    for count in (1, 2, 3, 4):
        threads(count)
        for _ in range(2):
            torch.manual_seed(3)
            results.setdefault(count, []).append(run())
    for first, again in results.values():
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert_same(named(first), named(results[1][0]), EXACT[torch.float32])


def test_rows_do_not_depend_on_threads_at_all(threads):
    """Only sums over rows are split: y, h and dx have the same bits on any number of threads."""
    runs = []
    for count in (1, 4):
        threads(count)
        torch.manual_seed(3)
        runs.append(adapter_run()[:3])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---- instruction sets ----------------------------------------------------------------------

ISA = STATE.reason.split(", ")[-1]
NARROWER = {"AVX-512": {"avx2": "AVX2", "baseline": "SSE2"}, "AVX2": {"baseline": "SSE2"}}.get(ISA)

SWEEP = """
import torch, hal_kernels
import test_native as t
torch.set_num_threads(1)
torch.manual_seed(0)
print(t.ISA)
for dtype in (torch.float32, torch.float64):
    for shape in t.SHAPES:
        for rank in (1, 5, 8):
            t.test_adapter_of_any_shape(dtype, *shape, rank)
for dtype in t.DTYPES:
    t.test_linear_agrees_with_the_default(dtype, 5)
    t.test_group_agrees_with_the_default(dtype, (3, 5, 1), (0, 2))
for dtype in (torch.bfloat16, torch.float16):
    t.test_every_16_bit_number_survives(dtype)
    t.test_rounding_to_16_bits_is_torch_s(dtype)
t.test_dropout_mask_is_the_same_in_every_layout_and_block()
print(t.mask_digest())
"""


def mask_digest():
    """A number that stands for one dropout mask of 100 × 100."""
    eye = torch.eye(100)
    arguments = (torch.ones(100, 100), eye, torch.ones(100), eye, 1.0, 0.5, torch.tensor(5))
    mask, _ = added(torch.zeros(100, 100), *arguments)
    return int((mask.bool().flatten() * torch.arange(10_000) ** 2).sum())


@pytest.mark.skipif(not NARROWER, reason=f"there is one choice only: {ISA}")
def test_narrower_instruction_sets():
    """The code for older CPUs, on this one; every choice draws the same dropout mask."""
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent)])
    for choice, name in NARROWER.items():
        environment = {**os.environ, "HAL_KERNELS_ISA": choice, "PYTHONPATH": paths}
        command = [sys.executable, "-c", SWEEP]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert run.stdout.split() == [name, str(mask_digest())]


# ---- arguments that the public functions would not let through --------------------------------

(Y, X, P, LAM, Q), WEIGHT, PLAIN = adapter(3, 4, 5, 2), torch.ones(5, 4), (1.0, 0.0, None)
TWO, BACK = [[WEIGHT] * 2, [Y[0]] * 2, [P] * 2, [LAM] * 2, [Q] * 2], (*PLAIN, 0.0, True, True)


@pytest.mark.parametrize(
    "call",
    [
        (HAL.svd_linear, X, None, Y, P[:, 1:], LAM, Q, *PLAIN),
        (HAL.svd_linear, X, None, Y, P, LAM[1:], Q, *PLAIN),
        (HAL.svd_linear, X, None, Y, P, LAM, Q[1:], *PLAIN),
        (HAL.svd_linear, X[1:], None, Y, P, LAM, Q, *PLAIN),
        (HAL.svd_linear, X.long(), None, Y.long(), P, LAM, Q, *PLAIN),
        (HAL.svd_linear, X.double(), None, Y, P, LAM, Q, *PLAIN),
        (HAL.svd_linear, X, None, Y, P, LAM, Q, 1.0, 0.5, torch.ones(1)),
        (HAL.svd_linear, Y[0, 0], None, Y, P, LAM, Q, *PLAIN),
        (HAL.svd_linear, X, Q, None, P, LAM, Q, *PLAIN),
        (HAL.svd_linear, X, WEIGHT, torch.ones(4), P, LAM, Q, *PLAIN),
        (HAL.svd_linear, X, None, None, P, LAM, Q, *PLAIN),
        (HAL.svd_linear, X, None, Y[0], P, LAM, Q, *PLAIN),
        (HAL.svd_linear_backward, Y, X, torch.ones(2, 2), WEIGHT, P, LAM, Q, *BACK),
        (HAL.svd_linear_backward, Y[1:], X, torch.ones(3, 2), WEIGHT, P, LAM, Q, *BACK),
        (HAL.svd_linear_group, X, [], [], [], [], [], *PLAIN),
        (HAL.svd_linear_group, X, *TWO[:4], [Q], *PLAIN),
        (HAL.svd_linear_group, X, *TWO[:2], [P, P.double()], *TWO[3:], *PLAIN),
        (
            HAL.svd_linear_group_backward, [Y, None], X, torch.ones(3, 2), TWO[0], *TWO[2:], *BACK
        ),
        (HAL.orthogonality_penalty, [torch.ones(4, 3)], [torch.tensor([0, 5])], [5], True, 1.0),
        (HAL.orthogonality_penalty, [torch.ones(4, 3)], [torch.tensor([0, 3, 2])], [3], True, 1.0),
        (HAL.orthogonality_penalty, [torch.ones(4, 3)], [torch.tensor([0, 4])], [3], True, 1.0),
        (HAL.orthogonality_penalty, [torch.ones(4, 3)], [torch.tensor([0.0, 4])], [4], True, 1.0),
        (HAL.orthogonality_penalty, [torch.ones(4, 3)], [], [4], True, 1.0),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_errors(call):
    """Never a read or write outside of a tensor."""
    operator, *arguments = call
    with pytest.raises(RuntimeError):
        operator(*arguments)


# ---- the binary ------------------------------------------------------------------------------


def symbols(library):
    """Names that the library takes from elsewhere, with the version they are asked in."""
    tool = shutil.which("nm")
    if tool is None:
        pytest.skip("binutils are not installed")
    command = [tool, "--dynamic", "--undefined-only", library]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in out.splitlines()]


def test_the_binary_needs_stable_interfaces_alone():
    """torch's C shims that exist since the target version, and the C and C++ run time."""
    library = Path(hal_kernels.__file__).with_name("libhal_kernels.so")
    if not library.exists() or sys.platform != "linux":
        pytest.skip("another library is loaded")
    include = Path(torch.__file__).parent / "include/torch/csrc"
    declared = set()
    for header in (
        "inductor/aoti_torch/c/shim.h",
        "inductor/aoti_torch/generated/c_shim_aten.h",
        "inductor/aoti_torch/generated/c_shim_cpu.h",
        "stable/c/shim.h",
    ):
        declared |= set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", since_target(include / header)))
    versioned = re.compile(r".+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+")
    weak = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
    needed = symbols(library)
    assert len(needed) > 20
    others = [n for n in needed if not versioned.fullmatch(n) and n not in weak]
    assert not [name for name in others if name not in declared]
    assert not [name for name in needed if name.startswith(("Py", "_Py"))]


def since_target(header):
    """The header's text without what a later torch than 2.10 added."""
    text, kept, hidden = header.read_text(), [], []
    for line in text.splitlines():
        if line.startswith("#if"):
            found = re.search(r"TORCH_FEATURE_VERSION >= TORCH_VERSION_(\d+)_(\d+)", line)
            hidden.append(bool(found) and tuple(map(int, found.groups())) > (2, 10))
        elif line.startswith("#endif"):
            hidden.pop()
        elif not any(hidden):
            kept.append(line)
    return "\n".join(kept)
