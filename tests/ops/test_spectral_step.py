"""The spectral step of all layers against its formula, one layer after the other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hal_kernels.ops.spectral_step import Layer, batched, msign, spectral_step_reference

from .spectral_cases import (
    EQUAL,
    NAMES,
    RAGGED,
    make,
    moments,
    off_orthonormal,
    orthonormal,
    update,
)
from .util import assert_same, count_calls, relative_error

BOUND = {torch.float32: 2e-6, torch.float64: 1e-11}
LAYERS = {"equal": EQUAL, "ragged": RAGGED, "alone": [(5, 7, 2)], "one": [(1, 1, 1), (3, 1, 1)]}


def check(case, bound=None, **options):
    """One step against the reference in float64; returns the candidates."""
    dtype = case.lam.dtype
    bound, found = bound or BOUND[dtype], case.step(**options)
    for i, (*_, rank) in enumerate(case.layers):
        ref, candidates = case.expected(i, **options)
        out = case.layer(i)
        assert_same({"lam": out.lam, "dw": update(out)}, {"lam": ref.lam, "dw": update(ref)}, bound)
        assert_same(moments(out), moments(ref), 4 * bound)
        assert off_orthonormal(out.p) <= bound and off_orthonormal(out.q) <= bound
        assert_same({"": found[i, : 2 * rank]}, {"": candidates}, bound)
        assert (found[i, 2 * rank :] == 0).all()
    return found


def take(case, tensors):
    """Set what steps change."""
    for to, tensor in zip(case.tensors(), tensors, strict=True):
        to.copy_(tensor)


def check_updates(case, bound, orthonormal_to=1e-6, **options):
    """One step: ΔW as the reference's, P and Q orthonormal. The reference's (layer, candidates)."""
    case.step(**options)
    expected = [case.expected(i, **options) for i in range(len(case.layers))]
    for i, (ref, _) in enumerate(expected):
        out = case.layer(i)
        assert_same({"dw": update(out)}, {"dw": update(ref)}, bound)
        assert off_orthonormal(out.p) <= orthonormal_to and off_orthonormal(out.q) <= orthonormal_to
    return expected


def some_of(rows):
    """A mask with ones and zeros, and a number below zero, which does not keep either."""
    return torch.tensor([1.0, 0.0, 2.0, 1.0, -1.0]).repeat(rows // 5 + 1)[:rows]


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_the_reference(dtype, layers):
    check(make(LAYERS[layers], dtype), eta=0.3, scaling=2.5, beta=0.8, decay=0.9)
    check(make(LAYERS[layers], torch.float64, lam="equal"), eta=1e-3)


@pytest.mark.parametrize("rank", [1, 2, 4, 13, 16, 17, 64, 128])
def test_any_rank(rank):
    """Up to half of a width, above it, and as high as it is."""
    check(make([(2 * rank, rank + 1, rank), (rank, 3 * rank, rank)]), 2e-5, eta=0.1)


@pytest.mark.parametrize("layers", ["equal", "ragged"])
def test_masks(layers):
    """ΔW is that of Λ⊙mask; pruned rows end with Λ = 0, orthonormal to the others."""
    rows = sum(rank for *_, rank in LAYERS[layers])
    case = make(LAYERS[layers], torch.float64, mask=some_of(rows))
    check(case, eta=0.3, scaling=0.5)
    assert (case.lam[case.mask <= 0] == 0).all()
    everything = make(LAYERS[layers], torch.float64, mask=torch.zeros(rows))
    check(everything, eta=0.3)


def test_a_number_for_each_layer():
    numbers = {n: torch.rand(len(EQUAL)) + 0.5 for n in ("eta", "scaling", "decay")}
    check(make(dtype=torch.float64), **numbers)
    alike = [make(dtype=torch.float64, momentum=False) for _ in range(2)]
    alike[1].give({n: alike[0].before[n] for n in ("gradient_p", "gradient_q")})
    take(alike[1], alike[0].tensors())
    alike[0].step(eta=0.25)
    alike[1].step(eta=torch.tensor(0.25))
    assert all(torch.equal(*pair) for pair in zip(*(c.tensors() for c in alike), strict=True))


def test_is_the_best_matrix_of_its_rank():
    """From the definitions alone, with dense matrices."""
    case = make([(14, 11, 4)], torch.float64)
    old = case.layer(0)
    p, lam, q, m_p, m_q = (t.clone() for t in old)
    g_p, g_q = case.packed["gradient_p"][0], case.packed["gradient_q"][0]
    m_p, m_q = 0.9 * m_p + g_p, 0.9 * m_q + g_q
    ahead = 0.9 * m_p + g_p, 0.9 * m_q + g_q
    o_p, o_q = (torch.linalg.svd(v, full_matrices=False) for v in ahead)
    o_p, o_q = (left @ right for left, _, right in (o_p, o_q))
    aim = 2.0 * q.t() @ lam.diag() @ p - 0.2 * (o_q.t() @ p + q.t() @ o_p)
    left, values, right = torch.linalg.svd(aim)
    best = left[:, :4] @ values[:4].diag() @ right[:4]
    (candidates,) = case.step(eta=0.4, scaling=2.0)
    new = case.layer(0)
    assert relative_error(update(new, 2.0), best) <= 1e-12
    assert relative_error(candidates, values[:8]) <= 1e-12
    assert (new.lam >= 0).all() and (new.lam.diff() <= 0).all()
    assert relative_error(new.momentum_p, (new.q @ q.t()) @ m_p) <= 1e-12
    assert relative_error(new.momentum_q, (new.p @ p.t()) @ m_q) <= 1e-12


def test_reference_of_a_momentum():
    """msign has singular values of 1 and 0, and its momentum's directions."""
    m = orthonormal(4, 9) * torch.tensor([[3.0], [1e-3], [1e-9], [0.0]])
    sign = msign(orthonormal(4, 4) @ m)
    assert relative_error(torch.linalg.svdvals(sign), torch.tensor([1.0, 1, 0, 0])) <= 1e-9
    assert relative_error(msign(2.0**9 * m), msign(m)) <= 1e-12


