# mypy: allow-untyped-defs
"""The SVD layers' kernels in all that is shipped, for the ahead-of-time check."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from hal_kernels.kernels.configs import ARCHITECTURES, HIGHEST_RANK, ODD, SVDTiles, Tile
from hal_kernels.ops.svd_linear.plans import ONE_PASS, REDUCE
from hal_kernels.ops.svd_linear.triton import PENALTY
from hal_kernels.ops.svd_linear.triton_kernels import (
    ANYWHERE,
    RUN_TIME,
    expand_kernel,
    fused_kernel,
    gradients_dy_apart_kernel,
    gradients_dy_kernel,
    gradients_x_kernel,
    shrink_kernel,
)
from hal_kernels.ops.svd_linear.triton_sums import penalty_kernel, reduce_kernel

from .cases import POINTERS, Case, make_case

# Types of the kernels' arguments.
_FACTORS = ("p", "lam", "q", "dp", "dq", "dlam")
_SUMS = ("h", "h_sum", "u", "gram")
_ACTIVATIONS = ("x", "y", "dy", "dx", "base", "bias", "weight")


def adapter_case(
    kernel: Any,
    architecture: str,
    tile: Tile,
    dtype: torch.dtype,
    widths_aligned: bool,
    **constexprs: Any,
) -> Case:
    """A case of one of the adapter's kernels, with float32 factors and x of `dtype`."""
    types = {
        **dict.fromkeys(_FACTORS + _SUMS, torch.float32),
        **dict.fromkeys(_ACTIVATIONS, dtype),
        "p_seed": torch.int64,
    }
    pointers = {n: t for n, t in types.items() if n in kernel.arg_names and n not in constexprs}
    unaligned = (*RUN_TIME, *ANYWHERE) if widths_aligned else ("*",)
    return make_case(
        kernel,
        architecture,
        pointers,
        ("scaling", "scale", "tangent"),
        unaligned,
        constexprs,
        tile.options,
    )


def variants() -> Iterator[tuple[str, SVDTiles, torch.dtype, bool, dict[str, Any]]]:
    """(architecture, tiles, dtype, widths divisible by 16, constants) of all that is shipped.

    One rank for each class of ranks, its highest, with dropout, which takes more registers, and in
    16 bits without. Odd widths, whose tiles are everywhere the same, once for each set of
    instructions.
    """
    for gpu in ARCHITECTURES.values():
        full = "ieee" if gpu.name.startswith("gfx") else "tf32x3"
        for dtype, precision in ((torch.bfloat16, "tf32"), (torch.float32, full)):
            for R, tiles in gpu.svd.items():
                constants = {"R": R, "PRECISION": precision}
                yield gpu.name, tiles, dtype, True, constants
                if dtype == torch.bfloat16:
                    yield gpu.name, tiles, dtype, True, {**constants, "p_seed": None}
            if gpu.name in ("default", "sm_90", "gfx942"):
                for R, tiles in ODD.items():
                    yield gpu.name, tiles, dtype, False, {"R": R, "PRECISION": precision}


def cases() -> Iterator[Case]:
    """What is compiled ahead of time: every kernel in every shipped config."""
    for name, tiles, dtype, even, constants in variants():
        plain, R = "p_seed" in constants, constants["R"]

        def case(kernel: Any, tile: Tile, side: str, **more: Any) -> Case:
            sizes = {"BT": tile.rows, side: tile.columns_of(dtype)}  # noqa: B023
            return adapter_case(kernel, name, tile, dtype, even, **sizes, **more)  # noqa: B023

        grams: list[dict[str, str | None]] = [{"gram": None, "GRAM": None}]
        if plain:
            grams.append({"GRAM": "ieee" if name.startswith("gfx") else "tf32x3"})
        for gram in grams:
            yield case(shrink_kernel, tiles.shrink, "BK", **constants, **gram)
        # As for y with a bias, or added to one in place; and for dx where the factors are frozen.
        absent: dict[str, Any] = {"base": None, "h_sum": None} if plain else {"bias": None}
        absent |= {"PARTS": 1 if plain else 2, "STAGES": tiles.expand.num_stages}
        for gram in grams:
            yield case(expand_kernel, tiles.expand, "BN", **constants, **absent, **gram)
        absent = {"STAGES": tiles.x.num_stages} | ({"base": None} if plain else {})
        for parts in (1, 4, 16) if plain else (2,):
            yield case(gradients_x_kernel, tiles.x, "BK", **constants, **absent, PARTS=parts)
        if plain:  # tangent gradients
            more = {**absent, "dlam": None, "PARTS": 2}
            yield case(gradients_x_kernel, tiles.x, "BK", **constants, **more)
        if not plain:
            kernel = gradients_dy_apart_kernel if R > ONE_PASS else gradients_dy_kernel
            yield case(kernel, tiles.dy_of(dtype), "BN", **constants)
        for tile in tiles.fused:  # the weight row-major and (Conv1D's, once) transposed
            sizes = {"BT": tile.rows, "BN": tile.columns_of(dtype), "BK": tile.depth_of(dtype)}
            both = dtype == torch.bfloat16 and plain
            for unit in ("stride_wk", "stride_wn") if both else ("stride_wk",):
                consts = {**sizes, **constants, unit: 1}
                yield adapter_case(fused_kernel, name, tile, dtype, even, **consts)
    yield from reduce_cases()
    for name, rank in itertools.product(ARCHITECTURES, (16, HIGHEST_RANK)):
        pointers = ("gram_p", "gram_q", "residual_p", "residual_q", "penalty")
        types = dict.fromkeys(pointers, "*fp32")
        types |= dict.fromkeys(("r", "splits_p", "splits_q"), "i32")
        options = {"num_warps": PENALTY["num_warps"], "num_stages": 3}
        yield Case(penalty_kernel, types, {"BR": PENALTY["BR"], "R": rank}, options, pointers, name)


def reduce_cases() -> Iterator[Case]:
    """One layer's three lists; two of tangent gradients."""
    names, options = ("starts", "sizes", "odds"), {"num_warps": 4, "num_stages": 3}
    lists = ((torch.float32, 3), (torch.bfloat16, 3), (torch.float32, 2))
    for architecture, (dtype, count) in itertools.product(ARCHITECTURES, lists):
        types: dict[str, Any] = dict.fromkeys(names, ("i32",) * count)
        types |= {"parts": ("*fp32",) * count, "outputs": (POINTERS[dtype],) * count}
        constants = {"M": count, **REDUCE}
        aligned_ones = ("parts", "outputs", "sizes")
        yield Case(reduce_kernel, types, constants, options, aligned_ones, architecture)
