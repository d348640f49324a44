"""Padded tokens to factors, all matrices at once, against one matrix at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hal_kernels.ops import hypernet_factors, hypernet_factors_reference

from .slot_cases import (
    EMPTY,
    EQUAL,
    LAYERS,
    UNEQUAL,
    listed,
    numbered,
    random,
    shapes_of,
    slots_of,
    widths_of,
)
from .util import DEVICE, EXACT, assert_same, bounds, count_calls, laid_out

TRAINED = ("tokens", "w", "b")


def make(layers, hidden=6, dtype=torch.float32, base=True):
    """Named tokens, weights and biases; and the base."""
    slots, widths = slots_of(layers), widths_of(layers)
    inputs = {"tokens": random(3, len(layers), slots.max_rank, hidden, dtype=dtype)}
    inputs |= numbered("w", (random(d, hidden, dtype=dtype) for d in widths))
    inputs |= numbered("b", (random(d, dtype=dtype) for d in widths))
    if base:
        inputs |= numbered("base", (random(*shape, dtype=dtype) for shape in shapes_of(layers)))
    return inputs


def trained(inputs):
    return [name for name in inputs if name.rstrip("0123456789") in TRAINED]


def call(slots, function=hypernet_factors):
    def run(**inputs):
        w, b, base = (listed(prefix, inputs) for prefix in ("w", "b", "base"))
        return function(inputs["tokens"], w, b, slots, base or None)

    return run


def upstream_of(layers, dtype=torch.float32):
    return [random(*shape, dtype=dtype) for shape in shapes_of(layers)]


def run(function, inputs, upstream=None, wanted=None, cast=None):
    """Factors as "out0", …, and the gradients of what is wanted (everything that can be)."""
    wanted = trained(inputs) if wanted is None else wanted
    leaves = {n: t.detach().to(cast or t.dtype) for n, t in inputs.items()}
    for name in wanted:
        leaves[name].requires_grad_()
    out = function(**leaves)
    if upstream is None:
        gradients = torch.autograd.grad(sum(t.sum() for t in out), [leaves[n] for n in wanted])
    else:
        upstream = [u.to(t.dtype) for u, t in zip(upstream, out, strict=True)]
        gradients = torch.autograd.grad(out, [leaves[n] for n in wanted], upstream)
    return numbered("out", (t.detach() for t in out)) | dict(zip(wanted, gradients, strict=True))


def check(layers, inputs, upstream=None, bound=None):
    slots, dtype = slots_of(layers), inputs["tokens"].dtype
    formula = call(slots, hypernet_factors_reference)
    out = run(call(slots), inputs, upstream)
    ref = run(formula, inputs, upstream, cast=torch.float64)
    if bound is None:
        plain = run(formula, inputs, upstream) if dtype.itemsize == 2 else None
        bound = bounds(dtype, plain, ref)
    assert_same(out, ref, bound)
    assert all(t.dtype == dtype for t in out.values())


def test_by_hand():
    """Two layers of ranks 1 and 2; H is 1. P is grouped by width, so layer 1 comes first."""
    tokens = torch.tensor([[[1, 2], [3, 99]], [[4, 99], [5, 6]], [[7, 99], [8, 9]]], device=DEVICE)
    weights = [torch.tensor(w, device=DEVICE) for w in ([[10.0]], [[1.0], [-1]], [[2.0]], [[3.0]])]
    biases = [torch.tensor(b, device=DEVICE) for b in ([0.5], [0.0, 1.0], [0.25], [0.0])]
    slots = slots_of([(2, 1, 1), (1, 1, 2)])
    arguments = (tokens[..., None].float(), weights, biases, slots)
    expected = [[[10.5], [20.5]], [[3.0, -2.0]], [8.25, 10.25, 12.25], [[21.0], [24.0], [27.0]]]
    for found, values in zip(hypernet_factors(*arguments), expected, strict=True):
        torch.testing.assert_close(found, torch.tensor(values, device=DEVICE))
    base = [torch.full_like(f, 100.0) for f in hypernet_factors(*arguments)]
    for found, values in zip(hypernet_factors(*arguments, base), expected, strict=True):
        torch.testing.assert_close(found, torch.tensor(values, device=DEVICE) + 100)


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_matches_the_reference(dtype, layers, base):
    check(layers, make(layers, dtype=dtype, base=base), upstream_of(layers, dtype))


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 17, 64, 128])
def test_any_rank(rank):
    for layers in ([(5, 3, rank)] * 2, [(5, 3, rank), (4, 3, 1)]):
        check(layers, make(layers), upstream_of(layers))


@pytest.mark.parametrize("hidden", [1, 7, 312])
def test_any_hidden_size(hidden):
    layers = [(33, 20, 3), (48, 20, 2)]
    check(layers, make(layers, hidden), upstream_of(layers))


@given(st.data())
def test_random_layers(data):
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    layer = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 4))
    some_rows = st.lists(layer, min_size=1, max_size=6).filter(lambda ls: any(r for *_, r in ls))
    layers, hidden = data.draw(some_rows), data.draw(st.integers(1, 5))
    inputs = make(layers, hidden, torch.float64, data.draw(st.booleans()))
    # A gradient may cancel to nearly nothing: 1e-11 leaves four digits to that.
    check(layers, inputs, upstream_of(layers, torch.float64), bound=1e-11)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("layers", [EQUAL, UNEQUAL])
def test_any_layout(layers, layout):
    check(
        layers,
        {name: laid_out(t, layout) for name, t in make(layers).items()},
        upstream_of(layers),
    )


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "all_expanded"])
@pytest.mark.parametrize("layers", [EQUAL, UNEQUAL])
def test_any_layout_of_the_upstream_gradients(layers, layout):
    check(layers, make(layers), [laid_out(u, layout) for u in upstream_of(layers)])


@pytest.mark.parametrize("layers", [EQUAL, EMPTY])
def test_gradient_of_a_sum(layers):
    """Stride 0."""
    check(layers, make(layers))


def test_no_rows_at_all():
    layers = [(3, 4, 0), (2, 4, 0)]
    out = run(call(slots_of(layers)), make(layers))
    assert [out[f"out{i}"].shape for i in range(4)] == [(0, 2), (0, 3), (0,), (0, 4)]
    assert all((out[name] == 0).all() for name in trained(out))


# ---- what the operator promises ----------------------------------------------------------------


def test_the_start_is_the_base_itself():
    """Output projections start at zero: not one bit of the anchor may change."""
    inputs = {
        n: t if n == "tokens" or n.startswith("base") else torch.zeros_like(t)
        for n, t in make(UNEQUAL).items()
    }
    out = call(slots_of(UNEQUAL))(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(out, listed("base", inputs), strict=True))


def test_what_lies_in_the_padding_is_never_seen():
    """Neither forward nor backward: 0 · NaN would be NaN."""
    inputs, slots = make(UNEQUAL), slots_of(UNEQUAL)
    upstream = upstream_of(UNEQUAL)
    expected = run(call(slots), inputs, upstream)
    for side, offsets in enumerate(slots.offsets):
        for matrix, rank in enumerate(offsets.diff().tolist()):
            inputs["tokens"][side, matrix, rank:] = float("nan")
            assert (expected["tokens"][side, matrix, rank:] == 0).all()
    assert_same(run(call(slots), inputs, upstream), expected, 0.0)


def test_matrices_do_not_see_each_other():
    inputs, slots = make(UNEQUAL), slots_of(UNEQUAL)
    before = call(slots)(**inputs)
    inputs["tokens"][:, 1] = float("nan")
    after = call(slots)(**inputs)
    lam = len(slots.counts[0])
    sides = [
        torch.cat([(a != b).flatten(1).any(1) for a, b in zip(after[s], before[s], strict=True)])
        for s in (slice(lam), slice(lam + 1, None))
    ]
    sides.insert(1, after[lam] != before[lam])
    for changed, offsets in zip(sides, slots.offsets, strict=True):
        rows = torch.zeros_like(changed)
        rows[offsets[1] : offsets[2]] = True
        assert torch.equal(changed, rows)


def test_inputs_stay_as_they_are():
    inputs = make(UNEQUAL)
    before = {n: t.clone() for n, t in inputs.items()}
    run(call(slots_of(UNEQUAL)), inputs)
    assert_same(inputs, before, 0.0)


def test_saved_are_the_tokens_the_weights_and_the_offsets():
    inputs, slots, saved = make(EQUAL), slots_of(EQUAL), []
    for name in trained(inputs):
        inputs[name].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(slots)(**inputs)
    expected = [inputs["tokens"], *listed("w", inputs), *slots.offsets]
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in expected]


# ---- gradients, torch.library, torch.compile ---------------------------------------------------


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("layers", [EQUAL, UNEQUAL, EMPTY])
def test_gradcheck(layers, base):
    inputs = make(layers, 3, torch.float64, base)
    names, function = trained(inputs), call(slots_of(layers))
    leaves = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *t: tuple(function(**{**inputs, **dict(zip(names, t, strict=True))})), leaves
    )


@pytest.mark.parametrize("wanted", [["tokens"], ["w0"], ["b3"], ["w2", "tokens"]])
def test_gradients_only_where_asked(wanted):
    inputs, function, upstream = make(UNEQUAL), call(slots_of(UNEQUAL)), upstream_of(UNEQUAL)
    every = run(function, inputs, upstream)
    some = run(function, inputs, upstream, wanted)
    assert_same(some, {n: every[n] for n in every if n.startswith("out") or n in wanted}, 0.0)


@pytest.mark.parametrize("used", [0, 2, 4])
def test_a_gradient_of_some_factors_alone(used):
    """The others' gradients are undefined, which stands for zeros."""
    inputs, function = make(EQUAL), call(slots_of(EQUAL))
    upstream = [torch.zeros_like(u) for u in upstream_of(EQUAL)]
    upstream[used] = torch.ones_like(upstream[used])
    expected = run(function, inputs, upstream)
    alone = run(lambda **t: function(**t)[used : used + 1], inputs)
    assert_same({n: alone[n] for n in trained(inputs)}, {n: expected[n] for n in trained(inputs)},
                EXACT[torch.float32])  # fmt: skip


