"""A static model of the SVD kernels' times, from their SASS and their traffic. Nothing is measured.

Of T = 8192 rows of d = 4096 columns a kernel takes at least the longest of

    memory   its bytes at the GPU's bandwidth; reads at no more than what the multiprocessors have
             asked for in advance: copies in flight over the latency of memory
    cache    what its copies ask for, again and again, at the level-2 cache's bandwidth
    issue    its loops' instructions, one a cycle in each of a multiprocessor's four schedulers

and `RAMP` in which the first loads arrive and the last results leave. Waits at barriers and the
uneven end of a grid are left out, so a GPU will be slower.
"""

import math
from typing import Any

from hal_kernels.kernels.configs import ARCHITECTURES

from . import traffic
from .cases import Case
from .sass import Loop
from .traffic import Traffic

T, D = 8192, 4096
LATENCY = 0.8  # µs from a request to the arrival of its bytes, of busy memory
RAMP = 2.0  # µs
SCHEDULERS = 4
CYCLES = {"sm_80": 1410, "sm_90": 1755, "sm_100": 1800}  # a µs


def _traffic(case: Case, width: int) -> tuple[Traffic, int] | None:
    """What the kernel moves, and how many of its loops load ahead or (dx's) write."""
    c: dict[str, Any] = case.constexprs
    r, parts = c.get("R", 0), c.get("PARTS", 1)
    base = "base" in case.signature
    match case.kernel.__name__:
        case "shrink_kernel":
            return traffic.shrink(T, D, r, width=width, splits=2), 1
        case "expand_kernel":
            return traffic.expand(T, D, r, width=width, splits=parts, base=base), 1
        case "gradients_dy_kernel":
            splits = min(64, T // c["BT"])
            more = {"parts": 2, "splits": splits, "blocks": T // c["BT"] // splits}
            return traffic.gradients_dy(T, D, r, width=width, **more), 1
        case "gradients_dy_apart_kernel":
            return traffic.gradients_dy(T, D, r, width=width, splits=4, apart=True), 2
        case "gradients_x_kernel":
            return traffic.gradients_x(T, D, r, width=width, splits=4, parts=parts, add=base), 2
    return None


def ahead(case: Case) -> int:
    """How many loops of a kernel are to load ahead. Of odd widths none can, of many parts dx's."""
    found = _traffic(case, 2)
    if found is None or not case.aligned or case.config["num_stages"] == 1:
        return 0
    parts, R = case.constexprs.get("PARTS", 1), case.constexprs["R"]
    return found[1] - (found[1] == 2 and (parts > 4 or parts * R > 128))


def times(case: Case, loops: list[Loop], blocks: int) -> tuple[float, float] | None:
    """(floor, model) in µs, for a kernel whose loops all load ahead and that has a model."""
    gpu, c = ARCHITECTURES[case.architecture], case.constexprs
    width = 2 if "*bf16" in case.signature.values() else 4
    found, main = _traffic(case, width), [loop for loop in loops if loop.copies]
    if gpu.name not in CYCLES or found is None or found[1] > ahead(case):
        return None
    moved, expected = found
    if len(main) < expected or not blocks:
        return None
    columns = c.get("BN") or c["BK"]
    tile, warps = c["BT"] * columns, case.config["num_warps"]
    turns = T * D / tile * warps  # of all warps in each of the loops
    issue = turns * sum(loop.instructions for loop in main[:expected])
    issue /= gpu.multiprocessors * SCHEDULERS * CYCLES[gpu.name]
    cache = turns * sum(loop.bytes for loop in main[:expected]) + moved.written
    flying = gpu.multiprocessors * blocks * tile * width * (case.config["num_stages"] - 1)
    rate = min(gpu.bandwidth, flying / LATENCY)
    floor = moved.floor_us(gpu.bandwidth, math.inf)
    memory = moved.read / rate + moved.written / gpu.bandwidth
    return floor, max(memory, cache / gpu.cache_bandwidth, issue) + RAMP
