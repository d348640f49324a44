"""Importance of singular directions, and pruning of the least important."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hal_kernels.ops import importance_scores, prune_smallest, update_importance_

from .util import DEVICE, EXACT, assert_same, count_calls, laid_out, relative_error

NAN, INF = math.nan, math.inf
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def scores_of(*numbers, dtype=torch.float32):
    return torch.tensor(numbers, dtype=dtype, device=DEVICE)


# ---- prune_smallest ------------------------------------------------------------------------


def pruned_by_hand(scores, count):
    """The mask, by sorting (is NaN, score, index) on the host."""
    values = scores.tolist()
    order = sorted(range(len(values)), key=lambda i: (math.isnan(values[i]), values[i], i))
    return [float(i not in order[:count]) for i in range(len(values))]


@pytest.mark.parametrize(
    "scores, count, expected",
    [
        ([3.0, 1.0, 2.0], 0, [1, 1, 1]),
        ([3.0, 1.0, 2.0], 1, [1, 0, 1]),
        ([3.0, 1.0, 2.0], 3, [0, 0, 0]),
        ([2.0, 1.0, 1.0, 1.0], 2, [1, 0, 0, 1]),  # ties: the lower index goes first
        ([0.0] * 5, 3, [0, 0, 0, 1, 1]),
        ([0.0, -0.0, 0.0], 1, [0, 1, 1]),
        ([-0.0, 0.0, -1.0], 2, [0, 1, 0]),
        ([NAN, 1.0, INF], 2, [1, 0, 0]),  # NaN goes last, after inf
        ([NAN, INF, -NAN, NAN], 3, [0, 0, 0, 1]),  # whatever its sign
        ([-NAN, NAN, 1.0], 2, [0, 1, 0]),
        ([1.0, -INF, -2.0, -INF], 1, [1, 0, 1, 1]),  # -inf goes first
        ([-1.0, -3.0, 0.0], 1, [1, 0, 1]),  # smallest, not smallest in magnitude
        ([1e-45, -1e-45, 0.0, 3e38, INF], 4, [0, 0, 0, 0, 1]),
        ([], 0, []),
    ],
)
def test_prune_by_hand(scores, count, expected):
    assert prune_smallest(scores_of(*scores), count).tolist() == expected
    assert pruned_by_hand(scores_of(*scores), count) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 300, 5000])
def test_prune_of_many_ties(size, dtype):
    """Scores rounded to few values have many ties, some of them at the border."""
    scores = (torch.randn(size) * 4).round().to(DEVICE, dtype)
    scores[torch.rand(size) < 0.1] = NAN
    scores[torch.rand(size) < 0.1] = -INF
    before = scores.clone()
    for count in {0, 1, size // 3, size // 2, size - 1, size}:
        mask = prune_smallest(scores, count)
        assert mask.dtype == dtype
        assert mask.tolist() == pruned_by_hand(scores, count)
        assert (mask == 0).sum() == count
    assert torch.equal(scores.nan_to_num(3.5), before.nan_to_num(3.5))


@given(st.data())
def test_prune_of_any_scores(data):
    number = st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, NAN, -NAN, INF, -INF]), st.floats(width=32, allow_nan=True)
    )
    scores = scores_of(*data.draw(st.lists(number, max_size=12)))
    count = data.draw(st.integers(0, len(scores)))
    assert prune_smallest(scores, count).tolist() == pruned_by_hand(scores, count)


@pytest.mark.parametrize("layout", ["sliced", "expanded"])
def test_prune_of_any_layout(layout):
    scores = laid_out(torch.randn(9, device=DEVICE), layout)
    if layout == "expanded":
        scores = scores[:1].expand(9)
    assert prune_smallest(scores, 4).tolist() == pruned_by_hand(scores, 4)


def test_prune_has_no_derivative():
    scores = torch.randn(5, requires_grad=True, device=DEVICE)
    assert not prune_smallest(scores, 2).requires_grad


def test_prune_compiles():
    torch._dynamo.reset()
    compiled = torch.compile(prune_smallest, backend="aot_eager", fullgraph=True)
    scores = scores_of(3.0, 1.0, NAN, 1.0)
    for count in range(5):
        assert torch.equal(compiled(scores, count), prune_smallest(scores, count))


@pytest.mark.parametrize(
    "scores, count, exception, message",
    [
        (torch.ones(2, 2), 1, ValueError, r"scores has shape \(2, 2\), expected \[R\]"),
        (torch.tensor(1.0), 0, ValueError, r"scores has shape \(\), expected \[R\]"),
        (torch.ones(4), 5, ValueError, r"count is 5, expected 0 to 4"),
        (torch.ones(4), -1, ValueError, r"count is -1, expected 0 to 4"),
        (torch.ones(0), 1, ValueError, r"count is 1, expected 0 to 0"),
        (torch.ones(4), 1.5, TypeError, r"count is 1.5, expected an int"),
    ],
)
def test_prune_bad_arguments(scores, count, exception, message):
    with pytest.raises(exception, match=message):
        prune_smallest(scores, count)


# ---- update_importance_ ----------------------------------------------------------------------

SHAPES = [(4, 3, 5), (6,), (1, 2, 1), (0, 7), (33, 70)]


def lists(dtype=torch.float32, shapes=SHAPES, factors=None):
    """(importance, uncertainty, values, gradients), all of them random."""
    state = [[torch.rand(s, device=DEVICE).to(dtype) for s in shapes] for _ in range(2)]
    moving = [[torch.randn(s).to(DEVICE, factors or dtype) for s in shapes] for _ in range(2)]
    return *state, *moving


def updated(importance, uncertainty, value, gradient, beta1, beta2):
    """The formula for one tensor, in float64, with weights of its own for every step of the sum."""
    importance, uncertainty, value, gradient = (
        t.double() for t in (importance, uncertainty, value, gradient)
    )
    sensitivity = value.abs() * gradient.abs()
    smooth = torch.stack([importance, sensitivity], -1) @ sensitivity.new_tensor([beta1, 1 - beta1])
    apart = torch.maximum(sensitivity, smooth) - torch.minimum(sensitivity, smooth)
    return smooth, torch.stack([uncertainty, apart], -1) @ apart.new_tensor([beta2, 1 - beta2])


def test_importance_follows_adalora_step_by_step():
    """AdaLoRA's equations 8 to 10, one number at a time, over several steps from zero."""
    beta1, beta2 = 0.8, 0.6
    importance, uncertainty = torch.zeros(3, device=DEVICE), torch.zeros(3, device=DEVICE)
    smooth, unsure = [0.0] * 3, [0.0] * 3
    for _ in range(5):
        value, gradient = torch.randn(3, device=DEVICE), torch.randn(3, device=DEVICE)
        update_importance_(
            [importance], [uncertainty], [value], [gradient], beta1=beta1, beta2=beta2
        )
        for i in range(3):
            sensitivity = abs(value[i].item() * gradient[i].item())
            smooth[i] = beta1 * smooth[i] + (1 - beta1) * sensitivity
            unsure[i] = beta2 * unsure[i] + (1 - beta2) * abs(sensitivity - smooth[i])
        # |I − Ī| cancels: its error is that of I, 2⁻²³ of numbers ten times its size.
        assert importance.tolist() == pytest.approx(smooth, rel=2e-6)
        assert uncertainty.tolist() == pytest.approx(unsure, rel=2e-6)


