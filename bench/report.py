"""Tables of the documentation, from the rows under bench/results.

    python -m bench.report [--check] [--add FILE]

Rewrites what stands between ``<!-- table NAME -->`` and ``<!-- end -->`` in README.md and docs/,
from the newest row of each kind; one is computed (`bench.communication`). Writes the pages of
docs/results with their plots, one for each suite that has rows. ``--check`` changes nothing, and
fails if a table or a page is out of date. ``--add`` first takes over the rows of a file that suites
share, as bench/gpu.sh leaves one.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import communication, pages
from .common import RESULTS, rows_file
from .convergence import WINDOW, reached
from .rows import Row, markdown, newest, rows, source

# Training losses of the convergence tables; eight classes start at 2.08, two at 0.69.
TARGETS, STDLIB, RTE = (0.5, 0.45, 0.4), (1.8, 1.5, 1.2), (0.68, 0.65, 0.6)
GSM8K, WNLI = (1.05, 1.0, 0.97), (0.693, 0.69, 0.687)
TUNED, FRESH = (0, 1, 2, 3, 4, 5), (6, 7, 8)  # seeds while the design was chosen, and thereafter
ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def launches(model: str) -> str:
    """Launches of a training step, by part and method."""
    row = newest("launches", model=model)
    depth, methods = list(row["parts"].items())[-1]
    order = dict.fromkeys(p for m in reversed(list(methods)) for p in methods[m])
    body = [
        [part, *(f"{values[part]:.3g}" if part in values else "" for values in methods.values())]
        for part in order
    ]
    total = body.pop([line[0] for line in body].index("step, optimizer not counted"))
    total[1:] = [f"{values[total[0]]:.0f}" for values in methods.values()]
    title = f"{model}, {depth} blocks, batch {row['batch']} × {row['length']} tokens"
    return markdown([title, *methods], [*body, total]) + source(row)


def host() -> str:
    """Host time of a step and of a layer with faked launches (bench.host)."""
    row = newest("host")
    body = []
    for name, own in row["a step"].items():
        layer = row["a layer"].get(name)
        line = [name, f"{own['median_ms']:.1f}", f"{own['launches']:.0f}", f"{own['ratio']:.2f}"]
        line += [f"{1e3 * layer['median_ms']:.0f}", f"{layer['ratio']:.2f}"] if layer else ["", ""]
        body.append(line)
    head = ["method", "a step: ms", "launches", "÷ AdaLoRA", "a layer: µs", "÷ AdaLoRA"]
    return markdown(head, body) + source(row)


def step(batch: int) -> str:
    """Step time, its ratios, and peak memory of each method."""
    row = newest("step", batch=batch)
    methods = row["methods"]
    medians = {name: m["step"]["median_ms"] for name, m in methods.items()}
    body = []
    for name, method in methods.items():
        spread = f"{method['step']['q1_ms']:.0f}–{method['step']['q3_ms']:.0f}"
        body.append(
            [
                name,
                f"{medians[name]:.0f} [{spread}]",
                f"{medians[name] / medians['floor']:.2f}",
                f"{medians[name] / medians['adalora']:.2f}",
                f"{method['peak_mb']:.0f}" if "peak_mb" in method else "",
            ]
        )
    head = [f"batch {batch} × {row['length']}", "ms a step", "÷ floor", "÷ AdaLoRA", "peak MB"]
    return markdown(head, body) + source(row)


def convergence(
    name: str = "convergence",
    seeds: tuple[int, ...] = TUNED,
    targets: tuple[float, ...] = TARGETS,
    **wanted: Any,
) -> str:
    """Steps until the running mean of the loss is below each target, by method and lr.

    Seconds, where some of the rows have them, are means over the seeds that do.
    """
    groups: dict[tuple[str, float, str], list[Row]] = {}
    for row in rows(name, **_setting(wanted)):
        if row["seed"] in seeds:
            groups.setdefault((row["method"], row["lr"], rate(row)), []).append(row)
    timed = any(row["seconds"] for members in groups.values() for row in members)
    body = []
    for (method, _, said), members in sorted(groups.items()):
        members.sort(key=lambda row: row["seed"])
        line = [method, said, ", ".join(str(row["seed"]) for row in members)]
        for target in targets:
            steps = [reached(row["losses"], target) for row in members]
            line.append(", ".join("–" if s is None else str(s) for s in steps))
        if timed:
            line.append(", ".join(_seconds(members, target) for target in targets))
        last = [_last(row) for row in members]
        accuracy = [row["accuracy"] for row in members]
        body.append([*line, f"{statistics.fmean(last):.3f}", f"{statistics.fmean(accuracy):.3f}"])
    head = ["method", "lr", "seeds", *(f"steps to {t:g}" for t in targets)]
    head += ["seconds to these"] * timed
    return markdown([*head, "last loss", "accuracy"], body)


def _setting(wanted: dict[str, Any]) -> dict[str, Any]:
    """Fields of runs without pruning; what is not said is as on SST-2."""
    wanted = {"task": "sst2", "steps": 160, "rank": 3, "model": "MiniLM-L6"} | wanted
    return {"init_rank": wanted["rank"]} | wanted


def rate(row: Row) -> str:
    """A run's learning rate, and what of its optimizer is not the default."""
    said = f"{row['lr']:g}"
    if row.get("warmup") is not None:
        said += f", warm-up {row['warmup']}"
    return said + (f", β₂ {row['beta2']:g}" if row.get("beta2") else "")


