"""Factors to padded tokens, all matrices at once, against one matrix at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hal_kernels.ops import Slots, hypernet_tokens, hypernet_tokens_reference

from .slot_cases import (
    EMPTY,
    EQUAL,
    LAYERS,
    UNEQUAL,
    listed,
    numbered,
    random,
    random_mask,
    shapes_of,
    slots_of,
    widths_of,
)
from .util import DEVICE, assert_same, bounds, count_calls, laid_out, results

TRAINED = ("w", "b", "embedding")


def make(layers, hidden=6, dtype=torch.float32):
    """Named factors, weights, biases and embedding; and the mask."""
    widths, rows = widths_of(layers), sum(rank for *_, rank in layers)
    inputs = numbered("f", (random(*shape, dtype=dtype) for shape in shapes_of(layers)))
    inputs |= numbered("w", (random(hidden, d, dtype=dtype) for d in widths))
    inputs |= numbered("b", (random(hidden, dtype=dtype) for _ in widths))
    inputs["embedding"] = random(rows, hidden, dtype=dtype)
    return inputs, random_mask(rows, dtype=dtype)


def trained(inputs):
    return [name for name in inputs if name.rstrip("0123456789") in TRAINED]


def call(slots, mask, function=hypernet_tokens, output=0):
    def run(**inputs):
        f, w, b = (listed(prefix, inputs) for prefix in "fwb")
        return function(f, mask, w, b, inputs["embedding"], slots)[output]

    return run


def upstream_of(slots, hidden=6, dtype=torch.float32):
    return random(3, slots.offsets[0].shape[0] - 1, slots.max_rank, hidden, dtype=dtype)


def check(layers, inputs, mask, upstream=None, bound=None):
    slots, dtype = slots_of(layers), inputs["embedding"].dtype
    formula = call(slots, mask, hypernet_tokens_reference)
    wanted = trained(inputs)
    out = results(call(slots, mask), inputs, upstream, wanted)
    ref = results(formula, inputs, upstream, wanted, cast=torch.float64)
    if bound is None:
        plain = results(formula, inputs, upstream, wanted) if dtype.itemsize == 2 else None
        bound = bounds(dtype, plain, ref)
    assert_same(out, ref, bound)
    assert out["out"].dtype == dtype
    usable, expected = (
        call(slots, mask, f, 1)(**inputs) for f in (hypernet_tokens, hypernet_tokens_reference)
    )
    assert usable.dtype == torch.bool
    assert torch.equal(usable, expected)


def test_by_hand():
    """Two layers of ranks 1 and 2; H is 1. P is grouped by width, so layer 1 comes first."""
    p, lam, q = [[[2.0]] * 2, [[1.0, 3.0]]], [5.0, 6.0, 7.0], [[[1.0], [2.0], [4.0]]]
    factors = [torch.tensor(t, device=DEVICE) for t in (*p, lam, *q)]
    weights = [torch.tensor(w, device=DEVICE) for w in ([[3.0]], [[1.0, -1.0]], [[2.0]], [[10.0]])]
    biases = [torch.tensor([b], device=DEVICE) for b in (0.5, 0.25, 0.0, 1.0)]
    embedding = torch.tensor([[0.1], [0.2], [0.3]], device=DEVICE)
    mask = torch.tensor([0.0, 1.0, 0.0], device=DEVICE)
    slots = slots_of([(2, 1, 1), (1, 1, 2)])
    tokens, usable = hypernet_tokens(factors, mask, weights, biases, embedding, slots)
    expected = [
        [[6.5, 6.5], [-1.75, 0.0]],
        [[10.1, 0.0], [12.2, 14.3]],
        [[11.0, 0.0], [21.0, 41.0]],
    ]
    torch.testing.assert_close(tokens[..., 0], torch.tensor(expected, device=DEVICE))
    assert usable.tolist() == [
        [[True, False], [False, False]],
        [[False, False], [True, False]],
        [[False, False], [True, False]],
    ]


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_matches_the_reference(dtype, layers):
    inputs, mask = make(layers, dtype=dtype)
    check(layers, inputs, mask, upstream_of(slots_of(layers), dtype=dtype))


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 17, 64, 128])
def test_any_rank(rank):
    for layers in ([(5, 3, rank)] * 2, [(5, 3, rank), (4, 3, 1)]):
        inputs, mask = make(layers)
        check(layers, inputs, mask, upstream_of(slots_of(layers)))


@pytest.mark.parametrize("hidden", [1, 7, 312])
def test_any_hidden_size(hidden):
    layers = [(33, 20, 3), (48, 20, 2)]
    inputs, mask = make(layers, hidden)
    check(layers, inputs, mask, upstream_of(slots_of(layers), hidden))


@given(st.data())
def test_random_layers(data):
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    layer = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 4))
    some_rows = st.lists(layer, min_size=1, max_size=6).filter(lambda ls: any(r for *_, r in ls))
    layers, hidden = data.draw(some_rows), data.draw(st.integers(1, 5))
    inputs, mask = make(layers, hidden, torch.float64)
    # A gradient may cancel to nearly nothing: 1e-11 leaves four digits to that.
    check(layers, inputs, mask, upstream_of(slots_of(layers), hidden), bound=1e-11)


@pytest.mark.parametrize("mask", ["ones", "zeros", "transposed", "double"])
def test_any_mask(mask):
    inputs, some = make(UNEQUAL)
    masks = {
        "ones": torch.ones_like(some), "zeros": torch.zeros_like(some),
        "transposed": some[:, None].expand(-1, 2).contiguous()[:, 1], "double": some.double(),
    }  # fmt: skip
    check(UNEQUAL, inputs, masks[mask], upstream_of(slots_of(UNEQUAL)))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("layers", [EQUAL, UNEQUAL])
def test_any_layout(layers, layout):
    inputs, mask = make(layers)
    inputs = {name: laid_out(t, layout) for name, t in inputs.items()}
    check(layers, inputs, mask, upstream_of(slots_of(layers)))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "permuted", "expanded"])
@pytest.mark.parametrize("layers", [EQUAL, UNEQUAL])
def test_any_layout_of_the_upstream_gradient(layers, layout):
    inputs, mask = make(layers)
    check(layers, inputs, mask, laid_out(upstream_of(slots_of(layers)), layout))


@pytest.mark.parametrize("layers", [EQUAL, EMPTY])
def test_gradient_of_a_sum(layers):
    """Stride 0."""
    inputs, mask = make(layers)
    check(layers, inputs, mask)


def test_no_rows_at_all():
    layers = [(3, 4, 0), (2, 4, 0)]
    inputs, mask = make(layers)
    out = results(call(slots_of(layers), mask), inputs, wanted=trained(inputs))
    assert out["out"].shape == (3, 2, 0, 6)
    assert all((out[name] == 0).all() for name in trained(inputs))


# ---- what the operator promises ----------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_padding_is_zero_beside_rows_that_are_not_finite(bad):
    """The slots below a matrix's own rows, and other matrices: a NaN must not leak."""
    layers = [(3, 4, 1), (3, 4, 3), (3, 4, 2)]
    inputs, mask = make(layers)
    inputs["f0"][1:4] = inputs["f2"][1:4] = inputs["f1"][1:4] = bad
    tokens = call(slots_of(layers), mask)(**inputs)
    assert not tokens[:, 1].isfinite().any()
    assert tokens[:, [0, 2]].isfinite().all()
    assert (tokens[:, 0, 1:] == 0).all() and (tokens[:, 2, 2:] == 0).all()