@pytest.mark.parametrize("betas", [(0.85, 0.85), (0.3, 0.01)])
@pytest.mark.parametrize("state", DTYPES)
@pytest.mark.parametrize("factors", DTYPES)
def test_importance_matches_the_formula(state, factors, betas):
    """Products of small 16-bit numbers do not underflow: they are formed in the state's float32."""
    importance, uncertainty, values, gradients = lists(state, factors=factors)
    if state.itemsize > 2:  # sums of 16 bits would lose such small terms
        for tensor in (*values, *gradients):
            tensor.mul_(1e-4)
        importance, uncertainty = ([t * 1e-8 for t in ts] for ts in (importance, uncertainty))
    pairs = zip(importance, uncertainty, values, gradients, strict=True)
    expected = [updated(*tensors, *betas) for tensors in pairs]
    update_importance_(importance, uncertainty, values, gradients, beta1=betas[0], beta2=betas[1])
    bound = EXACT[state] if state in EXACT else 2 * torch.finfo(state).eps
    for *found, wanted in zip(importance, uncertainty, expected, strict=True):
        for got, ref in zip(found, wanted, strict=True):
            assert got.dtype == state and relative_error(got, ref) <= bound


def test_importance_changes_its_state_alone():
    """Also where values are the optimizer's parameters: no graph is recorded."""
    importance, uncertainty, values, gradients = lists()
    before = [t.clone() for t in values + gradients]
    pointers = [t.data_ptr() for t in importance + uncertainty]
    values = [v.requires_grad_() for v in values]
    assert update_importance_(importance, uncertainty, values, gradients) is None
    assert all(torch.equal(a, b) for a, b in zip(values + gradients, before, strict=True))
    assert [t.data_ptr() for t in importance + uncertainty] == pointers
    assert not any(t.requires_grad for t in importance + uncertainty)


