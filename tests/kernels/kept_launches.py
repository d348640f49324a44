"""A program: the SVD layers' operators on a faked sm_90, every launch once more by Triton itself.

    python kept_launches.py

Kernels do nothing, on tensors of the CPU. Prints as JSON how many launches there were, how many of
them passed Triton by, how many of these were not what Triton launched for the same tensors, and how
many a hook was told of, of those that were made while there was one.
"""

import itertools
import json

import torch
from triton import knobs
from triton.runtime.jit import JITFunction

from bench.host import faked_gpu
from hal_kernels.kernels import plan
from hal_kernels.ops.svd_linear import triton as svd_linear

DTYPES = (torch.float32, torch.bfloat16)
found = {"launches": 0, "direct": 0, "other": 0, "hooked": 0, "told": 0}
log: list[tuple] = []  # of what the driver was called with
by_triton, hooks = 0, knobs.runtime.launch_enter_hook


def driver(x, y, z, stream, function, *rest):
    tensors_and_numbers = rest[-1] if isinstance(rest[-1], tuple) else rest[9:]
    log.append((x, y, z, stream, function, tensors_and_numbers))
    if hooks.calls:
        found["hooked"] += 1
        found["told"] += any(value is hooks for value in rest)


def checked(self, kernel, *tensors):
    """A launch, and Triton's of the same."""
    before = by_triton
    launch(self, kernel, *tensors)
    found["launches"] += 1
    if by_triton == before:
        found["direct"] += 1
        kernel[self.grid](*tensors, *self.numbers, **self.constants)
        ours, theirs = log[-2:]
        same = ours[:5] == theirs[:5] and len(ours[5]) == len(theirs[5])
        same = same and all(map(equal, ours[5], theirs[5]))
        found["other"] += not same


def equal(a, b):
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a is b or (not isinstance(a, torch.Tensor) and type(a) is type(b) and a == b)


def counted(self, *args, **options):
    global by_triton
    by_triton += 1
    return run(self, *args, **options)


def strided(rows, columns, dtype, how):
    """A matrix: contiguous, not on 16 bytes, or with rows apart."""
    if how == "apart":
        return torch.randn(rows, columns + 16).to(dtype)[:, :columns]
    return (
        torch.randn(rows * columns + 1)
        .to(dtype)[how == "odd" :][: rows * columns]
        .view(rows, columns)
    )


def layers(T, d, widths, r, dtype, how, tangent):
    """Forward and backward of one layer or several, in every path."""
    x, dropout = strided(T, d, dtype, how), 0.1 if len(widths) == 1 else 0.0
    seed = torch.tensor(3) if dropout else None
    weight = [torch.randn(n, d).to(dtype) for n in widths]
    base = [torch.randn(n).to(dtype) if n % 32 else None for n in widths]
    p, lam = list(torch.randn(len(widths) * r, d).split(r)), [torch.randn(r) for _ in widths]
    q = [torch.randn(r, n) for n in widths]
    dy = [strided(T, n, dtype, how) for n in widths]
    for path in svd_linear.PATHS:
        _, h = svd_linear.forward(x, weight, base, p, lam, q, 0.5, dropout, seed, path=path)
    for path, factors in itertools.product(("prepare", "add"), (True, False)):
        more = (0.5, dropout, seed, tangent, True, factors)
        svd_linear.backward(dy, x, h, weight, p, lam, q, *more, path=path)
    if len(dy) > 1:
        more = (0.5, dropout, seed, tangent, True, True)
        svd_linear.backward([None, *dy[1:]], x, h, weight, p, lam, q, *more)


def every_kind():
    sizes = ((8, 64, (64,), 5), (300, 48, (80,), 3), (1, 1, (1,), 1), (70, 48, (64, 48), 4))
    kinds = itertools.product(sizes, DTYPES, ("plain", "odd", "apart"), (0.0, 2.0**-24))
    for (T, d, widths, r), dtype, how, tangent in kinds:
        layers(T, d, widths, r, dtype, how, tangent)
    layers(8, 64, (64,), 40, torch.float32, "plain", 0.0)  # u and dQ apart


launch, run = plan.Launch.__call__, JITFunction.run
plan.Launch.__call__, JITFunction.run = checked, counted
with faked_gpu(driver):
    every_kind()
    every_kind()
    hooks.add(lambda metadata: None)
    layers(8, 64, (64,), 5, torch.float32, "plain", 0.0)
print(json.dumps(found))