def test_gradients_of_the_padding_go_nowhere():
    inputs, mask = make(UNEQUAL)
    slots, wanted = slots_of(UNEQUAL), trained(inputs)
    upstream = upstream_of(slots)
    expected = results(call(slots, mask), inputs, upstream, wanted)
    for side, offsets in enumerate(slots.offsets):
        for matrix, rank in enumerate(offsets.diff().tolist()):
            upstream[side, matrix, rank:] = float("nan")
    assert_same(results(call(slots, mask), inputs, upstream, wanted), expected, 0.0)


def test_the_mask_changes_no_token():
    inputs, mask = make(EQUAL)
    tokens = [call(slots_of(EQUAL), m)(**inputs) for m in (mask, 1 - mask)]
    assert torch.equal(*tokens)


def test_inputs_stay_as_they_are():
    inputs, mask = make(UNEQUAL)
    before, mask_before = {n: t.clone() for n, t in inputs.items()}, mask.clone()
    results(call(slots_of(UNEQUAL), mask), inputs, wanted=trained(inputs))
    assert torch.equal(mask, mask_before)
    assert_same(inputs, before, 0.0)


def test_saved_are_the_factors_and_the_offsets():
    inputs, mask = make(EQUAL)
    inputs = {n: t.requires_grad_() if n in trained(inputs) else t for n, t in inputs.items()}
    slots, saved = slots_of(EQUAL), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(slots, mask)(**inputs)
    expected = [*listed("f", inputs), *slots.offsets]
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in expected]