def test_importance_of_views():
    """State and factors may be views: of one packed buffer, transposed, or expanded."""
    plain = lists(shapes=[(4, 3), (5, 2)])
    layouts = ("sliced", "transposed", "transposed", "expanded")
    viewed = [[laid_out(t, layout) for t in ts] for ts, layout in zip(plain, layouts, strict=True)]
    plain = [[t.contiguous() for t in ts] for ts in viewed]
    update_importance_(*plain)
    update_importance_(*viewed)
    for got, wanted in zip(viewed[:2], plain[:2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_importance_compiles():
    torch._dynamo.reset()
    eager = lists()
    compiled = [[t.clone() for t in ts] for ts in eager]
    torch.compile(update_importance_, backend="aot_eager", fullgraph=True)(*compiled)
    update_importance_(*eager)
    for got, wanted in zip(compiled[:2], eager[:2], strict=True):
        assert_same(dict(enumerate(got)), dict(enumerate(wanted)), 1e-6)


def test_importance_bad_arguments():
    one, two = torch.ones(3), torch.ones(2)
    good = {n: [one, one] for n in ("importance", "uncertainty", "values", "gradients")}
    for changes, error, message in (
        ({"beta1": 0.0}, ValueError, r"beta1 is 0.0, expected more than 0"),
        ({"beta1": 1.0}, ValueError, r"beta1 is 1.0, expected"),
        ({"beta2": -0.5}, ValueError, r"beta2 is -0.5, expected"),
        ({"uncertainty": []}, ValueError, r"uncertainty is empty, expected"),
        ({"gradients": []}, ValueError, r"gradients is empty, expected"),
        ({"values": [one]}, ValueError, r"values has 1 tensors, expected 2"),
        ({"uncertainty": [two, one]}, ValueError, r"uncertainty\[0\] has shape \(2,\), expected"),
        ({"values": [two, one]}, ValueError, r"values\[0\] has shape \(2,\), expected"),
        (
            {"gradients": [one, two]}, ValueError,
            r"gradients\[1\] has shape \(2,\), expected \(3,\) \(as importance\[1\]\)",
        ),
        (
            {"uncertainty": [one.double(), one]}, TypeError,
            r"uncertainty\[0\] has dtype torch.float64, expected torch.float32 \(as importance\[0",
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            update_importance_(**good | changes)
    assert torch.equal(one, torch.ones(3))


# ---- importance_scores -----------------------------------------------------------------------


def make(p=((4, 7), (3, 5)), q=((7, 6),), dtype=torch.float32):
    """Averages of P by width, Λ and Q by width, and two random orders of the rows."""
    rows = sum(n for n, _ in p)
    shapes = [*p, (rows,), *q]
    importance, uncertainty = (
        [torch.rand(shape, device=DEVICE).to(dtype) for shape in shapes] for _ in range(2)
    )
    return {
        "importance": importance,
        "uncertainty": uncertainty,
        "positions_p": torch.randperm(rows, device=DEVICE),
        "positions_q": torch.randperm(rows, device=DEVICE),
        "count_p": len(p),
    }


def scored(inputs):
    """The formula in float64, one direction after the other."""
    pairs = zip(inputs["importance"], inputs["uncertainty"], strict=True)
    products = [i.double() * u.double() for i, u in pairs]
    count = inputs["count_p"]
    p = [row.mean() for t in products[:count] for row in t]
    q = [row.mean() for t in products[count + 1 :] for row in t]
    places = zip(inputs["positions_p"].tolist(), inputs["positions_q"].tolist(), strict=True)
    scores = products[count].clone()
    for i, (at_p, at_q) in enumerate(places):
        scores[i] += p[at_p] + q[at_q]
    return scores


# A 16-bit result is rounded once, and its three terms; products of 16 bits before that.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-14}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    "p, q",
    [
        (((4, 7), (3, 5)), ((7, 6),)),
        (((1, 1),), ((1, 1),)),
        (((0, 3),), ((0, 4),)),
        (((130, 64),), ((30, 33), (0, 9), (100, 1500))),
    ],
)
def test_scores_match_the_formula(dtype, p, q):
    inputs = make(p, q, dtype)
    out = importance_scores(**inputs)
    assert out.dtype == dtype
    assert relative_error(out, scored(inputs)) <= BOUNDS[dtype]


@given(st.data())
def test_scores_of_any_rows(data):
    """Rows shared out among widths at random, on either side, in any layout."""
    rows = data.draw(st.integers(1, 12))
    sides = []
    for _ in range(2):
        cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=2)))
        heights = [b - a for a, b in zip([0, *cuts], [*cuts, rows], strict=True)]
        sides.append(tuple((n, data.draw(st.integers(1, 9))) for n in heights))
    inputs = make(*sides)
    layout = data.draw(st.sampled_from(["contiguous", "sliced"]))
    inputs |= {n: [laid_out(t, layout) for t in inputs[n]] for n in ("importance", "uncertainty")}
    assert relative_error(importance_scores(**inputs), scored(inputs)) <= BOUNDS[torch.float32]


