"""Cost of a training step against blocks, width, rank, tokens and processes.

    python -m bench.scaling [--axis layers width rank tokens processes]

One of the five is varied at a time, the others small, on a RoBERTa of random weights (six adapted
layers a block; heads of 64, an inner width of four times the width), so that what a method costs
beyond the arithmetic of the model shows. Frozen model, floor, LoRA, AdaLoRA and this library take
steps in turn, with the checks of bench.table7: what fails them writes no row. A row is appended for
each point as it is done. Beside each time stands what the step takes at least by prediction
(bench.least).

Processes (bench.data_parallel) are of one thread each, so that more of them than there are cores
share these, or of one GPU each, where there are as many. The tokens are those of each. What each
sends in a step is counted, and all have to end with the same parameters.
"""

import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import data_parallel
from .common import append_row, parser
from .least import least_ms
from .methods import METHODS, WARMUP
from .models import roberta_base
from .training_step import measure, this_device


@dataclasses.dataclass(frozen=True)
class Point:
    """What one measurement is made at."""

    layers: int = 4
    width: int = 128
    rank: int = 3
    batch: int = 1
    length: int = 32
    processes: int = 1

    @property
    def tokens(self) -> int:
        return self.batch * self.length


@dataclasses.dataclass(frozen=True)
class Axis:
    label: str
    points: Sequence[Point]
    quick: Sequence[int]  # which of them


AXES = {
    "layers": Axis("blocks", [Point(layers=n, width=64) for n in (2, 5, 10, 20, 40, 80)], (0, 1)),
    "width": Axis("width", [Point(width=n) for n in (64, 128, 256, 512, 1024)], (0, 1)),
    "rank": Axis("rank", [Point(width=256, rank=n) for n in (1, 4, 8, 16, 32, 64, 128)], (0, 1)),
    "tokens": Axis(
        "tokens of a batch",
        [Point(width=256, batch=n, length=128) for n in (1, 2, 4, 8, 16, 32, 64)],
        (0, 1),
    ),
    "processes": Axis(
        "processes", [Point(width=256, length=128, processes=n) for n in (1, 2, 4)], (0, 1)
    ),
}


def title(axis: str, point: Point) -> str:
    """The values that do not vary."""
    fixed = {
        "layers": f"{point.layers} blocks",
        "width": f"width {point.width}",
        "rank": f"rank {point.rank}",
        "tokens": f"{point.tokens} tokens",
    }
    words = ", ".join(words for name, words in fixed.items() if name != axis)
    return words + " a process" * (axis == "processes")


def label(axis: str) -> str:
    """What varies; of processes also what each has, since more than there are cores share them."""
    words = AXES[axis].label
    if axis == "processes":
        gpu = this_device().type == "cuda"
        words += " of one GPU" if gpu else f" of one thread ({os.cpu_count()} cores)"
    return words


def measured(axis: str, point: Point, repeats: int, warmup: int) -> dict[str, Any]:
    """Times of all methods at one point, by method."""
    ranks = {"rank": point.rank, "init_rank": math.ceil(1.5 * point.rank)}
    if axis == "processes":
        return data_parallel.measure(
            point.processes, layers=point.layers, width=point.width, batch=point.batch,
            length=point.length, repeats=repeats, warmup=warmup, **ranks,
        )  # fmt: skip
    base = roberta_base(layers=point.layers, width=point.width)
    return measure(base, METHODS, point.batch, point.length, repeats, warmup, **ranks)


def points_of(axis: Axis, quick: bool) -> list[Point]:
    """Those that are measured: no more processes than GPUs."""
    points = [axis.points[i] for i in axis.quick] if quick else axis.points
    most = torch.cuda.device_count() if torch.cuda.is_available() else math.inf
    return [point for point in points if point.processes <= most]


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--axis", nargs="+", choices=AXES, default=list(AXES))
    options.add_argument("--repeats", type=int, default=20)
    options.add_argument("--warmup", type=int, default=WARMUP)
    arguments = options.parse_args()
    if arguments.quick:
        arguments.repeats, arguments.warmup = 2, 1
    console = Console()
    for name in arguments.axis:
        axis = AXES[name]
        heading = f"ms a step ≥ prediction: {title(name, axis.points[0])}"
        view = Table(name, *METHODS, title=heading)
        for point in points_of(axis, arguments.quick):
            results = measured(name, point, arguments.repeats, arguments.warmup)
            row = {
                "axis": name, "value": getattr(point, name), "label": label(name),
                "title": title(name, point), "point": dataclasses.asdict(point),
                "repeats": arguments.repeats, "methods": results,
            }  # fmt: skip
            if not arguments.no_save:
                append_row("scaling", row, arguments.out)
            base = roberta_base(layers=point.layers, width=point.width)
            least = least_ms(base, METHODS, point.batch, point.length)
            cells = (f"{results[m]['step']['median_ms']:.1f} ≥ {least[m]:.1f}" for m in METHODS)
            view.add_row(str(row["value"]), *cells)
        console.print(view)
    return 0


if __name__ == "__main__":
    sys.exit(main())
