"""The SVD adapter's kernels in all that is shipped, for the ahead-of-time check."""

from collections.abc import Iterator
from typing import Any

import torch

from .cases import Case, make_case
from .configs import ARCHITECTURES, ODD, SVDTiles, Tile
from .svd_blocks import ANYWHERE, RUN_TIME

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