def test_nan_reaches_its_own_direction_only():
    inputs = make()
    inputs["importance"][0][1, 2] = NAN
    out = importance_scores(**inputs)
    assert out.isnan().nonzero().tolist() == [[inputs["positions_p"].tolist().index(1)]]


BAD = [
    ({"count_p": 0}, ValueError, r"count_p is 0, expected 1 to 2"),
    ({"count_p": 3}, ValueError, r"count_p is 3, expected 1 to 2"),
    ({"count_p": 1}, ValueError, r"importance\[1\] has shape \(3, 5\), expected \[R\]"),
    ({"uncertainty": []}, ValueError, r"uncertainty is empty, expected"),
    ({"positions_p": torch.zeros(7)}, TypeError, r"positions_p has dtype torch.float32"),
    ({"positions_q": torch.zeros(6).long()}, ValueError, r"positions_q has shape \(6,\)"),
    (
        {"uncertainty": make()["uncertainty"][::-1]}, ValueError,
        r"uncertainty\[0\] has shape \(7, 6\), expected \(4, 7\)",
    ),
    (
        make(((4, 7), (2, 5)), ((7, 6),)) | {"positions_q": torch.arange(6)}, ValueError,
        r"importance has \[7\] rows for positions_q, expected 6",
    ),
]  # fmt: skip


@pytest.mark.parametrize("changes, exception, message", BAD)
def test_scores_bad_arguments(changes, exception, message):
    with pytest.raises(exception, match=message):
        importance_scores(**(make() | changes))


# ---- all of them -----------------------------------------------------------------------------


def test_calls_do_not_grow_with_layers():
    def run(layers):
        inputs = make(((2 * layers, 4), (layers, 5)), ((3 * layers, 4),))
        scores = torch.rand(3 * layers, device=DEVICE)
        tensors = lists(shapes=[(layers, 3, 5), (layers, 3, 6), (layers, 3)])
        return [
            count_calls(lambda: update_importance_(*tensors)),
            count_calls(lambda: importance_scores(**inputs)),
            count_calls(lambda: prune_smallest(scores, layers)),
        ]

    counts = [run(layers) for layers in (2, 12, 48)]
    assert counts == [counts[0]] * 3
    assert min(counts[0]) > 3  # they were seen


def test_nothing_is_read_on_the_host():
    """Tensors without data cannot be."""
    assert prune_smallest(torch.empty(6, device="meta"), 2).shape == (6,)
    update_importance_(*([torch.empty(3, device="meta")] for _ in range(4)))
    meta = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), make())
    assert importance_scores(**meta).shape == (7,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_in_a_cuda_graph():
    """Captured with nothing read on the host; replayed on other numbers."""
    tensors, scores = lists(), torch.randn(20000, device=DEVICE)

    def step():
        update_importance_(*tensors)
        return prune_smallest(scores, 7000)

    for _ in range(2):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    scores.copy_(torch.randn_like(scores).round(decimals=2))
    before = [t.clone() for t in tensors[0]]
    graph.replay()
    assert captured.tolist() == pruned_by_hand(scores, 7000)
    assert not torch.equal(tensors[0][0], before[0])
