"""The kernels from factors to tokens against the formula in float64, one matrix at a time."""

import dataclasses
import importlib

import pytest
import torch
from ops.slot_cases import LAYERS, UNEQUAL, random, random_mask, shapes_of, slots_of, widths_of
from ops.util import laid_out, relative_error
from torch.utils import _pytree as pytree

from hal_kernels.kernels import configs
from hal_kernels.ops import Slots, hypernet_tokens, hypernet_tokens_reference

from .harness import DEVICE, EXACT, Guarded, launches

kernels = importlib.import_module("hal_kernels.kernels.hypernet_tokens")
default = importlib.import_module("hal_kernels.ops.hypernet_tokens")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_device(tree):
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(DEVICE), tree)


def make(layers, hidden=24, dtype=torch.float32):
    """(factors, mask, weights, biases, embedding), and the slots."""
    widths, rows = widths_of(layers), sum(rank for *_, rank in layers)
    inputs = (
        [random(*shape, dtype=dtype) for shape in shapes_of(layers)],
        random_mask(rows, dtype),
        [random(hidden, d, dtype=dtype) for d in widths],
        [random(hidden, dtype=dtype) for _ in widths],
        random(rows, hidden, dtype=dtype),
    )
    return on_device(inputs), on_device(slots_of(layers))


def spread(slots: Slots):
    return list(slots.rows), list(slots.offsets), *slots.counts, slots.max_rank


def upstream_of(inputs, slots):
    embedding = inputs[-1]
    shape = (3, slots.offsets[0].shape[0] - 1, slots.max_rank, embedding.shape[1])
    return on_device(random(*shape, dtype=embedding.dtype))


def run(inputs, slots, dtokens):
    """Tokens, usable keys and gradients, from kernels that stay within their outputs."""
    _, offsets, counts_p, counts_q, _ = spread(slots)
    with launches(kernels) as log, Guarded() as guarded:
        tokens, usable = kernels.forward(*inputs, *spread(slots))
        gradients = kernels.backward(dtokens, inputs[0], offsets, counts_p, counts_q)
    return tokens, usable, [*gradients[0], *gradients[1], gradients[2]], log, guarded.calls


def reference(inputs, slots, dtokens):
    factors, mask, weights, biases, embedding = pytree.tree_map(lambda t: t.double(), inputs)
    leaves = [*weights, *biases, embedding]
    for leaf in leaves:
        leaf.requires_grad_()
    tokens, usable = hypernet_tokens_reference(factors, mask, weights, biases, embedding, slots)
    return tokens, usable, torch.autograd.grad(tokens, leaves, dtokens.double())


def check(inputs, slots, dtokens=None):
    dtokens = upstream_of(inputs, slots) if dtokens is None else dtokens
    tokens, usable, gradients, log, calls = run(inputs, slots, dtokens)
    assert log == ["tokens", "tokens_backward"]
    given = [t for t in pytree.tree_leaves((inputs, dtokens)) if isinstance(t, torch.Tensor)]
    assert not calls or not all(t.is_contiguous() for t in given)
    wanted = reference(inputs, slots, dtokens)
    assert torch.equal(usable, wanted[1])
    # Sums of exact inputs in float32: only the result is rounded, each element by eps/2.
    dtype = inputs[-1].dtype
    limit = EXACT + (0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)
    for ours, ref in zip([tokens, *gradients], [wanted[0], *wanted[2]], strict=True):
        assert ours.dtype == dtype
        assert ours.is_contiguous()
        assert relative_error(ours, ref) <= limit
    assert torch.equal(tokens == 0, wanted[0] == 0)


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(dtype, layers):
    check(*make(layers, dtype=dtype))


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
    inputs, slots = make([(70, 20, rank) for rank in ranks], hidden=70)
    check(inputs, slots)
    few, many = configs.DEFAULT.slots
    with configs.using(dataclasses.replace(configs.DEFAULT, slots=(many, few))):
        check(inputs, slots)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_any_layout(layout):
    inputs, slots = make(UNEQUAL)
    dtokens = laid_out(upstream_of(inputs, slots), layout)
    if layout == "expanded":  # the stride of a sum's gradient
        check(inputs, slots, dtokens)
    else:
        check(pytree.tree_map(lambda t: laid_out(t, layout), inputs), slots, dtokens)


def test_a_mask_of_another_dtype():
    inputs, slots = make(UNEQUAL, dtype=torch.bfloat16)
    for dtype in (torch.float64, torch.float32):
        check((inputs[0], inputs[1].to(dtype), *inputs[2:]), slots)


def test_what_lies_in_the_padding_is_never_seen():
    """Forward: rows of the next matrix; backward: the padding's own gradients."""
    inputs, slots = make([(9, 6, 1), (9, 6, 3), (9, 6, 2)])
    dtokens = upstream_of(inputs, slots)
    tokens, _, expected, *_ = run(inputs, slots, dtokens)
    for side, offsets in enumerate(slots.offsets):
        for matrix, rank in enumerate(offsets.diff().tolist()):
            dtokens[side, matrix, rank:] = float("nan")
            assert (tokens[side, matrix, rank:] == 0).all()
    gradients = run(inputs, slots, dtokens)[2]
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    for factor in inputs[0]:
        factor[1:4] = float("nan")
    again = run(inputs, slots, dtokens)[0]
    assert torch.equal(again[:, [0, 2]], tokens[:, [0, 2]])


def test_the_same_every_time():
    inputs, slots = make([(20, 9, 3)] * 12, hidden=40)
    dtokens = upstream_of(inputs, slots)
    first, second = (run(inputs, slots, dtokens) for _ in range(2))
    pairs = zip([first[0], *first[2]], [second[0], *second[2]], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_no_rows():
    inputs, slots = make([(5, 4, 0), (3, 4, 0)])
    tokens, usable, gradients, log, _ = run(inputs, slots, upstream_of(inputs, slots))
    assert tokens.shape == (3, 2, 0, 24) and usable.shape == (3, 2, 0)
    assert log == ["tokens_backward"]
    assert all((g == 0).all() for g in gradients)


def test_what_the_default_implementation_keeps():
    inputs, slots = make(UNEQUAL, dtype=torch.float64)
    dtokens = upstream_of(inputs, slots)
    tokens, usable, gradients, log, _ = run(inputs, slots, dtokens)
    assert log == []
    expected = default._forward(*inputs, *spread(slots))
    assert torch.equal(tokens, expected[0]) and torch.equal(usable, expected[1])
    _, offsets, counts_p, counts_q, _ = spread(slots)
    theirs = default._backward_default(dtokens, inputs[0], offsets, counts_p, counts_q)
    for ours, ref in zip(gradients, [*theirs[0], *theirs[1], theirs[2]], strict=True):
        assert torch.equal(ours, ref)


def test_registered_for_cuda():
    for name in ("hypernet_tokens", "hypernet_tokens_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"hal::{name}", "CUDA")


@pytest.mark.gpu
def test_in_a_cuda_graph():
    """Captured with nothing read on the host; replayed on other numbers and another mask."""
    (factors, mask, weights, biases, embedding), slots = make(
        [(768, 768, 5)] * 20 + [(768, 3072, 3), (3072, 768, 5)], 312
    )
    leaves = [t.requires_grad_() for t in (*weights, *biases, embedding)]

    def step():
        tokens, usable = hypernet_tokens(factors, mask, weights, biases, embedding, slots)
        return [tokens.detach(), usable, *torch.autograd.grad(tokens.square().sum(), leaves)]

    for _ in range(2):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in (*factors, mask):
        tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    replayed = [t.clone() for t in captured]
    assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))
