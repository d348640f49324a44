"""The hypernetwork of all layers at once against one matrix at a time, in float64."""

import copy

import pytest
import torch
from hypernet_reference import encoder_layer, generated
from hypothesis import given
from hypothesis import strategies as st
from ops.slot_cases import LAYERS, slots_of
from ops.util import DEVICE, EXACT, assert_same, bounds, count_calls, relative_error

from hal_kernels.nn.hypernet import BertBody, Hypernetwork
from hal_kernels.nn.layout import LayerSpec, Layout
from hal_kernels.nn.packed import Packed

ORDERS = pytest.mark.parametrize("norm_first", [False, True])


class Case:
    """A hypernetwork, random factors of `layers` (d_in, d_out, rank), and upstream gradients."""

    def __init__(self, layers, dtype=torch.float64, kept="some", seed=0, **options):
        torch.manual_seed(seed)
        specs = [LayerSpec(f"l{i}", *layer, layer[2], 1.0) for i, layer in enumerate(layers)]
        self.layout, self.slots = Layout(specs), slots_of(layers)
        widths = [[group.width for group in s.groups] for s in (self.layout.p, self.layout.q)]
        self.net = Hypernetwork(
            "bert", *widths, self.layout.rows, zero_output=False,
            **({"hidden": 8} | options),
        ).to(DEVICE, dtype)  # fmt: skip
        with torch.no_grad():
            for name, parameter in self.net.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        self.factors, self.base, self.upstream = (self.random(dtype) for _ in range(3))
        self.mask = torch.ones(self.layout.rows, device=DEVICE)
        if kept != "all":  # zeros and negative numbers are not kept; nor is all of one matrix
            self.mask[1::3], self.mask[2::7] = 0.0, -1.0
            first = 0 if kept == "none" else self.layout.offsets[-2]
            self.mask[first:] = 0.0

    def random(self, dtype):
        def normal(*shape):
            return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)

        p, q = (
            tuple(normal(g.rows, g.width) / g.width**0.5 for g in side.groups)
            for side in (self.layout.p, self.layout.q)
        )
        return Packed(p, normal(self.layout.rows), q)

    def by_hand(self, factors, mask, slots, base):
        return generated(self.net, self.layout, factors, mask, base)

    def results(self, forward=None):
        """Outputs and gradients of every parameter, by name."""
        self.net.zero_grad()
        forward = self.net if forward is None else forward
        out = forward(self.factors, self.mask, self.slots, self.base).tensors()
        torch.autograd.backward(out, self.upstream.tensors())
        gradients = {name: p.grad for name, p in self.net.named_parameters()}
        return {f"out{i}": t.detach() for i, t in enumerate(out)} | {
            name: gradient for name, gradient in gradients.items() if gradient is not None
        }

    def widened(self):
        """The same numbers in float64."""
        wide = copy.deepcopy(self)
        wide.net.double()
        for name in ("factors", "base", "upstream"):
            packed = getattr(wide, name)
            setattr(wide, name, packed.like([t.double() for t in packed.tensors()]))
        return wide


def check(case, bound=None):
    """By relative error. Rounding that a LayerNorm or a small difference amplifies, plain steps
    have as well: as in tests/ops, twice theirs is allowed on top."""
    wide = case.widened()
    dtype, expected = case.factors.lam.dtype, wide.results(wide.by_hand)
    if bound is None:
        plain = case.results(case.by_hand)
        bound = bounds(dtype, plain, expected)
        if dtype in EXACT:
            more = {name: 2 * relative_error(plain[name], expected[name]) for name in expected}
            bound = {name: 2 * EXACT[dtype] + error for name, error in more.items()}
    assert_same(case.results(), expected, bound)


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(
    ("kept", "dtype", "norm_first"),
    [
        ("all", torch.float64, False), ("some", torch.float64, True),
        ("none", torch.float64, False), ("some", torch.float32, False),
    ],
)  # fmt: skip
def test_ragged_ranks_and_masks(norm_first, dtype, kept, layers):
    check(Case(layers, dtype, kept, norm_first=norm_first))


@ORDERS
def test_sixteen_bits(norm_first):
    check(Case(LAYERS["unequal"], torch.bfloat16, norm_first=norm_first))


@pytest.mark.parametrize("hidden", [None, 64])
@ORDERS
def test_real_sizes(norm_first, hidden):
    """The paper's hidden 312 with 12 heads: sums are up to 1200 terms long."""
    layers = [(40, 24, 5), (24, 40, 3), (40, 40, 5)]
    check(Case(layers, torch.float32, norm_first=norm_first, hidden=hidden))


