"""Cost of a training step against the number of blocks, the width, the rank and the tokens.

    python -m bench.scaling [--axis layers width rank tokens]

One of the four is varied at a time, the others small, on a RoBERTa of random weights (six adapted
layers a block; heads of 64, an inner width of four times the width), so that what a method costs
beyond the arithmetic of the model shows. Frozen model, floor, LoRA, AdaLoRA and this library take
steps in turn, with the checks of bench.table7: what fails them writes no row. A row is appended for
each point as it is done, and at the end a plot, scaling.png. Beside each time stands what the step
takes at least by prediction (bench.least).
"""

import dataclasses
import math
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from .common import append_row, parser
from .least import least_ms
from .methods import METHODS, WARMUP
from .models import roberta_base
from .training_step import measure


@dataclasses.dataclass(frozen=True)
class Point:
    """What one measurement is made at."""

    layers: int = 4
    width: int = 128
    rank: int = 3
    batch: int = 1
    length: int = 32

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
}


def title(axis: str, point: Point) -> str:
    """The values that do not vary."""
    fixed = {
        "layers": f"{point.layers} blocks",
        "width": f"width {point.width}",
        "rank": f"rank {point.rank}",
        "tokens": f"{point.tokens} tokens",
    }
    return ", ".join(words for name, words in fixed.items() if name != axis)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--axis", nargs="+", choices=AXES, default=list(AXES))
    options.add_argument("--repeats", type=int, default=20)
    options.add_argument("--warmup", type=int, default=WARMUP)
    arguments = options.parse_args()
    if arguments.quick:
        arguments.repeats, arguments.warmup = 2, 1
    console, rows = Console(), []
    for name in arguments.axis:
        axis = AXES[name]
        heading = f"ms a step ≥ prediction: {title(name, axis.points[0])}"
        view = Table(name, *METHODS, title=heading)
        for point in [axis.points[i] for i in axis.quick] if arguments.quick else axis.points:
            base = roberta_base(layers=point.layers, width=point.width)
            results = measure(
                base, METHODS, point.batch, point.length, arguments.repeats, arguments.warmup,
                rank=point.rank, init_rank=math.ceil(1.5 * point.rank),
            )  # fmt: skip
            row = {
                "axis": name, "value": getattr(point, name), "label": axis.label,
                "title": title(name, point), "point": dataclasses.asdict(point),
                "repeats": arguments.repeats, "methods": results,
            }  # fmt: skip
            rows.append(row)
            if not arguments.no_save:
                append_row("scaling", row, arguments.out)
            least = least_ms(base, METHODS, point.batch, point.length)
            cells = (f"{results[m]['step']['median_ms']:.1f} ≥ {least[m]:.1f}" for m in METHODS)
            view.add_row(str(row["value"]), *cells)
        console.print(view)
    if not arguments.no_save:
        from .plots import scaling

        scaling(rows, arguments.out / "scaling.png")
        console.print(f"plot in {arguments.out / 'scaling.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
