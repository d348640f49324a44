"""Each operator: time beside its roofline floor, plain PyTorch, torch.compile and PEFT's layer.

    python -m bench.operators [--only svd_linear] [--quick] [--check]

On a GPU over the sizes of real models, on a CPU over small ones. Every implementation is checked
against the formula in float64 before it is timed, and only then. ``--check`` runs every operator
once, forward and backward, at a small odd size, and times nothing: what a sanitizer wants.

The floor is the bytes and flops of the traffic model, at the rates of the GPU's configuration; on a
CPU at those of a copy and of a product that are measured first. Sizes for a CPU are small and may
stay in its cache, beyond which the floor does not see. bench/pytest_operators.py has the small
sizes for pytest-benchmark.
"""

import functools
import sys
import time
from collections.abc import Callable, Mapping
from statistics import quantiles
from typing import Any

import torch

from hal_kernels.kernels.configs import architecture_of

from .common import append_row, parser, synchronize
from .operator_cases import Case, Function, Inputs, cases

CYCLES_PER_US = 2000  # of a GPU's clock, at most
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative: TF32x3 sums; 2⁻⁷ in long sums


def leaves_of(case: Case, dtype: torch.dtype | None = None) -> tuple[Inputs, list[torch.Tensor]]:
    """Copies of the inputs, and those of them whose gradients are wanted."""
    leaves = {
        name: t.to(dtype or t.dtype, copy=True).requires_grad_(not name.startswith(case.frozen))
        for name, t in case.inputs.items()
    }
    return leaves, [t for t in leaves.values() if t.requires_grad]


def outputs(function: Function, inputs: Inputs) -> list[torch.Tensor]:
    out = function(inputs)
    return [out] if isinstance(out, torch.Tensor) else list(out)


