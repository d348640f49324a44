"""The linear layer with its own penalty: what is particular to it. y itself is `svd_linear`'s."""

import pytest
import torch

from hal_kernels.ops import (
    orthogonality_penalty,
    svd_linear,
    svd_linear_penalty,
    svd_linear_penalty_reference,
)

from .adapter_cases import FACTORS, SCALING, AdapterCases, make_mask, seed
from .util import EXACT, CountCalls, assert_same, laid_out, relative_error, results

KINDS = ("squared", "frobenius")
NAMES = ("x", "weight", "bias", *FACTORS)


class Cases(AdapterCases):
    names = NAMES


make = Cases().make


def joined(function, kind="squared", weights=(1.0, 2.0), **options):
    """y and the penalty in one vector, so that each has its part in every gradient."""

    def run(**inputs):
        y, penalty = function(**inputs, kind=kind, scaling=SCALING, **options)
        return torch.cat([weights[0] * y.flatten(), weights[1] * penalty.to(y.dtype).flatten()])

    return run


def check(inputs, kind="squared", bound=None, wanted=None):
    ours = results(joined(svd_linear_penalty, kind), inputs, wanted=wanted)
    formula = joined(svd_linear_penalty_reference, kind)
    ref = results(formula, inputs, wanted=wanted, cast=torch.float64)
    assert_same(ours, ref, bound or EXACT[inputs["x"].dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [0, 1, 3, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_the_reference(dtype, rank, kind):
    # The gradient of a norm has its square root's error too.
    check(make((3, 4), 37, 29, rank, dtype), kind, 2 * EXACT[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_sixteen_bits(dtype):
    """The penalty of float32 factors is as exact beside them as without; y is `svd_linear`'s."""
    inputs = make((3, 4), 37, 29, 5, dtype, torch.float32)
    y, penalty = svd_linear_penalty(**inputs, scaling=SCALING)
    assert torch.equal(y, svd_linear(**inputs, scaling=SCALING))
    ref = svd_linear_penalty_reference(**{n: t.double() for n, t in inputs.items()})[1]
    assert penalty.dtype == torch.float32
    assert relative_error(penalty, ref) <= EXACT[torch.float32]


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_sum_of_the_two_operators(kind):
    """Mask and dropout are y's alone."""
    inputs, mask = make((6,), rank=4), make_mask("some", 4)
    options = {"mask": mask, "dropout": 0.3, "seed": seed(3)}
    ours = results(joined(svd_linear_penalty, kind, **options), inputs)

    def apart(p, q, kind, **rest):
        y = svd_linear(p=p, q=q, **rest)
        return y, orthogonality_penalty([p[None], q[None]], kind=kind)

    assert_same(ours, results(joined(apart, kind, **options), inputs), EXACT[torch.float32])


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_any_layout(layout):
    inputs = make((4, 5))
    for name in ("x", "weight", "p", "q"):
        inputs[name] = laid_out(inputs[name], layout)
    check(inputs)


def test_no_rows_and_no_bias():
    check(make((2, 0)))
    inputs = make()
    check({**inputs, "bias": None})


@pytest.mark.parametrize("used", [0, 1])
def test_an_output_that_is_not_used_costs_nothing(used):
    inputs = make()
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    output = svd_linear_penalty(**leaves, scaling=SCALING)[used]
    wanted = NAMES if used == 0 else ("p", "q")
    with CountCalls() as counter:
        gradients = torch.autograd.grad(output.sum(), [leaves[n] for n in wanted])
    called = {0: "svd_linear_backward", 1: "orthogonality_penalty_backward"}
    assert set(counter.operators) == {called[used]}
    formula = joined(svd_linear_penalty_reference, weights=(float(used == 0), float(used == 1)))
    ref = results(formula, inputs, wanted=wanted, cast=torch.float64)
    ref.pop("out")
    assert_same(dict(zip(wanted, gradients, strict=True)), ref, EXACT[torch.float32])


def test_gradients_only_where_asked():
    for wanted in (["x"], ["p"], ["lam"], ["q"], ["weight", "bias"], ["x", "q"]):
        check(make(dtype=torch.float64), wanted=wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    inputs = make((2, 2), 4, 3, 2, torch.float64)
    function = joined(svd_linear_penalty, kind, dropout=0.4, seed=seed(1))
    leaves = [inputs[n].requires_grad_() for n in NAMES]
    assert torch.autograd.gradcheck(lambda *t: function(**dict(zip(NAMES, t, strict=True))), leaves)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16, "factors": torch.float32}])
def test_opcheck(options):
    inputs = make((2, 3), **options)
    arguments = [inputs[n].requires_grad_() for n in NAMES]
    torch.library.opcheck(
        torch.ops.hal.svd_linear_penalty.default, (*arguments, SCALING, 0.5, seed(2), True)
    )


@pytest.mark.parametrize("weights", [(1.0, 2.0), (1.0, 0.0)])
def test_compile(weights):
    inputs, function = make(), joined(svd_linear_penalty, weights=weights)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same(results(compiled, inputs), results(function, inputs), 1e-6)


def test_autocast():
    inputs = make()
    with torch.autocast(inputs["x"].device.type, torch.bfloat16):
        y, penalty = svd_linear_penalty(**inputs)
        assert torch.equal(y, svd_linear(**inputs))
    assert torch.equal(penalty, svd_linear_penalty(**inputs)[1])


@pytest.mark.parametrize(
    "changes, exception, message",
    [
        ({"kind": "cubed"}, ValueError, r"kind is 'cubed', expected one of"),
        ({"q": lambda t: t.double()}, TypeError, r"q has dtype torch.float64, expected .* of p"),
        ({"p": lambda t: t[:, 1:]}, ValueError, r"p has shape \(3, 11\), expected"),
        ({"dropout": 1.0}, ValueError, r"dropout is 1.0, expected at least 0 and less"),
        ({"weight": lambda t: t.double()}, TypeError, r"x has dtype .*, weight torch.float64"),
    ],
)
def test_bad_arguments(changes, exception, message):
    arguments = make()
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises(exception, match=message):
        svd_linear_penalty(**arguments)
