"""Plots of the suites' rows. Lines differ in style and marker as well as in colour."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import (
    FixedLocator,
    LogLocator,
    NullLocator,
    ScalarFormatter,
    StrMethodFormatter,
)

from examples.demo.task import running_mean

from .convergence import WINDOW

Row = Mapping[str, Any]
STYLES: dict[str, dict[str, Any]] = {
    "frozen": {"color": "#999999", "linestyle": ":", "marker": "."},
    "floor": {"color": "#555555", "linestyle": "--", "marker": "."},
    "lora": {"color": "#38761d", "linestyle": "-.", "marker": "^"},
    "hyper-lora": {"color": "#6aa84f", "linestyle": "-", "marker": "^"},
    "dora": {"color": "#7b4ea3", "linestyle": "-.", "marker": "v"},
    "hyper-dora": {"color": "#a98bc7", "linestyle": "-", "marker": "v"},
    "dylora": {"color": "#b08a00", "linestyle": ":", "marker": "x"},
    "hyper-dylora": {"color": "#d9b400", "linestyle": "-", "marker": "x"},
    "adalora": {"color": "#c55a11", "linestyle": "--", "marker": "s"},
    "hal-direct": {"color": "#3d85c6", "linestyle": "-", "marker": "D"},
    "hal-spectral": {"color": "#d81b60", "linestyle": "-", "marker": "P"},
    "hal-hyper": {"color": "#0b3d6b", "linestyle": "-", "marker": "o"},
}
STYLES |= {
    "direct-gradient": STYLES["hal-direct"],
    "spectral": STYLES["hal-spectral"],
    "hyper": STYLES["hal-hyper"],
    "hyper-lam": {"color": "#2a9d8f", "linestyle": "-.", "marker": "v"},
}

HATCHES = ("", "//", "\\\\", "xx", "..", "--", "++")


def line(
    axes: Axes,
    method: str,
    x: Sequence[float],
    y: Sequence[float],
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
) -> None:
    """One method's line, with a band where bounds are given."""
    style = STYLES[method]
    axes.plot(x, y, label=method, linewidth=1.6, markersize=5, **style)
    if low is not None and high is not None:
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def log_axes(axes: Axes, x: Sequence[float]) -> None:
    """Both axes logarithmic; ticks at the values measured, as plain numbers."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(x)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(alpha=0.3)


def step_times(axes: Axes, rows: Sequence[Row], value: str) -> None:
    """Median step time with quartiles of every method, over a field of the rows."""
    rows = sorted(rows, key=lambda row: row[value])
    methods = dict.fromkeys(name for row in rows for name in row["methods"])
    for method in methods:
        own = [r for r in rows if "step" in r["methods"].get(method, {})]
        if own:
            steps = [r["methods"][method]["step"] for r in own]
            medians, lows, highs = ([s[k] for s in steps] for k in ("median_ms", "q1_ms", "q3_ms"))
            line(axes, method, [r[value] for r in own], medians, lows, highs)
    log_axes(axes, [row[value] for row in rows])
    axes.set_ylabel("ms a step (median, quartiles)")


def scaling(rows: Sequence[Row], path: Path) -> None:
    """Step time over each of the axes that were measured."""
    names = list(dict.fromkeys(row["axis"] for row in rows))
    columns = min(2, len(names))
    height = -(-len(names) // columns)
    figure, panels = plt.subplots(
        height, columns, figsize=(5.2 * columns, 3.6 * height), layout="constrained", squeeze=False
    )
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(panels.flat, names, strict=False):
        own = [row for row in rows if row["axis"] == name]
        step_times(axes, own, "value")
        axes.set_xlabel(own[0]["label"])
        axes.set_title(own[0]["title"], fontsize=10)
    panels[0][0].legend(fontsize=8)
    save(figure, path)


def step_and_memory(rows: Sequence[Row], path: Path) -> None:
    """Step time and peak memory over the batch size."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 3.8), layout="constrained")
    step_times(left, rows, "batch")
    batches = [row["batch"] for row in rows]
    for method in dict.fromkeys(name for row in rows for name in row["methods"]):
        own = [r for r in rows if "peak_mb" in r["methods"].get(method, {})]
        line(
            right, method, [r["batch"] for r in own], [r["methods"][method]["peak_mb"] for r in own]
        )
    log_axes(right, batches)
    right.set_yscale("linear")
    right.set_ylim(bottom=0)
    right.set_ylabel("peak memory (MB)")
    for axes in (left, right):
        axes.set_xlabel("batch size")
    left.legend(fontsize=8)
    save(figure, path)


