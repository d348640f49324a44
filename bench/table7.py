"""Table 7: memory (MB) and latency (ms a step) by batch size, all methods side by side.

    python -m bench.table7 [--model roberta-base] [--batch 1 2 4 8] [--gradient-checkpointing]

The paper's columns are AdaLoRA and HyperAdaLoRA ("hal-hyper" here); beside them the frozen model,
the floor of any adapter, PEFT's LoRA and DoRA, and AdaLoRA on these kernels ("hal-direct"). Weights
are random, sequences of 128, the rank 3 (initially 5). Memory is measured of one method at a time
(bench.memory: of the GPU, allocated and reserved; else resident, in a process for each); what runs
out of it is left out of the timing, where all methods take steps in turn; "at least" is what a step
takes by prediction (bench.least). A row is appended for each batch size as it is done.

All methods must start from the same loss, and bring it down: a run in which one does not writes no
row.
"""

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from .common import append_row, parser
from .least import least_ms
from .memory import base_of, model_options, peaks
from .methods import ALL_METHODS, WARMUP
from .training_step import measure, this_device


def table(title: str, results: dict[str, dict[str, Any]], least: dict[str, float]) -> Table:
    view = Table(title=title)
    columns = ("method", "peak MB", "ms a step [quartiles]", "at least", "first → last loss")
    for column in columns:
        view.add_column(column, justify="left" if column == "method" else "right")
    for name, result in results.items():
        memory = f"{result['peak_mb']:.0f}" if "peak_mb" in result else "out of memory"
        latency = loss = "–"
        if "step" in result:
            step = result["step"]
            latency = f"{step['median_ms']:.1f} [{step['q1_ms']:.1f}–{step['q3_ms']:.1f}]"
            loss = f"{result['first_loss']:.4f} → {result['last_loss']:.4f}"
        view.add_row(name, memory, latency, f"{least[name]:.1f}", loss)
    return view


def main() -> int:
    options = parser(__doc__)
    model_options(options)
    options.add_argument("--batch", type=int, nargs="+", help="default: 1 to 8, on a GPU to 64")
    options.add_argument("--method", nargs="+", choices=ALL_METHODS)
    options.add_argument("--repeats", type=int, default=20)
    options.add_argument("--warmup", type=int, default=WARMUP)
    arguments = options.parse_args()
    device, console = this_device(), Console()
    if arguments.batch is None:
        arguments.batch = [1, 2, 4, 8] + ([16, 32, 64] if device.type == "cuda" else [])
    if arguments.quick:
        arguments.batch, arguments.repeats, arguments.warmup = [1], 3, 1
        arguments.layers = arguments.layers or 2
        arguments.method = arguments.method or ["dora", "adalora", "hal-hyper"]
    arguments.method = arguments.method or list(ALL_METHODS)
    base = base_of(arguments)
    base.require_memory(device)
    for batch in arguments.batch:
        with console.status(f"memory, batch {batch}"):
            results = peaks(base, arguments.method, batch, arguments.length)
        fitting = [name for name in results if "peak_mb" in results[name]]
        if fitting:
            times = measure(
                base, fitting, batch, arguments.length, arguments.repeats, arguments.warmup
            )
            for name in fitting:
                results[name] |= times[name]
        title = f"{base.name}, batch {batch} × {arguments.length} tokens"
        least = least_ms(base, results, batch, arguments.length)
        console.print(table(title, results, least))
        if not arguments.no_save:
            row = {
                "model": base.name, "layers": arguments.layers, "batch": batch,
                "length": arguments.length, "repeats": arguments.repeats,
                "checkpointing": base.checkpointing, "methods": results,
            }  # fmt: skip
            append_row("table7", row, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
