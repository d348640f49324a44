"""Kernels timed alone on a GPU: launches of one kernel in a CUDA graph, replayed."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import quantiles
from typing import Any
from unittest import mock

import torch

from hal_kernels.ops.spectral_step import triton as spectral_kernels
from hal_kernels.ops.svd_linear import triton as svd_kernels
from tools.problems import Problem

from .spectral_layers import SpectralLayers

LAUNCHES, REPLAYS = 12, 15  # launches in a graph, replays of it
SPECTRAL = ("gram", "solve", "write")


def replayed(runs: Sequence[Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median and quartiles of one run, in µs, from replays of one graph of several.

    The runs take turns: let their inputs be larger together than the GPU's cache. On a CPU, where
    nothing can be captured, they are timed as they are.
    """
    for run in runs:
        run()  # compiles
    rounds = max(1, LAUNCHES // len(runs))
    if device.type == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for run in runs:
                    run()
        samples = [_replay_us(graph) for _ in range(REPLAYS + 3)][3:]
        samples = [us / (rounds * len(runs)) for us in samples]
    else:
        samples = []
        for _ in range(2):
            begin = time.perf_counter()
            runs[0]()
            samples.append(1e6 * (time.perf_counter() - begin))
    low, middle, high = quantiles(samples, n=4)
    return {"median_us": middle, "q1_us": low, "q3_us": high}


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return 1e3 * start.elapsed_time(stop)


def copied_per_us(device: torch.device, size: int) -> dict[str, float]:
    """A copy of `size` floats: its time, and the bytes that it reads and writes per µs."""
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    found = replayed([lambda: target.copy_(source)], device)
    return found | {"bytes_per_us": 2 * 4 * size / found["median_us"]}


def reduce_problem(T: int, d: int, r: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """The sum of the partial dP, dΛ and dQ that the kernels before leave of a layer d → d."""
    x = torch.randn(T, d, device=device).to(dtype)
    p, lam = torch.randn(r, d, device=device), torch.randn(r, device=device)
    h, u = torch.randn(T, r, device=device), p.new_empty(svd_kernels.parts_of_u(x, p), T, r)
    dq = svd_kernels.gradients_dy(x, h, u, lam, p, 0.5)
    sums = [*svd_kernels.gradients_x(x, h, u, p, lam, 0.5), dq]
    like = [p, lam, p]
    expected = [
        t.double().sum(0) if t.dim() > of.dim() else t for t, of in zip(sums, like, strict=True)
    ]
    return Problem(lambda: svd_kernels.reduce(sums, like), lambda out: out, expected, 1e-5)


class _Nothing:
    """In place of a kernel: its launch does nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **options: None


@contextmanager
def launching(kernels: Sequence[str]) -> Iterator[None]:
    """Of the spectral step's kernels only these are launched."""
    left_out = {f"{name}_kernel": _Nothing() for name in SPECTRAL if name not in kernels}
    with mock.patch.multiple(spectral_kernels, **left_out) if left_out else mock.MagicMock():
        yield


def spectral_us(layers: SpectralLayers, device: torch.device) -> dict[str, dict[str, float]]:
    """Each of the spectral step's kernels: what a step gains in time by its launch.

    A kernel reads what the one before has written, so they are left out from the end on.
    """
    inputs = layers.inputs()
    layers.step(inputs)  # from what there is after a step, momenta included
    times = []
    for count in range(len(SPECTRAL) + 1):
        with launching(SPECTRAL[:count]):
            times.append(replayed([lambda: layers.step(inputs)], device))
    found: dict[str, Any] = {}
    for name, (before, after) in zip(SPECTRAL, itertools.pairwise(times), strict=True):
        found[name] = {"median_us": after["median_us"] - before["median_us"]}
    return found | {"step": times[-1]}
