"""Each operator: time beside its roofline floor, plain PyTorch, torch.compile and PEFT's layer.

    python -m bench.operators [--only svd_linear] [--quick] [--check]

On a GPU over the sizes of real models, on a CPU over small ones. Every implementation is checked
against the formula in float64 before it is timed, and only then. ``--check`` runs every operator
once, forward and backward, at a small odd size, and times nothing: what a sanitizer wants.
"""

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from statistics import quantiles
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hal_kernels import ops
from hal_kernels.kernels import traffic
from hal_kernels.kernels.configs import architecture_of

from .common import append_row, parser, synchronize

Inputs = dict[str, Any]
Function = Callable[[Inputs], torch.Tensor]
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative: TF32x3 sums; 2⁻⁷ in long sums


@dataclasses.dataclass(frozen=True)
class Case:
    """One operator at one size."""

    operator: str
    size: str
    ours: Function
    formula: Function
    inputs: Inputs
    floor: traffic.Traffic | None = None  # of forward and backward
    peft: Callable[[], Function] | None = None


def normal(
    *shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0
) -> torch.Tensor:
    """Of mean 1, so that sums do not cancel by chance and relative errors mean something."""
    return ((torch.randn(shape, device=device) + 1) * scale).to(dtype)


def svd_linear_case(
    T: int, d_in: int, d_out: int, r: int, dtype: torch.dtype, device: torch.device
) -> Case:
    inputs = {
        "x": normal(T, d_in, dtype=dtype, device=device),
        "weight": normal(d_out, d_in, dtype=dtype, device=device, scale=d_in**-0.5),
        "bias": normal(d_out, dtype=dtype, device=device),
        "p": normal(r, d_in, dtype=torch.float32, device=device, scale=d_in**-0.5),
        "lam": normal(r, dtype=torch.float32, device=device),
        "q": normal(r, d_out, dtype=torch.float32, device=device, scale=d_out**-0.5),
    }
    width = dtype.itemsize
    floor = (
        traffic.gemm(T, d_in, d_out, width=width)
        + traffic.shrink(T, d_in, r, width=width)
        + traffic.expand(T, d_out, r, width=width)
        + traffic.gemm(T, d_out, d_in, width=width)
        + traffic.gradients_dy(T, d_out, r, width=width)
        + traffic.gradients_x(T, d_in, r, width=width, dx=True)
    )

    def formula(i: Inputs) -> torch.Tensor:
        dtype = i["x"].dtype
        i = {name: t.to(dtype) for name, t in i.items()}
        return ops.svd_linear_reference(**i, scaling=0.5)

    return Case(
        "svd_linear",
        f"T={T} {d_in}→{d_out} r={r} {_name(dtype)}",
        lambda i: ops.svd_linear(**i, scaling=0.5),
        formula,
        inputs,
        floor,
        lambda: peft_layer(inputs),
    )


def peft_layer(inputs: Inputs) -> Function:
    """PEFT's AdaLoRA layer with the same numbers; its rank number is 1/0.5 = 2 · alpha."""
    from peft import AdaLoraConfig, get_peft_model

    weight, rank = inputs["weight"], inputs["p"].shape[0]
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0]).to(weight.device, weight.dtype)
    config = AdaLoraConfig(target_modules=["0"], init_r=rank, lora_alpha=1, total_step=10)
    model: Any = get_peft_model(torch.nn.Sequential(linear), config)  # type: ignore[arg-type]
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.copy_(weight)
        layer.base_layer.bias.copy_(inputs["bias"])
        layer.ranknum["default"].fill_(2.0)
    names = {"p": layer.lora_A, "lam": layer.lora_E, "q": layer.lora_B}
    parameters = {name: group["default"] for name, group in names.items()}

    def run(i: Inputs) -> torch.Tensor:
        # The very tensors of this call, so that their gradients are asked for like the others'.
        own = {"p": i["p"], "lam": i["lam"][:, None], "q": i["q"].t()}
        for name, group in names.items():
            group._parameters["default"] = own[name]
        try:
            out: torch.Tensor = layer(i["x"])
            return out
        finally:
            for name, group in names.items():
                group._parameters["default"] = parameters[name]

    return run