@pytest.mark.parametrize("layers", ["equal", "ragged"])
def test_first_step(layers):
    """Λ = 0 and no momentum: the singular values are η/2, and P and Q turn into the gradient's."""
    case = make(LAYERS[layers], torch.float64, lam="zeros", momentum=False)
    case.step(eta=0.2)
    for i, (d_in, d_out, rank) in enumerate(case.layers):
        layer, (ref, _) = case.layer(i), case.expected(i, eta=0.2)
        assert relative_error(layer.lam, ref.lam) <= 1e-9
        assert off_orthonormal(layer.p) <= 1e-9 and off_orthonormal(layer.q) <= 1e-9
        if 2 * rank <= min(d_in, d_out):
            assert ((layer.lam >= 0.05) & (layer.lam <= 0.2 + 1e-9)).all()


@pytest.mark.parametrize("rank_of_gradient", [0, 1, 2])
@pytest.mark.parametrize("side", ["gradient_p", "gradient_q"])
@pytest.mark.parametrize("lam", ["random", "zeros"])
def test_rank_deficient_gradients(lam, side, rank_of_gradient):
    """Directions there are none of do not turn up: fewer candidates, and frames stay frames."""
    case = make(EQUAL, lam=lam, momentum=False)
    own = [t.clone() for t in case.before[side]]
    for t in own:
        t[rank_of_gradient:] = t[:1].clone() if rank_of_gradient == 1 else 0
    case.before[side] = own
    case.give({side: own})
    check_updates(case, 5e-6, eta=0.2)


@pytest.mark.parametrize("lam", ["random", "zeros"])
def test_gradients_inside_the_span_of_the_factors(lam):
    """O adds no direction to P: with Λ = 0 there are r candidates, or fewer."""
    case = make(EQUAL, lam=lam, momentum=False)
    for name in ("p", "q"):
        turned = [orthonormal(len(t), len(t)).float() @ t for t in case.before[name]]
        case.before[f"gradient_{name}"] = turned
        case.give({f"gradient_{name}": turned})
    for _, candidates in check_updates(case, 1e-5, eta=0.2):
        assert (candidates[3:] < 1e-6).all()


def test_a_step_that_cancels_a_layer():
    """ΔW⁺ = 0 exactly: all of P and Q is free, and stays orthonormal."""
    case = make([(16, 12, 3)], torch.float64, lam="equal", momentum=False)
    case.give({f"gradient_{n}": case.before[n] for n in ("p", "q")})
    (candidates,) = case.step(eta=1.0)
    assert (candidates < 1e-12).all() and (case.lam.abs() < 1e-12).all()
    assert off_orthonormal(case.packed["p"][0]) <= 1e-10
    assert off_orthonormal(case.packed["q"][0]) <= 1e-10


