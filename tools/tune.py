"""Search on this machine's GPU for tiles that are faster than those of kernels/configs.py.

    python -m tools.tune [--only svd.16 ...] [--quick] [--dry-run]

From each tile the search goes on to whichever neighbour is fastest (one side halved or doubled, one
stage more or less) until none is. What does not compile or is wrong is left out. The GPU's own
rates, which decide between the paths of the linear layer, are measured as well. At the end stands
what differs, as it is written in `hal_kernels.kernels.configs`.

A search of everything takes long: each tile's result is printed when it is found. ``--quick`` takes
one step from each tile and no more. Without a GPU there is nothing to measure: ``--dry-run`` lists
what would be tried first.
"""

import argparse
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from triton.testing import do_bench

from hal_kernels.kernels.configs import Architecture, Tile, architecture_of, fused_us, using
from hal_kernels.kernels.dropout import fill_keep_
from hal_kernels.ops.svd_linear.triton import forward

from .problems import Problem, Sizes, problems, seconds_per
from .tiles import free_fields, limits, tiles_of
from .traffic import gemm

Bench = Callable[[Callable[[], object]], float]  # seconds of one call, on the GPU's clock


def neighbours(name: str, tile: Tile) -> list[Tile]:
    """The tiles one step away from `tile`, within `limits`."""
    found = []
    for field in free_fields(name, tile):
        value = getattr(tile, field)
        steps = (value - 1, value + 1) if field == "num_stages" else (value // 2, value * 2)
        least, most = limits(name, field)
        found += [dataclasses.replace(tile, **{field: v}) for v in steps if least <= v <= most]
    return found


def search(
    name: str,
    tile: Tile,
    cost: Callable[[Tile], tuple[float, str]],
    report: Callable[..., Any],
    steps: float = math.inf,
) -> tuple[Tile, float, float]:
    """(best tile, its cost, the cost of `tile`), by so many steps to the best neighbour at most."""
    costs: dict[Tile, float] = {}

    def of(candidate: Tile) -> float:
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


def _text(tile: Tile) -> str:
    sides = "×".join(str(n) for n in (tile.rows, tile.columns, tile.depth) if n)
    return f"{sides}, {tile.num_warps} warps, {tile.num_stages} stages"


def measured_rates(
    gpu: Architecture, device: torch.device, bench: Bench, sizes: Sizes
) -> dict[str, Any]:
    """What an `Architecture` says of the GPU itself, measured."""
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
    gpu: Architecture,
    device: torch.device,
    only: Sequence[str],
    bench: Bench,
    sizes: Sizes,
    report: Callable[..., Any] = print,
    steps: float = math.inf,
) -> Iterator[tuple[str, Tile]]:
    """The best tile of each kind that `only` selects, one after the other."""
    for name, tile in selected(gpu, only).items():
        report(name)
        cases: list[Problem] = list(problems(name, device, sizes))
        best, cost, before = search(
            name, tile, lambda t: seconds_per(gpu, name, t, cases, bench), report, steps  # noqa: B023
        )  # fmt: skip
        if math.isfinite(cost):
            report(f"  best: {_text(best)}, {before / cost:.2f} times as fast as before")
            yield name, best


def selected(gpu: Architecture, only: Sequence[str]) -> dict[str, Tile]:
    """The tiles whose names begin with one of `only`; all of them if that is empty."""
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
        prog="python -m tools.tune",
        description="Search on this machine's GPU for tiles faster than those of configs.py.",
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="svd.16, penalty, …")
    parser.add_argument("--quick", action="store_true", help="one step from each tile at most")
    parser.add_argument("--dry-run", action="store_true", help="list what would be tried first")
    options = parser.parse_args(arguments)
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    gpu = architecture_of(device)
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

    rates: dict[str, Any] = {
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count,
        **measured_rates(gpu, device, _bench, Sizes()),
    }
    steps = 1 if options.quick else math.inf
    measured = dataclasses.replace(gpu, **rates)
    found = dict(tune(measured, device, options.only, _bench, Sizes(), steps=steps))
    print(f"\n{gpu.name} in kernels/configs.py, from {torch.cuda.get_device_name(device)}:")
    for rate, value in rates.items():
        print(f"{rate}: {value if isinstance(value, bool) else f'{value:.4g}'}")
    for name, tile in found.items():
        if tile != chosen[name]:
            fields = dataclasses.astuple(tile)[: 5 if tile.depth else 4]
            print(f"{name}: Tile({', '.join(map(str, fields))})")
    return 0


def _bench(run: Callable[[], object]) -> float:
    milliseconds: float = do_bench(run, warmup=10, rep=50, return_mode="median")
    return milliseconds / 1e3


if __name__ == "__main__":
    sys.exit(main())