def group_case(T: int, d: int, r: int, dtype: torch.dtype, device: torch.device) -> Case:
    widths = (d, d // 4, d // 4)  # grouped queries
    inputs = {"x": normal(T, d, dtype=dtype, device=device)}
    p = normal(3 * r, d, dtype=torch.float32, device=device, scale=d**-0.5).split(r)
    lam = normal(3 * r, dtype=torch.float32, device=device).split(r)
    for n, width in enumerate(widths):
        inputs |= {
            f"weight{n}": normal(width, d, dtype=dtype, device=device, scale=d**-0.5),
            f"p{n}": p[n],
            f"lam{n}": lam[n],
            f"q{n}": normal(r, width, dtype=torch.float32, device=device, scale=width**-0.5),
        }

    def lists(i: Inputs) -> Iterator[list[torch.Tensor]]:
        return ([i[f"{name}{n}"] for n in range(3)] for name in ("weight", "p", "lam", "q"))

    def ours(i: Inputs) -> torch.Tensor:
        weight, *factors = lists(i)
        return torch.cat(ops.svd_linear_group(i["x"], weight, [None] * 3, *factors), -1)

    def formula(i: Inputs) -> torch.Tensor:
        weight, *factors = ([t.to(i["x"].dtype) for t in group] for group in lists(i))
        return torch.cat(ops.svd_linear_group_reference(i["x"], weight, [None] * 3, *factors), -1)

    return Case("svd_linear_group", f"T={T} d={d} r={r} {_name(dtype)}", ours, formula, inputs)


def adapter_add_case(T: int, d: int, r: int, dtype: torch.dtype, device: torch.device) -> Case:
    inputs = {
        "y": normal(T, d, dtype=dtype, device=device),
        "x": normal(T, d, dtype=dtype, device=device),
        "p": normal(r, d, dtype=torch.float32, device=device, scale=d**-0.5),
        "lam": normal(r, dtype=torch.float32, device=device),
        "q": normal(r, d, dtype=torch.float32, device=device, scale=d**-0.5),
    }

    def formula(i: Inputs) -> torch.Tensor:
        dtype = i["x"].dtype
        return ops.svd_adapter_add_reference(**{n: t.to(dtype) for n, t in i.items()})

    return Case(
        "svd_adapter_add",
        f"T={T} d={d} r={r} {_name(dtype)}",
        lambda i: ops.svd_adapter_add(**i),
        formula,
        inputs,
    )


def penalty_case(matrices: int, r: int, d: int, device: torch.device) -> Case:
    factors = normal(matrices, r, d, dtype=torch.float32, device=device, scale=d**-0.5)
    return Case(
        "orthogonality_penalty",
        f"{matrices} matrices r={r} d={d}",
        lambda i: ops.orthogonality_penalty([i["factors"]]),
        lambda i: ops.orthogonality_penalty_reference(list(i["factors"])),
        {"factors": factors},
    )


def hypernet_case(matrices: int, r: int, device: torch.device) -> Case:
    from hal_kernels.nn.hypernet import HEADS, HIDDEN, BertBody

    body = BertBody().to(device)
    inputs = dict(body.named_parameters()) | {
        "tokens": normal(3, matrices, r, HIDDEN, dtype=torch.float32, device=device)
    }
    inputs = {name: t.detach() for name, t in inputs.items()}
    keys = torch.ones(3, matrices, r, dtype=torch.bool, device=device)

    def call(function: Callable[..., torch.Tensor]) -> Function:
        def run(i: Inputs) -> torch.Tensor:
            weights = {n: t for n, t in i.items() if n != "tokens"}
            return function(i["tokens"], keys, weights, heads=HEADS)

        return run

    return Case(
        "hypernet_layer",
        f"3 × {matrices} matrices r={r}",
        call(ops.hypernet_layer),
        call(ops.hypernet_layer_reference),
        inputs,
    )


def allocation_case(rows: int, device: torch.device) -> Case:
    scores = normal(rows, dtype=torch.float32, device=device)
    state = [normal(rows, 768, dtype=torch.float32, device=device).abs() for _ in range(4)]

    def ours(i: Inputs) -> torch.Tensor:
        importance, uncertainty, values, gradients = (t.clone() for t in state)
        ops.update_importance_([importance], [uncertainty], [values], [gradients])
        mask = ops.prune_smallest(i["scores"].detach(), rows // 3)
        return (importance * uncertainty).sum(1).to(mask.dtype) * mask

    def formula(i: Inputs) -> torch.Tensor:
        importance, uncertainty = ops.update_importance_reference(*state)
        mask = ops.prune_smallest_reference(i["scores"].detach(), rows // 3)
        return (importance * uncertainty).sum(1).to(mask.dtype) * mask

    return Case("allocation", f"R={rows}", ours, formula, {"scores": scores})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cases(device: torch.device, quick: bool, check: bool) -> Iterator[Case]:
    """Everything that is measured on `device`, one at a time: inputs are large."""
    gpu = device.type == "cuda" and not quick
    bf16, fp32 = torch.bfloat16, torch.float32
    if check:
        for dtype in (fp32, bf16):
            yield svd_linear_case(33, 48, 80, 3, dtype, device)
            yield svd_linear_case(65, 37, 29, 64, dtype, device)
            yield group_case(33, 48, 3, dtype, device)
            yield adapter_add_case(33, 48, 5, dtype, device)
    elif gpu:
        widths = ((768, 768), (768, 3072), (4096, 4096), (4096, 14336))
        for dtype, (d_in, d_out), T, r in itertools.product(
            (bf16, fp32), widths, (1, 128, 1024, 8192, 32768), (3, 8, 16, 64)
        ):
            if dtype == bf16 or (d_in == 768 and T <= 8192):
                yield svd_linear_case(T, d_in, d_out, r, dtype, device)
        for T, d in itertools.product((128, 8192), (768, 4096)):
            yield group_case(T, d, 16, bf16, device)
            yield adapter_add_case(T, d, 16, bf16, device)
    else:
        for T in (1, 128) if quick else (1, 128, 1024):
            yield svd_linear_case(T, 768, 768, 3, fp32, device)
        yield group_case(128, 768, 3, fp32, device)
        yield adapter_add_case(128, 768, 3, fp32, device)
    small = check or quick
    yield penalty_case(5 if small else 144, 5, 37 if small else 768, device)
    yield hypernet_case(3 if small else 72, 5, device)
    if not small:
        yield hypernet_case(224, 16, device)
    yield allocation_case(77 if small else 1152, device)


def leaves_of(case: Case, dtype: torch.dtype | None = None) -> tuple[Inputs, list[torch.Tensor]]:
    """Inputs, and those of them whose gradients are wanted: base weights are frozen."""
    frozen = () if case.operator == "hypernet_layer" else ("weight", "bias")
    leaves = {
        name: t.detach().to(dtype or t.dtype).requires_grad_(not name.startswith(frozen))
        for name, t in case.inputs.items()
    }
    return leaves, [t for t in leaves.values() if t.requires_grad]


def results(
    function: Function, case: Case, dy: torch.Tensor | None, dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """Output and, where there is any, the gradients; computed in `dtype`."""
    leaves, wanted = leaves_of(case, dtype)
    out = function(leaves)
    if not out.requires_grad:
        return [out]
    gradient = torch.ones_like(out) if dy is None else dy.to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, wanted, gradient)]


def error(function: Function, case: Case, dy: torch.Tensor | None) -> float:
    """Largest relative error of output and gradients against the formula in float64.

    A gradient a billionth of the largest is zero but for rounding, as that of the keys' bias is.
    """
    reference = results(case.formula, case, dy, torch.float64)
    largest = max(float(t.norm()) for t in reference)
    worst = 0.0
    for one, other in zip(results(function, case, dy), reference, strict=True):
        norm = float(other.norm())
        if norm > 1e-9 * largest:
            worst = max(worst, float((one.double() - other).norm()) / norm)
    return worst


def implementations(case: Case, compiled: bool) -> dict[str, Function]:
    found: dict[str, Function] = {"hal": case.ours, "eager": case.formula}
    if compiled:
        found["compile"] = torch.compile(case.formula, dynamic=False)
    if case.peft is not None:
        found["peft"] = case.peft()
    if "weight" in case.inputs and "bias" in case.inputs:
        found["base GEMM"] = lambda i: torch.nn.functional.linear(i["x"], i["weight"], i["bias"])
    return found


def trained(function: Function, case: Case) -> Callable[[], object]:
    """One forward and backward, weights frozen, as in training."""
    leaves, wanted = leaves_of(case)
    out = function(leaves)
    dy = torch.randn_like(out)

    def step() -> object:
        out = function(leaves)
        if not out.requires_grad:
            return out
        return torch.autograd.grad(out, wanted, dy, allow_unused=True)

    return step


def time_all(
    steps: dict[str, Callable[[], object]], device: torch.device, budget_s: float
) -> dict[str, Any]:
    """Median and quartiles of each, in µs, interleaved."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
        step()
    synchronize()
    end = time.perf_counter() + budget_s
    if device.type == "cuda":
        flush = torch.empty(1 << 26, dtype=torch.int32, device=device)  # as large as any L2
    while time.perf_counter() < end or len(samples["hal"]) < 5:
        for name, step in steps.items():
            if device.type == "cuda":
                flush.zero_()
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                step()
                stop.record()
                stop.synchronize()
                samples[name].append(1e3 * start.elapsed_time(stop))
            else:
                begin = time.perf_counter()
                step()
                samples[name].append(1e6 * (time.perf_counter() - begin))
    found = {}
    for name, values in samples.items():
        low, middle, high = quantiles(values, n=4)
        found[name] = {"median_us": middle, "q1_us": low, "q3_us": high, "repeats": len(values)}
    return found


def measure(case: Case, device: torch.device, compiled: bool, budget_s: float) -> dict[str, Any]:
    functions = implementations(case, compiled)
    out = case.ours(case.inputs)
    dy = torch.randn_like(out) if out.dim() else None
    dtype = next(iter(case.inputs.values())).dtype
    errors = {n: error(f, case, dy) for n, f in functions.items() if n != "base GEMM"}
    if errors["hal"] > BOUNDS[dtype]:
        raise SystemExit(f"{case.operator} {case.size}: relative error {errors['hal']:.2e}")
    steps = {name: trained(function, case) for name, function in functions.items()}
    times = time_all(steps, device, budget_s)
    gpu = architecture_of(device)
    floor = None
    if case.floor is not None and device.type == "cuda":
        rate = gpu.matrix_rate * (1.0 if dtype == torch.bfloat16 else 0.125)
        floor = case.floor.floor_us(gpu.bandwidth, rate)
    return {"errors": errors, "times": times, "floor_us": floor, "arch": gpu.name}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--check", action="store_true", help="check small sizes, time nothing")
    options.add_argument("--only", default="", help="operators whose name contains this")
    options.add_argument("--compile", action="store_true", help="measure torch.compile as well")
    arguments = options.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console, wrong = Console(width=None if sys.stdout.isatty() else 160), 0
    names = ("hal", "eager", "compile", "peft", "base GEMM")
    table = Table(title="forward + backward, median µs")
    for column in ("operator", "size", *names, "floor", "floor/hal", "error"):
        table.add_column(column)
    for case in cases(device, arguments.quick, arguments.check):
        if arguments.only not in case.operator:
            continue
        if arguments.check:
            found = error(case.ours, case, None)
            dtype = next(iter(case.inputs.values())).dtype
            bad = not found <= BOUNDS[dtype]
            wrong += bad
            console.print(f"{'WRONG' if bad else 'ok   '} {case.operator} {case.size}: {found:.1e}")
            continue
        row = measure(case, device, arguments.compile, 0.05 if arguments.quick else 0.3)
        if not arguments.no_save:
            append_row(
                "operators", {"operator": case.operator, "size": case.size} | row, arguments.out
            )
        times, floor = row["times"], row["floor_us"]
        cells = [f"{times[n]['median_us']:.0f}" if n in times else "–" for n in names]
        share = f"{floor / times['hal']['median_us']:.0%}" if floor else "–"
        table.add_row(
            case.operator, case.size, *cells, f"{floor:.0f}" if floor else "–", share,
            f"{row['errors']['hal']:.0e}",
        )  # fmt: skip
    if table.row_count:
        console.print(table)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