# ---- gradients, torch.library, torch.compile ---------------------------------------------------


@pytest.mark.parametrize("layers", [EQUAL, UNEQUAL, EMPTY])
def test_gradcheck(layers):
    inputs, mask = make(layers, 3, torch.float64)
    names = trained(inputs)
    leaves = [inputs[name].requires_grad_() for name in names]
    function = call(slots_of(layers), mask)
    assert torch.autograd.gradcheck(
        lambda *t: function(**{**inputs, **dict(zip(names, t, strict=True))}), leaves
    )


@pytest.mark.parametrize("wanted", [["w0"], ["b3"], ["embedding"], ["w2", "embedding"]])
def test_gradients_only_where_asked(wanted):
    inputs, mask = make(UNEQUAL)
    slots = slots_of(UNEQUAL)
    upstream = upstream_of(slots)
    every = results(call(slots, mask), inputs, upstream, trained(inputs))
    some = results(call(slots, mask), inputs, upstream, wanted)
    assert_same(some, {n: every[n] for n in ("out", *wanted)}, 0.0)


def test_no_graph_without_gradients():
    inputs, mask = make(EQUAL)
    assert not call(slots_of(EQUAL), mask)(**inputs).requires_grad
    usable = call(slots_of(EQUAL), mask, output=1)
    assert not usable(**{n: t.requires_grad_(n == "w0") for n, t in inputs.items()}).requires_grad


@pytest.mark.parametrize("name", ["f0", "f2", "f3"])
def test_a_factor_that_wants_a_gradient_is_an_error(name):
    """It would silently get none."""
    inputs, mask = make(EQUAL)
    inputs[name].requires_grad_()
    function = call(slots_of(EQUAL), mask)
    message = rf"factors\[{name[1]}\] requires a gradient, expected state"
    with pytest.raises(ValueError, match=message):
        function(**inputs)
    with torch.no_grad():
        function(**inputs)


def test_double_backward_is_an_error():
    inputs, mask = make(EQUAL)
    weight = inputs["w0"].requires_grad_()
    loss = call(slots_of(EQUAL), mask)(**inputs).square().sum()
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()


def test_autocast_changes_nothing():
    """Neither around the call nor around the backward pass."""
    inputs, mask = make(UNEQUAL)
    slots, wanted = slots_of(UNEQUAL), trained(inputs)
    upstream = upstream_of(slots)
    expected = results(call(slots, mask), inputs, upstream, wanted)
    with torch.autocast(DEVICE.split(":")[0], torch.bfloat16):
        assert_same(results(call(slots, mask), inputs, upstream, wanted), expected, 0.0)


@pytest.mark.parametrize("ranks", [[2, 2], [3, 1]])
def test_calls_do_not_depend_on_the_number_of_layers(ranks):
    def run(count):
        layers = [(4, 5, ranks[i % 2]) for i in range(count)]
        inputs, mask = make(layers)
        function, wanted = call(slots_of(layers), mask), trained(inputs)
        return count_calls(lambda: results(function, inputs, wanted=wanted))

    counts = [run(count) for count in (2, 12, 48)]
    assert counts[0] > 15  # the calls inside of the operator were seen
    assert counts == [counts[0]] * 3


