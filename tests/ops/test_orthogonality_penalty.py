"""The orthogonality penalty of all matrices at once against one matrix at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hal_kernels.ops import orthogonality_penalty, orthogonality_penalty_reference

from .util import (
    DEVICE,
    EXACT,
    CountCalls,
    assert_same,
    count_calls,
    laid_out,
    packed_offsets,
    relative_error,
    results,
)

KINDS = ("squared", "frobenius")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Groups of matrices of one width: (ranks, width).
RAGGED = [
    [([3, 3, 3], 10)],
    [([3, 1, 2], 10)],
    [([0, 4, 0, 2, 0], 9)],
    [([0, 0], 5), ([2, 1], 6)],
    [([5], 3), ([2, 2], 8), ([1, 0, 3], 4)],
]


def packed(ranks, width, dtype=torch.float32):
    """Rows of norm about 1, neither orthogonal nor near it."""
    rows = torch.randn(sum(ranks), width, dtype=torch.float64) / max(width, 1) ** 0.5 + 0.1
    return rows.to(DEVICE, dtype)


def matrices_of(factors, groups):
    return [m for f, (ranks, _) in zip(factors, groups, strict=True) for m in f.split(ranks)]


def named(factors):
    return {f"f{i}": f for i, f in enumerate(factors)}


def ragged(groups, **options):
    """The operator on packed rows as a function of named factors."""
    offsets = [packed_offsets(ranks) for ranks, _ in groups]
    max_ranks = [max(ranks) for ranks, _ in groups]

    def function(**factors):
        return orthogonality_penalty(
            list(factors.values()), offsets=offsets, max_ranks=max_ranks, **options
        )

    return function


def formula(groups, **options):
    def function(**factors):
        return orthogonality_penalty_reference(matrices_of(factors.values(), groups), **options)

    return function


def check(factors, groups, kind="squared", weight=0.3, function=None):
    options = {"kind": kind, "weight": weight}
    upstream = torch.tensor(1.7, device=DEVICE)
    out = results(function or ragged(groups, **options), named(factors), upstream)
    ref = results(formula(groups, **options), named(factors), upstream, cast=torch.float64)
    dtype = factors[0].dtype
    bound = EXACT[torch.float64 if dtype == torch.float64 else torch.float32]
    # 16 bits: float32 sums of exact inputs; only the gradient is rounded, each element by eps/2.
    coarse = bound if dtype in EXACT else torch.finfo(dtype).eps / 2
    assert out["out"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same(out, ref, {n: bound if n == "out" else coarse for n in ref})


@pytest.mark.parametrize("kind, expected", [("squared", 9.0 + 2.0), ("frobenius", 3.0 + 2**0.5)])
def test_value_by_hand(kind, expected):
    """F = diag(2, 1) has residual diag(3, 0); F with two equal unit rows has off-diagonal ones."""
    factors = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]], device=DEVICE)
    value = orthogonality_penalty([factors], kind=kind).item()
    assert value == pytest.approx(expected, rel=1e-6)  # one rounding of √2 and of the sum
    reference = orthogonality_penalty_reference(list(factors), kind=kind).item()
    assert reference == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [0, 1, 3, 8, 16, 17, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(dtype, rank, kind):
    groups = [([rank] * 2, 37), ([rank] * 3, 20)]
    factors = [packed(*g, dtype) for g in groups]

    def function(**rows):
        shaped = [f.view(len(g[0]), rank, g[1]) for f, g in zip(rows.values(), groups, strict=True)]
        return orthogonality_penalty(shaped, kind=kind, weight=0.3)

    check(factors, groups, kind, function=function)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", RAGGED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unequal_ranks(dtype, groups, kind):
    check([packed(*g, dtype) for g in groups], groups, kind)


@given(st.data())
def test_random_ranks_and_widths(data):
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    ranks = st.lists(st.integers(0, 5), min_size=1, max_size=5)
    group = st.tuples(ranks, st.integers(1, 7))
    groups = data.draw(st.lists(group, min_size=1, max_size=3))
    kind, weight = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from([1.0, -2.0, 0.01]))
    factors = named([packed(*g, torch.float64) for g in groups])
    options = {"kind": kind, "weight": weight}
    out, ref = (results(f(groups, **options), factors) for f in (ragged, formula))
    # A residual may cancel to nearly nothing: 1e-11 leaves four digits to that.
    assert_same(out, ref, 1e-11)


@pytest.mark.parametrize("shapes", [[(0, 3, 5)], [(4, 0, 5)], [(0, 3, 5), (2, 3, 5)], [(2, 3, 0)]])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_factors(shapes, kind):
    factors = [torch.randn(s, device=DEVICE) for s in shapes]
    out = results(lambda **f: orthogonality_penalty(list(f.values()), kind=kind), named(factors))
    matrices = [m for f in factors for m in f.double()]
    expected = (
        sum(orthogonality_penalty_reference([m], kind=kind) for m in matrices)
        if matrices
        else torch.zeros(())
    )
    assert relative_error(out["out"], expected) <= EXACT[torch.float32]


@pytest.mark.parametrize("layout", ["transposed", "sliced", "rows_sliced", "permuted", "expanded"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_layout(layout, kind):
    """Of matrices of one height, and of packed rows."""
    factor = laid_out(packed([4] * 3, 10).view(3, 4, 10), layout)
    out = results(lambda f: orthogonality_penalty([f], kind=kind), {"f": factor})
    ref = results(
        lambda f: orthogonality_penalty_reference(list(f), kind), {"f": factor}, cast=torch.float64
    )
    assert_same(out, ref, EXACT[torch.float32])
    if layout in ("transposed", "sliced", "rows_sliced"):
        for ranks in ([2, 2], [1, 3]):
            check([laid_out(packed(ranks, 6), layout)], [(ranks, 6)], kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [[3, 3], [3, 1, 0]])
def test_orthonormal_rows_cost_nothing(kind, ranks):
    """Value and gradient are zero, not NaN, also where the norm has no derivative."""
    rows = torch.cat([torch.eye(r, 5) for r in ranks]).to(DEVICE)
    out = results(ragged([(ranks, 5)], kind=kind), {"f": rows})
    assert out["out"] == 0
    assert torch.equal(out["f"], torch.zeros_like(rows))


def test_frobenius_gradient_beside_an_orthonormal_matrix():
    """The zero norm of one matrix leaves the other's gradient alone."""
    factor = torch.stack([torch.eye(2, 4), torch.randn(2, 4)]).to(DEVICE)
    (gradient,) = gradients([factor], "frobenius")
    (alone,) = gradients([factor[1:]], "frobenius")
    assert (gradient[0] == 0).all()
    assert torch.equal(gradient[1:], alone)