@given(st.data())
def test_random_shapes(data):
    width, rank = st.integers(1, 4), st.integers(0, 4)
    layers = data.draw(st.lists(st.tuples(width, width, rank), min_size=1, max_size=5))
    if not any(r for *_, r in layers):
        layers[0] = (*layers[0][:2], 2)
    case = Case(
        layers, seed=data.draw(st.integers(0, 2**32)), norm_first=data.draw(st.booleans()),
        hidden=4 * data.draw(st.integers(1, 4)), kept="all",
    )  # fmt: skip
    flags = st.lists(st.sampled_from([1.0, 0.0]), min_size=len(case.mask), max_size=len(case.mask))
    case.mask = torch.tensor(data.draw(flags), device=DEVICE)
    check(case, 1e-9)  # LayerNorm over few elements amplifies


@ORDERS
def test_the_reference_is_torch_s_own_encoder_layer(norm_first):
    """The formula itself, against an implementation that shares no line with it."""
    body = BertBody(norm_first, hidden=12).to(DEVICE, torch.float64)
    own = {n: torch.randn_like(p) for n, p in body.named_parameters()}
    body.load_state_dict(own)
    layer = torch.nn.TransformerEncoderLayer(
        12, 4, 48, dropout=0.0, activation="gelu", layer_norm_eps=1e-12, batch_first=True,
        norm_first=norm_first,
    ).to(DEVICE, torch.float64)  # fmt: skip
    names = {
        "self_attn.in_proj_": "qkv_", "self_attn.out_proj.": "out_", "linear1.": "up_",
        "linear2.": "down_", "norm1.": "norm1_", "norm2.": "norm2_",
    }  # fmt: skip
    kinds = ("weight", "bias")
    layer.load_state_dict({f"{t}{k}": own[f"{o}{k}"][1] for t, o in names.items() for k in kinds})
    tokens = torch.randn(5, 12, dtype=torch.float64, device=DEVICE)
    kept = torch.tensor([True, False, True, True, False], device=DEVICE)
    expected = layer(tokens[None], src_key_padding_mask=~kept[None])[0]
    assert relative_error(encoder_layer(body, 1, tokens, kept), expected) < 1e-12


@pytest.mark.parametrize("norm_first, kept", [(False, "some"), (True, "none")])
def test_gradcheck(norm_first, kept):
    case = Case([(2, 3, 2), (3, 3, 1)], kept=kept, norm_first=norm_first, hidden=4)
    names, parameters = zip(*case.net.named_parameters(), strict=True)

    def function(*tensors):
        given = (case.factors, case.mask, case.slots, case.base)
        named = dict(zip(names, tensors, strict=True))
        return tuple(torch.func.functional_call(case.net, named, given).tensors())

    # against a random direction; test_ragged_ranks_and_masks compares every gradient
    assert torch.autograd.gradcheck(function, parameters, fast_mode=True)


@ORDERS
def test_matrices_and_sets_do_not_see_each_other(norm_first):
    body = BertBody(norm_first, hidden=12).to(DEVICE)
    tokens, keys = torch.randn(3, 3, 4, 12, device=DEVICE), torch.ones(3, 3, 4, device=DEVICE) > 0
    before = body(tokens, keys)
    tokens[0, 1] += torch.randn(4, 12, device=DEVICE)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter[1] += 0.1
    changed = (body(tokens, keys) != before).flatten(2).any(-1)
    assert changed.tolist() == [[False, True, False], [True] * 3, [False] * 3]


@ORDERS
def test_large_scores_do_not_overflow(norm_first):
    case = Case(LAYERS["unequal"], torch.float32, norm_first=norm_first)
    case.net.body.qkv_weight.data.mul_(1e5)
    assert all(t.isfinite().all() for t in case.results().values())


@pytest.mark.parametrize("layers", ["equal", "unequal"])
def test_meta_device(layers):
    """Tensors without data cannot be read: the host waits for no device."""
    case = Case(LAYERS[layers])
    rows, offsets = ([t.to("meta") for t in ts] for ts in case.slots[:2])
    slots = case.slots._replace(rows=tuple(rows), offsets=tuple(offsets))
    factors, base = (f.like([t.to("meta") for t in f.tensors()]) for f in (case.factors, case.base))
    made = case.net.to("meta")(factors, case.mask.to("meta"), slots, base)
    assert [t.shape for t in made.tensors()] == [t.shape for t in factors.tensors()]


@pytest.mark.parametrize("ranks", [(2, 2), (2, 1)])
@ORDERS
def test_calls_do_not_depend_on_the_number_of_layers(norm_first, ranks):
    def calls(depth):
        case = Case([(4, 4, rank) for rank in ranks] * depth, norm_first=norm_first)
        return count_calls(case.results)

    assert calls(1) == calls(12)
