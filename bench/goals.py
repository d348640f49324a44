"""The goals for a GPU: what the kernels, a layer and training steps take, beside what they should.

    python -m bench.goals [--seconds 240]

In this order: whether the kernels are right at the sizes of the goals, against the formula in
float64; a layer of T = 8192, 4096 → 4096, r = 16, bf16; each kernel alone under replay of a CUDA
graph, beside its roofline floor (tools.traffic, at the bandwidth that a copy reaches); RoBERTa-base
at batch 1 and 8 of 128 tokens; eight blocks of Llama-3.1-8B's width at r = 16; RoBERTa-base again
with forward and backward captured in a CUDA graph, where that works.

Each measurement appends a row as it is made, and one that fails is a row too: the others go on.
What there is no time left for is skipped, with a row that says so. Each goal is printed as "goal /
measured / reached". The exit status is 1 if something failed; a goal that is not reached is no
failure. --quick does the same in small, on a CPU with TRITON_INTERPRET=1.
"""

import dataclasses
import functools
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import hal_kernels
from hal_kernels.ops import svd_adapter_add
from hal_kernels.ops.svd_linear import triton as svd_kernels
from tools import traffic
from tools.problems import Problem, penalty_problem, svd_problem

from . import operators
from .common import append_row, parser
from .memory import peak_of
from .methods import Method, batch_of
from .models import Base, llama_31_8b, roberta_base
from .operator_cases import LLAMA_BLOCK, Inputs, Outputs, spectral_case, svd_linear_case
from .replay import copied_per_us, reduce_problem, replayed, spectral_us
from .spectral_layers import SpectralLayers
from .training_step import this_device, timed

METHODS = ("frozen", "floor", "lora", "adalora", "hal-direct", "hal-spectral")
CAPTURED = ("lora", "adalora", "hal-direct", "hal-spectral")  # floor's gradients have no parameter
LLAMA_METHODS = ("frozen", "floor", "lora", "hal-spectral")
DEFAULT = "hal-spectral"
STEP, LAYER, LLAMA, FLOOR = 0.40, 0.80, 1.08, 0.70  # the goals, as ratios
JUDGED = ("shrink", "expand", "gradients_dy", "gradients_x", "penalty", "penalty gradient")
JUDGED += ("spectral gram", "spectral write")  # bound by memory


@dataclasses.dataclass(frozen=True)
class Sizes:
    T: int = 8192
    d: int = 4096
    r: int = 16
    dtype: torch.dtype = torch.bfloat16
    matrices: int = 448  # P and Q of Llama-3.1-8B's 224 layers
    layers: tuple[tuple[int, int], ...] = LLAMA_BLOCK * 32
    checked: int = 14  # of those, what the formula is computed for
    inputs: int = 3  # of a kernel, in turn: x of 64 MB three times is beyond any cache
    copied: int = 1 << 28
    roberta: Callable[[], Base] = roberta_base
    batches: tuple[int, ...] = (1, 8)
    length: int = 128
    llama: Callable[[], Base] = lambda: llama_31_8b(layers=8)
    shapes: tuple[tuple[int, int], ...] = ((1, 1024), (4, 2048))
    budget_s: float = 0.5
    repeats: int = 25
    warmup: int = 3


def small_llama() -> Base:
    """Two narrow blocks."""
    whole = llama_31_8b(layers=2)

    def config() -> Any:
        found = whole.config()
        found.update({"hidden_size": 64, "intermediate_size": 96, "vocab_size": 50_000})
        found.update({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})
        return found

    return dataclasses.replace(whole, config=config, dtype=torch.float32)


SMALL = Sizes(  # in float32: neither a CPU nor Triton's interpreter knows bf16 well
    T=33, d=32, r=3, dtype=torch.float32, matrices=2, layers=((32, 48), (48, 32)), checked=2,
    inputs=1, copied=1 << 16,
    roberta=lambda: roberta_base(layers=1, width=64, vocabulary=50_000), batches=(1,), length=8,
    llama=small_llama, shapes=((1, 16),), budget_s=0.01, repeats=2, warmup=1,
)  # fmt: skip


