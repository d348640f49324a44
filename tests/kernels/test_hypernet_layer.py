"""The hypernetwork layer's kernels against the formula in float64, one set at a time."""

import dataclasses
import importlib

import pytest
import torch
from ops.util import laid_out, relative_error

from hal_kernels.kernels import configs
from hal_kernels.ops import hypernet_layer, hypernet_layer_reference
from hal_kernels.ops.hypernet_layer import PARAMETERS

from .harness import DEVICE, EXACT, Guarded, launches

kernels = importlib.import_module("hal_kernels.kernels.hypernet_layer")
default = importlib.import_module("hal_kernels.ops.hypernet_layer")

FORWARD = ["attention", "linear_norm", "linear_gelu", "linear_norm"]
BACKWARD = ["norm_backward", "gelu_backward", "norm_backward", "attention_backward", "reduce"]
# With norm_first the LayerNorm that is passed first in backward is passed last.
BACKWARD_FIRST = [*BACKWARD[1:4], "norm_backward", "reduce"]
BOTH = pytest.mark.parametrize("norm_first", [False, True])


def make(sets=2, matrices=3, rank=4, hidden=12, inner=20, dtype=torch.float32):
    """Tokens and parameters, all of them random: no affine is 1 or 0."""
    shapes = {
        "qkv_weight": (3 * hidden, hidden),
        "qkv_bias": (3 * hidden,),
        "out_weight": (hidden, hidden),
        "up_weight": (inner, hidden),
        "up_bias": (inner,),
        "down_weight": (hidden, inner),
    }
    parameters = []
    for name in PARAMETERS:
        shape = shapes.get(name, (hidden,))
        tensor = torch.randn(sets, *shape, dtype=torch.float64)
        if len(shape) == 2:
            tensor *= 1.5 / shape[1] ** 0.5
        parameters.append(tensor.to(DEVICE, dtype))
    tokens = torch.randn(sets, matrices, rank, hidden, dtype=torch.float64)
    return tokens.to(DEVICE, dtype), parameters


def make_keys(tokens, kind="some"):
    keys = torch.ones(tokens.shape[:3], dtype=torch.bool, device=DEVICE)
    if kind == "some":  # every other one; all of the first matrix, none of the last
        keys[..., 1::2] = False
        keys[0, 0] = True
        keys[-1, -1] = False
    if kind == "none":
        keys[:] = False
    return keys


