"""Importance and pruning kernels against the formulas on the host."""

import importlib

import pytest
import torch
from ops.util import laid_out, relative_error

from hal_kernels.ops import (
    prune_smallest,
    prune_smallest_reference,
    update_importance_,
    update_importance_reference,
)

from .harness import DEVICE, EXACT, Guarded, launches

kernels = importlib.import_module("hal_kernels.kernels.rank_allocation")
operator = importlib.import_module("hal_kernels.ops.rank_allocation")
NAN, INF = float("nan"), float("inf")
SHAPES = [(4, 3, 5), (6,), (1, 2, 1), (0, 7), (33, 70), (1024,)]


def prune(scores, count):
    with launches(kernels) as log, Guarded() as guarded:
        mask = kernels.prune_smallest(scores, count)
    assert log == ["prune"]
    assert not guarded.calls or not scores.is_contiguous()
    return mask


@pytest.mark.parametrize(
    "scores",
    [
        [2.0, 1.0, 1.0, 1.0],  # ties: the lower index goes first
        [0.0, -0.0, 0.0, -1.0],
        [NAN, 1.0, INF, -NAN, NAN, -INF, -2.0, -INF],  # NaN last, whatever its sign
        [1e-45, -1e-45, 0.0, 3e38, -3e38],
    ],
)
def test_prune_by_hand(scores):
    scores = torch.tensor(scores, device=DEVICE)
    for count in range(len(scores) + 1):
        assert torch.equal(prune(scores, count), prune_smallest_reference(scores, count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 17, 64, 300])
def test_prune_of_many_ties(size, dtype):
    scores = (torch.randn(size) * 4).round().to(DEVICE, dtype)
    scores[torch.rand(size) < 0.1] = NAN
    scores[torch.rand(size) < 0.1] = -INF
    for count in {0, 1, size // 3, size - 1, size}:
        mask = prune(scores, count)
        assert mask.dtype == dtype
        assert torch.equal(mask, prune_smallest_reference(scores, count))


@pytest.mark.parametrize("layout", ["sliced", "expanded"])
def test_prune_of_any_layout(layout):
    scores = laid_out(torch.randn(9, device=DEVICE), layout)
    scores = scores[:1].expand(9) if layout == "expanded" else scores
    assert torch.equal(prune(scores, 4), prune_smallest_reference(scores, 4))


def test_prune_of_nothing():
    assert kernels.prune_smallest(torch.empty(0, device=DEVICE), 0).shape == (0,)


def test_prune_of_float64_is_the_default_implementation_s(monkeypatch):
    monkeypatch.setattr(operator, "_prune_smallest", None)  # on a GPU that would come back here
    scores = torch.tensor([1.0, 1.0 - 2**-50, 2.0], dtype=torch.float64, device=DEVICE)
    with launches(kernels) as log:
        assert operator._prune_smallest_cuda(scores, 1).tolist() == [1, 0, 1]
    assert log == []


def lists(state=torch.float32, factors=torch.float32, shapes=SHAPES):
    """(importance, uncertainty, values, gradients) on the device."""
    return [
        *([torch.rand(s).to(DEVICE, state) for s in shapes] for _ in range(2)),
        *([torch.randn(s).to(DEVICE, factors) for s in shapes] for _ in range(2)),
    ]


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
def test_importance(state, factors):
    tensors = lists(state, factors)
    before = [[t.double() for t in ts] for ts in tensors]
    with launches(kernels) as log, Guarded() as guarded:
        kernels.update_importance(*tensors, 0.85, 0.6)
    assert log == ["importance"]
    assert guarded.calls == []
    limit = EXACT if state == torch.float32 else torch.finfo(state).eps  # I and the averages
    for index, (i, u, v, g) in enumerate(zip(*before, strict=True)):
        wanted = update_importance_reference(i, u, v, g, 0.85, 0.6)
        for ours, reference in zip((tensors[0][index], tensors[1][index]), wanted, strict=True):
            assert relative_error(ours, reference) <= limit
        assert torch.equal(tensors[2][index].double(), v)
        assert torch.equal(tensors[3][index].double(), g)


def test_importance_stays_within_its_tensors():
    """State in the middle of a larger buffer, 4 bytes off an aligned address."""
    buffers = [torch.full((40,), 7.0, device=DEVICE) for _ in range(2)]
    state = [buffer[1:34] for buffer in buffers]
    factors = torch.randn(2, 33, device=DEVICE)
    kernels.update_importance([state[0]], [state[1]], [factors[0]], [factors[1]], 0.85, 0.85)
    for buffer in buffers:
        assert (buffer[:1] == 7).all() and (buffer[34:] == 7).all()
        assert (buffer[1:34] != 7).all()


def test_importance_of_views():
    plain = lists(shapes=[(4, 3), (5, 2)])
    layouts = ("sliced", "transposed", "transposed", "expanded")
    viewed = [[laid_out(t, layout) for t in ts] for ts, layout in zip(plain, layouts, strict=True)]
    plain = [[t.contiguous() for t in ts] for ts in viewed]
    for tensors in (plain, viewed):
        kernels.update_importance(*tensors, 0.85, 0.85)
    for got, wanted in zip(viewed[:2], plain[:2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_importance_of_empty_tensors():
    with launches(kernels) as log:
        kernels.update_importance(*lists(shapes=[(0,), (3, 0)]), 0.85, 0.85)
    assert log == []


def test_importance_in_float64_is_the_default_implementation_s():
    tensors = lists(torch.float64, torch.float64)
    i, u, v, g = ([t.clone() for t in ts] for ts in tensors)
    with launches(kernels) as log:
        operator._update_importance_cuda(*tensors, 0.85, 0.6)
    assert log == []
    wanted = update_importance_reference(i[0], u[0], v[0], g[0], 0.85, 0.6)
    assert torch.allclose(tensors[0][0], wanted[0], rtol=1e-14)


def test_registered_for_cuda():
    for name in ("update_importance_", "prune_smallest"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"hal::{name}", "CUDA")


@pytest.mark.gpu
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
    expected = [t.clone() for t in tensors[0]]
    graph.replay()
    assert torch.equal(captured, prune_smallest_reference(scores, 7000))
    assert not torch.equal(tensors[0][0], expected[0])