def gradients(factors, kind):
    leaves = [f.detach().requires_grad_() for f in factors]
    return torch.autograd.grad(orthogonality_penalty(leaves, kind=kind), leaves)


def test_a_matrix_that_is_not_finite_leaves_other_gradients_alone():
    groups = [([1, 3, 2], 6)]
    rows = packed(*groups[0])
    good = results(ragged(groups), {"f": rows})["f"]
    rows[1:4] = float("nan")
    bad = results(ragged(groups), {"f": rows})["f"]
    assert bad[1:4].isnan().all()
    assert torch.equal(bad[[0, 4, 5]], good[[0, 4, 5]])


def test_gradient_only_where_asked():
    first, second = packed([2, 2], 5).view(2, 2, 5), packed([3], 4).view(1, 3, 4)
    for wanted in (["a"], ["b"]):
        both = {"a": first, "b": second}
        out = results(lambda a, b: orthogonality_penalty([a, b]), both, wanted=wanted)
        expected = gradients([both[wanted[0]]], "squared")[0]
        assert_same({"g": out[wanted[0]]}, {"g": expected}, EXACT[torch.float32])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [[3, 3], [2, 0, 3]])
def test_gradcheck(kind, ranks):
    groups = [(ranks, 4), ([2], 3)]
    leaves = [packed(*g, torch.float64).requires_grad_() for g in groups]
    function = ragged(groups, kind=kind, weight=0.5)
    assert torch.autograd.gradcheck(lambda *f: function(**named(f)), leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_double_backward_is_an_error(kind):
    factor = packed([2, 2], 4).view(2, 2, 4).requires_grad_()
    loss = orthogonality_penalty([factor], kind=kind)
    (gradient,) = torch.autograd.grad(loss, factor, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind):
    """Neither around the call nor around the backward pass."""
    factor = packed([3] * 4, 20).view(4, 3, 20).requires_grad_()
    value = orthogonality_penalty([factor], kind=kind)
    (gradient,) = torch.autograd.grad(value, factor)
    with torch.autocast(factor.device.type, torch.bfloat16):
        under = orthogonality_penalty([factor], kind=kind)
        (gradient_under,) = torch.autograd.grad(under, factor)
    assert torch.equal(under, value)
    assert torch.equal(gradient_under, gradient)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unequal", [False, True])
def test_calls_do_not_depend_on_the_number_of_matrices(kind, unequal):
    def run(count):
        ranks = [3, 1] * (count // 2) if unequal else [3] * count
        groups = [(ranks, 12), (ranks, 20)]
        factors = named([packed(*g) for g in groups])
        function = ragged(groups, kind=kind)
        return count_calls(lambda: results(function, factors))

    counts = [run(count) for count in (2, 12, 48)]
    assert counts[0] > 10  # the calls inside of the operator were seen
    assert counts == [counts[0]] * 3


def operator_arguments(groups, squared, dtype):
    factors = [packed(*g, dtype) for g in groups]
    offsets = [packed_offsets(ranks) for ranks, _ in groups]
    return factors, offsets, [max(ranks) for ranks, _ in groups], squared, 0.5


@pytest.mark.parametrize(
    "groups, squared, dtype",
    [*((g, s, torch.float32) for g in RAGGED[1:4] for s in (True, False)),
     (RAGGED[4], True, torch.bfloat16)],
)  # fmt: skip
def test_opcheck(groups, squared, dtype):
    factors, *rest = operator_arguments(groups, squared, dtype)
    factors = [f.requires_grad_() for f in factors]
    torch.library.opcheck(torch.ops.hal.orthogonality_penalty.default, (factors, *rest))


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_backward(squared, dtype):
    factors, offsets, max_ranks, *options = operator_arguments(RAGGED[3], squared, dtype)
    residuals = torch.ops.hal.orthogonality_penalty(factors, offsets, max_ranks, *options)[1]
    dvalue = torch.tensor(1.5, device=DEVICE)
    arguments = (dvalue, factors, residuals, offsets, max_ranks, *options)
    torch.library.opcheck(torch.ops.hal.orthogonality_penalty_backward.default, arguments)


def equal_ranks(f0):
    return orthogonality_penalty([f0.view(3, 3, 10)], weight=0.5)


@pytest.mark.parametrize(
    "groups, function",
    [*((g, ragged(g, kind=k, weight=0.5)) for g in (RAGGED[0], RAGGED[4]) for k in KINDS),
     (RAGGED[0], equal_ranks)],
)  # fmt: skip
def test_compile(groups, function):
    torch._dynamo.reset()
    factors = named([packed(*g) for g in groups])
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same(results(compiled, factors), results(function, factors), 1e-6)


def test_saved_are_the_factors_themselves_and_the_residuals():
    factor = packed([3] * 4, 50).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ragged([([3] * 4, 50)])(f=factor)
    own = factor.untyped_storage().data_ptr()
    assert sum(t.untyped_storage().data_ptr() == own for t in saved) == 1
    assert sorted(t.numel() for t in saved) == [5, 36, 600]


GOOD = torch.ones(2, 3, 4)
ROWS = torch.ones(6, 4)
OFFSETS = torch.tensor([0, 3, 6])


ONE = {"offsets": [OFFSETS], "max_ranks": [3]}


@pytest.mark.parametrize(
    "factors, options, exception, message",
    [
        ([GOOD], {"kind": "l2"}, ValueError, r"kind is 'l2', expected one of"),
        ([GOOD], {"kind": None}, ValueError, r"kind is None, expected one of"),
        (GOOD, {}, TypeError, r"factors is a Tensor, expected a"),
        ([GOOD, GOOD.int()], {}, TypeError, r"factors\[1\] has dtype torch.int32, expected"),
        ([GOOD, ROWS], {}, ValueError, r"factors\[1\] has shape \(6, 4\), expected \[G, r, d\]"),
        ([GOOD, GOOD.double()], {}, TypeError, r"factors\[1\] has dtype torch.float64"),
        ([GOOD, GOOD.to("meta")], {}, ValueError, r"factors\[1\] is on meta, expected cpu"),
        ([ROWS], {"offsets": [OFFSETS]}, ValueError, r"offsets and max_ranks come together"),
        ([ROWS], {"max_ranks": [3]}, ValueError, r"offsets and max_ranks come together"),
        ([GOOD], ONE, ValueError, r"factors\[0\] has shape \(2, 3, 4\), expected \[R, d\]"),
        ([ROWS, ROWS], ONE, ValueError, r"factors, offsets and max_ranks have 2, 1 and 1 entries"),
        (
            [ROWS], ONE | {"max_ranks": [3, 3]}, ValueError,
            r"factors, offsets and max_ranks have 1, 1 and 2 entries",
        ),
        (
            [ROWS], ONE | {"offsets": [OFFSETS.float()]}, TypeError,
            r"offsets\[0\] has dtype torch.float32, expected torch.int64",
        ),
    ],
)  # fmt: skip
def test_bad_arguments(factors, options, exception, message):
    with pytest.raises(exception, match=message):
        orthogonality_penalty(factors, **options)


def test_counter_sees_the_operator():
    """The instrument of the call counts above, itself."""
    with CountCalls() as counter:
        orthogonality_penalty([GOOD.to(DEVICE)])
    assert list(counter.operators) == ["orthogonality_penalty"]