def results(
    function: Function,
    case: Case,
    upstream: list[torch.Tensor] | None,
    dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """Outputs and, where there are any, the gradients; computed in `dtype`."""
    leaves, wanted = leaves_of(case, dtype)
    found = outputs(function, leaves)
    if not found[0].requires_grad:
        return found
    dy = [torch.ones_like(t) for t in found]
    if upstream is not None:
        dy = [t.to(out.dtype) for t, out in zip(upstream, found, strict=True)]
    return [*(t.detach() for t in found), *torch.autograd.grad(found, wanted, dy)]


def error(function: Function, case: Case, upstream: list[torch.Tensor] | None) -> float:
    """Largest relative error of outputs and gradients against the formula in float64.

    A gradient a billionth of the largest is zero but for rounding, as that of the keys' bias is.
    """
    reference = results(case.formula, case, upstream, torch.float64)
    largest = max(float(t.norm()) for t in reference)
    worst = 0.0
    for one, other in zip(results(function, case, upstream), reference, strict=True):
        norm = float(other.norm())
        if norm > 1e-9 * largest:
            worst = max(worst, float((one.double() - other).norm()) / norm)
    return worst


def implementations(case: Case, compiled: bool) -> dict[str, Function]:
    found: dict[str, Function] = {"hal": case.ours}
    if case.formula_timed:
        found["eager"] = case.formula
    if compiled:
        found["compile"] = torch.compile(case.formula, dynamic=False)
    if case.peft is not None:
        found["peft"] = case.peft()
    if case.operator == "svd_linear":
        found["base GEMM"] = lambda i: torch.nn.functional.linear(i["x"], i["weight"], i["bias"])
    return found


def trained(function: Function, case: Case) -> Callable[[], object]:
    """One forward and backward, weights frozen, as in training."""
    leaves, wanted = leaves_of(case)
    dy = [torch.randn_like(t) for t in outputs(function, leaves)]

    def step() -> object:
        found = outputs(function, leaves)
        if not found[0].requires_grad:
            return found
        return torch.autograd.grad(found, wanted, dy, allow_unused=True)

    return step


def time_all(
    steps: dict[str, Callable[[], object]], device: torch.device, budget_s: float
) -> dict[str, Any]:
    """Median and quartiles of each, in µs, interleaved.

    On a GPU with empty caches, and behind a sleep of the device that lasts until the host has
    launched everything: the device's time alone.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    host_us = {}
    for name, step in steps.items():
        step()
        step()
        synchronize()
        host_us[name] = _host_us(step)
        synchronize()
    end = time.perf_counter() + budget_s
    if device.type == "cuda":
        flush = torch.empty(1 << 26, dtype=torch.int32, device=device)  # as large as any L2
    while time.perf_counter() < end or len(samples["hal"]) < 5:
        for name, step in steps.items():
            if device.type == "cuda":
                flush.zero_()
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(int(1.5 * CYCLES_PER_US * host_us[name]))
                start.record()
                step()
                stop.record()
                stop.synchronize()
                samples[name].append(1e3 * start.elapsed_time(stop))
            else:
                samples[name].append(_host_us(step))
    found = {}
    for name, values in samples.items():
        low, middle, high = quantiles(values, n=4)
        found[name] = {"median_us": middle, "q1_us": low, "q3_us": high, "repeats": len(values)}
    return found


def _host_us(step: Callable[[], object]) -> float:
    begin = time.perf_counter()
    step()
    return 1e6 * (time.perf_counter() - begin)


@functools.cache
def rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes per µs of memory and flop per µs of matrix work."""
    if device.type == "cuda":
        gpu = architecture_of(device)
        return gpu.bandwidth, gpu.matrix_rate * (1.0 if dtype == torch.bfloat16 else 0.125)
    source = torch.ones(1 << 24)
    target, a = torch.empty_like(source), torch.ones(1024, 1024, dtype=dtype)

    def fastest(run: Callable[[], object]) -> float:
        times = []
        for _ in range(50):  # half a second, so that no burst of other work covers all of it
            times.append(_host_us(run))
        return min(times)

    moved, flops = 2 * source.numel() * 4, 2 * 1024**3
    return moved / fastest(lambda: target.copy_(source)), flops / fastest(lambda: a @ a)


def measure(
    case: Case,
    device: torch.device,
    compiled: bool,
    budget_s: float,
    others: Mapping[str, Function] | None = None,
) -> dict[str, Any]:
    """Errors and times of the implementations, and of `others` of the same formula.

    Raises:
        SystemExit: this library's is wrong.
    """
    functions = implementations(case, compiled) | dict(others or {})
    out = outputs(case.ours, leaves_of(case)[0])
    upstream = [torch.randn_like(t) for t in out] if out[0].dim() else None
    errors = {n: error(f, case, upstream) for n, f in functions.items() if n != "base GEMM"}
    if not errors["hal"] <= BOUNDS[case.dtype]:
        raise SystemExit(f"{case.operator} {case.size}: relative error {errors['hal']:.2e}")
    steps = {name: trained(function, case) for name, function in functions.items()}
    times = time_all(steps, device, budget_s)
    floor = case.floor.floor_us(*rates(device, case.dtype))
    return {
        "errors": errors,
        "times": times,
        "floor_us": floor,
        "floor_share": floor / times["hal"]["median_us"],
        "bytes": case.floor.moved,
        "flops": case.floor.flops,
        "arch": architecture_of(device).name,
    }


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--check", action="store_true", help="check small sizes, time nothing")
    options.add_argument("--only", default="", help="operators whose name contains this")
    options.add_argument("--compile", action="store_true", help="measure torch.compile as well")
    arguments = options.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wrong = 0
    names = ("hal", "eager", "compile", "peft", "base GEMM")
    head = (*names, "MB", "floor", "floor/hal", "error")
    if not arguments.check:
        print("forward + backward, median µs")
        print(f"{'operator':23}{'size':36}" + "".join(f"{name:>10}" for name in head))
    for case in cases(device, arguments.quick, arguments.check):
        if arguments.only not in case.operator:
            continue
        if arguments.check:
            found = error(case.ours, case, None)
            bad = not found <= BOUNDS[case.dtype]
            wrong += bad
            print(f"{'WRONG' if bad else 'ok   '} {case.operator} {case.size}: {found:.1e}")
            continue
        row = measure(case, device, arguments.compile, 0.05 if arguments.quick else 0.3)
        if not arguments.no_save:
            append_row(
                "operators", {"operator": case.operator, "size": case.size} | row, arguments.out
            )
        times = row["times"]
        cells = [f"{times[n]['median_us']:.0f}" if n in times else "–" for n in names]
        cells += [f"{row['bytes'] / 1e6:.3g}", f"{row['floor_us']:.3g}"]
        cells += [f"{row['floor_share']:.0%}", f"{row['errors']['hal']:.0e}"]
        # Line by line: a run that is stopped has shown what it measured.
        print(f"{case.operator:23}{case.size:36}" + "".join(f"{cell:>10}" for cell in cells))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
