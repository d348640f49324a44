"""What the demo says: a progress bar, tables, and the same figures as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .demo_methods import Contender, Settings
from .plots import RankGrid, plot_losses, plot_rank_maps, rank_change, running_mean

WINDOW = 10  # steps of the running mean, in the table and in the plot


@dataclass(frozen=True)
class Figures:
    """What one method's run came to."""

    label: str
    loss_quarter: float
    loss_half: float
    loss_end: float
    accuracy_before: float
    accuracy_after: float
    step_ms_median: float
    step_ms_quartiles: tuple[float, float]
    peak_memory_mb: float | None
    trainable_parameters: int
    ranks_before: dict[str, int]
    ranks_after: dict[str, int]
    budget_met_at_step: int | None
    losses: list[float]
    step_ms: list[float]


def figures(
    contender: Contender, accuracies: tuple[float, float], memory_mb: float | None
) -> Figures:
    """Sum up a finished run."""
    means = running_mean(contender.losses, WINDOW)
    times = contender.milliseconds
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return Figures(
        label=contender.label,
        loss_quarter=means[(len(means) - 1) // 4],
        loss_half=means[(len(means) - 1) // 2],
        loss_end=means[-1],
        accuracy_before=accuracies[0],
        accuracy_after=accuracies[1],
        step_ms_median=median,
        step_ms_quartiles=(low, high),
        peak_memory_mb=memory_mb,
        trainable_parameters=contender.trainable,
        ranks_before=contender.ranks_before,
        ranks_after=contender.ranks(),
        budget_met_at_step=contender.budget_met_at,
        losses=contender.losses,
        step_ms=times,
    )


@contextmanager
def training_progress(console: Console, steps: int) -> Iterator[Any]:
    """A bar with every contender's running loss; yields a function to call after each step."""
    columns = (
        BarColumn(bar_width=14),  # so that the whole line fits 80 columns
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps, losses="")

        def advance(contenders: Sequence[Contender]) -> None:
            recent = (statistics.fmean(c.losses[-WINDOW:]) for c in contenders)
            shown = zip(contenders, recent, strict=True)
            losses = ", ".join(f"{c.label} {loss:.3f}" for c, loss in shown)
            progress.update(task, advance=1, losses=f"loss {losses}")

        yield advance


def print_figures(console: Console, results: Sequence[Figures], settings: Settings) -> None:
    """The table of figures, a column a method."""
    steps, batch = settings.steps, settings.batch_size
    table = Table(
        title=f"{steps} steps of {batch} texts, both methods in turn, step by step",
        caption=(
            f"loss: training cross-entropy without the penalty, mean of {WINDOW} steps; "
            r"time: median \[quartiles]; memory: of a process of its own, training at full length; "
            "parameters: with the head; ranks: (least–most in a layer)"
        ),
    )
    table.add_column("")
    for result in results:
        table.add_column(result.label, justify="right")
    for name, cells in _rows(results):
        table.add_row(name, *map(escape, cells))
    console.print(table)


def _rows(results: Sequence[Figures]) -> Iterator[tuple[str, list[str]]]:
    yield "loss at a quarter (nats)", [f"{r.loss_quarter:.3f}" for r in results]
    yield "loss at half", [f"{r.loss_half:.3f}" for r in results]
    yield "loss at the end", [f"{r.loss_end:.3f}" for r in results]
    yield "held-out accuracy before (%)", [f"{100 * r.accuracy_before:.1f}" for r in results]
    yield "held-out accuracy after (%)", [f"{100 * r.accuracy_after:.1f}" for r in results]
    yield "time a step (ms)", [_time(r) for r in results]
    yield "peak memory (MB)", [_memory(r) for r in results]
    yield "trainable parameters", [f"{r.trainable_parameters:,}" for r in results]
    yield "ranks before, total", [_spread(r.ranks_before) for r in results]
    yield "ranks after, total", [_spread(r.ranks_after) for r in results]
    yield "rank budget met at step", [str(r.budget_met_at_step or "not met") for r in results]


def _time(result: Figures) -> str:
    low, high = result.step_ms_quartiles
    return f"{result.step_ms_median:.0f} [{low:.0f}, {high:.0f}]"


def _memory(result: Figures) -> str:
    return "not measured" if result.peak_memory_mb is None else f"{result.peak_memory_mb:.0f}"


def _spread(ranks: dict[str, int]) -> str:
    return f"{sum(ranks.values())} ({min(ranks.values())}–{max(ranks.values())})"


def print_ranks(console: Console, results: Sequence[Figures]) -> None:
    """Ranks by layer and kind of layer, before and after allocation, a table a method."""
    for result in results:
        before, after = result.ranks_before, result.ranks_after
        grid = RankGrid.of(list(before))
        table = Table(title=f"Ranks by layer, before→after: {result.label}")
        for column in ("layer", *grid.columns):
            table.add_column(column.replace(".", "\n"), justify="right")
        for row in grid.rows:
            layers = [grid.cells.get((row, column)) for column in grid.columns]
            cells = [rank_change(before[x], after[x]) if x else "" for x in layers]
            table.add_row(str(row), *cells)
        others = (f"{name} {rank_change(before[name], after[name])}" for name in grid.others)
        table.caption = ", ".join(others) or None
        console.print(table)


def write_files(out: Path, results: Sequence[Figures], settings: Settings, data: str) -> None:
    """metrics.json, loss.png and ranks.png."""
    metrics = {
        "settings": asdict(settings),
        "data": data,
        "methods": [asdict(result) for result in results],
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    plot_losses(
        {result.label: result.losses for result in results},
        out / "loss.png",
        window=WINDOW,
        budget_met_at={result.label: result.budget_met_at_step for result in results},
    )
    plot_rank_maps(
        {result.label: (result.ranks_before, result.ranks_after) for result in results},
        out / "ranks.png",
    )