def test_no_graph_without_gradients():
    assert not any(t.requires_grad for t in call(slots_of(EQUAL))(**make(EQUAL)))


@pytest.mark.parametrize("index", [0, 2, 3])
def test_a_base_that_wants_a_gradient_is_an_error(index):
    """It would silently get none."""
    inputs, function = make(EQUAL), call(slots_of(EQUAL))
    inputs[f"base{index}"].requires_grad_()
    with pytest.raises(ValueError, match=rf"base\[{index}\] requires a gradient, expected state"):
        function(**inputs)
    with torch.no_grad():
        function(**inputs)


def test_double_backward_is_an_error():
    inputs = make(EQUAL)
    weight = inputs["w0"].requires_grad_()
    loss = sum(t.square().sum() for t in call(slots_of(EQUAL))(**inputs))
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()


def test_autocast_changes_nothing():
    """Neither around the call nor around the backward pass."""
    inputs, function, upstream = make(UNEQUAL), call(slots_of(UNEQUAL)), upstream_of(UNEQUAL)
    expected = run(function, inputs, upstream)
    with torch.autocast(DEVICE.split(":")[0], torch.bfloat16):
        assert_same(run(function, inputs, upstream), expected, 0.0)


@pytest.mark.parametrize("ranks", [[2, 2], [3, 1]])
def test_calls_do_not_depend_on_the_number_of_layers(ranks):
    def calls(count):
        layers = [(4, 5, ranks[i % 2]) for i in range(count)]
        function, inputs, upstream = call(slots_of(layers)), make(layers), upstream_of(layers)
        return count_calls(lambda: run(function, inputs, upstream))

    counts = [calls(count) for count in (2, 12, 48)]
    assert counts[0] > 15  # the calls inside of the operator were seen
    assert counts == [counts[0]] * 3


