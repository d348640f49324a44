"""The kernels from tokens to factors against the formula in float64, one matrix at a time."""

import dataclasses
import importlib

import pytest
import torch
from ops.slot_cases import LAYERS, UNEQUAL, random, shapes_of, slots_of, widths_of
from ops.util import laid_out, relative_error
from torch.utils import _pytree as pytree

from hal_kernels.kernels import configs
from hal_kernels.ops import Slots, hypernet_factors, hypernet_factors_reference

from .harness import DEVICE, EXACT, Guarded, launches

kernels = importlib.import_module("hal_kernels.kernels.hypernet_factors")
default = importlib.import_module("hal_kernels.ops.hypernet_factors")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_device(tree):
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(DEVICE), tree)


def make(layers, hidden=24, dtype=torch.float32, base=True):
    """(tokens, weights, biases, base), the slots, and the gradients of the factors."""
    slots, widths, shapes = slots_of(layers), widths_of(layers), shapes_of(layers)
    inputs = (
        random(3, len(layers), slots.max_rank, hidden, dtype=dtype),
        [random(d, hidden, dtype=dtype) for d in widths],
        [random(d, dtype=dtype) for d in widths],
        [random(*shape, dtype=dtype) for shape in shapes] if base else [],
    )
    upstream = [random(*shape, dtype=dtype) for shape in shapes]
    return on_device(inputs), on_device(slots), on_device(upstream)


def spread(slots: Slots):
    return list(slots.offsets), *slots.counts, *slots.sizes


def run(inputs, slots, upstream):
    """Factors and gradients, from kernels that stay within their outputs."""
    tokens, weights, _, _ = inputs
    with launches(kernels) as log, Guarded() as guarded:
        factors = kernels.forward(*inputs, *spread(slots))
        gradients = kernels.backward(upstream, tokens, weights, *spread(slots)[:3])
    return factors, [gradients[0], *gradients[1], *gradients[2]], log, guarded.calls


def reference(inputs, slots, upstream):
    tokens, weights, biases, base = pytree.tree_map(lambda t: t.double(), inputs)
    leaves = [tokens, *weights, *biases]
    for leaf in leaves:
        leaf.requires_grad_()
    factors = hypernet_factors_reference(tokens, weights, biases, slots, base or None)
    return factors, torch.autograd.grad(factors, leaves, [u.double() for u in upstream])


def check(inputs, slots, upstream):
    factors, gradients, log, calls = run(inputs, slots, upstream)
    assert log == ["factors", "token_gradient", "weight_gradient"]
    assert not calls or not all(t.is_contiguous() for t in pytree.tree_leaves((inputs, upstream)))
    wanted = reference(inputs, slots, upstream)
    # Sums of exact inputs in float32: only the result is rounded, each element by eps/2.
    dtype = inputs[0].dtype
    limit = EXACT + (0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)
    for ours, ref in zip([*factors, *gradients], [*wanted[0], *wanted[1]], strict=True):
        assert ours.dtype == dtype
        assert ours.is_contiguous()
        assert relative_error(ours, ref) <= limit
    for side, offsets in enumerate(slots.offsets):
        for matrix, rank in enumerate(offsets.diff().tolist()):
            assert (gradients[0][side, matrix, rank:] == 0).all()


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(dtype, layers, base):
    check(*make(layers, dtype=dtype, base=base))


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 17, 64, 128])
def test_any_rank(rank):
    """Matrices of several tiles, and tiles of several matrices."""
    check(*make([(9, 6, rank)] * 2))
    check(*make([(9, 6, rank), (9, 6, 1)]))


@pytest.mark.parametrize("hidden", [1, 31, 70, 312])
def test_any_hidden_size(hidden):
    check(*make([(9, 6, 3), (16, 6, 2)], hidden))


@pytest.mark.parametrize("widths", [(1, 2), (64, 65), (130, 191)])
def test_any_width(widths):
    check(*make([(widths[0], widths[1], 3), (widths[1], widths[0], 2)]))


