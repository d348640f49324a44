"""Measure the kernels' tiles on this machine's GPU, and remember the best ones.

    python -m hal_kernels.tune [--only svd.16 ...] [--quick] [--output FILE] [--dry-run]

From each shipped tile the search goes on to whichever neighbour is fastest (one side halved or
doubled, one stage more or less) until none is. What does not compile or is wrong is left out. The
GPU's own rates, which decide between the paths of the linear layer, are measured as well. The
result is a JSON file that later processes read when they launch their first kernel:
``~/.cache/hal_kernels/tuned-<device>-<version>.json``, or what $HAL_KERNELS_TUNED names (see
`hal_kernels.kernels.tuned`). Training itself never measures anything.

A search of everything takes long; it keeps what it has found at each tile, and a later one goes on
from there. ``--quick`` takes one step from each tile and no more. Without a GPU there is nothing to
measure: ``--dry-run`` lists what would be tried first.
"""

import argparse
import dataclasses
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .kernels.configs import Architecture, Tile
    from .kernels.problems import Problem, Sizes

Bench = Callable[[Callable[[], object]], float]  # seconds of one call, on the GPU's clock


def neighbours(name: str, tile: "Tile") -> list["Tile"]:
    """The tiles one step away from `tile`, within the limits of what may be stored."""
    from .kernels.tuned import free_fields, limits

    found = []
    for field in free_fields(name, tile):
        value = getattr(tile, field)
        steps = (value - 1, value + 1) if field == "num_stages" else (value // 2, value * 2)
        least, most = limits(name, field)
        found += [dataclasses.replace(tile, **{field: v}) for v in steps if least <= v <= most]
    return found


def search(
    name: str,
    tile: "Tile",
    cost: Callable[["Tile"], tuple[float, str]],
    report: Callable[..., Any],
    steps: float = math.inf,
) -> tuple["Tile", float, float]:
    """(best tile, its cost, the cost of `tile`), by so many steps to the best neighbour at most."""
    costs: dict[Tile, float] = {}

    def of(candidate: "Tile") -> float:
        if candidate not in costs:
            costs[candidate], wrong = cost(candidate)
            report(f"  {_text(candidate)}: {wrong or f'{costs[candidate] * 1e6:.1f} µs'}")
        return costs[candidate]

    best, started = tile, of(tile)
    while steps > 0:
        step = min(neighbours(name, best), key=of)
        if not of(step) < of(best):
            break
        best, steps = step, steps - 1
    return best, of(best), started


def _text(tile: "Tile") -> str:
    sides = "×".join(str(n) for n in (tile.rows, tile.columns, tile.depth) if n)
    return f"{sides}, {tile.num_warps} warps, {tile.num_stages} stages"


def measured_rates(
    gpu: "Architecture", device: torch.device, bench: Bench, sizes: "Sizes"
) -> dict[str, Any]:
    """What of `tuned.RATES` takes a measurement."""
    from .kernels.configs import using
    from .kernels.dropout import fill_keep_
    from .kernels.traffic import fused_us, gemm
    from .ops.svd_linear.triton import forward

    T, d = sizes.large
    x, weight = (torch.randn(n, d, device=device).bfloat16() for n in (T, d))
    y, copied = x.new_empty(T, d), torch.empty_like(x)
    rates: dict[str, Any] = {
        "bandwidth": 2 * x.numel() * 2 / (1e6 * bench(lambda: copied.copy_(x))),
        "matrix_rate": gemm(T, d, d).flops / (1e6 * bench(lambda: torch.mm(x, weight.t(), out=y))),
    }
    keep, seed = torch.empty(32, 128, device=device), torch.zeros((), dtype=torch.int64).to(device)
    fill_keep_(keep, 0, 0.5, seed)
    _synchronize(device)
    before, launches = time.perf_counter(), 100
    for _ in range(launches):
        fill_keep_(keep, 0, 0.5, seed)
    _synchronize(device)
    rates["launch_us"] = (time.perf_counter() - before) / launches * 1e6
    gpu = dataclasses.replace(gpu, **(rates | {"gemm_slowdown": 1.0}))

    r = min(gpu.svd)
    p, lam, q = (torch.randn(*shape, device=device) for shape in ((r, d), (r,), (r, d)))

    def linear(rows: torch.Tensor, path: str) -> float:
        layer = [weight], [None], [p], [lam], [q]
        return bench(lambda: forward(rows, *layer, 0.5, 0.0, None, path=path))

    with using(gpu):
        rates["prepare"] = linear(x, "prepare") <= linear(x, "add")
        rows = x[: sizes.small[0]]
        tiles = gpu.svd_tiles(r, True).fused
        estimate = min(fused_us(gpu, tile, len(rows), d, d, r) for tile in tiles)
        rates["gemm_slowdown"] = linear(rows, "fused") * 1e6 / estimate
    return rates


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tune(
    gpu: "Architecture",
    device: torch.device,
    only: Sequence[str],
    bench: Bench,
    sizes: "Sizes",
    report: Callable[..., Any] = print,
    steps: float = math.inf,
) -> Iterator[tuple[str, "Tile"]]:
    """The best tile of each kind that `only` selects, one after the other."""
    from .kernels.problems import problems, seconds_per

    for name, tile in selected(gpu, only).items():
        report(name)
        cases: list[Problem] = list(problems(name, device, sizes))
        best, cost, before = search(
            name, tile, lambda t: seconds_per(gpu, name, t, cases, bench), report, steps  # noqa: B023
        )  # fmt: skip
        if math.isfinite(cost):
            report(f"  best: {_text(best)}, {before / cost:.2f} times as fast as before")
            yield name, best


def selected(gpu: "Architecture", only: Sequence[str]) -> dict[str, "Tile"]:
    """The tiles whose names begin with one of `only`; all of them if that is empty."""
    from .kernels.tuned import tiles_of

    every = tiles_of(gpu)
    unknown = [n for n in only if not any(_within(name, n) for name in every)]
    if unknown:
        raise ValueError(f"no tile is named {unknown[0]!r}, expected one of {list(every)}")
    return {
        name: tile
        for name, tile in every.items()
        if not only or any(_within(name, n) for n in only)
    }


def _within(name: str, group: str) -> bool:
    return f"{name}.".startswith(f"{group}.")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hal_kernels.tune",
        description="Measure the kernels' tiles on this machine's GPU and remember the best ones.",
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="svd.16, penalty, …")
    parser.add_argument("--quick", action="store_true", help="one step from each tile at most")
    parser.add_argument("--output", type=Path, help="the file, in place of the one that is read")
    parser.add_argument("--dry-run", action="store_true", help="list what would be tried first")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        parser.exit(1, "triton is not installed: there are no kernels to tune\n")

    from .kernels import tuned
    from .kernels.configs import DEFAULT, shipped

    has_gpu = torch.cuda.is_available()
    gpu = shipped(torch.cuda.current_device()) if has_gpu else DEFAULT
    try:
        chosen = selected(gpu, options.only)
    except ValueError as error:
        parser.error(str(error))
    if options.dry_run:
        for name, tile in chosen.items():
            print(f"{name}: {_text(tile)}")
            for other in neighbours(name, tile):
                print(f"  {_text(other)}")
        return 0
    if not has_gpu:
        parser.exit(1, "no GPU: tiles are measured on the one that is to use them (--dry-run?)\n")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels say nothing about time")

    from .kernels.problems import Sizes

    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    path = options.output or tuned.path_of(name)
    if path is None:
        parser.error(f"{tuned.VARIABLE} is set to nothing: name a file with --output")
    # What an earlier run found stays, and is gone on from.
    before = tuned.load_or_warn(path, gpu, name) if path.exists() else gpu
    rates: dict[str, Any] = {
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count,
        **measured_rates(before, device, _bench, Sizes()),
    }
    print(", ".join(f"{n} {v:.4g}" for n, v in rates.items()))
    gpu = dataclasses.replace(before, **rates)
    tiles = tuned.tiles_of(before)
    tuned.save(path, gpu, name, tiles, rates)
    steps = 1 if options.quick else math.inf
    for tile_name, tile in tune(gpu, device, options.only, _bench, Sizes(), steps=steps):
        tiles[tile_name] = tile
        tuned.save(path, gpu, name, tiles, rates)  # at each one: an interrupted search is not lost
    print(f"written to {path}")
    return 0


def _bench(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    milliseconds: float = do_bench(run, warmup=10, rep=50, return_mode="median")
    return milliseconds / 1e3


if __name__ == "__main__":
    sys.exit(main())
