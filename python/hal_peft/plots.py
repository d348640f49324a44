"""Plots of training runs: loss against steps, and ranks by layer and kind of layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

Ranks = Mapping[str, int]  # layer name -> rank

# Line style as well as colour, so that lines can be told apart in grey.
_STYLES = (("#0b5394", "-"), ("#c55a11", "--"), ("#38761d", "-."), ("#444444", ":"))
_DPI = 150


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place (of fewer at the start)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return list((sums[ends] - sums[starts]) / (ends - starts))


def plot_losses(
    losses: Mapping[str, Sequence[float]],
    path: Path,
    *,
    window: int = 10,
    every: int = 1,
    budget_met_at: Mapping[str, int | None] | None = None,
) -> None:
    """Write the training loss of each run as a running mean, one line a run, to a PNG.

    Args:
        losses: run -> values, each the mean of `every` optimizer steps.
        path: of the PNG.
        window: values that the running mean takes.
        every: optimizer steps between two values.
        budget_met_at: marks the step after which a run's ranks stay as they are.
    """
    figure, axes = plt.subplots(figsize=(7.0, 4.2), layout="constrained")
    marks = budget_met_at or {}
    for (label, values), (color, style) in zip(losses.items(), _STYLES, strict=False):
        means = running_mean(values, window)
        steps = every * np.arange(1, len(values) + 1)
        axes.plot(steps, means, style, color=color, linewidth=1.8, label=label)
        mark = marks.get(label)
        if mark:
            axes.plot(mark, means[(mark - 1) // every], "o", color=color, markersize=7)
    if any(marks.values()):
        axes.plot([], [], "o", color="#444444", markersize=7, label="rank budget met")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"training loss (nats, mean of {window * every} steps)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0, every * max(map(len, losses.values())))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


@dataclass(frozen=True)
class RankGrid:
    """Ranks laid out as layer number (rows) × kind of layer (columns)."""

    rows: list[int]
    columns: list[str]
    cells: dict[tuple[int, str], str]  # (row, column) -> layer name
    others: list[str]  # layers whose name holds no number

    @classmethod
    def of(cls, layers: Sequence[str]) -> RankGrid:
        """Split each name at its first number: what follows it is the kind."""
        numbered = [(re.fullmatch(r"(?:.*?\.)?(\d+)\.(.+)", layer), layer) for layer in layers]
        places = {layer: (int(m[1]), m[2]) for m, layer in numbered if m}
        short = _shortened(list(dict.fromkeys(kind for _, kind in places.values())))
        return cls(
            rows=sorted({row for row, _ in places.values()}),
            columns=list(short.values()),
            cells={(row, short[kind]): layer for layer, (row, kind) in places.items()},
            others=[layer for m, layer in numbered if m is None],
        )


def _shortened(kinds: Sequence[str]) -> dict[str, str]:
    """The shortest ending of each dotted name that no other name ends with."""

    def ending(kind: str) -> str:
        parts = kind.split(".")
        for count in range(1, len(parts)):
            end = ".".join(parts[-count:])
            if not any(k != kind and f".{k}".endswith(f".{end}") for k in kinds):
                return end
        return kind

    return {kind: ending(kind) for kind in kinds}


def rank_change(before: int, after: int) -> str:
    """Both ranks as a cell shows them."""
    return f"{before}→{after}"


def plot_rank_maps(maps: Mapping[str, tuple[Ranks, Ranks]], path: Path) -> None:
    """Write one heat map a run to a PNG: colour is the rank after allocation, text both ranks.

    Args:
        maps: run -> (ranks before, ranks after), over the same layers in every run.
        path: of the PNG.
    """
    grid = RankGrid.of(list(next(iter(maps.values()))[0]))
    top = max(max(before.values()) for before, _ in maps.values())
    width = 0.85 * len(grid.columns) + 1.0
    figure, panels = plt.subplots(
        1,
        len(maps),
        figsize=(max(7.0, width * len(maps)), 0.42 * len(grid.rows) + 2.2),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    image = None
    for axes, (label, (before, after)) in zip(panels[0], maps.items(), strict=True):
        values = np.full((len(grid.rows), len(grid.columns)), np.nan)
        for (row, column), layer in grid.cells.items():
            y, x = grid.rows.index(row), grid.columns.index(column)
            values[y, x] = after[layer]
            color = "white" if after[layer] > 0.55 * top else "black"
            text = rank_change(before[layer], after[layer])
            axes.text(x, y, text, ha="center", va="center", color=color, fontsize=9)
        image = axes.imshow(values, cmap="Blues", norm=Normalize(0, top), aspect="auto")
        _label_rank_axes(axes, grid, label, before, after)
    panels[0][0].set_ylabel("layer")
    if image is not None:
        bar = figure.colorbar(image, ax=list(panels[0]), label="rank after allocation", pad=0.01)
        bar.locator = MaxNLocator(integer=True)
        bar.update_ticks()
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def _label_rank_axes(axes: Axes, grid: RankGrid, label: str, before: Ranks, after: Ranks) -> None:
    columns = [column.replace(".", "\n") for column in grid.columns]
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(grid.rows)), [str(row) for row in grid.rows])
    axes.tick_params(length=0)
    axes.set_title(f"{label}: {sum(before.values())}→{sum(after.values())} directions", fontsize=10)
    others = (f"{name} {rank_change(before[name], after[name])}" for name in grid.others)
    axes.set_xlabel("\n".join(["kind of layer", *others]), fontsize=9)
