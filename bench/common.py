"""What every benchmark shares: the machine, interleaved timing, and rows of results."""

import argparse
import datetime
import functools
import json
import os
import platform
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft")


def machine() -> dict[str, Any]:
    """Processor, GPU, thread count, versions and commit: what a row needs to be read later."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"time": now, **_this_run()}


@functools.cache
def _this_run() -> dict[str, Any]:
    """What stays: asked for once, since nvidia-smi and git take a while and rows are many."""
    info: dict[str, Any] = {
        "command": " ".join(["python", "-m", _module_name(), *map(_without_folder, sys.argv[1:])]),
        "commit": _commit(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            info[package] = version(package)
        except PackageNotFoundError:
            info[package] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        info |= {"gpu": properties.name, "gpu_memory": properties.total_memory}
        info["driver"] = _first_line(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    return info


def _commit() -> str:
    """The commit, "-dirty" where files differ from it other than what runs themselves write.

    Where there is no git, what COMMIT in the environment says.
    """
    if not _git("rev-parse", "HEAD"):
        return os.environ.get("COMMIT", "")
    outputs = (f":(top,exclude){folder}" for folder in ("bench/results", "docs/results"))
    changed = _git("status", "--porcelain", "--", ":(top)", *outputs)
    return _git("rev-parse", "HEAD") + ("-dirty" if changed else "")


def _without_folder(argument: str) -> str:
    """An absolute path's last part: where things lie on one machine means nothing on another."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else Path(sys.argv[0]).stem


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip().split("\n")[0]


def _git(*arguments: str) -> str:
    return _first_line("git", "-C", str(Path(__file__).parent), *arguments)


def rows_file(suite: str, out: Path) -> Path:
    """Where a suite's rows go: ``<out>/<suite>.jsonl``; `out` itself, if it is a .jsonl file."""
    return out if out.suffix == ".jsonl" else out / f"{suite}.jsonl"


def append_row(suite: str, row: dict[str, Any], out: Path = RESULTS) -> None:
    """Append one row, with its suite and the machine it came from, to `rows_file`."""
    path = rows_file(suite, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({"suite": suite} | row | {"machine": machine()}) + "\n")


def stored(suite: str, out: Path, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """A suite's rows in its `rows_file`, if that is there, with these fields; oldest first."""
    path = rows_file(suite, out)
    lines = path.read_text().splitlines() if path.exists() else []
    wanted = {"suite": suite} | wanted
    found = [{"suite": suite} | json.loads(line) for line in lines]  # older rows do not name it
    return [row for row in found if all(row.get(k) == v for k, v in wanted.items())]


def data_file(folder: Path, name: str) -> Path:
    """A task's JSONL file, plain or packed.

    Raises:
        SystemExit: neither ``<name>.jsonl`` nor ``<name>.jsonl.gz`` is in the folder.
    """
    for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"):
        if path.exists():
            return path
    raise SystemExit(f"there is no {name}.jsonl (or .gz) in {folder}")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Clock:
    """Seconds spent in named phases of one step.

    With `only` a single one is measured, and the host waits for the device before and after it
    alone.
    """

    def __init__(self, only: str | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.only = only

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self.only not in (None, name):
            yield
            return
        synchronize()
        start = time.perf_counter()
        yield
        synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its calls counted into a phase."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return timed

    def take(self) -> dict[str, float]:
        seconds, self.seconds = self.seconds, {}
        return seconds


def interleaved(
    steps: dict[str, Callable[[], dict[str, float]]], repeats: int, warmup: int
) -> Iterator[dict[str, list[dict[str, float]]]]:
    """Run every step in turn, `repeats` times after `warmup`; yields what is measured so far."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for turn in range(warmup + repeats):
        for name, step in steps.items():
            seconds = step()
            if turn >= warmup:
                samples[name].append(seconds)
        yield samples


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds."""
    low, _, high = quantiles(seconds, n=4) if len(seconds) > 1 else (seconds[0],) * 3
    return {"median_ms": 1e3 * median(seconds), "q1_ms": 1e3 * low, "q3_ms": 1e3 * high}


def peak_memory_mb() -> float:
    """Largest memory of this process so far: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin at that of the process that started this one
        line = next(n for n in status.read_text().splitlines() if n.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def in_own_process(module: str, *arguments: str) -> dict[str, Any]:
    """Run ``python -m module arguments`` and read the JSON on its last line."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.strip().split("\n")[-1])
    return result


def hush() -> None:
    """Without warnings that PEFT calls what transformers has renamed: nothing to act on."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    hush()
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--quick", action="store_true", help="few repeats, small sizes")
    options.add_argument("--out", type=Path, default=RESULTS, help="folder or .jsonl file of rows")
    options.add_argument("--no-save", action="store_true", help="print only")
    return options