def operator_arguments(layers, dtype=torch.float32, base=True):
    inputs, slots = make(layers, dtype=dtype, base=base), slots_of(layers)
    for name in trained(inputs):
        inputs[name].requires_grad_()
    lists = (listed(prefix, inputs) for prefix in ("w", "b", "base"))
    return inputs["tokens"], *lists, list(slots.offsets), *slots.counts, *slots.sizes


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_opcheck(layers, base):
    arguments = operator_arguments(layers, torch.float32, base)
    torch.library.opcheck(torch.ops.hal.hypernet_factors.default, arguments)


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_opcheck_backward(layers):
    tokens, weights, _, _, offsets, counts_p, counts_q, *_ = operator_arguments(layers)
    tokens, weights = tokens.detach(), [w.detach() for w in weights]
    arguments = (upstream_of(layers), tokens, weights, offsets, counts_p, counts_q)
    torch.library.opcheck(torch.ops.hal.hypernet_factors_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("layers, base", [(EQUAL, True), (EMPTY, False)])
def test_compile(layers, base, dynamic):
    torch._dynamo.reset()
    inputs, function, upstream = (
        make(layers, base=base),
        call(slots_of(layers)),
        upstream_of(layers),
    )
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert_same(run(compiled, inputs, upstream), run(function, inputs, upstream), 1e-6)


# ---- bad arguments -----------------------------------------------------------------------------


def changed(change):
    """`change` applied to one entry of a list of tensors."""
    return lambda tensors: [*tensors[:1], change(tensors[1]), *tensors[2:]]


@pytest.mark.parametrize(
    "name, change, exception, message",
    [
        ("tokens", lambda t: None, TypeError, r"tokens is a NoneType, expected a torch.Tensor"),
        ("tokens", lambda t: t.long(), TypeError, r"tokens has dtype torch.int64"),
        ("tokens", lambda t: t[0], ValueError, r"tokens has shape \(3, 2, 6\), expected \[3, G"),
        ("tokens", lambda t: t[1:], ValueError, r"tokens has shape \(2, 3, 2, 6\), expected \(3,"),
        ("tokens", lambda t: t[:, 1:], ValueError, r"tokens has shape \(3, 2, 2, 6\), expected"),
        ("tokens", lambda t: t[:, :, 1:], ValueError, r"tokens has shape \(3, 3, 1, 6\), expect"),
        ("tokens", lambda t: t.half(), TypeError, r"weights\[0\] has dtype torch.float32, expec"),
        ("weights", lambda t: t[1:], ValueError, r"weights has 4 entries, expected 5 \(the wid"),
        ("weights", lambda t: t[1], TypeError, r"weights is a Tensor, expected a list"),
        ("weights", changed(lambda t: None), TypeError, r"weights\[1\] is a NoneType"),
        ("weights", changed(lambda t: t.t()), ValueError, r"weights\[1\] has shape \(6, 7\), ex"),
        ("weights", changed(lambda t: t[0]), ValueError, r"weights\[1\] has shape \(6,\), expec"),
        ("weights", changed(lambda t: t.double()), TypeError, r"weights\[1\] has dtype torch.fl"),
        ("weights", changed(lambda t: t.to("meta")), ValueError, r"weights\[1\] is on meta"),
        (
            "weights",
            lambda t: [*t[:2], torch.ones(2, 6), *t[3:]],
            ValueError,
            r"weights\[2\] has shape \(2, 6\), expected \(1, 6\)",
        ),
        ("biases", changed(lambda t: t[1:]), ValueError, r"biases\[1\] has shape \(6,\), expect"),
        ("biases", lambda t: [*t, t[0]], ValueError, r"biases has 6 entries, expected 5"),
        ("base", lambda t: [], ValueError, r"base has 0 entries, expected 5"),
        ("base", lambda t: t[0], TypeError, r"base is a Tensor, expected a list"),
        ("base", changed(lambda t: t[1:]), ValueError, r"base\[1\] has shape \(3, 7\), expected"),
        ("base", changed(lambda t: t[:, 1:]), ValueError, r"base\[1\] has shape \(4, 6\), expec"),
        ("base", changed(lambda t: t.double()), TypeError, r"base\[1\] has dtype torch.float64"),
        ("base", changed(lambda t: t.to("meta")), ValueError, r"base\[1\] is on meta, expected"),
        ("slots", lambda s: None, TypeError, r"slots is a NoneType, expected hal_kernels.ops.Sl"),
    ],
)
def test_bad_arguments(name, change, exception, message):
    inputs = make(EQUAL)
    w, b, base = (listed(prefix, inputs) for prefix in ("w", "b", "base"))
    arguments = {
        "tokens": inputs["tokens"], "weights": w, "biases": b, "slots": slots_of(EQUAL),
        "base": base,
    }  # fmt: skip
    arguments[name] = change(arguments[name])
    with pytest.raises(exception, match=message):
        hypernet_factors(**arguments)