def _seconds(members: list[Row], target: float) -> str:
    clocks = [(reached(row["losses"], target), row["seconds"]) for row in members if row["seconds"]]
    if not clocks or any(step is None for step, _ in clocks):
        return "–"
    return f"{statistics.fmean(sum(seconds[:step]) for step, seconds in clocks):.1f}"


SETTINGS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "SST-2": ({}, TUNED),
    "SST-2, fresh seeds": ({}, FRESH),
    "SST-2, rank 8": ({"rank": 8}, TUNED),
    "SST-2, d = 768": ({"model": "MiniLM-L6-d768"}, TUNED),
    "stdlib": ({"task": "stdlib"}, TUNED),
    "stdlib, fresh seeds": ({"task": "stdlib"}, FRESH),
    "GSM8K's questions": ({"task": "gsm8k"}, TUNED),
    "RTE": ({"task": "rte", "steps": 480}, TUNED),
    "RTE, fresh seeds": ({"task": "rte", "steps": 480}, FRESH),
}
PARTS = {"half": 0.5, "three quarters": 0.75, "the end": 1.0}


def compared() -> str:
    """Steps of spectral steps to the losses AdaLoRA reaches at parts of its run; medians of seeds.

    Both at the learning rate with the lowest last loss, on the seeds that both ran with.
    """
    body = []
    for name, (wanted, seeds) in SETTINGS.items():
        wanted = _setting(wanted)
        ours, theirs = (
            _best_rate(rows("convergence", method=method, **wanted), seeds)
            for method in ("spectral", "adalora")
        )
        pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
        if not pairs:
            continue
        line = [name, str(len(pairs)), " : ".join(map(rate, pairs[0]))]
        for part in PARTS.values():
            end = round(part * wanted["steps"])
            line.append(_ratio([_steps_to_lowest(*pair, end) for pair in pairs]))
        for value in (_last, lambda row: row["accuracy"]):
            means = (statistics.fmean(map(value, side)) for side in zip(*pairs, strict=True))
            line.append(", ".join(f"{mean:.3f}" for mean in means))
        body.append(line)
    return markdown(["task", "seeds", "rates", *PARTS, "last losses", "accuracies"], body)


def _steps_to_lowest(own: Row, other: Row, end: int) -> tuple[int | None, int | None]:
    """Steps of both runs to the lowest running mean that the other has up to step `end`."""
    losses = other["losses"]
    lowest = min(statistics.fmean(losses[i - WINDOW : i]) for i in range(WINDOW, end + 1))
    return reached(own["losses"], lowest), reached(losses, lowest)


def _best_rate(found: list[Row], seeds: tuple[int, ...]) -> dict[int, Row]:
    """By seed, the runs at the learning rate that most of the seeds ran with, and ended lowest."""
    by_rate: dict[str, dict[int, Row]] = {}
    for row in found:
        if row["seed"] in seeds:
            by_rate.setdefault(rate(row), {})[row["seed"]] = row
    key = lambda runs: (-len(runs), statistics.fmean(_last(row) for row in runs.values()))  # noqa: E731
    return min(by_rate.values(), key=key, default={})


def _last(row: Row) -> float:
    return statistics.fmean(row["losses"][-WINDOW:])


def _ratio(pairs: list[tuple[int | None, int | None]]) -> str:
    """Medians of two methods' steps, and the first divided by the second; – : not reached."""
    ours, theirs = (
        statistics.median(math.inf if step is None else step for step in side)
        for side in zip(*pairs, strict=True)
    )
    return "–" if math.isinf(ours) else f"{ours:g} : {theirs:g} = {ours / theirs:.2f}"