class Run:
    """Measurements as they are made: printed, and appended to the rows."""

    def __init__(self, sizes: Sizes, out: Path | None, seconds: float) -> None:
        self.sizes, self.out, self.device = sizes, out, this_device()
        self.begin = time.perf_counter()
        self.seconds, self.failed, self.goals = seconds, False, [("goal", "measured", "reached")]

    def attempt(self, section: str, name: str, measure: Callable[[], dict[str, Any] | None]) -> Any:
        """What `measure` returns, as a row; {} if it failed, or if the time is over."""
        spent = time.perf_counter() - self.begin
        row: dict[str, Any] = {"skipped": f"{self.seconds:g} s are over"}
        if spent < self.seconds:
            try:
                row = measure() or {}
            except (Exception, SystemExit) as error:  # the compiler's own too, of many types
                traceback.print_exc()
                row, self.failed = {"failed": f"{type(error).__name__}: {error}"[:1000]}, True
        self.write(section, name, row)
        return {} if "failed" in row or "skipped" in row else row

    def write(self, section: str, name: str, row: dict[str, Any]) -> None:
        spent = round(time.perf_counter() - self.begin, 1)
        if self.out is not None:
            row_of = {"section": section, "name": name, "at_s": spent}
            append_row("goals", row_of | row, self.out)
        cells = (
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in row.items()
            if not isinstance(v, dict)
        )
        print(f"{spent:6.1f} s  {section}, {name}: {', '.join(cells)}", flush=True)

    def goal(self, name: str, measured: float, bound: float, *, least: bool = False) -> None:
        """Compare a ratio with its goal: at most that, or at least."""
        reached = measured >= bound if least else measured <= bound
        self.write("goal", name, {"goal": bound, "measured": measured, "reached": reached})
        sign = "≥" if least else "≤"
        words = (f"{name} {sign} {bound}", f"{measured:.3f}", "yes" if reached else "NO")
        self.goals.append(words)


def kernel_problems(s: Sizes, device: torch.device) -> dict[str, tuple[Any, traffic.Traffic]]:
    """By kernel: what makes its `Problem`, and the least that it moves."""
    size, width = (s.T, s.d, s.r), s.dtype.itemsize

    def adapter(kernel: str) -> Callable[[], Problem]:
        return lambda: svd_problem(kernel, *size, s.dtype, device)

    def penalty(kernel: str) -> Callable[[], Problem]:
        return lambda: penalty_problem(kernel, s.matrices, s.r, s.d, torch.float32, device)

    matrices = (s.matrices, s.r, s.d)
    norms = traffic.penalty_sum(s.matrices)
    return {
        "shrink": (adapter("shrink"), traffic.shrink(*size, width=width)),
        "expand": (adapter("expand"), traffic.expand(*size, width=width)),
        "gradients_dy": (adapter("dy"), traffic.gradients_dy(*size, width=width)),
        "gradients_x": (adapter("x"), traffic.gradients_x(*size, width=width)),
        "reduce": (
            lambda: reduce_problem(*size, s.dtype, device),
            traffic.reduce(s.d, s.d, s.r, splits=2, splits_q=2),
        ),
        "penalty": (penalty("residual"), traffic.penalty_residual(*matrices) + norms),
        "penalty gradient": (penalty("gradient"), traffic.penalty_gradient(*matrices)),
    }


def right(run: Run) -> None:
    """Every kernel at the goals' sizes, and the operators made of them."""
    s = run.sizes

    def check(problem: Callable[[], Problem]) -> dict[str, Any]:
        wrong = problem().wrong()
        if wrong:
            raise RuntimeError(wrong)
        return {"right": True}

    def compare(case: Any) -> dict[str, Any]:
        error = operators.error(case.ours, case, None)
        if not error <= operators.BOUNDS[case.dtype]:
            raise RuntimeError(f"relative error {error:.2e}")
        return {"right": True, "error": error}

    for name, (problem, _) in kernel_problems(s, run.device).items():
        run.attempt("right", name, lambda: check(problem))  # noqa: B023
    some = s.layers[: s.checked]
    run.attempt("right", "spectral step", lambda: compare(spectral_case("", some, s.r, run.device)))


def layer(run: Run) -> None:
    """A linear layer, forward and backward: by the operator, as two steps, PEFT's, without any."""
    s, device = run.sizes, run.device
    case = svd_linear_case(s.T, s.d, s.d, s.r, s.dtype, device)
    results: dict[str, Any] = {}

    def added(i: Inputs) -> Outputs:
        y = torch.nn.functional.linear(i["x"], i["weight"], i["bias"])
        return svd_adapter_add(y, i["x"], i["p"], i["lam"], i["q"], scaling=0.5)

    def measure() -> dict[str, Any]:
        row = operators.measure(case, device, False, s.budget_s, {"adapter added": added})
        results.update(row["times"])
        return row | {name: found["median_us"] for name, found in results.items()}

    if run.attempt("layer", "forward and backward, µs", measure):
        ratio = results["hal"]["median_us"] / results["peft"]["median_us"]
        run.goal(f"layer, T = {s.T}: ÷ PEFT's", ratio, LAYER)
    x, weight, bias, p, lam, q = case.inputs.values()
    arguments = (x, [weight], [bias], [p], [lam], [q], 0.5, 0.0, None)
    for path in svd_kernels.PATHS:

        def forward(path: str = path) -> object:
            return svd_kernels.forward(*arguments, path=path)

        run.attempt("layer", f"forward by path {path}", lambda: replayed([forward], device))


