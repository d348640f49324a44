"""Inputs, reference and runs of the SVD adapter's kernels, shared by its two operators' tests."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator

import pytest
import torch
from ops.tangent_contract import tangent_results
from ops.util import EXACT as INTERPRETED
from ops.util import assert_same, bounds, laid_out, values

from hal_kernels.kernels import configs
from hal_kernels.kernels.dropout import fill_keep_
from hal_kernels.ops import svd_adapter_add_reference, svd_linear_reference
from hal_kernels.ops._library import TRITON
from hal_kernels.ops.svd_linear import triton as kernels

from .harness import DEVICE, EXACT, Guarded, launches

SCALING = 0.75
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS_OF_RANK = {1: 1, 3: 17, 8: 128, 16: 17, 17: 1, 64: 17, 128: 17}  # each rank in one case
FACTORS = ("p", "lam", "q")
# Names of the kernels, as `launches` logs them, forward and backward.
SHRINK_EXPAND = ["shrink", "expand"]
ONE_BLOCK = ["gradients_dy", "gradients_x"]


def backward_kernels(rank: int, rows: int) -> list[str]:
    """With the default tiles: rows are shared out where there are more than 64 of them."""
    dy = "gradients_dy_apart" if rank > 32 else "gradients_dy"
    return [dy, "gradients_x"] + (["reduce"] if rows > 64 else [])


# Few and large tiles, for the interpreter, which takes some milliseconds for each.
_TILE = configs.Tile(64, 128, 4, 2, 128)
LARGE = {128: configs.SVDTiles(_TILE, _TILE, _TILE, _TILE, _TILE, (_TILE,))}


def seed(name: int | torch.Tensor) -> torch.Tensor:
    """On the device; one that is there already is not copied, which no CUDA graph could capture."""
    return torch.as_tensor(name, device=DEVICE)


def make(T=17, d_in=48, d_out=32, rank=3, dtype=torch.float32, factors=None):
    """Inputs by name. One in three singular values is pruned: Λ⊙mask is what kernels see."""
    factors = factors or dtype
    lam = (0.5 + torch.rand(rank, dtype=torch.float64)) * (1 - 2 * (torch.arange(rank) % 2))
    lam[1::3] = 0
    every = {
        "x": values(T, d_in, dtype=dtype),
        "y": values(T, d_out, dtype=dtype),
        "weight": (values(d_out, d_in) / d_in**0.5).to(dtype),
        "bias": values(d_out, dtype=dtype),
        "p": (values(rank, d_in) / d_in**0.5).to(factors),
        "lam": lam.to(factors),
        "q": (values(rank, d_out) / d_out**0.5).to(factors),
    }
    return {n: t.to(DEVICE) for n, t in every.items()}


def upstream(inputs, layout="contiguous"):
    return laid_out(values(*inputs["y"].shape, dtype=inputs["y"].dtype).to(DEVICE), layout)


def keep_of(x, dropout, name):
    """The dropout mask of x, in float64, as the kernels regenerate it."""
    keep = torch.empty(x[..., 0].numel(), x.shape[-1], dtype=torch.float64, device=DEVICE)
    return fill_keep_(keep, 0, dropout, seed(name)).view(x.shape)


def expected(operator, inputs, dy, dropout=0.0, name=0, dtype=torch.float64, tangent=0.0):
    """Output, h and gradients of the formula, by autograd, computed in `dtype`."""
    keep = keep_of(inputs["x"], dropout, name).to(dtype) if dropout else None
    leaves = {n: None if t is None else t.detach().to(dtype) for n, t in inputs.items()}
    wanted = [leaves[n].requires_grad_() for n in ("x", *FACTORS)]
    x, p, lam, q = wanted
    dropped = x if keep is None else x * keep
    if operator == "svd_linear":
        base = svd_linear_reference(x, leaves["weight"], leaves["bias"], p, lam, q, 0.0)
    else:
        base = leaves["y"]
    out = svd_adapter_add_reference(base, dropped, p, lam, q, SCALING)
    gradients = torch.autograd.grad(out, wanted, dy.to(dtype))
    h = dropped.reshape(-1, dropped.shape[-1]) @ p.t()
    found = dict(zip(("dx", "dp", "dlam", "dq"), gradients, strict=True))
    if tangent:
        of_tangent = tangent_results(inputs, dy, dtype, keep, tangent)
        found |= {"dp": of_tangent["p"], "dlam": lam.new_empty(0), "dq": of_tangent["q"]}
    return {"out": out.detach(), "h": h.detach(), **found}


def run(operator, inputs, dy, dropout=0.0, name=0, needs=(True, True), tangent=0.0, **paths):
    """The same by the launch functions; `paths` are their `path` arguments."""
    named = seed(name) if dropout else None
    factors = [inputs[n] for n in FACTORS]
    linear = operator == "svd_linear"
    weight, base = (inputs["weight"], inputs["bias"]) if linear else (None, inputs["y"])
    layer = [[t] for t in (weight, base, *factors)]
    if paths.get("forward"):
        options = (SCALING, dropout, named)
        (out,), h = kernels.forward(inputs["x"], *layer, *options, path=paths["forward"])
    else:
        out, h = TRITON["svd_linear"](inputs["x"], weight, base, *factors, SCALING, dropout, named)
    options = (SCALING, dropout, named, tangent, *needs)
    if paths.get("backward"):
        dx, dp, dlam, (dq,) = kernels.backward(
            [dy], inputs["x"], h, [weight], *layer[2:], *options, path=paths["backward"]
        )
        gradients = (dx, dp, dlam, dq)
    else:
        gradients = TRITON["svd_linear_backward"](dy, inputs["x"], h, weight, *factors, *options)
    assert h.dtype == (torch.float64 if inputs["x"].dtype == torch.float64 else torch.float32)
    for gradient, of in zip(gradients, ("x", *FACTORS), strict=True):
        assert gradient.dtype == inputs[of].dtype
    return {"out": out, "h": h, **dict(zip(("dx", "dp", "dlam", "dq"), gradients, strict=True))}


def allowed(dtype, plain, ref):
    """As `bounds`; on a GPU a float32 product is three TF32 products, see `EXACT`."""
    if dtype == torch.float32 and DEVICE == "cuda":
        return EXACT
    return bounds(dtype, plain, ref)


def check(operator, inputs, layout="contiguous", dropout=0.0, coarse=None, tangent=0.0, **paths):
    """Output, h and every gradient against the formula in float64; returns the kernels' names.

    16-bit results may be twice as wrong as plain PyTorch in 16 bits (in `coarse`, if that is
    another dtype than x's), plus eps/4 for the rounding that plain PyTorch may have been spared.
    """
    dtype = coarse or inputs["x"].dtype
    dy = upstream(inputs, layout)
    with recorded() as log:
        out = run(operator, inputs, dy, dropout, 5, tangent=tangent, **paths)
    ref = expected(operator, inputs, dy, dropout, 5, tangent=tangent)
    plain = None
    if dtype not in INTERPRETED:
        plain = expected(operator, inputs, dy, dropout, 5, inputs["x"].dtype, tangent)
    assert_same(out, ref, allowed(dtype, plain, ref))
    return log


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """Kernels launched, outputs within bands that stay as they were."""
    with launches(kernels) as log, Guarded():
        yield log


@contextlib.contextmanager
def dispatched(name) -> Iterator[None]:
    """On a CPU, the kernels as that device's implementation of the operator ``hal::name``."""
    if DEVICE == "cuda":
        yield
        return
    library = torch.library.Library("hal", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for each in (name, f"{name}_backward"):
            library.impl(each, TRITON[each], "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def gpu_like(monkeypatch: pytest.MonkeyPatch, **changes) -> None:
    """Launch as for another GPU: the default one with `changes`."""
    monkeypatch.setattr(configs, "_in_use", dataclasses.replace(configs.DEFAULT, **changes))