def language(task: str, name: str = "language") -> str:
    """Held-out loss of a language model by steps, each method at each of its rates."""
    body = []
    found = rows(name, task=task)
    for row in sorted(found, key=lambda row: (row["method"], row["lr"] or 0.0, row["seed"] or 0)):
        held = list(row["held_out"].values())
        cells = (
            [f"{loss:.4f}" for loss in held] if len(held) > 1 else ["", "", "", f"{held[0]:.4f}"]
        )
        rate = f"{row['lr']:g}" if row["lr"] else "–"
        body.append([row["method"], rate, "–" if row["seed"] is None else str(row["seed"]), *cells])
    return markdown(["method", "lr", "seed", "step 10", "step 20", "step 40", "step 60"], body)


def spectral_trials(task: str) -> str:
    """Prototypes of the spectral update: loss at the end, best first."""
    found = sorted(rows("spectral_trials", task=task), key=lambda row: row["held_out"])
    body = [
        [
            row["method"],
            row["width"] or "–",
            f"{row['lr']:g}",
            str(row["seed"]),
            ", ".join(str(reached(row["losses"], t) or "–") for t in TARGETS)
            if task == "sst2"
            else f"{statistics.fmean(row['losses'][-12:]):.3f}",
            f"{row['held_out']:.4f}",
        ]
        for row in found
    ]
    training = "steps to 0.5, 0.45, 0.4" if task == "sst2" else "training loss, last 12 steps"
    return markdown(["update", "η times", "η", "seed", training, "held-out loss"], body)


TABLES: dict[str, Callable[[], str]] = {
    "paper": pages.beside_the_paper,
    "launches-roberta": lambda: launches("roberta"),
    "launches-llama": lambda: launches("llama"),
    "step-1": lambda: step(1),
    "step-8": lambda: step(8),
    "convergence-tuned": convergence,
    "convergence-fresh": lambda: convergence(seeds=FRESH),
    "convergence-trials": lambda: convergence("convergence_trials"),
    "convergence-stdlib": lambda: convergence(task="stdlib", targets=STDLIB),
    "convergence-stdlib-fresh": lambda: convergence(task="stdlib", seeds=FRESH, targets=STDLIB),
    "convergence-trials-stdlib": lambda: convergence(
        "convergence_trials", task="stdlib", targets=STDLIB
    ),
    "convergence-gsm8k": lambda: convergence(task="gsm8k", targets=GSM8K),
    "convergence-rte": lambda: convergence(task="rte", steps=480, targets=RTE),
    "convergence-rte-fresh": lambda: convergence(task="rte", steps=480, seeds=FRESH, targets=RTE),
    "convergence-wnli": lambda: convergence(task="wnli", targets=WNLI),
    "convergence-rank-8": lambda: convergence(rank=8),
    "convergence-width-768": lambda: convergence(model="MiniLM-L6-d768"),
    "convergence-width-1024": lambda: convergence(model="MiniLM-L6-d1024"),
    "convergence-width-1152": lambda: convergence(model="MiniLM-L6-d1152"),
    "convergence-long": lambda: convergence(steps=2000),
    "convergence-compared": compared,
    "language-gsm8k": lambda: language("gsm8k"),
    "language-alpaca": lambda: language("alpaca"),
    "language-trials-gsm8k": lambda: language("gsm8k", "language_trials"),
    "language-trials-alpaca": lambda: language("alpaca", "language_trials"),
    "spectral-gsm8k": lambda: spectral_trials("gsm8k"),
    "spectral-alpaca": lambda: spectral_trials("alpaca"),
    "spectral-sst2": lambda: spectral_trials("sst2"),
    "host": host,
    "communication": communication.table,
}


def updated(text: str) -> str:
    """`text` with every table made anew."""

    def table(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise SystemExit(f"there is no table {match[2]!r}; there are {sorted(TABLES)}")
        return match[1] + TABLES[match[2]]() + match[3]

    return BLOCK.sub(table, text)


def take_over(path: Path) -> None:
    """Append each row of a shared file to its suite's own."""
    for line in path.read_text().splitlines():
        with rows_file(json.loads(line)["suite"], RESULTS).open("a") as file:
            file.write(line + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if one is old")
    parser.add_argument("--add", type=Path, metavar="FILE", help="rows to take over")
    arguments = parser.parse_args()
    if arguments.add:
        take_over(arguments.add)
    old = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = path.read_text()
        if updated(text) != text:
            old.append(str(path.relative_to(ROOT)))
            if not arguments.check:
                path.write_text(updated(text))
    old += pages.write(ROOT / "docs" / "results", check=arguments.check)
    if old:
        print(("out of date: " if arguments.check else "updated: ") + ", ".join(old))
    return 1 if old and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