def kernels(run: Run) -> None:
    """Each kernel alone beside its floor."""
    s, device = run.sizes, run.device
    copy = run.attempt("kernel", "copy", lambda: copied_per_us(device, s.copied))
    bandwidth, rate = operators.rates(device, s.dtype)
    bandwidth = copy.get("bytes_per_us", bandwidth)

    def beside(floor: traffic.Traffic, times: dict[str, float]) -> dict[str, Any]:
        least = floor.floor_us(bandwidth, rate)
        return times | {"floor_us": least, "share": least / times["median_us"]}

    def judge(name: str, row: dict[str, Any]) -> None:
        if row and name in JUDGED:
            run.goal(f"{name}: floor ÷ time", row["share"], FLOOR, least=True)

    for name, (problem, floor) in kernel_problems(s, device).items():

        def measure(problem: Callable[[], Problem] = problem) -> dict[str, Any]:
            runs = [problem().run for _ in range(s.inputs)]
            return beside(floor, replayed(runs, device))  # noqa: B023

        judge(name, run.attempt("kernel", name, measure))

    layers = SpectralLayers(s.layers, s.r, device)
    parts: dict[str, dict[str, float]] = {}

    def measure_all() -> dict[str, Any]:
        parts.update(spectral_us(layers, device))
        return parts["step"]

    run.attempt("kernel", "spectral step", measure_all)
    for name, floor in layers.traffic().items():
        if parts:
            own = f"spectral {name}"
            judge(own, run.attempt("kernel", own, lambda: beside(floor, parts[name])))  # noqa: B023


def steps(
    run: Run,
    base: Base,
    methods: Sequence[str],
    batch: int,
    length: int,
    *,
    captured: bool = False,
    **options: int,
) -> dict[str, float]:
    """Median step times in ms of those methods that take a step; each by itself first.

    What each takes by itself is its peak memory. `options` are those of methods.build.
    """
    section = f"{base.name}, {batch} × {length}" + ", captured" * captured
    model, rows = base.build(run.device), batch_of(batch, length, run.device)
    running: dict[str, Method] = {}
    peaks: dict[str, dict[str, Any]] = {}

    def start(name: str) -> dict[str, Any]:
        peaks[name] = {} if captured else peak_of(name, model, base, batch, length, **options)
        if "out_of_memory" not in peaks[name]:
            method = Method(name, model, base, run.device, phases=False, **options)
            if captured:
                method.capture(rows)
            running[name] = method
        return peaks[name]

    for name in methods:
        run.attempt(section, f"{name} alone", lambda: start(name))  # noqa: B023
    results: dict[str, Any] = {}

    def measure() -> dict[str, Any]:
        repeats, warmup = run.sizes.repeats, run.sizes.warmup
        results.update(timed(base, running, rows, repeats, warmup, show=False))
        return {name: found["step"]["median_ms"] for name, found in results.items()}

    medians: dict[str, float] = run.attempt(section, "ms a step", measure) if running else {}
    for name in medians:
        run.write(section, name, results[name] | peaks[name])
    return medians


def roberta(run: Run) -> None:
    s = run.sizes
    for batch in s.batches:
        medians = steps(run, s.roberta(), METHODS, batch, s.length)
        judge_step(run, medians, "adalora", STEP, f"RoBERTa-base, {batch} × {s.length}")


def llama(run: Run) -> None:
    s = run.sizes
    for batch, length in s.shapes:
        ranks = {"rank": s.r, "init_rank": s.r}
        medians = steps(run, s.llama(), LLAMA_METHODS, batch, length, **ranks)
        judge_step(run, medians, "floor", LLAMA, f"Llama blocks, {batch} × {length}")


def captured(run: Run) -> None:
    """Last: a capture that fails may leave the device in any state."""
    s = run.sizes
    if run.device.type != "cuda":
        run.write("captured", "all", {"skipped": "a CPU has no CUDA graphs"})
        return
    for batch in s.batches:
        medians = steps(run, s.roberta(), CAPTURED, batch, s.length, captured=True)
        title = f"RoBERTa-base, {batch} × {s.length}, both captured"
        judge_step(run, medians, "adalora", STEP, title)


def judge_step(
    run: Run, medians: dict[str, float], reference: str, bound: float, title: str
) -> None:
    if {DEFAULT, reference} <= medians.keys():
        ratio = medians[DEFAULT] / medians[reference]
        run.goal(f"{title}: {DEFAULT} ÷ {reference}", ratio, bound)


SECTIONS = (right, layer, kernels, roberta, llama, captured)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=240.0, help="start nothing after these")
    arguments = options.parse_args()
    torch.manual_seed(0)
    sizes = SMALL if arguments.quick else Sizes()
    run = Run(sizes, None if arguments.no_save else arguments.out, arguments.seconds)
    print({n: {d: b.name for d, b in found.items()} for n, found in hal_kernels.backends().items()})
    for section in SECTIONS:
        run.attempt(section.__name__, "whole", functools.partial(section, run))
    width = max(len(name) for name, *_ in run.goals)
    for name, measured, reached in run.goals:
        print(f"{name:{width}}  {measured:>8}  {reached}")
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
