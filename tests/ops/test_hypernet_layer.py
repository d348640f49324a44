"""The hypernetwork's transformer layer over all matrices at once against its reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hal_kernels.ops import hypernet_layer, hypernet_layer_reference
from hal_kernels.ops.hypernet_layer import PARAMETERS

from .util import DEVICE, EXACT, assert_same, bounds, count_calls, laid_out, relative_error, results

# Two LayerNorms, a softmax and six products in a row: twice what two or three sums may lose.
BOUNDS = {dtype: 2 * bound for dtype, bound in EXACT.items()}


def make(sets=2, matrices=3, rank=4, hidden=12, inner=20, dtype=torch.float32):
    """Tokens and parameters by name, all of them random: no affine is 1 or 0."""
    shapes = {
        "tokens": (matrices, rank, hidden),
        "qkv_weight": (3 * hidden, hidden),
        "qkv_bias": (3 * hidden,),
        "out_weight": (hidden, hidden),
        "out_bias": (hidden,),
        "up_weight": (inner, hidden),
        "up_bias": (inner,),
        "down_weight": (hidden, inner),
        "down_bias": (hidden,),
    }
    inputs = {}
    for name in ("tokens", *PARAMETERS):
        shape = shapes.get(name, (hidden,))
        tensor = torch.randn(sets, *shape, dtype=torch.float64)
        if name.endswith("weight") and len(shape) == 2:
            tensor *= 1.5 / shape[1] ** 0.5
        inputs[name] = tensor.to(DEVICE, dtype)
    return inputs


def make_keys(kind, sets=2, matrices=3, rank=4):
    keys = torch.ones(sets, matrices, rank, dtype=torch.bool, device=DEVICE)
    if kind in ("some", "mixed"):
        keys[..., 1::2] = False
        keys[0, 0] = True
    if kind == "mixed":  # one matrix without a key of its own
        keys[-1, -1] = False
    if kind == "none":
        keys[:] = False
    return keys


def call(keys, heads=3, **options):
    def function(tokens, **parameters):
        return hypernet_layer(tokens, keys, parameters, heads=heads, **options)

    return function


def formula(keys, heads=3, **options):
    def function(tokens, **parameters):
        return hypernet_layer_reference(tokens, keys, parameters, heads, **options)

    return function


def check(inputs, keys, heads=3, upstream=None, bound=None, **options):
    if upstream is None:
        upstream = torch.randn_like(inputs["tokens"], memory_format=torch.contiguous_format)
    out = results(call(keys, heads, **options), inputs, upstream)
    ref = results(formula(keys, heads, **options), inputs, upstream, cast=torch.float64)
    if bound is None:
        # A LayerNorm of few numbers, or a gradient that nearly cancels, amplifies what any
        # implementation rounds: plain PyTorch's own error says by how much.
        dtype = inputs["tokens"].dtype
        plain = results(formula(keys, heads, **options), inputs, upstream)
        bound = bounds(dtype, plain, ref)
        if dtype in BOUNDS:
            bound = {n: BOUNDS[dtype] + 2 * relative_error(plain[n], ref[n]) for n in ref}
    assert_same(out, ref, bound)


@pytest.mark.parametrize("norm_first", [False, True])
def test_reference_is_torch_s_own_encoder_layer(norm_first):
    """The formula itself, against an implementation that shares no line with it."""
    inputs, keys = make(sets=1, dtype=torch.float64), make_keys("some", sets=1)
    layer = torch.nn.TransformerEncoderLayer(
        12,
        3,
        20,
        dropout=0.0,
        activation="gelu",
        layer_norm_eps=1e-3,
        batch_first=True,
        norm_first=norm_first,
    ).to(DEVICE, torch.float64)
    names = {
        "self_attn.in_proj_weight": "qkv_weight", "self_attn.in_proj_bias": "qkv_bias",
        "self_attn.out_proj.weight": "out_weight", "self_attn.out_proj.bias": "out_bias",
        "linear1.weight": "up_weight", "linear1.bias": "up_bias",
        "linear2.weight": "down_weight", "linear2.bias": "down_bias",
        "norm1.weight": "norm1_weight", "norm1.bias": "norm1_bias",
        "norm2.weight": "norm2_weight", "norm2.bias": "norm2_bias",
    }  # fmt: skip
    layer.load_state_dict({theirs: inputs[ours][0] for theirs, ours in names.items()})
    expected = layer(inputs["tokens"][0], src_key_padding_mask=~keys[0])
    out = formula(keys, eps=1e-3, norm_first=norm_first)(**inputs)[0]
    assert relative_error(out, expected) <= BOUNDS[torch.float64]


@pytest.mark.parametrize("kind", ["all", "some", "mixed", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_first", [False, True])
def test_matches_the_reference(dtype, kind, norm_first):
    check(make(dtype=dtype), make_keys(kind), norm_first=norm_first)


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 17, 64, 128])
@pytest.mark.parametrize("norm_first", [False, True])
def test_any_rank(rank, norm_first):
    check(make(rank=rank), make_keys("some", rank=rank), norm_first=norm_first)


@pytest.mark.parametrize("hidden, heads", [(12, 1), (12, 12), (26, 2), (7, 7)])
@pytest.mark.parametrize("sets, matrices", [(1, 1), (3, 2), (1, 5)])
@pytest.mark.parametrize("norm_first", [False, True])
def test_any_size(sets, matrices, hidden, heads, norm_first):
    keys = make_keys("some", sets, matrices)
    check(make(sets, matrices, hidden=hidden, inner=11), keys, heads, norm_first=norm_first)


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_method_s_own_size(norm_first):
    """Hidden 312, 12 heads, inner 1200: sums are up to 1200 terms long."""
    keys = make_keys("all", 3, 4, 3)
    check(make(3, 4, 3, 312, 1200), keys, heads=12, norm_first=norm_first)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.3])
def test_eps(eps):
    check(make(), make_keys("some"), eps=eps)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "rows_sliced", "permuted", "expanded"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_any_layout_of_tokens(layout, norm_first):
    inputs = make()
    inputs["tokens"] = laid_out(inputs["tokens"], layout)
    check(inputs, make_keys("some"), norm_first=norm_first)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_any_layout_of_parameters_and_keys(layout):
    inputs = {n: t if n == "tokens" else laid_out(t, layout) for n, t in make().items()}
    keys = make_keys("mixed").transpose(0, 1).contiguous().transpose(0, 1)
    check(inputs, keys)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "permuted", "expanded"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_any_layout_of_the_upstream_gradient(layout, norm_first):
    inputs = make()
    upstream = laid_out(torch.randn(2, 3, 4, 12, device=DEVICE), layout)
    check(inputs, make_keys("some"), upstream=upstream, norm_first=norm_first)


def test_gradient_of_a_sum():
    """Stride 0. The gradient of what only norm2 sees is exact; the rest is a small difference."""
    inputs, keys = make(dtype=torch.float64), make_keys("some")
    out, ref = (results(f(keys), inputs) for f in (call, formula))
    assert_same(out, ref, 1e-12)


@given(st.data())
def test_random_shapes(data):
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    sets, matrices, rank = (data.draw(st.integers(1, 3)) for _ in range(3))
    heads, width = data.draw(st.integers(1, 3)), data.draw(st.integers(4, 6))
    inputs = make(sets, matrices, rank, heads * width, data.draw(st.integers(1, 6)), torch.float64)
    keys = torch.rand(sets, matrices, rank, device=DEVICE) < data.draw(st.floats(0, 1))
    # LayerNorm over few elements amplifies: 1e-10 leaves five digits to that.
    norm_first = data.draw(st.booleans())
    check(inputs, keys, heads, bound=1e-10, eps=1e-3, norm_first=norm_first)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
@pytest.mark.parametrize("norm_first", [False, True])
def test_empty_batches(shape, norm_first):
    inputs = make(*shape)
    keys = torch.ones(shape, dtype=torch.bool, device=DEVICE)
    out = results(call(keys, norm_first=norm_first), inputs)
    assert out["out"].shape == (*shape, 12)
    assert all((out[name] == 0).all() for name in inputs)


# ---- what the layer promises about its tokens -------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_pruned_token_can_be_dropped(norm_first):
    """The kept tokens' outputs and gradients do not depend on the pruned ones."""
    inputs, keys = make(), make_keys("all")
    keys[..., [1, 3]] = False
    upstream = torch.randn(2, 3, 4, 12, device=DEVICE)
    upstream[..., [1, 3], :] = 0  # a pruned direction reaches no output of the model
    full = results(call(keys, norm_first=norm_first), inputs, upstream)
    short = {**inputs, "tokens": inputs["tokens"][:, :, [0, 2]]}
    shorter = call(keys[..., [0, 2]], norm_first=norm_first)
    dropped = results(shorter, short, upstream[:, :, [0, 2]])
    assert (full["tokens"][:, :, [1, 3]] == 0).all()
    for name in ("out", "tokens"):
        full[name] = full[name][:, :, [0, 2]]
    assert_same(full, dropped, BOUNDS[torch.float32])


