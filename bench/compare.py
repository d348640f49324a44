"""This revision against another: operators or training steps, measured in turn.

    python -m bench.compare REV [--suite operators step] [--rounds 3] [--only svd_linear]

REV is checked out into a git worktree in a temporary folder, which is removed at the end. Each
round runs the suite once in both trees, each with its own bench and library, this one first and the
other first in turn, so that what else the machine does meets both. What both measured is compared:
the median over rounds of each tree's median, and the range over rounds. A suite checks its results
before it writes a row; if it fails in either tree, nothing is reported.

The native library is copied if both revisions build it from the same sources, else it is built.
Uncommitted changes count as this revision's.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .common import append_row, parser

ROOT = Path(__file__).parent.parent
NATIVE = "hal_kernels/libhal_kernels.so"
SOURCES = ("csrc", "setup.py")
Medians = dict[str, float]  # what was measured -> milliseconds


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A folder with `revision`, its native library in place."""
    commit = git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--detach", str(tree), commit)
        try:
            same = not git("diff", "--name-only", commit, "--", *SOURCES)
            if same and (ROOT / NATIVE).exists():
                shutil.copy2(ROOT / NATIVE, tree / NATIVE)
            else:
                build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
                subprocess.run(build, cwd=tree, check=True)
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def operator_medians(row: dict[str, Any]) -> Medians:
    return {f"{row['operator']} {row['size']}": row["times"]["hal"]["median_us"] / 1e3}


def step_medians(row: dict[str, Any]) -> Medians:
    return {
        f"{name}, batch {row['batch']}": result["step"]["median_ms"]
        for name, result in row["methods"].items()
        if name.startswith("hal")
    }


SUITES = {"operators": operator_medians, "step": step_medians}


def measured(tree: Path, suite: str, arguments: list[str]) -> Medians:
    """One run of a suite in a tree.

    Raises:
        SystemExit: it failed.
    """
    with tempfile.TemporaryDirectory() as out:
        paths = os.pathsep.join((str(tree), str(tree / "python")))
        done = subprocess.run(
            [sys.executable, "-m", f"bench.{suite}", "--out", out, *arguments],
            cwd=tree, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True,
        )  # fmt: skip
        rows = Path(out) / f"{suite}.jsonl"
        # bench.step exits with 1 where a bound is missed, its rows written.
        if not rows.exists() or (done.returncode and "missed: " not in done.stdout):
            raise SystemExit(f"bench.{suite} failed in {tree}:\n{done.stdout}{done.stderr}")
        found: Medians = {}
        for line in rows.read_text().splitlines():
            found |= SUITES[suite](json.loads(line))
        return found


def combined(rounds: list[dict[str, Medians]]) -> dict[str, dict[str, Any]]:
    """By what both trees measured in every round: medians over rounds, their range and ratio."""
    names = [n for n in rounds[0]["this"] if all(n in m for r in rounds for m in r.values())]
    found = {}
    for name in names:
        this, other = ([r[tree][name] for r in rounds] for tree in ("this", "other"))
        found[name] = {
            "this_ms": median(this),
            "this_range": [min(this), max(this)],
            "other_ms": median(other),
            "other_range": [min(other), max(other)],
            "ratio": median(this) / median(other),
        }
    return found


def main() -> int:
    options: argparse.ArgumentParser = parser(__doc__)
    options.add_argument("revision", metavar="REV", help="the other revision, as git names it")
    options.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES))
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--only", default="", help="operators whose name contains this")
    arguments = options.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.suite = 1, arguments.suite[:1]
    console = Console()
    with worktree(arguments.revision) as tree:
        for suite in arguments.suite:
            own = ["--quick"] if arguments.quick else []
            own += ["--only", arguments.only] if suite == "operators" and arguments.only else []
            rounds: list[dict[str, Medians]] = []
            with Progress(console=console, transient=True) as progress:
                task = progress.add_task(suite, total=2 * arguments.rounds)
                for turn in range(arguments.rounds):
                    trees = [("this", ROOT), ("other", tree)]
                    found = {}
                    for name, folder in trees if turn % 2 == 0 else trees[::-1]:
                        found[name] = measured(folder, suite, own)
                        progress.advance(task)
                    rounds.append(found)
            results = combined(rounds)
            view = Table(title=f"bench.{suite}, median of {arguments.rounds} rounds [range]")
            for column in ("", "this, ms", f"{arguments.revision}, ms", "this ÷ other"):
                view.add_column(column, justify="right" if column else "left")
            for name, r in results.items():
                cells = (
                    f"{r[f'{which}_ms']:.4g} [{r[f'{which}_range'][0]:.4g}–"
                    f"{r[f'{which}_range'][1]:.4g}]"
                    for which in ("this", "other")
                )
                view.add_row(name, *cells, f"{r['ratio']:.3f}")
            console.print(view)
            if not arguments.no_save:
                row = {"suite": suite, "revision": arguments.revision, "rounds": arguments.rounds}
                row |= {"commit": git("rev-parse", arguments.revision), "results": results}
                append_row("compare", row, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