@pytest.mark.parametrize("what", ["zeros", "nan", "inf", "momentum", "factor", "lam", "eta"])
@pytest.mark.parametrize("layers", ["equal", "ragged"])
def test_layers_that_stay_as_they_are(layers, what):
    """Bit for bit, momentum too; the others move as if these were not there."""
    case, eta = make(LAYERS[layers]), torch.full((len(LAYERS[layers]),), 0.1)
    still = [0, 4] if layers == "ragged" else [1]
    for i in still:
        if what == "zeros":
            for n in ("gradient_p", "gradient_q"):
                case.before[n][i] = torch.zeros_like(case.before[n][i])
        elif what == "eta":
            eta[i] = float("nan")
        else:
            name = {"momentum": "momentum_q", "factor": "p", "lam": "lam"}.get(what, "gradient_q")
            case.before[name][i] = case.before[name][i].clone()
            bad = {"inf": -float("inf"), "momentum": float("inf")}.get(what, float("nan"))
            case.before[name][i].view(-1)[0] = bad
    case.packed = {n: case.pack(n, own) for n, own in case.before.items() if n != "lam"}
    case.lam = torch.cat(case.before["lam"])
    candidates = case.step(eta=eta)
    for i in range(len(case.layers)):
        out = case.layer(i)
        if i in still:
            own = [case.before[n][i] for n in Layer._fields]
            assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(out, own, strict=True))
            pairs = zip(out, own, strict=True)
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
            if what == "zeros":
                values = own[1].abs().sort(descending=True).values
                assert torch.equal(candidates[i, : len(values)], values)
        else:
            ref, _ = case.expected(i, eta=0.1)
            assert_same({"dw": update(out)}, {"dw": update(ref)}, BOUND[torch.float32])


def test_one_gradient_is_enough():
    """Where K is zero and L is not, there is a step; None stands for zeros."""
    case, other = make(), make()
    take(other, case.tensors())
    other.give({"gradient_p": case.before["gradient_p"]})
    for tensor in (*case.packed["gradient_q"], *other.packed["gradient_q"]):
        tensor.zero_()
    other.packed["gradient_q"] = [None] * len(other.packed["gradient_q"])
    before = case.lam.clone()
    case.step(eta=0.1)
    other.step(eta=0.1)
    assert not torch.equal(case.lam, before)
    assert all(torch.equal(a, b) for a, b in zip(case.tensors(), other.tensors(), strict=True))


def test_equal_inputs_give_equal_bits_and_gradients_any_scale():
    """Those that c·L and c·K have for a power of two, momentum being theirs."""
    torch.manual_seed(5)
    runs = []
    for scale in (1.0, 1.0, 2.0**-20):
        torch.manual_seed(6)
        case = make(RAGGED)
        for name in ("momentum_p", "momentum_q", "gradient_p", "gradient_q"):
            for tensor in case.packed[name]:
                tensor.mul_(scale)
        case.step(eta=0.1)
        runs.append([case.lam, *case.packed["p"], *case.packed["q"]])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_rows_keep_their_signs():
    """A small step changes each row a little: none is turned round, nor changes its place."""
    case = make(dtype=torch.float64)
    for i, lam in enumerate(case.lam.split(3)):
        lam.copy_(torch.tensor([3.0, 2.0, 1.0]) + i)
    before = [t.clone() for t in case.tensors()]
    case.step(eta=1e-6)
    for now, then in zip(case.tensors()[:5], before[:5], strict=True):
        assert relative_error(now, then) <= 1e-5