def operator_arguments(layers, dtype=torch.float32):
    inputs, mask = make(layers, dtype=dtype)
    for name in trained(inputs):
        inputs[name].requires_grad_()
    slots = slots_of(layers)
    f, w, b = (listed(prefix, inputs) for prefix in "fwb")
    return (
        f, mask, w, b, inputs["embedding"], list(slots.rows), list(slots.offsets), *slots.counts,
        slots.max_rank,
    )  # fmt: skip


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, layers):
    torch.library.opcheck(torch.ops.hal.hypernet_tokens.default, operator_arguments(layers, dtype))


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_opcheck_backward(layers):
    factors, *_, embedding, _, offsets, counts_p, counts_q, _ = operator_arguments(layers)
    upstream = upstream_of(slots_of(layers), embedding.shape[1])
    arguments = (upstream, factors, offsets, counts_p, counts_q)
    torch.library.opcheck(torch.ops.hal.hypernet_tokens_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("layers", [EQUAL, EMPTY])
def test_compile(layers, dynamic):
    torch._dynamo.reset()
    inputs, mask = make(layers)
    function, wanted = call(slots_of(layers), mask), trained(inputs)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    upstream = upstream_of(slots_of(layers))
    out, expected = (results(f, inputs, upstream, wanted) for f in (compiled, function))
    assert_same(out, expected, 1e-6)


# ---- bad arguments -----------------------------------------------------------------------------


def changed(change):
    """`change` applied to one entry of a list of tensors."""
    return lambda tensors: [*tensors[:1], change(tensors[1]), *tensors[2:]]


@pytest.mark.parametrize(
    "name, change, exception, message",
    [
        ("embedding", lambda t: None, TypeError, r"embedding is a NoneType, expected a torch.Ten"),
        ("embedding", lambda t: t.long(), TypeError, r"embedding has dtype torch.int64"),
        ("embedding", lambda t: t[1:], ValueError, r"embedding has shape \(5, 6\), expected \[R"),
        ("embedding", lambda t: t[0], ValueError, r"embedding has shape \(6,\), expected \[R, H"),
        ("mask", lambda t: t.bool(), TypeError, r"mask has dtype torch.bool, expected a floating"),
        ("mask", lambda t: t[1:], ValueError, r"mask has shape \(5,\), expected \(6,\)"),
        ("mask", lambda t: t.to("meta"), ValueError, r"mask is on meta, expected cpu"),
        ("factors", lambda t: t[0], TypeError, r"factors is a Tensor, expected a list"),
        ("factors", lambda t: t[1:], ValueError, r"factors has 4 entries, expected 5 \(the wid"),
        ("factors", changed(lambda t: None), TypeError, r"factors\[1\] is a NoneType"),
        ("factors", changed(lambda t: t[1:]), ValueError, r"factors\[1\] has shape \(3, 7\), exp"),
        ("factors", changed(lambda t: t[0]), ValueError, r"factors\[1\] has shape \(7,\), exp"),
        ("factors", changed(lambda t: t.double()), TypeError, r"factors\[1\] has dtype torch.fl"),
        ("factors", changed(lambda t: t.to("meta")), ValueError, r"factors\[1\] is on meta, exp"),
        (
            "factors",
            lambda t: [*t[:2], t[2][:, None], *t[3:]],
            ValueError,
            r"factors\[2\] has shape \(6, 1\), expected \(6,\) \(Λ, \[R\]\)",
        ),
        ("weights", lambda t: t[1:], ValueError, r"weights has 4 entries, expected 5"),
        ("weights", lambda t: {}, TypeError, r"weights is a dict, expected a list"),
        ("weights", changed(lambda t: t.t()), ValueError, r"weights\[1\] has shape \(7, 6\), ex"),
        ("weights", changed(lambda t: t.half()), TypeError, r"weights\[1\] has dtype torch.floa"),
        ("weights", changed(lambda t: t.to("meta")), ValueError, r"weights\[1\] is on meta"),
        ("biases", changed(lambda t: t[1:]), ValueError, r"biases\[1\] has shape \(5,\), expect"),
        ("biases", changed(lambda t: None), TypeError, r"biases\[1\] is a NoneType"),
        ("slots", lambda s: tuple(s), TypeError, r"slots is a tuple, expected hal_kernels.ops.S"),
        ("slots", lambda s: s._replace(max_rank=1), ValueError, r"slots.sizes\[0\] is \[2, 4\], "),
    ],
)
def test_bad_arguments(name, change, exception, message):
    inputs, mask = make(EQUAL)
    f, w, b = (listed(prefix, inputs) for prefix in "fwb")
    arguments = {
        "factors": f, "mask": mask, "weights": w, "biases": b, "embedding": inputs["embedding"],
        "slots": slots_of(EQUAL),
    }  # fmt: skip
    assert isinstance(arguments["slots"], Slots)
    arguments[name] = change(arguments[name])
    with pytest.raises(exception, match=message):
        hypernet_tokens(**arguments)
