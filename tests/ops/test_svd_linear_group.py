"""The group of SVD linear layers against its formula, one layer after the other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hal_kernels.ops import svd_linear, svd_linear_group, svd_linear_group_reference
from hal_kernels.ops.svd_linear.default import joined

from .adapter_cases import DTYPES, LAYOUTS, SCALING
from .tangent_contract import TANGENT, tangent_results
from .util import (
    DEVICE,
    EXACT,
    CountCalls,
    allocations,
    assert_same,
    autocast,
    bounds,
    laid_out,
    relative_error,
    results,
    values,
)

NAMES = ("weight", "bias", "p", "lam", "q")
BACKWARD = torch.ops.hal.svd_linear_group_backward


def make(
    leading=(5,), d_in=12, d_out=(7, 4, 9), ranks=(3, 2, 4), dtype=torch.float32, factors=None
):
    """Inputs by name, "p0", "p1", …; P and Λ are views of packed tensors, as in a patched model."""
    factors = factors or dtype
    total = sum(ranks)
    inputs = {"x": values(*leading, d_in, dtype=dtype)}
    p = (values(total, d_in) / d_in**0.5).to(factors).split(ranks)
    lam = (0.5 + torch.rand(total, device=DEVICE)).to(factors).split(ranks)
    for i, (d, rank) in enumerate(zip(d_out, ranks, strict=True)):
        inputs |= {
            f"weight{i}": (values(d, d_in) / d_in**0.5).to(dtype),
            f"bias{i}": values(d, dtype=dtype),
            f"p{i}": p[i],
            f"lam{i}": lam[i],
            f"q{i}": (values(rank, d) / d**0.5).to(factors),
        }
    return inputs


def layers_of(inputs):
    count = sum(name.startswith("weight") for name in inputs)
    return {name: [inputs[f"{name}{i}"] for i in range(count)] for name in NAMES}


def call(scaling=SCALING, used=None, function=svd_linear_group, **more):
    """The operator as a function of named tensors: the outputs (of layers `used`) side by side."""

    def run(x, **inputs):
        outputs = function(x, **layers_of(inputs), scaling=scaling, **more)
        return torch.cat([y for i, y in enumerate(outputs) if used is None or i in used], -1)

    return run


def formula(scaling=SCALING, used=None, dtype=None):
    def run(**inputs):
        if dtype is not None:
            inputs = {n: t if t is None else t.to(dtype) for n, t in inputs.items()}
        return call(scaling, used, svd_linear_group_reference)(**inputs)

    return run


def upstream(inputs, layout="contiguous", used=None):
    widths = [t.shape[0] for n, t in inputs.items() if n.startswith("weight")]
    width = sum(w for i, w in enumerate(widths) if used is None or i in used)
    x = inputs["x"]
    return laid_out(values(*x.shape[:-1], width, dtype=x.dtype), layout)


def check(inputs, scaling=SCALING, layout="contiguous", wanted=None, bound=None):
    """Outputs and gradients against the reference in float64, of the rounded inputs."""
    dtype, dy = inputs["x"].dtype, None if layout == "sum" else upstream(inputs, layout)
    out = results(call(scaling), inputs, dy, wanted)
    ref = results(formula(scaling), inputs, dy, wanted, cast=torch.float64)
    plain = None
    if dtype.itemsize == 2:
        plain = results(formula(scaling, dtype=dtype), inputs, dy, wanted)
    assert_same(out, ref, bound or bounds(dtype, plain, ref))
    return out


RANKS = [(1, 1, 1), (3, 8, 16), (5, 5, 5), (0, 3, 0), (64, 40, 24)]
SHAPES = [
    *({"leading": n} for n in ((), (1,), (2, 3), (2, 1, 3, 2), (0,), (2, 0, 3))),
    *({"d_out": (6,) * count, "ranks": (2,) * count} for count in (1, 2, 5)),
    *(
        {"leading": (3, 11), "d_in": 37, "d_out": (29, 64, 8), "ranks": ranks, "dtype": dtype}
        for ranks in RANKS for dtype in DTYPES
    ),
]  # fmt: skip


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_matches_the_reference(options):
    inputs = make(**options)
    out = check(inputs)["out"]
    assert out.shape == (*inputs["x"].shape[:-1], sum(options.get("d_out", (7, 4, 9))))


def test_is_what_its_layers_are_one_by_one():
    inputs = make()
    layers = layers_of(inputs)
    together = svd_linear_group(inputs["x"], **layers, scaling=SCALING)
    for i, y in enumerate(together):
        alone = svd_linear(inputs["x"], *(layers[n][i] for n in NAMES), scaling=SCALING)
        assert relative_error(y, alone) <= EXACT[torch.float32]


# Not "all_expanded" in 16 bits: equal numbers round alike, the bound is for errors that don't.
@pytest.mark.parametrize(
    "dtype, layout",
    [(torch.float32, layout) for layout in ("sum", *LAYOUTS)]
    + [(torch.bfloat16, layout) for layout in LAYOUTS if layout != "all_expanded"],
)
def test_any_layout_of_x_and_of_the_upstream_gradient(layout, dtype):
    inputs = make((4, 5), dtype=dtype)
    if layout != "sum":
        inputs["x"] = laid_out(inputs["x"], layout)
    check(inputs, layout=layout)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_any_layout_of_weights_and_factors(layout):
    inputs = make()
    for name in inputs:
        if name[:-1] in ("weight", "p", "q"):
            inputs[name] = laid_out(inputs[name], layout)
    check(inputs)


@pytest.mark.parametrize("without, scaling", [((0,), 0.0), ((1, 2), -2.5), ((0, 1, 2), SCALING)])
def test_without_bias_and_with_any_scaling(without, scaling):
    check(make() | {f"bias{i}": None for i in without}, scaling)


@pytest.mark.parametrize("factors", [torch.float32, torch.float64])
def test_factors_of_another_dtype(factors):
    inputs = make((3, 5), dtype=torch.bfloat16, factors=factors)
    dy = upstream(inputs)
    ref = results(formula(), inputs, dy, cast=torch.float64)
    plain = results(formula(dtype=torch.bfloat16), inputs, dy)
    assert_same(results(call(), inputs, dy), ref, bounds(torch.bfloat16, plain, ref))


@pytest.mark.parametrize("used", [(0, 1, 2), (1,), (0, 2)])
@pytest.mark.parametrize("ranks", [(3, 2, 4), (3, 0, 40), (64, 40, 24)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tangent_gradients(dtype, ranks, used):
    """K and L of each layer, whatever its Λ is; all else is as it was, bit for bit."""
    inputs = make((3, 7), ranks=ranks, dtype=dtype, factors=torch.float32)
    inputs |= {"lam0": inputs["lam0"] * 0}
    wanted = ["x", *(n for n in inputs if n[:-1] in ("p", "q"))]
    dy = upstream(inputs, used=used)
    out = results(call(used=used, tangent=TANGENT), inputs, dy, wanted)
    own = results(call(used=used), inputs, dy, wanted)
    same = [n for n in out if n[0] not in "pq"]
    assert_same({n: out[n] for n in same}, {n: own[n] for n in same}, 0.0)
    split = dict(zip(used, dy.split([(7, 4, 9)[i] for i in used], -1), strict=True))
    for i in range(3):
        found = {n: out[f"{n}{i}"] for n in "pq"}
        if i not in used:
            assert all((g == 0).all() for g in found.values())
            continue
        own = {"x": inputs["x"], "p": inputs[f"p{i}"], "q": inputs[f"q{i}"]}
        ref = tangent_results(own, split[i])
        plain = tangent_results(own, split[i], dtype)
        assert_same(found, ref, bounds(dtype, plain, ref))


def test_a_tangent_gradient_of_lam_does_not_exist():
    inputs = {n: t.detach().requires_grad_() for n, t in make().items()}
    out = call(tangent=TANGENT)(**inputs).sum()
    found = torch.autograd.grad(out, [*inputs.values()], allow_unused=True)
    without = [n for n, g in zip(inputs, found, strict=True) if g is None]
    assert without == ["lam0", "lam1", "lam2"]


@pytest.mark.parametrize("used", [(0,), (1,), (0, 2)])
def test_layers_that_are_not_used_have_zero_gradients(used):
    inputs = make()
    dy = upstream(inputs, used=used)
    wanted = ["x", *(n for n in inputs if n[:-1] in ("p", "lam", "q"))]
    out = results(call(used=used), inputs, dy, wanted)
    known = ["x", *(n for n in wanted if n[-1] in map(str, used))]
    ref = results(formula(used=used), inputs, dy, known, cast=torch.float64)
    assert_same({n: out[n] for n in ref}, ref, EXACT[torch.float32])
    assert all((out[n] == 0).all() for n in set(out) - set(ref))


def test_a_layer_that_is_not_used_costs_its_backward_no_gemm():
    inputs = make()
    with CountCalls() as counter:
        results(call(used=(1,)), inputs, upstream(inputs, used=(1,)), ["x", "q1"])
    dy = counter.operators["svd_linear_group_backward"][0]
    assert dy[0] is None and dy[2] is None and dy[1].shape == (5, 4)


@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("needs_factors", [True, False])
def test_backward_computes_only_what_is_asked(needs_dx, needs_factors):
    inputs = make()
    wanted = ["x"] * needs_dx + ["lam1"] * needs_factors + ["bias0"]
    with CountCalls() as counter:
        results(call(), inputs, upstream(inputs), wanted)
    arguments = counter.operators["svd_linear_group_backward"]
    assert arguments[-2:] == (needs_dx, needs_factors)
    dx, dp, dlam, dq = BACKWARD(*arguments)
    assert dx.numel() == 60 * needs_dx and dp.numel() == 108 * needs_factors
    assert dlam.numel() == 9 * needs_factors
    assert [t.numel() for t in dq] == [n * needs_factors for n in (21, 8, 36)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    inputs = make((3, 5)) | {"bias1": None}
    dy = upstream(inputs).to(dtype)
    out = results(autocast(call(), dtype), inputs, dy)
    ref = results(formula(), inputs, dy, cast=torch.float64)
    assert out["out"].dtype == dtype
    assert_same(out, ref, bounds(dtype, results(autocast(formula(), dtype), inputs, dy), ref))


def test_outputs_may_be_changed_in_place():
    inputs = make((2, 3), dtype=torch.float64)
    dy = upstream(inputs)

    def doubled(function):
        def run(x, **layers):
            outputs = function(x, **layers_of(layers), scaling=SCALING)
            return torch.cat([y.mul_(2).relu_() for y in outputs], -1)

        return run

    out = results(doubled(svd_linear_group), inputs, dy)
    assert_same(out, results(doubled(svd_linear_group_reference), inputs, dy), EXACT[torch.float64])


def test_no_copy_of_packed_factors_and_no_temporary_of_their_size():
    inputs = make((2,), d_in=1024, d_out=(8, 8), ranks=(16, 16))
    inputs = {n: t.detach() for n, t in inputs.items()}
    blocks = allocations(lambda: call()(**inputs))
    assert max(blocks) < inputs["p0"].nbytes


def test_joined_is_a_view_only_where_it_may_be():
    packed = torch.arange(40.0).view(10, 4)
    a, b, c = packed.split([3, 0, 7])
    assert joined([a, b, c]).data_ptr() == packed.data_ptr()
    for parts in ([c, a], [a, c[1:]], [a, a], [a, c.clone()], [packed[:2].t(), packed[2:4].t()]):
        whole = joined(parts)
        assert torch.equal(whole, torch.cat(parts))
        assert whole.data_ptr() != parts[0].data_ptr()


@given(st.data())
def test_random_shapes_and_options(data):
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    leading = tuple(data.draw(st.lists(st.integers(0, 4), max_size=3)))
    count = data.draw(st.integers(1, 4))
    widths = [data.draw(st.integers(1, 9)) for _ in range(count)]
    ranks = [data.draw(st.integers(0, 5)) for _ in range(count)]
    inputs = make(leading, data.draw(st.integers(1, 9)), widths, ranks, torch.float64)
    for i in range(count):
        if data.draw(st.booleans()):
            inputs[f"bias{i}"] = None
    available = [n for n, t in inputs.items() if t is not None]
    wanted = data.draw(st.lists(st.sampled_from(available), min_size=1, unique=True))
    # Sums of two or three random terms may cancel: 1e-11 leaves four digits to that.
    check(inputs, data.draw(st.sampled_from([1.0, -3.0])), wanted=wanted, bound=1e-11)


def test_gradcheck():
    inputs = make((2, 2), 4, (3, 2), (2, 1), torch.float64)
    leaves = [t.detach().requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(lambda *t: call()(**dict(zip(inputs, t, strict=True))), leaves)


@pytest.mark.parametrize("linear", [True, False])
def test_double_backward_is_an_error(linear):
    inputs = make()
    inputs["x"].requires_grad_()
    out = call()(**inputs)
    loss = (out if linear else out.square()).sum()
    (gradient,) = torch.autograd.grad(loss, inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def arguments(inputs):
    layers = layers_of(inputs)
    return (inputs["x"], *(layers[n] for n in NAMES), SCALING, 0.0, None)


@pytest.mark.parametrize("leading", [(5,), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(leading, dtype):
    inputs = make(leading, dtype=dtype, factors=torch.float32)
    inputs |= {"bias1": None}
    torch.library.opcheck(torch.ops.hal.svd_linear_group.default, arguments(inputs))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_opcheck_backward(needs):
    inputs = make((2, 3))
    layers = layers_of(inputs)
    dy = [values(2, 3, 7), None, values(2, 3, 9)]
    factors = [layers[n] for n in ("weight", "p", "lam", "q")]
    for tangent in (0.0, TANGENT):
        arguments = (dy, inputs["x"], values(6, 9), *factors, 0.5, 0.0, None, tangent, *needs)
        torch.library.opcheck(BACKWARD.default, arguments)


@pytest.mark.parametrize("dynamic, tangent", [(False, 0.0), (True, 0.0), (False, TANGENT)])
def test_compiles(dynamic, tangent):
    inputs = make((3, 4)) | {"bias0": None}
    torch._dynamo.reset()
    function = call(tangent=tangent)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    wanted = [n for n in inputs if inputs[n] is not None and not (tangent and n[:-1] == "lam")]
    for rows in (3, 6):
        inputs["x"] = values(rows, 4, 12)
        dy = upstream(inputs)
        ref = results(function, inputs, dy, wanted)
        assert_same(results(compiled, inputs, dy, wanted), ref, 1e-6)


def test_bitwise_reproducible():
    inputs = make((64,), 48, (32, 16, 16))
    dy = upstream(inputs)
    one, two = (results(call(), inputs, dy) for _ in range(2))
    assert all(torch.equal(one[n], two[n]) for n in one)


def change(name, index, to):
    """Layers with one entry of one list changed."""

    def changed(layers):
        layers[name][index] = to(layers[name][index]) if callable(to) else to

    return changed


BAD = [
    (change("weight", 2, lambda t: t[0]), ValueError, r"weight\[2\] has shape \(12,\), expected"),
    (change("weight", 1, lambda t: t[:, 1:]), ValueError, r"x has .*weight\[1\] is \[4, 11\]"),
    (change("bias", 0, lambda t: t[1:]), ValueError, r"bias\[0\] has shape \(6,\), expected"),
    (change("p", 1, lambda t: t[:, 1:]), ValueError, r"p\[1\] has shape \(2, 11\), expected"),
    (change("lam", 2, lambda t: t[1:]), ValueError, r"lam\[2\] has shape \(3,\), expected"),
    (change("q", 0, lambda t: t.long()), TypeError, r"q\[0\] has dtype torch.int64"),
    (change("q", 2, lambda t: t.to("meta")), ValueError, r"q\[2\] is on meta, expected"),
    (change("p", 1, lambda t: t.double()), TypeError, r"p has dtypes .*expected one dtype"),
    (change("lam", 1, lambda t: t.half()), TypeError, r"lam has dtypes .*expected one dtype"),
    (change("weight", 1, lambda t: t.double()), TypeError, r"weight\[1\] torch.float64"),
    (lambda layers: layers["q"].pop(), ValueError, r"q has 2 entries, expected 3: one a layer"),
    (lambda layers: layers.update(p=layers["p"][0]), TypeError, r"p is a Tensor, expected a list"),
    (lambda layers: [v.clear() for v in layers.values()], ValueError, r"weight has 0 entries"),
]


@pytest.mark.parametrize("breaking, exception, message", BAD)
def test_bad_arguments(breaking, exception, message):
    inputs = make()
    layers = layers_of(inputs)
    breaking(layers)
    with pytest.raises(exception, match=message):
        svd_linear_group(inputs["x"], **layers)