@pytest.mark.parametrize("steps", [50, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layers", ["equal", "ragged"])
def test_factors_stay_orthonormal(layers, steps):
    case = make(LAYERS[layers], lam="zeros", momentum=False)
    for _ in range(steps):
        for tensor in (*case.packed["gradient_p"], *case.packed["gradient_q"]):
            tensor.normal_()
        case.step(eta=0.05)
    rows = (f for i in range(len(case.layers)) for f in case.layer(i)[0:3:2])
    assert all(off_orthonormal(f) <= 1e-5 for f in rows)
    assert case.lam.isfinite().all()


def test_factors_become_orthonormal():
    """What rounding or a user did to them is measured, not assumed away."""
    case = make(dtype=torch.float64)
    for tensor in (*case.packed["p"], *case.packed["q"]):
        tensor.add_(torch.randn_like(tensor), alpha=0.02)
    old = [update(case.layer(i)) for i in range(len(EQUAL))]
    case.step(eta=1e-9)
    for i, dw in enumerate(old):
        assert relative_error(update(case.layer(i)), dw) <= 1e-8
        assert off_orthonormal(case.layer(i).p) <= 1e-11


@pytest.mark.parametrize("layers", ["equal", "ragged"])
def test_the_gain_follows_the_mean_cosine(layers):
    """The step is the one of η times the gain that this step ends with."""
    case = make(LAYERS[layers], torch.float64)
    case.before["gradient_p"][1].zero_()
    case.before["gradient_q"][2][0, 0] = torch.nan
    case.give({n: case.before[n] for n in ("gradient_p", "gradient_q")})
    gain = torch.tensor(0.3, dtype=torch.float64)
    expected = case.expected_gain(0.3, 7.0)
    assert abs(expected - 0.3) > 0.01
    case.step(eta=0.2, log_gain=gain, gain_rate=7.0)
    assert relative_error(gain, expected) <= 1e-12
    ref, _ = case.expected(0, eta=0.2 * expected.exp().item())
    assert_same({"dw": update(case.layer(0))}, {"dw": update(ref)}, 1e-11)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_gain_has_an_end(sign):
    """Gradients that go on, or turn about, move it by the whole rate, to 2.5 at most."""
    case, gain = make(dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for name in ("p", "q"):
        for momentum, gradient in zip(
            case.packed[f"momentum_{name}"], case.packed[f"gradient_{name}"], strict=True
        ):
            momentum.copy_(sign * gradient)
    before = [t.clone() for t in case.tensors()]
    for rate, expected in ((1.5, 1.5), (1.5, 2.5)):
        take(case, before)
        case.step(eta=0.1, log_gain=gain, gain_rate=rate)
        assert gain.item() == pytest.approx(sign * expected)


def test_no_momentum_and_no_gradients_leave_the_gain():
    case, gain = make(momentum=False), torch.tensor(0.25)
    case.step(eta=0.1, log_gain=gain)
    case.give({n: [torch.zeros_like(t) for t in case.before[n]] for n in NAMES[4:]})
    case.step(eta=0.1, log_gain=gain)
    assert gain.item() == 0.25


def test_changes_are_noticed():
    """Autograd and caches look at tensors' versions; parameters may be changed too."""
    case = make()
    versions = [t._version for t in case.tensors()]
    case.packed["p"] = [torch.nn.Parameter(t) for t in case.packed["p"]]
    case.step(eta=0.1)
    assert all(t._version > v for t, v in zip(case.tensors(), versions, strict=True))


@pytest.mark.parametrize("layers", ["equal", "ragged"])
def test_opcheck(layers):
    case = make(LAYERS[layers])
    n, slots = len(case.layers), case.slots
    p, q, *rest = (case.packed[name] for name in NAMES)
    numbers = [torch.full((n,), value, dtype=torch.float64) for value in (0.1, 1.0, 1.0)]
    where = (list(slots.rows), list(slots.offsets), *slots.counts, *slots.sizes, slots.max_rank)
    for gain in (None, torch.tensor(0.3)):
        options = some_of(len(case.lam)), *numbers, gain, 0.9, 0.5
        arguments = (p, case.lam, q, *rest, *options, *where)
        torch.library.opcheck(torch.ops.hal.spectral_step_.default, arguments)


@pytest.mark.parametrize("layers", ["equal", "ragged"])
def test_blocks_of_matrices(monkeypatch, layers):
    """Two matrices at a time, or one that is more than a block."""
    for block in (300, 1):
        monkeypatch.setattr(batched, "BLOCK", block)
        check(make(LAYERS[layers] * 3, torch.float64), eta=0.3)


def test_many_layers_take_as_many_calls_as_few():
    counts = []
    for layers in (EQUAL, EQUAL * 5):
        case = make(layers)
        counts.append(count_calls(lambda: case.step(eta=0.1)))  # noqa: B023
    assert counts[0] == counts[1]


def test_no_rows_and_no_layers():
    assert make([(4, 5, 0), (3, 3, 0)]).step(eta=0.1).shape == (2, 0)


@given(st.data())
def test_random_layers(data):
    """Never longer than η, always orthonormal, always as the reference."""
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    layers = []
    for _ in range(data.draw(st.integers(1, 4))):
        d_in, d_out = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
        layers.append((d_in, d_out, data.draw(st.integers(0, min(d_in, d_out)))))
    rows = sum(rank for *_, rank in layers)
    masked = data.draw(st.booleans())
    lam = data.draw(st.sampled_from(["random", "zeros", "equal"]))
    mask = (torch.rand(rows) > 0.4).float() if masked else None
    case = make(layers, torch.float64, lam, mask)
    eta = data.draw(st.sampled_from([1e-4, 0.1, 3.0]))
    old = []
    for i in range(len(layers)):
        layer = case.layer(i)
        kept = 1.0 if mask is None else case.own_mask(i)
        old.append(update(layer._replace(lam=layer.lam * kept)))
    case.step(eta=eta)
    for i, dw in enumerate(old):
        new, (ref, _) = case.layer(i), case.expected(i, eta=eta)
        if layers[i][2] == 0:
            continue
        assert off_orthonormal(new.p) <= 1e-9 and off_orthonormal(new.q) <= 1e-9
        assert (update(new) - update(ref)).abs().max() <= 1e-9
        # As long again where directions are pruned: what the best matrix of their rank leaves out.
        longest = eta if mask is None or (case.own_mask(i) > 0).all() else 2 * eta
        assert torch.linalg.matrix_norm(update(new) - dw, 2) <= longest * (1 + 1e-9)


def change(name, to):
    return lambda case: case.packed.update({name: to(case.packed[name])})


BAD = [
    (change("p", lambda p: p[:1]), ValueError, r"p is 1 of them, expected 2 tensors: one a width"),
    (change("q", lambda q: q[0]), ValueError, r"q is Tensor, expected 3 tensors"),
    (change("p", lambda p: [p[0][1:], p[1]]), ValueError, r"p\[0\] has shape \(5, 16\), expected"),
    (change("q", lambda q: [t.long() for t in q]), TypeError, r"q\[0\] has dtype torch.int64"),
    (change("q", lambda q: [t.double() for t in q]), TypeError, r"q\[0\] .* \(the dtype of lam"),
    (change("momentum_p", lambda m: m[:1]), ValueError, r"momentum_p is 1 of them, expected 2"),
    (change("momentum_q", lambda m: [t.double() for t in m]), TypeError, r"momentum_q\[0\] has dt"),
    (change("gradient_p", lambda g: [t[1:] for t in g]), ValueError, r"gradient_p\[0\] has shape"),
    (change("gradient_q", lambda g: [t.to("meta") for t in g]), ValueError, r"gradient_q\[0\] is"),
    (lambda case: setattr(case, "mask", torch.ones(3)), ValueError, r"mask has shape \(3,\)"),
    (lambda case: setattr(case, "lam", case.lam[1:]), ValueError, r"lam has shape \(11,\)"),
    (lambda case: setattr(case, "slots", None), TypeError, r"slots is a NoneType"),
]  # fmt: skip


@pytest.mark.parametrize("breaking, exception, message", BAD)
def test_bad_tensors(breaking, exception, message):
    case = make()
    breaking(case)
    with pytest.raises(exception, match=message):
        case.step(eta=0.1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": 1.0}, r"beta is 1.0, expected a number in \[0, 1\)"),
        ({"eta": float("nan")}, r"eta is nan, expected a finite number"),
        ({"scaling": 0.0}, r"scaling is 0.0, expected a finite number"),
        ({"eta": torch.ones(3)}, r"eta has shape \(3,\), expected \(4,\) \(one a layer\)"),
        ({"decay": torch.ones(4, device="meta")}, r"decay is on meta, expected cpu"),
        ({"log_gain": torch.zeros(4)}, r"log_gain has shape \(4,\), expected \(\)"),
        ({"log_gain": torch.zeros((), device="meta")}, r"log_gain is on meta, expected cpu"),
        ({"gain_rate": -1.0}, r"gain_rate is -1.0, expected a finite number"),
    ],
)
def test_bad_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        make().step(**{"eta": 0.1, **options})


def test_the_reference_is_for_any_precision():
    own = make([(9, 8, 3)]).before
    layer = Layer(*(own[n][0] for n in Layer._fields))
    out, candidates = spectral_step_reference(
        layer, own["gradient_p"][0], own["gradient_q"][0], eta=0.1
    )
    assert out.p.dtype == candidates.dtype == torch.float32