def reference(tokens, keys, parameters, options, dout, dtype=torch.float64):
    """Output and gradients by autograd through the formula."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (tokens, *parameters)]
    named = dict(zip(PARAMETERS, leaves[1:], strict=True))
    out = hypernet_layer_reference(leaves[0], keys, named, *options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]


def run(tokens, keys, parameters, options, dout):
    """Output and gradients, from kernels that stay within their outputs."""
    with launches(kernels) as log, Guarded() as guarded:
        out, *saved = kernels.forward(tokens, keys, parameters, *options)
        forward = (list(log), list(guarded.calls))
        log.clear()
        guarded.calls.clear()
        dtokens, gradients = kernels.backward(dout, tokens, parameters, saved, *options)
    return [out, dtokens, *gradients], saved, forward, (log, guarded.calls)


def check(tokens, parameters, keys=None, heads=3, eps=1e-5, norm_first=False, dout=None):
    keys = make_keys(tokens) if keys is None else keys
    dout = torch.randn(tokens.shape, device=DEVICE, dtype=tokens.dtype) if dout is None else dout
    options = (heads, eps, norm_first)
    results, saved, forward, backward = run(tokens, keys, parameters, options, dout)
    assert forward[0] == FORWARD
    assert backward[0] == (BACKWARD_FIRST if norm_first else BACKWARD)
    wanted = reference(tokens, keys, parameters, options, dout)
    plain = reference(tokens, keys, parameters, options, dout, tokens.dtype)
    # Twice the error of plain PyTorch, and what it may have been spared by chance.
    floor = EXACT if tokens.dtype == torch.float32 else torch.finfo(tokens.dtype).eps / 4
    errors = [relative_error(p, w) for p, w in zip(plain, wanted, strict=True)]
    # A vector of a few numbers may come out better than its operands are, by chance.
    limits = [2 * max(error, sum(errors) / len(errors)) + floor for error in errors]
    names = ("out", "tokens", *PARAMETERS)
    for name, ours, ref, limit in zip(names, results, wanted, limits, strict=True):
        assert ours.dtype == tokens.dtype
        assert ours.is_contiguous()
        error = relative_error(ours, ref)
        assert error <= limit, f"{name}: relative error {error:.3g}, allowed {limit:.3g}"
    return saved, forward, backward


@BOTH
@pytest.mark.parametrize("kind", ["all", "some", "none"])
def test_matches_the_reference(kind, norm_first):
    tokens, parameters = make()
    check(tokens, parameters, make_keys(tokens, kind), norm_first=norm_first)


RANKS = [(1, 40), (3, 12), (8, 5), (16, 3), (17, 3), (64, 2), (128, 1)]
SIXTEEN_BITS = [(3, 12, torch.bfloat16), (3, 12, torch.float16), (17, 3, torch.bfloat16)]


@pytest.mark.parametrize(
    "rank, matrices, dtype", [*((*rank, torch.float32) for rank in RANKS), *SIXTEEN_BITS]
)
@BOTH
def test_any_rank(dtype, rank, matrices, norm_first):
    """Several blocks of matrices, the last one not full; and matrices of several tiles."""
    inputs = make(1, matrices, rank, hidden=8, inner=12, dtype=dtype)
    check(*inputs, heads=1, norm_first=norm_first)


@BOTH
def test_many_tokens(norm_first):
    """Patch tokens, beyond what directions there may be: no code of their own."""
    check(*make(1, 1, 150, hidden=4, inner=6), heads=1, norm_first=norm_first)


@pytest.mark.parametrize(
    "sets, hidden, heads, inner",
    [(3, 12, 1, 11), (1, 12, 12, 64), (1, 26, 2, 65), (2, 7, 7, 3), (1, 40, 4, 130)],
)
@BOTH
def test_any_size(sets, hidden, heads, inner, norm_first):
    check(*make(sets, 1, 3, hidden, inner), heads=heads, norm_first=norm_first)


@BOTH
def test_the_method_s_own_size(norm_first):
    """Hidden 312 in two tiles, 12 heads of 26, inner 1200."""
    tokens, parameters = make(1, 2, 3, 312, 1200)
    options = {"heads": 12, "eps": 1e-12, "norm_first": norm_first}
    saved, forward, backward = check(tokens, parameters, **options)
    assert forward[1] == []
    assert backward[1] == ["bmm"] * 4 + ["baddbmm_"] * (not norm_first)
    theirs = default._forward(tokens, make_keys(tokens), parameters, *options.values())
    for ours, wanted in zip(saved, theirs[1:], strict=True):
        assert relative_error(ours, wanted) <= EXACT


@BOTH
def test_forward_and_backward_may_come_from_different_backends(norm_first):
    tokens, parameters = make()
    keys, dout, options = make_keys(tokens), torch.randn_like(tokens), (3, 1e-5, norm_first)
    _, *ours = kernels.forward(tokens, keys, parameters, *options)
    _, *theirs = default._forward(tokens, keys, parameters, *options)
    for first, second in ((ours, theirs), (theirs, ours)):
        dtokens, gradients = kernels.backward(dout, tokens, parameters, first, *options)
        expected = default._backward_default(dout, tokens, parameters, second, *options)
        for one, two in zip([dtokens, *gradients], [expected[0], *expected[1]], strict=True):
            assert relative_error(one, two) <= EXACT


@BOTH
def test_many_rows(norm_first):
    """More than a tile of rows, in the larger tiles too."""
    tokens, parameters = make(1, 28, 3, 8, 6)
    check(tokens, parameters, heads=1, norm_first=norm_first)
    few, many = configs.DEFAULT.hypernet
    with configs.using(dataclasses.replace(configs.DEFAULT, hypernet=(many, few))):
        check(tokens, parameters, heads=1, norm_first=norm_first)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "permuted", "expanded"])
@BOTH
def test_any_layout(layout, norm_first):
    """Of tokens and of the upstream gradient; stride 0 is that of a sum."""
    tokens, parameters = make()
    dout = torch.randn(tokens.shape, device=DEVICE)
    if layout != "expanded":
        tokens = laid_out(tokens, layout)
    check(tokens, parameters, norm_first=norm_first, dout=laid_out(dout, layout))


@BOTH
def test_any_layout_of_parameters_and_keys(norm_first):
    tokens, parameters = make()
    keys = make_keys(tokens).transpose(0, 1).contiguous().transpose(0, 1)
    check(tokens, [laid_out(p, "sliced") for p in parameters], keys, norm_first=norm_first)


def test_large_scores_do_not_overflow():
    tokens, parameters = make()
    parameters[0] *= 1e3
    out = kernels.forward(tokens, make_keys(tokens), parameters, 3, 1e-5, False)[0]
    assert out.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
@BOTH
def test_no_tokens(shape, norm_first):
    tokens, parameters = make(*shape)
    keys = torch.ones(shape, dtype=torch.bool, device=DEVICE)
    options = (3, 1e-5, norm_first)
    out, *saved = kernels.forward(tokens, keys, parameters, *options)
    theirs = default._forward(tokens, keys, parameters, *options)
    assert [t.shape for t in (out, *saved)] == [t.shape for t in theirs]
    dtokens, gradients = kernels.backward(out, tokens, parameters, saved, *options)
    assert dtokens.shape == tokens.shape
    assert all(
        (g == 0).all() and g.shape == p.shape for g, p in zip(gradients, parameters, strict=True)
    )


@pytest.mark.parametrize(
    "hidden, heads, dtype", [(12, 3, torch.float64), (600, 12, None), (65, 1, None)]
)
@BOTH
def test_what_the_default_implementation_keeps(hidden, heads, dtype, norm_first):
    tokens, parameters = make(1, 1, 2, hidden, 4, dtype or torch.float32)
    keys, dout = make_keys(tokens), torch.ones_like(tokens)
    options = (heads, 1e-5, norm_first)
    results, saved, forward, backward = run(tokens, keys, parameters, options, dout)
    assert forward[0] == backward[0] == []
    assert torch.equal(results[0], default._forward(tokens, keys, parameters, *options)[0])
    expected = default._backward_default(dout, tokens, parameters, saved, *options)
    assert torch.equal(results[1], expected[0])


def test_registered_for_cuda():
    for name in ("hypernet_layer", "hypernet_layer_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"hal::{name}", "CUDA")


@pytest.mark.gpu
@BOTH
def test_in_a_cuda_graph(norm_first):
    """Captured with nothing read on the host; replayed on other numbers and other keys."""
    tokens, parameters = make(3, 24, 5, 312, 1200)
    keys = make_keys(tokens, "all")
    leaves = [t.requires_grad_() for t in (tokens, *parameters)]
    named = dict(zip(PARAMETERS, parameters, strict=True))

    def step():
        out = hypernet_layer(tokens, keys, named, heads=12, norm_first=norm_first)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    for _ in range(2):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        tokens.copy_(torch.randn_like(tokens))
    keys.copy_(make_keys(tokens))
    graph.replay()
    replayed = [t.clone() for t in captured]
    assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))
