"""Tables 5 and 11: what the weight γ of the orthogonality penalty does, on a classification task.

    python -m bench.gamma --data FOLDER [--gamma 0 0.1 0.15 0.2] [--seed 0 1 2] [--lr 3e-4]

HyperAdaLoRA is trained at each γ from the same seeds on the same batches (the paper generates text
with an 8B model; here SST-2 and MiniLM by default). Each run appends a row: the held-out accuracy,
the mean loss (without the penalty) of the last steps, the seconds of all steps, and how far P and Q
are from orthogonal after training: the mean over layers of ‖PᵀP − I‖²_F + ‖QQᵀ − I‖²_F, computed in
float64 here and compared with what `hal_kernels.penalty` says, so a wrong penalty writes no row.
A run that has a row is not run again. Runs follow one another, so that their seconds compare only
as far as the machine was the same all along.
"""

import itertools
import statistics
import sys
from typing import Any

import torch
from rich.table import Table

import hal_kernels

from .convergence import WINDOW
from .trained import Runs, directions, run_parser


def orthogonality(model: Any) -> dict[str, Any]:
    """Mean over layers of ‖PᵀP − I‖²_F + ‖QQᵀ − I‖²_F."""
    total = 0.0
    layers = directions(model)
    for p, _, q in layers.values():
        for rows in (p.double(), q.double()):
            gram = rows @ rows.t()
            total += float((gram - torch.eye(len(gram), dtype=gram.dtype)).square().sum())
    mean = total / len(layers)
    gamma = model.hal.config.gamma
    if gamma:  # without one there is no penalty to compare with
        with torch.no_grad():
            said = float(hal_kernels.penalty(model)) / gamma
        # The library sums squares of fp32 differences, each good to some 1e-7.
        if abs(said - mean) > 1e-3 * mean + 1e-9:
            raise SystemExit(f"the penalty is {said} by the library, {mean} by its formula")
    return {"orthogonality": mean}


def main() -> int:
    options = run_parser(__doc__)
    options.add_argument("--gamma", type=float, nargs="+", default=[0.0, 0.1, 0.15, 0.2])
    options.add_argument("--lr", type=float, default=3e-4, help="of the hypernetworks")
    arguments = options.parse_args()
    if arguments.quick:
        arguments.gamma, arguments.seed, arguments.steps = [0.0, 0.1], [0], 10
    runs, rows = Runs("gamma", arguments), []
    for gamma, seed in itertools.product(arguments.gamma, arguments.seed):
        key = runs.key(method="generated", gamma=gamma, lr=arguments.lr, seed=seed)
        row = runs.stored(key)
        if row is None:
            result = runs.train(key, orthogonality)
            row = key | {
                "accuracy": result["accuracy"],
                "loss": statistics.fmean(result["losses"][-WINDOW:]),
                "seconds": sum(result["seconds"]),
                "orthogonality": result["orthogonality"],
            }
            runs.save(row)
        rows.append(row)
    view = Table(title=f"{arguments.task}, {runs.model}, {arguments.steps} steps: means of seeds")
    columns = ("accuracy", "loss", "orthogonality", "seconds")
    for column in ("γ", "seeds", *columns):
        view.add_column(column, justify="right")
    for gamma in arguments.gamma:
        own = [row for row in rows if row["gamma"] == gamma]
        means = (statistics.fmean(row[column] for row in own) for column in columns)
        view.add_row(f"{gamma:g}", str(len(own)), *(f"{mean:.4g}" for mean in means))
    runs.console.print(view)
    return 0


if __name__ == "__main__":
    sys.exit(main())