@pytest.mark.parametrize("norm_first", [False, True])
def test_matrices_and_sets_do_not_see_each_other(norm_first):
    inputs, keys = make(), make_keys("some")
    before = call(keys, norm_first=norm_first)(**inputs)
    inputs["tokens"][0, 1] += torch.randn(4, 12, device=DEVICE)
    for name in PARAMETERS:
        inputs[name][1] *= 1.1
    after = call(keys, norm_first=norm_first)(**inputs)
    changed = (after != before).flatten(2).any(-1)
    assert changed.tolist() == [[False, True, False], [True, True, True]]


@pytest.mark.parametrize("norm_first", [False, True])
def test_large_scores_do_not_overflow(norm_first):
    inputs = make()
    inputs["qkv_weight"] *= 1e3
    assert call(make_keys("some"), norm_first=norm_first)(**inputs).isfinite().all()


@pytest.mark.parametrize("norm_first", [False, True])
def test_inputs_stay_as_they_are(norm_first):
    inputs, keys = make(), make_keys("mixed")
    before, keys_before = {n: t.clone() for n, t in inputs.items()}, keys.clone()
    results(call(keys, norm_first=norm_first), inputs)
    assert torch.equal(keys, keys_before)
    assert_same(inputs, before, 0.0)


# ---- gradients, torch.library, torch.compile ---------------------------------------------------


