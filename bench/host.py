"""Host time of a training step as a GPU would be served, measured without a GPU.

    python -m bench.host

A step of RoBERTa-base (12 blocks, of width 64) on 8 tokens, and one linear layer forward and
backward, on the CPU. This library's operators run as on a CUDA device, but for launches, which are
faked: what Triton would compile for an sm_90 does nothing. A launch so costs its host work but not
the driver's. Torch's operators run as they do on a CPU, where these sizes cost their dispatch and
little else; AdamW takes its foreach form, as on a GPU.

The model: CPU time of the process, and 2.5 µs for the driver's part of every launch, torch's and
Triton's. It says what decides steps of small batches; it says nothing about kernels.

Methods take turns, and a ratio is the median of the turns' ratios. The exit status is 1 if one is
beyond its bound.
"""

import contextlib
import dataclasses
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import hal_kernels
from hal_kernels.kernels import configs
from hal_kernels.nn.tensors import finite_norm
from hal_kernels.ops._library import TRITON

from . import overhead
from .common import append_row, interleaved, parser, summary
from .launches import counted
from .methods import Method, batch_of
from .models import roberta_base

LAUNCH_US = 2.5
METHODS = ("frozen", "floor", "lora", "adalora", "hal-direct", "hal-spectral")
PEER = "adalora"
BOUNDS = {"a step": 0.40, "a layer": 1.0}  # of the default's, hal-spectral's, over the peer's
QUICK = 1.1  # times these for few turns
WIDTH, TOKENS = 64, 8
SCRATCH = (
    "global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align",
    "launch_cooperative_grid", "launch_pdl", "arg_annotations", "kernel_signature",
)  # fmt: skip


DEVICE = -1  # Triton keeps what it compiles by device: apart from what real ones have


class _Driver:
    """What Triton asks the driver of an sm_90 for."""

    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def nothing(*args: Any) -> None:
    """A launch."""


@contextlib.contextmanager
def faked_gpu(launch: Callable[..., None] = nothing) -> Iterator[None]:
    """CUDA's implementations of this library's operators for tensors of the CPU, where Triton calls
    `launch` with what it calls the driver with."""
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.compiler import CompiledKernel
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    def compiled(self: Any, key: Any, *rest: Any) -> Any:
        launcher = CudaLauncher.__new__(CudaLauncher)
        vars(launcher).update(dict.fromkeys(SCRATCH, 0), launch=launch, num_ctas=1)
        kernel = CompiledKernel.__new__(CompiledKernel)
        kernel.function = kernel.packed_metadata = kernel.src = None
        kernel.name, kernel.module, kernel._run = key, object(), launcher
        self.device_caches[DEVICE][0][key] = kernel
        return kernel

    library, before = torch.library.Library("hal", "IMPL"), driver._active
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for name, function in TRITON.items():
            library.impl(name, function, "CPU", allow_override=True)
    driver.set_active(_Driver())  # type: ignore[arg-type]
    try:
        with (
            mock.patch.object(JITFunction, "_do_compile", compiled),
            configs.using(dataclasses.replace(configs.SM_90)),  # a GPU of which nothing is kept
        ):
            yield
    finally:
        driver._active = before
        library._destroy()


def layers_of(name: str) -> nn.Module:
    """32 layers, of width 64, one behind the other."""
    if name != "hal-spectral":
        return overhead.METHODS[name]()
    return hal_kernels.patch_model(
        overhead.stack(), overhead.RANK, init_rank=overhead.INIT_RANK, targets=overhead.NAMES,
        seed=0,
    )  # fmt: skip


def pass_of(name: str) -> Callable[[], None]:
    """Forward and backward of all of them."""
    model = layers_of(name)
    x, gradient = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(TOKENS, WIDTH)
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]

    def run() -> None:
        model(x).backward(gradient)
        for tensor in trained:
            tensor.grad = None

    return run


