"""Importance of singular directions, and pruning of the least important."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from hal_kernels.ops import (
    prune_smallest,
    prune_smallest_reference,
    update_importance_,
    update_importance_reference,
)

from .util import DEVICE, EXACT, assert_same, count_calls, laid_out

NAN, INF = float("nan"), float("inf")


def scores_of(*numbers, dtype=torch.float32):
    return torch.tensor(numbers, dtype=dtype, device=DEVICE)


# ---- prune_smallest ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores, count, expected",
    [
        ([3.0, 1.0, 2.0], 0, [1, 1, 1]),
        ([3.0, 1.0, 2.0], 1, [1, 0, 1]),
        ([3.0, 1.0, 2.0], 2, [1, 0, 0]),
        ([3.0, 1.0, 2.0], 3, [0, 0, 0]),
        ([2.0, 1.0, 1.0, 1.0], 2, [1, 0, 0, 1]),  # ties: the lower index goes first
        ([0.0] * 5, 3, [0, 0, 0, 1, 1]),
        ([0.0, -0.0, 0.0], 1, [0, 1, 1]),
        ([-0.0, 0.0, -1.0], 2, [0, 1, 0]),
        ([NAN, 1.0, INF], 2, [1, 0, 0]),  # NaN goes last, after inf
        ([NAN, INF, NAN, NAN], 3, [0, 0, 0, 1]),
        ([1.0, -INF, -2.0, -INF], 1, [1, 0, 1, 1]),  # -inf goes first
        ([-1.0, -3.0, 0.0], 1, [1, 0, 1]),  # smallest, not smallest in magnitude
        ([], 0, []),
    ],
)
def test_prune_by_hand(scores, count, expected):
    mask = prune_smallest(scores_of(*scores), count)
    assert mask.tolist() == expected
    assert prune_smallest_reference(scores_of(*scores), count).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 7, 300, 5000])
def test_prune_matches_the_reference(size, dtype):
    """Scores rounded to few values have many ties, some of them at the border."""
    scores = (torch.randn(size) * 4).round().to(DEVICE, dtype)
    scores[torch.rand(size) < 0.1] = NAN
    scores[torch.rand(size) < 0.1] = -INF
    for count in {0, 1, size // 3, size // 2, size - 1, size}:
        mask = prune_smallest(scores, count)
        assert mask.dtype == dtype
        assert torch.equal(mask, prune_smallest_reference(scores, count))
        assert (mask == 0).sum() == count


@given(st.data())
def test_prune_of_any_scores(data):
    number = st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, NAN, INF, -INF]), st.floats(width=32, allow_nan=True)
    )
    scores = scores_of(*data.draw(st.lists(number, max_size=12)))
    count = data.draw(st.integers(0, len(scores)))
    assert torch.equal(prune_smallest(scores, count), prune_smallest_reference(scores, count))


@pytest.mark.parametrize("layout", ["sliced", "expanded"])
def test_prune_of_any_layout(layout):
    scores = laid_out(torch.randn(9, device=DEVICE), layout)
    if layout == "expanded":
        scores = scores[:1].expand(9)
    assert torch.equal(prune_smallest(scores, 4), prune_smallest_reference(scores, 4))


def test_prune_leaves_the_scores_alone():
    scores = torch.randn(20, device=DEVICE)
    before = scores.clone()
    prune_smallest(scores, 5)
    assert torch.equal(scores, before)


def test_prune_has_no_derivative():
    scores = torch.randn(5, requires_grad=True, device=DEVICE)
    with pytest.raises(RuntimeError, match="prune_smallest has no derivative"):
        prune_smallest(scores, 2).sum().backward()


def test_prune_reads_nothing_on_the_host():
    """Tensors without data cannot be read: neither kind of them is."""
    assert prune_smallest(torch.empty(6, device="meta"), 2).shape == (6,)
    with FakeTensorMode():
        scores = torch.empty(6)
        assert prune_smallest(scores, 2).shape == (6,)
        assert default_backend(torch.ops.hal.prune_smallest.default, scores, 2).shape == (6,)


def default_backend(operator, *arguments):
    """The implementation itself; called through the dispatcher, its shape function would answer."""
    return operator._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *arguments)


def test_prune_opcheck():
    torch.library.opcheck(torch.ops.hal.prune_smallest.default, (torch.randn(7), 3))


def test_prune_compiles():
    torch._dynamo.reset()
    compiled = torch.compile(prune_smallest, backend="aot_eager", fullgraph=True)
    scores = scores_of(3.0, 1.0, NAN, 1.0)
    for count in range(5):
        assert torch.equal(compiled(scores, count), prune_smallest(scores, count))


@pytest.mark.parametrize(
    "scores, count, exception, message",
    [
        ([1.0, 2.0], 1, TypeError, r"scores is a list, expected a torch.Tensor"),
        (torch.arange(4), 1, TypeError, r"scores has dtype torch.int64, expected a floating"),
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

SHAPES = [(4, 3, 5), (6,), (1, 2, 1)]


def lists(dtype=torch.float32, shapes=SHAPES):
    """(importance, uncertainty, values, gradients), all of them random."""
    state = [[torch.rand(s, device=DEVICE, dtype=dtype) for s in shapes] for _ in range(2)]
    moving = [[torch.randn(s, device=DEVICE, dtype=dtype) for s in shapes] for _ in range(2)]
    return *state, *moving


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


@pytest.mark.parametrize("betas", [(0.85, 0.85), (0.5, 0.99), (0.3, 0.01)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_importance_matches_the_reference(dtype, betas):
    importance, uncertainty, _, _ = lists(dtype)
    expected = [t.double() for t in importance], [t.double() for t in uncertainty]
    for _ in range(4):
        _, _, values, gradients = lists(dtype)
        pairs = [
            update_importance_reference(*(t.double() for t in tensors), *betas)
            for tensors in zip(*expected, values, gradients, strict=True)
        ]
        expected = [i for i, _ in pairs], [u for _, u in pairs]
        update_importance_(
            importance, uncertainty, values, gradients, beta1=betas[0], beta2=betas[1]
        )
        for got, wanted in zip((importance, uncertainty), expected, strict=True):
            assert_same(dict(enumerate(got)), dict(enumerate(wanted)), EXACT[dtype])


def test_importance_has_adalora_s_defaults():
    default, given = (lists(shapes=[(4,)])[:2] for _ in range(2))
    for one, two in zip(default, given, strict=True):
        two[0].copy_(one[0])
    _, _, values, gradients = lists(shapes=[(4,)])
    update_importance_(*default, values, gradients)
    update_importance_(*given, values, gradients, beta1=0.85, beta2=0.85)
    for one, two in zip(default, given, strict=True):
        assert torch.equal(one[0], two[0])


def test_importance_changes_its_state_alone():
    importance, uncertainty, values, gradients = lists()
    before = [t.clone() for t in values + gradients]
    pointers = [t.data_ptr() for t in importance + uncertainty]
    assert update_importance_(importance, uncertainty, values, gradients) is None
    assert all(torch.equal(a, b) for a, b in zip(values + gradients, before, strict=True))
    assert [t.data_ptr() for t in importance + uncertainty] == pointers


def test_importance_of_views():
    """State and factors may be views: of one packed buffer, transposed, or expanded."""
    plain = lists(shapes=[(4, 3)])
    layouts = ("sliced", "transposed", "transposed", "expanded")
    viewed = [[laid_out(t, layout) for t in ts] for ts, layout in zip(plain, layouts, strict=True)]
    plain = [[t.contiguous() for t in ts] for ts in viewed]
    update_importance_(*plain)
    update_importance_(*viewed)
    for got, wanted in zip(viewed[:2], plain[:2], strict=True):
        assert torch.equal(got[0], wanted[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_importance_of_16_bit_factors(dtype):
    """Products of small numbers do not underflow: they are formed in the state's float32."""
    importance, uncertainty = torch.zeros(3, device=DEVICE), torch.zeros(3, device=DEVICE)
    value = torch.tensor([1e-4, -2e-4, 3e-2], device=DEVICE, dtype=dtype)
    gradient = torch.tensor([2e-5, 1e-4, 0.5], device=DEVICE, dtype=dtype)
    update_importance_([importance], [uncertainty], [value], [gradient])
    zeros = torch.zeros(3, dtype=torch.float64, device=DEVICE)
    expected = update_importance_reference(zeros, zeros, value.double(), gradient.double())
    for got, wanted in zip((importance, uncertainty), expected, strict=True):
        assert torch.allclose(got.double(), wanted, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("shapes", [[(0,)], [(2, 0, 3), (4,)]])
def test_importance_of_empty_tensors(shapes):
    tensors = lists(shapes=shapes)
    update_importance_(*tensors)
    assert [tuple(t.shape) for t in tensors[0]] == shapes


def test_importance_of_parameters_records_no_graph():
    """The values are the optimizer's parameters; the state must not start to need gradients."""
    importance, uncertainty, values, gradients = lists()
    values = [v.requires_grad_() for v in values]
    update_importance_(importance, uncertainty, values, gradients)
    assert not any(t.requires_grad for t in importance + uncertainty)


def test_importance_calls_do_not_depend_on_the_number_of_matrices():
    def run(matrices):
        tensors = lists(shapes=[(matrices, 3, 5), (matrices, 3, 6), (matrices, 3)])
        return count_calls(lambda: update_importance_(*tensors))

    counts = [run(matrices) for matrices in (2, 12, 48)]
    assert counts[0] > 3  # the calls inside of the operator were seen
    assert counts == [counts[0]] * 3


def test_importance_reads_nothing_on_the_host():
    with FakeTensorMode():
        operator = torch.ops.hal.update_importance_.default
        default_backend(operator, *([torch.empty(3)] for _ in range(4)), 0.5, 0.5)


def test_importance_opcheck():
    torch.library.opcheck(torch.ops.hal.update_importance_.default, (*lists(), 0.85, 0.8))


def test_importance_compiles():
    torch._dynamo.reset()
    eager = lists()
    compiled = [[t.clone() for t in ts] for ts in eager]
    torch.compile(update_importance_, backend="aot_eager", fullgraph=True)(*compiled)
    update_importance_(*eager)
    for got, wanted in zip(compiled[:2], eager[:2], strict=True):
        assert_same(dict(enumerate(got)), dict(enumerate(wanted)), 1e-6)


ONE, TWO = torch.ones(3), torch.ones(2)


@pytest.mark.parametrize(
    "arguments, options, exception, message",
    [
        (([ONE],) * 4, {"beta1": 0.0}, ValueError, r"beta1 is 0.0, expected more than 0"),
        (([ONE],) * 4, {"beta1": 1.0}, ValueError, r"beta1 is 1.0, expected"),
        (([ONE],) * 4, {"beta2": -0.5}, ValueError, r"beta2 is -0.5, expected"),
        (([ONE],) * 4, {"beta2": NAN}, ValueError, r"beta2 is nan, expected"),
        (([ONE], [], [ONE], [ONE]), {}, ValueError, r"uncertainty is empty, expected"),
        (([ONE], [ONE], [ONE, ONE], [ONE]), {}, ValueError, r"values has 2 tensors, expected 1"),
        (([ONE], [ONE], [ONE], []), {}, ValueError, r"gradients is empty, expected"),
        (([ONE], [TWO], [ONE], [ONE]), {}, ValueError, r"uncertainty\[0\] has shape \(2,\), exp"),
        (([ONE], [ONE], [TWO], [ONE]), {}, ValueError, r"values\[0\] has shape \(2,\), expected"),
        (
            ([ONE, ONE], [ONE, ONE], [ONE, ONE], [ONE, TWO]),
            {},
            ValueError,
            r"gradients\[1\] has shape \(2,\), expected \(3,\) \(as importance\[1\]\)",
        ),
        (([ONE], [ONE], [ONE], [None]), {}, TypeError, r"gradients\[0\] is a NoneType"),
    ],
)
def test_importance_bad_arguments(arguments, options, exception, message):
    before = ONE.clone()
    with pytest.raises(exception, match=message):
        update_importance_(*arguments, **options)
    assert torch.equal(before, ONE)