def gamma_points(rows: Sequence[Row], path: Path) -> None:
    """Accuracy and orthogonality at each γ: every seed a point, the line through their means."""
    figure, panels = plt.subplots(1, 2, figsize=(9.0, 3.6), layout="constrained")
    weights = sorted({row["gamma"] for row in rows})
    for axes, field, label in zip(
        panels,
        ("accuracy", "orthogonality"),
        ("held-out accuracy", "mean over layers of\n‖PᵀP − I‖² + ‖QQᵀ − I‖²"),
        strict=True,
    ):
        axes.plot([r["gamma"] for r in rows], [r[field] for r in rows], "o", color="#888888",
                  label="a seed", markersize=5)  # fmt: skip
        own = [[r[field] for r in rows if r["gamma"] == gamma] for gamma in weights]
        axes.plot(weights, [sum(v) / len(v) for v in own], "-", color="#0b3d6b", label="mean")
        axes.set_xlabel("weight γ of the penalty")
        axes.set_ylabel(label)
        axes.set_xticks(weights)
        axes.grid(alpha=0.3)
    panels[1].set_yscale("log")  # without a penalty it is a thousand times as much
    panels[0].legend(fontsize=8)
    save(figure, path)


def curves(runs: Mapping[str, Sequence[Row]], label: str, path: Path) -> None:
    """Running mean of the loss against steps and seconds, by method; band: all its seeds.

    Against seconds stand the runs that have them (null: the machine was shared).
    """
    timed = {method: [run for run in own if run["seconds"]] for method, own in runs.items()}
    clock = any(timed.values())
    figure, panels = plt.subplots(
        1, 1 + clock, figsize=(6.0 + 4.4 * clock, 4.0), sharey=True,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    left = panels[0, 0]
    others = ("-", "--", "-.", ":")
    band = 0.15 if len(runs) < 5 else 0.07  # many bands lie over one another
    for number, (method, own) in enumerate(runs.items()):
        style = STYLES.get(method) or {
            "color": f"C{number}", "linestyle": others[number % 4], "marker": "osD^vx"[number % 6]
        }  # fmt: skip
        for axes, shown in zip(panels[0], (own, timed[method]), strict=False):
            if not shown:
                continue
            means = np.array([running_mean(run["losses"], WINDOW)[WINDOW - 1 :] for run in shown])
            x = np.arange(WINDOW, WINDOW + means.shape[1])
            if axes is not left:
                x = np.array([run["seconds"] for run in shown]).cumsum(1).mean(0)[WINDOW - 1 :]
            axes.plot(
                x, means.mean(0), label=f"{method}, lr {own[0]['lr']:g}", linewidth=1.5,
                markevery=0.13, markersize=5, **style,
            )  # fmt: skip
            axes.fill_between(
                x, means.min(0), means.max(0), color=style["color"], alpha=band, linewidth=0
            )
    left.set_xlabel("optimizer steps")
    if clock:
        panels[0, 1].set_xlabel("seconds of training steps")
    left.set_ylabel(f"{label}, mean of {WINDOW} steps")
    for axes in panels[0]:
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    save(figure, path)


def score_bars(runs: Mapping[str, Sequence[Row]], metrics: Mapping[str, str], path: Path) -> None:
    """A panel for each metric that was measured: means over seeds, from least to largest."""
    found = [m for m in metrics if any(m in row["scores"] for own in runs.values() for row in own)]
    figure, panels = plt.subplots(
        1, len(found), figsize=(1.2 + 3.4 * len(found), 3.4), layout="constrained", squeeze=False
    )
    for axes, metric in zip(panels[0], found, strict=True):
        for place, (method, own) in enumerate(runs.items()):
            values = [row["scores"][metric] for row in own]
            mean = sum(values) / len(values)
            axes.bar(
                place, mean, yerr=[[mean - min(values)], [max(values) - mean]], capsize=4,
                color=STYLES[method]["color"], alpha=0.75, edgecolor="black",
                hatch=HATCHES[place % len(HATCHES)],
            )  # fmt: skip
        axes.set_xticks(range(len(runs)), list(runs), rotation=40, ha="right", fontsize=8)
        axes.set_title(metrics[metric], fontsize=10)
        axes.grid(axis="y", alpha=0.3)
        axes.set_ylim(bottom=0)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same rows give the same bytes, so that a plot out of date can be told.
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