def steps() -> dict[str, Callable[[], Any]]:
    """A training step of every method."""
    device, base = torch.device("cpu"), roberta_base(width=WIDTH, vocabulary=60_000, length=64)
    model, batch, made = base.build(device), batch_of(1, TOKENS, device), {}
    for name in METHODS:
        method = Method(name, model, base, device)
        for group in method.optimizer.param_groups:
            group["foreach"] = True
        made[name] = lambda method=method: method.step(batch)
    return made


def measured(
    passes: dict[str, Callable[[], Any]], repeats: int, parts: int = 1
) -> dict[str, dict[str, Any]]:
    """Of each pass, which has so many equal parts: a part's launches and host times, in turns."""
    # Values are what was in memory: gradients that are not finite would spare a step its end.
    check = mock.patch("hal_kernels.nn.adapter.all_finite", lambda t: finite_norm(t) or True)
    launches, samples = {}, {}
    with configs.using(dataclasses.replace(configs.SM_90)), check:
        for name, run in passes.items():
            run()
            launches[name] = counted(run).total / parts

    def timed(run: Callable[[], Any]) -> dict[str, float]:
        start = time.process_time()
        run()
        return {"host": (time.process_time() - start) / parts}

    with faked_gpu(), check:
        turns = {name: lambda run=run: timed(run) for name, run in passes.items()}
        for found in interleaved(turns, repeats, warmup=5):
            samples = found
    return {
        name: {"launches": launches[name], "seconds": [s["host"] for s in found]}
        for name, found in samples.items()
    }


def modelled(result: dict[str, Any]) -> list[float]:
    return [s + LAUNCH_US * 1e-6 * result["launches"] for s in result["seconds"]]


def table(title: str, unit: str, scale: float, results: dict[str, dict[str, Any]]) -> Table:
    view = Table(title=f"{title}: {unit}, median [quartiles]")
    for column in ("method", "host", "launches", "with 2.5 µs each", "÷ AdaLoRA"):
        view.add_column(column, justify="left" if column == "method" else "right")
    for name, r in results.items():
        host = f"{scale * r['median_ms']:.3g} [{scale * r['q1_ms']:.3g}–{scale * r['q3_ms']:.3g}]"
        whole = f"{scale * (r['median_ms'] + r['launches'] * LAUNCH_US / 1e3):.3g}"
        view.add_row(name, host, f"{r['launches']:.4g}", whole, f"{r['ratio']:.2f}")
    return view


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=100)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # results of kernels that do nothing may be such
    repeats = 20 if arguments.quick else arguments.repeats
    console, misses = Console(), []
    console.print(
        "launches are faked: CPU time of the process as a CUDA device would be served, plus "
        f"{LAUNCH_US} µs a launch; no kernel is run"
    )
    stacks = {n: pass_of(n) for n in ("frozen", "lora", PEER, "hal-direct", "hal-spectral")}
    cases = {
        "a step": ("ms", 1.0, measured(steps(), repeats)),
        "a layer": ("µs", 1e3, measured(stacks, 2 * repeats, overhead.LAYERS)),
    }
    for title, (unit, scale, results) in cases.items():
        theirs = modelled(results[PEER])
        for result in results.values():
            pairs = zip(modelled(result), theirs, strict=True)
            result["ratio"] = median(ours / peer for ours, peer in pairs)
            result |= summary(result.pop("seconds"))
        console.print(table(title, unit, scale, results))
        ratio, bound = results["hal-spectral"]["ratio"], BOUNDS[title]
        bound *= QUICK if arguments.quick else 1.0
        if ratio > bound:
            misses.append(f"{title}: hal-spectral / {PEER} = {ratio:.3f} > {bound:.3g}")
    if not arguments.no_save:
        row = {"width": WIDTH, "tokens": TOKENS, "launch_us": LAUNCH_US}
        row |= {title: results for title, (_, _, results) in cases.items()}
        append_row("host", row, Path(arguments.out))
    for miss in misses:
        console.print(f"missed: {miss}")
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