def test_as_many_widths_as_a_model_may_have():
    """One launch for all of them."""
    check(*make([(3 + i, 20 - i, 1 + i % 3) for i in range(8)]))


@pytest.mark.parametrize("ranks", [[4] * 30, [i % 5 for i in range(40)]])
def test_many_slots(ranks):
    """In the tiles for many as well."""
    arguments = make([(70, 20, rank) for rank in ranks], hidden=70)
    check(*arguments)
    few, many = configs.DEFAULT.slots
    with configs.using(dataclasses.replace(configs.DEFAULT, slots=(many, few))):
        check(*arguments)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "all_expanded"])
def test_any_layout(layout):
    inputs, slots, upstream = make(UNEQUAL)
    upstream = [laid_out(u, layout) for u in upstream]
    if "expanded" not in layout:  # the strides of a sum's gradient
        inputs = pytree.tree_map(lambda t: laid_out(t, layout), inputs)
    check(inputs, slots, upstream)


def test_weights_of_zero_leave_the_base_as_it_is():
    (tokens, weights, biases, base), slots, upstream = make(UNEQUAL)
    weights, biases = ([torch.zeros_like(t) for t in ts] for ts in (weights, biases))
    factors, *_ = run((tokens, weights, biases, base), slots, upstream)
    assert all(torch.equal(a, b) for a, b in zip(factors, base, strict=True))


def test_what_lies_in_the_padding_is_never_seen():
    inputs, slots, upstream = make([(9, 6, 1), (9, 6, 3), (9, 6, 2)])
    factors, gradients, *_ = run(inputs, slots, upstream)
    for side, offsets in enumerate(slots.offsets):
        for matrix, rank in enumerate(offsets.diff().tolist()):
            inputs[0][side, matrix, rank:] = float("nan")
    again = run(inputs, slots, upstream)
    pairs = zip([*factors, *gradients], [*again[0], *again[1]], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_same_every_time():
    arguments = make([(20, 9, 3)] * 12, hidden=40)
    first, second = (run(*arguments) for _ in range(2))
    pairs = zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_no_rows():
    factors, gradients, log, _ = run(*make([(5, 4, 0), (3, 4, 0)]))
    assert [f.shape for f in factors] == [(0, 3), (0, 5), (0,), (0, 4)]
    assert log == ["weight_gradient"]
    assert all((g == 0).all() for g in gradients)


def test_what_the_default_implementation_keeps():
    inputs, slots, upstream = make(UNEQUAL, dtype=torch.float64)
    factors, gradients, log, _ = run(inputs, slots, upstream)
    assert log == []
    expected = default._forward(*inputs, *spread(slots))
    theirs = default._backward_default(upstream, inputs[0], inputs[1], *spread(slots)[:3])
    for ours, ref in zip(
        [*factors, *gradients], [*expected, theirs[0], *theirs[1], *theirs[2]], strict=True
    ):
        assert torch.equal(ours, ref)


def test_registered_for_cuda():
    for name in ("hypernet_factors", "hypernet_factors_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"hal::{name}", "CUDA")


@pytest.mark.gpu
def test_in_a_cuda_graph():
    """Captured with nothing read on the host; replayed on other numbers."""
    (tokens, weights, biases, base), slots, upstream = make(
        [(768, 768, 5)] * 20 + [(768, 3072, 3), (3072, 768, 5)], 312
    )
    leaves = [t.requires_grad_() for t in (tokens, *weights, *biases)]

    def step():
        factors = hypernet_factors(tokens, weights, biases, slots, base)
        return [
            *(f.detach() for f in factors), *torch.autograd.grad(factors, leaves, upstream)
        ]  # fmt: skip

    for _ in range(2):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor in (tokens, *base, *upstream):
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    replayed = [t.clone() for t in captured]
    assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))
