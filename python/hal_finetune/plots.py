"""Plots of training runs: loss against steps, and ranks by layer and kind of layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

_DPI = 150
# Line style as well as colour, so that lines can be told apart in grey.
_STYLES = (("#0b5394", "-"), ("#c55a11", "--"), ("#38761d", "-."), ("#444444", ":"))


def plot_losses(
    losses: Mapping[str, Sequence[float]],
    path: Path,
    *,
    every: int,
    mean_of: int,
    evaluated: Sequence[tuple[int, float]] = (),
) -> None:
    """Write the training loss of each run, one line a run, to a PNG.

    Args:
        losses: run -> values, one after every so many optimizer steps.
        path: of the PNG.
        every: optimizer steps between two values.
        mean_of: optimizer steps that a value is the mean of.
        evaluated: (optimizer step, loss) of the evaluations of a single run.
    """
    figure, axes = plt.subplots(figsize=(7.0, 4.2), layout="constrained")
    for (label, values), (color, style) in zip(losses.items(), _STYLES, strict=False):
        steps = every * np.arange(1, len(values) + 1)
        axes.plot(steps, values, style, color=color, label=label)
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o:", color=_STYLES[-1][0], label="evaluation")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"training loss (nats, mean of {mean_of} steps)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def place(layer: str) -> tuple[str, str]:
    """(block, kind) of a layer: its name up to the first number, and what follows."""
    found = re.fullmatch(r"(.*?\d+)\.(.+)", layer)
    return (found[1], found[2]) if found else ("", layer)


def plot_ranks(title: str, before: Mapping[str, int], after: Mapping[str, int], path: Path) -> None:
    """Write ranks as a heat map, blocks down and kinds of layer across, to a PNG.

    Args:
        title: of the run.
        before, after: ranks by layer. Colour is the rank after allocation, text both ranks.
        path: of the PNG.
    """
    places = {name: place(name) for name in before}
    rows = list(dict.fromkeys(block for block, _ in places.values()))
    columns = list(dict.fromkeys(kind for _, kind in places.values()))
    values, top = np.full((len(rows), len(columns)), np.nan), max(before.values())
    size = (max(7.0, 0.85 * len(columns) + 2.5), 0.42 * len(rows) + 2.2)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    for name, (block, kind) in places.items():
        y, x = rows.index(block), columns.index(kind)
        values[y, x] = after[name]
        color = "white" if after[name] > 0.55 * top else "black"
        text = f"{before[name]}→{after[name]}"
        axes.text(x, y, text, ha="center", va="center", color=color, fontsize=9)
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    axes.set_xticks(range(len(columns)), [c.replace(".", "\n") for c in columns], fontsize=8)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.set_title(f"{title}: {sum(before.values())}→{sum(after.values())} directions", fontsize=10)
    ticks = MaxNLocator(integer=True)
    figure.colorbar(image, ax=axes, label="rank after allocation", pad=0.01, ticks=ticks)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
