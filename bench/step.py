"""One training step, side by side: frozen model, floor, PEFT's LoRA and AdaLoRA, this library.

    python -m bench.step --batch 1 8

RoBERTa-base shapes, sequences of 128, rank 3 (initially 5), every linear layer of the encoder. All
methods run in one process, interleaved; peak memory is that of one method at a time (bench.memory).
The exit status is 1 if a bound below is missed: they are those of a CPU (bench.goals has a GPU's).

"at least" is what a step takes by prediction (bench.least).
"""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .common import append_row, parser
from .least import least_ms
from .memory import peaks
from .methods import STEP_METHODS, WARMUP
from .models import roberta_base
from .training_step import PHASES, measure, this_device

BOUNDS = [  # (method, reference, batch, largest ratio of median step times)
    ("hal-direct", "adalora", 1, 0.78),
    ("hal-direct", "adalora", 8, 0.78),
    ("hal-direct", "floor", 1, 1.15),
    ("hal-direct", "floor", 8, 1.07),
    ("hal-spectral", "adalora", 1, 0.82),
    ("hal-spectral", "adalora", 8, 0.82),
    ("hal-spectral", "floor", 8, 1.08),
]


def missed(results: dict[str, Any], batch: int) -> list[str]:
    """The bounds that do not hold at this batch size, in words."""
    found = []
    for method, reference, at, bound in BOUNDS:
        if at == batch:
            ratio = ratio_of(results, method, reference)
            if ratio > bound:
                found.append(f"batch {batch}: {method} / {reference} = {ratio:.3f} > {bound}")
    peaks = {name: results[name].get("peak_mb", 0.0) for name in results}
    for name in ("hal-direct", "hal-spectral"):
        if peaks[name] > peaks["adalora"]:
            found.append(
                f"batch {batch}: {name} peaks at {peaks[name]:.0f} MB, adalora at "
                f"{peaks['adalora']:.0f} MB"
            )
    return found


def ratio_of(results: dict[str, Any], method: str, reference: str) -> float:
    ratio: float = results[method]["step"]["median_ms"] / results[reference]["step"]["median_ms"]
    return ratio


def table(results: dict[str, Any], batch: int, length: int) -> Table:
    view = Table(title=f"batch {batch} × {length} tokens: milliseconds, median [quartiles]")
    least = least_ms(roberta_base(), results, batch, length)
    for column in ("method", "step", "at least", "÷ floor", "÷ AdaLoRA", *PHASES, "peak MB"):
        view.add_column(column, justify="left" if column == "method" else "right")
    for name, result in results.items():
        step = result["step"]
        phases = [
            f"{result['phases'][p]['median_ms']:.1f}" if p in result["phases"] else "–"
            for p in PHASES
        ]
        view.add_row(
            name,
            f"{step['median_ms']:.1f} [{step['q1_ms']:.1f}–{step['q3_ms']:.1f}]",
            f"{least[name]:.1f}",
            f"{ratio_of(results, name, 'floor'):.3f}",
            f"{ratio_of(results, name, 'adalora'):.3f}",
            *phases,
            f"{result['peak_mb']:.0f}" if "peak_mb" in result else "–",
        )
    return view


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    options.add_argument("--length", type=int, default=128, help="tokens a row")
    options.add_argument("--repeats", type=int, default=20)
    options.add_argument("--warmup", type=int, default=WARMUP)
    arguments = options.parse_args()
    if arguments.quick:
        arguments.batch, arguments.repeats, arguments.warmup = [1], 3, 1
    console, misses = Console(), []
    for batch in arguments.batch:
        results = measure(
            roberta_base(),
            STEP_METHODS,
            batch,
            arguments.length,
            arguments.repeats,
            arguments.warmup,
        )
        if not arguments.quick:
            for name, peak in peaks(roberta_base(), STEP_METHODS, batch, arguments.length).items():
                results[name] |= peak
        console.print(table(results, batch, arguments.length))
        if not arguments.no_save:
            row = {"batch": batch, "length": arguments.length, "repeats": arguments.repeats}
            append_row("step", row | {"methods": results}, Path(arguments.out))
        if this_device().type == "cpu":
            misses += missed(results, batch)
    for miss in misses:
        console.print(f"missed: {miss}")
    return 1 if misses and not arguments.quick else 0


if __name__ == "__main__":
    sys.exit(main())