@pytest.mark.parametrize("kind", ["some", "none"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_gradcheck(kind, norm_first):
    inputs = make(2, 2, 3, 4, 3, torch.float64)
    keys = make_keys(kind, 2, 2, 3)
    leaves = [t.requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(
        lambda *t: call(keys, 2, eps=1e-3, norm_first=norm_first)(
            **dict(zip(inputs, t, strict=True))
        ),
        leaves,
    )


@pytest.mark.parametrize("wanted", [["tokens"], ["qkv_bias"], ["tokens", "norm2_weight"]])
def test_gradients_only_where_asked(wanted):
    inputs, keys = make(), make_keys("some")
    upstream = torch.randn(2, 3, 4, 12, device=DEVICE)
    every = results(call(keys), inputs, upstream)
    some = results(call(keys), inputs, upstream, wanted)
    assert_same(some, {n: every[n] for n in ("out", *wanted)}, 1e-6)


def test_no_graph_without_gradients():
    with torch.no_grad():
        assert not call(make_keys("all"))(**make()).requires_grad


def test_double_backward_is_an_error():
    inputs = make()
    tokens = inputs["tokens"].requires_grad_()
    loss = call(make_keys("all"))(**inputs).square().sum()
    (gradient,) = torch.autograd.grad(loss, tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()


def test_autocast_changes_nothing():
    """Neither around the call nor around the backward pass."""
    inputs, keys = make(), make_keys("some")
    upstream = torch.randn(2, 3, 4, 12, device=DEVICE)
    expected = results(call(keys), inputs, upstream)
    with torch.autocast(DEVICE.split(":")[0], torch.bfloat16):
        assert torch.equal(call(keys)(**inputs), expected["out"])
        assert_same(results(call(keys), inputs, upstream), expected, 0.0)


@pytest.mark.parametrize("norm_first", [False, True])
def test_calls_do_not_depend_on_the_number_of_matrices(norm_first):
    def run(matrices):
        inputs, keys = make(matrices=matrices), make_keys("some", matrices=matrices)
        return count_calls(lambda: results(call(keys, norm_first=norm_first), inputs))

    counts = [run(matrices) for matrices in (2, 12, 48)]
    assert counts[0] > 50  # the calls inside of the operator were seen
    assert counts == [counts[0]] * 3


def operator_arguments(**sizes):
    inputs = make(**sizes)
    tokens = inputs.pop("tokens")
    return tokens, list(inputs.values())


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["some", "none"])
def test_opcheck(kind, norm_first):
    tokens, parameters = operator_arguments()
    tokens, parameters = tokens.requires_grad_(), [p.requires_grad_() for p in parameters]
    arguments = (tokens, make_keys(kind), parameters, 3, 1e-5, norm_first)
    torch.library.opcheck(torch.ops.hal.hypernet_layer.default, arguments)


@pytest.mark.parametrize("norm_first", [False, True])
def test_opcheck_backward(norm_first):
    tokens, parameters = operator_arguments()
    options = (3, 1e-5, norm_first)
    _, *saved = torch.ops.hal.hypernet_layer(tokens, make_keys("some"), parameters, *options)
    arguments = (torch.randn_like(tokens), tokens, parameters, saved, *options)
    torch.library.opcheck(torch.ops.hal.hypernet_layer_backward.default, arguments)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, norm_first):
    torch._dynamo.reset()
    eager = call(make_keys("mixed"), norm_first=norm_first)
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    inputs, upstream = make(), torch.randn(2, 3, 4, 12, device=DEVICE)
    assert_same(results(compiled, inputs, upstream), results(eager, inputs, upstream), 1e-6)


# ---- bad arguments -----------------------------------------------------------------------------

BAD_PARAMETERS = [
    ({name: lambda t: t[..., 1:]}, ValueError, rf"{name} has shape .*, expected \(2, ")
    for name in PARAMETERS
]


@pytest.mark.parametrize(
    "changes, exception, message",
    [
        ({"tokens": None}, TypeError, r"tokens is a NoneType, expected a torch.Tensor"),
        ({"tokens": lambda t: t.long()}, TypeError, r"tokens has dtype torch.int64"),
        ({"tokens": lambda t: t[0]}, ValueError, r"tokens has shape \(3, 4, 12\), expected \[S"),
        ({"heads": 5}, ValueError, r"heads is 5, expected a divisor of H = 12"),
        ({"heads": 0}, ValueError, r"heads is 0, expected a divisor of H = 12"),
        ({"heads": -3}, ValueError, r"heads is -3, expected a divisor"),
        ({"keys": None}, TypeError, r"keys is a NoneType, expected"),
        ({"keys": lambda t: t.float()}, TypeError, r"keys has dtype torch.float32, expected"),
        ({"keys": lambda t: t[..., 1:]}, ValueError, r"keys has shape \(2, 3, 3\), expected \(2,"),
        ({"keys": lambda t: t.to("meta")}, ValueError, r"keys is on meta, expected cpu"),
        ({"up_weight": lambda t: t[1:]}, ValueError, r"up_weight has shape \(1, 20, 12\), exp"),
        ({"up_weight": lambda t: t[0, 0]}, ValueError, r"up_weight has shape \(12,\), expected"),
        ({"out_bias": None}, TypeError, r"out_bias is a NoneType, expected"),
        ({"out_bias": lambda t: t.double()}, TypeError, r"out_bias has dtype torch.float64, exp"),
        ({"out_bias": lambda t: t.to("meta")}, ValueError, r"out_bias is on meta, expected cpu"),
        *BAD_PARAMETERS,
    ],
)
def test_bad_arguments(changes, exception, message):
    arguments = {**make(), "keys": make_keys("all"), "heads": 3}
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    tokens, keys, heads = (arguments.pop(name) for name in ("tokens", "keys", "heads"))
    with pytest.raises(exception, match=message):
        hypernet_layer(tokens, keys, arguments, heads=heads)


def test_a_missing_parameter_is_named():
    inputs = make()
    tokens = inputs.pop("tokens")
    del inputs["norm1_bias"]
    with pytest.raises(KeyError, match=r"parameters lacks \['norm1_bias'\]"):
        hypernet_layer(tokens, make_keys("all"), inputs, heads=3)
