"""The traffic model, against each address that the kernels touch and the formulas' products."""

import contextlib
import functools
import importlib

import pytest
import torch
from ops.spectral_cases import make as make_layers
from torch.utils._python_dispatch import TorchDispatchMode

from hal_kernels.ops.orthogonality_penalty import triton as penalty_kernels
from hal_kernels.ops.spectral_step import triton as spectral_kernels
from hal_kernels.ops.svd_linear import default as svd_default
from hal_kernels.ops.svd_linear import triton as svd_kernels
from tools import traffic
from tools.traffic import Traffic

from .harness import DEVICE
from .svd_cases import LARGE, gpu_like, make
from .test_spectral_step import arguments

# Behind the functions of the same names.
penalty_op = importlib.import_module("hal_kernels.ops.orthogonality_penalty")


@contextlib.contextmanager
def counted():
    """For each launch, (kernel, bytes read, bytes written) of floating-point numbers."""
    from triton.runtime import interpreter

    found: list[tuple[str, int, int]] = []
    read: dict[int, set] = {}
    written: dict[int, set] = {}
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, run = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def note(sets, ptrs, mask):
        kind = ptrs.get_element_ty()
        if kind.is_floating():
            addresses = sets.setdefault(kind.primitive_bitwidth // 8, set())
            addresses.update(ptrs.data[mask.data.astype(bool)].ravel().tolist())

    def noted_load(self, ptrs, mask, *rest):
        note(read, ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def noted_store(self, ptrs, value, mask, *rest):
        note(written, ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def noted_run(self, *args, **options):
        read.clear()
        written.clear()
        run(self, *args, **options)
        sizes = [sum(width * len(a) for width, a in sets.items()) for sets in (read, written)]
        found.append((self.fn.__name__, *sizes))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", noted_load)
        patch.setattr(builder, "create_masked_store", noted_store)
        patch.setattr(executor, "__call__", noted_run)
        yield found


def measured(function) -> list[tuple[int, int]]:
    """(read, written) of each launch that `function` makes."""
    with counted() as found:
        function()
    return [(read, written) for _, read, written in found]


def moved(*parts: Traffic) -> list[tuple[int, int]]:
    return [(part.read, part.written) for part in parts]


class Products(TorchDispatchMode):
    """Counts the flops of matrix products, those into an existing output too."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.split("::")[-1].rstrip("_") in ("mm", "addmm", "bmm", "baddbmm"):
            x, y = [a for a in args if isinstance(a, torch.Tensor)][-2:]
            self.flops += 2 * x.numel() * y.shape[-1]
        return func(*args, **(kwargs or {}))


def flops_of(function) -> int:
    with Products() as products:
        function()
    return products.flops


interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="it is the interpreter that counts")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_the_adapter(monkeypatch, dtype):
    """Columns shared out twice, rows twice: partial sums of h, u, dP and dQ; two blocks a split."""
    gpu_like(
        monkeypatch, svd=LARGE, multiprocessors=8, column_parts=2, row_splits=2, block_splits=(2, 2)
    )
    T, d_in, d_out, r = 200, 256, 144, 3
    i, width = make(T, d_in, d_out, r, dtype, torch.float32), dtype.itemsize
    dy, y = torch.randn(T, d_out).to(dtype), torch.empty(T, d_out, dtype=dtype)
    parts = svd_kernels.shrink(i["x"], i["p"])
    c = len(parts)
    assert c == 2
    assert measured(lambda: svd_kernels.shrink(i["x"], i["p"])) == moved(
        traffic.shrink(T, d_in, r, width=width, splits=c)
    )
    h = svd_kernels.total_of(parts)
    for base in (None, y):
        assert measured(
            lambda: svd_kernels.expand_(y, parts, i["lam"], i["q"], 1.0, h_sum=h, base=base)  # noqa: B023
        ) == moved(traffic.expand(T, d_out, r, width=width, splits=c, base=base is not None))
    u = torch.empty(2, T, r)
    found = measured(lambda: svd_kernels.gradients_dy(dy, h, u, i["lam"], i["q"], 1.0))
    part = traffic.gradients_dy(T, d_out, r, width=width, splits=2, parts=2, blocks=2)
    # The sums in memory are written once a block of rows, to the same addresses.
    assert found == [(part.read, part.written - 2 * r * d_out * 4)]
    dx, sums = torch.empty_like(i["x"]), []
    for add in (False, True):
        found = measured(
            lambda: sums.append(
                svd_kernels.gradients_x(i["x"], h, u, i["p"], i["lam"], 1.0, dx=dx, add=add)  # noqa: B023
            )
        )
        assert found == moved(
            traffic.gradients_x(T, d_in, r, width=width, splits=2, parts=2, add=add)
        )
    dq = torch.randn(2, r, d_out)
    found = measured(lambda: svd_kernels.reduce([*sums[0], dq], [i["p"], i["lam"], i["q"]]))
    assert found == moved(traffic.reduce(d_in, d_out, r, splits=2, splits_q=2))


@interpreted
def test_bytes_of_the_adapter_of_a_high_rank(monkeypatch):
    """dy is read twice by one launch, which the cache may hide: counted once here."""
    gpu_like(monkeypatch, svd=LARGE, multiprocessors=8, row_splits=2)
    T, d, r = 130, 144, 40
    i, h, u = make(T, 64, d, r), torch.randn(T, r), torch.empty(2, T, r)
    dy = torch.randn(T, d)
    found = measured(lambda: svd_kernels.gradients_dy(dy, h, u, i["lam"], i["q"], 1.0))
    part = traffic.gradients_dy(T, d, r, width=4, splits=2, parts=2, apart=True)
    assert found == [(part.read - T * d * 4, part.written)]


@interpreted
def test_bytes_of_the_fused_layer_and_of_its_penalty(monkeypatch):
    gpu_like(monkeypatch, svd=LARGE, multiprocessors=4, column_parts=2)
    T, d_in, d_out, r = 70, 96, 200, 3
    i = make(T, d_in, d_out, r)
    layer = ([t] for t in (i["weight"], None, i["p"], i["lam"], i["q"]))
    arguments = (i["x"], *layer, 1.0, 0.0, None)
    assert measured(lambda: svd_kernels.forward(*arguments, path="fused")) == moved(
        traffic.fused(T, d_in, d_out, r, width=4)
    )
    grams, sizes = [], {"width": 4, "splits": 2}
    assert measured(lambda: svd_kernels.forward(*arguments, grams=grams)) == moved(
        traffic.shrink(T, d_in, r, **sizes) + traffic.gram(d_in, r, splits=2),
        traffic.expand(T, d_out, r, **sizes) + traffic.gram(d_out, r, splits=2),
    )
    assert measured(lambda: svd_kernels.penalty_of(grams)) == moved(
        traffic.finish(r, splits_p=2, splits_q=2)
    )


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_the_penalty(dtype):
    groups = [(3, 5, 40), (2, 4, 30)]  # matrices, r, d
    factors = [torch.randn(g * r, d).to(dtype) for g, r, d in groups]
    offsets = [torch.arange(0, g * r + 1, r) for g, r, _ in groups]
    rest = (offsets, [r for _, r, _ in groups], True, 1.0)
    residuals = penalty_kernels.forward(factors, *rest)[1]
    width = dtype.itemsize
    forward, backward = (
        functools.reduce(Traffic.__add__, [part(*group, factor=width) for group in groups])
        for part in (traffic.penalty_residual, traffic.penalty_gradient)
    )
    found = measured(lambda: penalty_kernels.forward(factors, *rest))
    assert found == moved(forward, traffic.penalty_sum(5))
    dvalue = torch.ones(())
    ((read, written),) = measured(
        lambda: penalty_kernels.backward(dvalue, factors, residuals, *rest)
    )
    assert (read - 4, written) == moved(backward)[0]  # the upstream gradient, one number


def test_flops():
    """Against the products of the implementations in plain PyTorch."""
    T, d_in, d_out, r = 20, 48, 32, 3
    i = make(T, d_in, d_out, r)
    weight, *factors = ([i[n]] for n in ("weight", "p", "lam", "q"))
    dy, more = torch.randn(T, d_out), (1.0, 0.0, None)
    forward = traffic.gemm(T, d_in, d_out) + traffic.shrink(T, d_in, r)
    forward += traffic.expand(T, d_out, r)
    found = flops_of(lambda: svd_default.forward(i["x"], weight, [None], *factors, *more))
    assert found == forward.flops
    h = torch.randn(T, r)
    found = flops_of(
        lambda: svd_default.backward([dy], i["x"], h, weight, *factors, *more, 0.0, True, True)
    )
    gradients = traffic.gradients_dy(T, d_out, r) + traffic.gradients_x(T, d_in, r)
    assert found == (traffic.gemm(T, d_out, d_in) + gradients).flops
    rows, rest = torch.randn(15, 40), ([torch.arange(0, 16, 5)], [5], True, 1.0)
    _, residuals = penalty_op._forward([rows], *rest)
    found = flops_of(lambda: penalty_op._forward([rows], *rest))
    assert found == traffic.penalty_residual(3, 5, 40).flops
    found = flops_of(lambda: penalty_op._backward_default(torch.ones(()), [rows], residuals, *rest))
    assert found == traffic.penalty_gradient(3, 5, 40).flops


@interpreted
def test_bytes_of_the_spectral_step():
    """Of a rank that is not padded. Where no gain is learned the two cosines are not read.

    Of the transforms two thirds are also read while they are made: the cache has them.
    """
    r, d_in, d_out = 8, 72, 24
    inputs = arguments(make_layers([(d_in, d_out, r)]))
    gram, solve, write = measured(lambda: spectral_kernels.step_(*inputs))
    assert [gram, write] == moved(
        traffic.spectral_gram(1, r, d_in) + traffic.spectral_gram(1, r, d_out),
        traffic.spectral_write(1, r, d_in) + traffic.spectral_write(1, r, d_out),
    )
    part = traffic.spectral_solve(1, r)
    assert solve == (part.read - 2 * 8 + 2 * 2 * r * r * 8, part.written)
