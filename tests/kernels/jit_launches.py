"""A program: launch kernels as on a GPU, and list what the launches would compile for an sm_90.

    python jit_launches.py rows|ranks|odd [--compile]

prints {kernel: number of variants} as JSON. Arguments are bound and specialized by Triton itself,
on tensors of the CPU; no kernel runs. With --compile, variants are compiled too.
"""

import collections
import json
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from hal_kernels.kernels import configs
from hal_kernels.nn.layout import LayerSpec, Layout
from hal_kernels.ops.orthogonality_penalty import triton as penalty_kernels
from hal_kernels.ops.spectral_step import triton as spectral_kernels
from hal_kernels.ops.svd_linear import triton as svd_linear


class NoGPU:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def listen(compiling: bool) -> collections.Counter:
    found: collections.Counter = collections.Counter()
    run, compile_it = JITFunction.run, JITFunction._do_compile

    def only_warm_up(self, *args, grid, warmup, **options):
        return run(self, *args, grid=grid, warmup=True, **options)

    def noted(self, key, *rest):
        found[self.__name__.strip("_")] += 1
        kernel = compile_it(self, key, *rest) if compiling else object()
        self.device_caches[0][0][key] = kernel
        return kernel

    driver.set_active(NoGPU())
    JITFunction.run, JITFunction._do_compile = only_warm_up, noted
    torch.mm, torch.Tensor.addmm_ = (lambda *rest, out: out), (lambda y, *rest: y)
    configs._in_use = configs.SM_90
    return found


def linear(T, d_in, d_out, r, dtype=torch.bfloat16, dropout=0.1):
    """Every path of the linear layer."""
    x, weight = torch.randn(T, d_in).to(dtype), [torch.randn(d_out, d_in).to(dtype)]
    factors = [torch.randn(r, d_in)], [torch.randn(r)], [torch.randn(r, d_out)]
    options, bias = (0.5, dropout, torch.tensor(3) if dropout else None), torch.randn(d_out)
    for path in svd_linear.PATHS:
        y, h = svd_linear.forward(x, weight, [bias.to(dtype)], *factors, *options, path=path)
    for path in ("prepare", "add"):
        svd_linear.backward(y, x, h, weight, *factors, *options, 0.0, True, True, path=path)


def group(T, d, widths, r):
    x, weights = torch.randn(T, d), [torch.randn(n, d) for n in widths]
    biases, n = [None] * len(widths), len(widths)
    p, lam = (list(torch.randn(n * r, *more).split(r)) for more in ((d,), ()))
    q = [torch.randn(r, n) for n in widths]
    options = (0.5, 0.0, None)
    y, h = svd_linear.forward(x, weights, biases, p, lam, q, *options)
    svd_linear.backward(list(y), x, h, weights, p, lam, q, *options, 0.0, True, True)


def penalty(*groups):
    """Of groups (matrices, r, d)."""
    factors = [torch.randn(g * r, d) for g, r, d in groups]
    offsets = [torch.arange(0, g * r + 1, r) for g, r, _ in groups]
    rest = (offsets, [r for _, r, _ in groups], True, 1.0)
    value, residuals = penalty_kernels.forward(factors, *rest)
    penalty_kernels.backward(value, factors, residuals, *rest)


def spectral(*layers):
    """Of layers (d_in, d_out, r), with a mask and a gain."""
    layout = Layout([LayerSpec(str(i), *d, d[2], 1.0) for i, d in enumerate(layers)])
    p, q = ([torch.randn(sum(g.ranks), g.width) for g in s.groups] for s in (layout.p, layout.q))
    lam, numbers = torch.randn(layout.rows), [torch.ones(len(layers), dtype=torch.float64)] * 3
    rows = [torch.tensor(side.rows) for side in (layout.p, layout.q)]
    offsets = [torch.tensor(o) for o in (layout.p.offsets, layout.offsets, layout.q.offsets)]
    spectral_kernels.step_(
        p, lam, q, p, q, p, q, torch.ones_like(lam), *numbers, torch.zeros(()), 0.9, 0.5,
        rows, offsets, layout.p.counts, layout.q.counts, layout.p.sizes, layout.q.sizes,
        layout.max_rank,
    )  # fmt: skip


def rows():
    for T in (2048, 1, 15, 16, 17, 100, 512, 513, 1000, 4096, 4097, 20000):
        linear(T, 768, 768, 3)


def ranks():
    for r in range(1, 17):
        linear(600, 768, 768, r)


def odd():
    """Where numbers are 1, and become constants."""
    linear(1, 1, 1, 1)
    linear(300, 5, 1, 1, torch.float32, 0.0)
    group(70, 48, (48, 16), 3)
    group(300, 1, (1, 1, 1), 1)
    penalty((1, 1, 1))
    penalty((2, 1, 1), (16, 1, 16), (1, 3, 7))
    spectral((1, 1, 1))
    spectral((1, 16, 1), (7, 1, 1), (64, 65, 9))


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = listen("--compile" in sys.argv)
    {"rows": rows, "ranks": ranks, "odd": odd}[sys.argv[1]]()
    print(json.dumps(found))
