"""What `tools.report` compiles: every kernel, with the types and constants of its launches.

`CASES` has a generator for each operator with kernels of its own.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hal_kernels.kernels import dropout
from hal_kernels.kernels.configs import ARCHITECTURES
from hal_kernels.ops.orthogonality_penalty import triton as penalty
from hal_kernels.ops.spectral_step import triton as spectral_step
from hal_kernels.ops.spectral_step import triton_solve

from . import svd_cases
from .cases import Case, make_case


def dropout_cases() -> Iterator[Case]:
    """The mask of one tile."""
    for name in ARCHITECTURES:
        pointers = {"keep": torch.float32, "p_seed": torch.int64}
        options = {"num_warps": 4, "num_stages": 1}
        yield make_case(
            dropout.keep_kernel, name, pointers, ("scale",), ("*",), dropout.TILE, options
        )


def orthogonality_penalty_cases() -> Iterator[Case]:
    """Launches over four widths."""
    n = 4
    signature: dict[str, Any] = {"offsets": ("*i64",) * n, "residuals": ("*fp32",) * n}
    signature |= dict.fromkeys(("starts", "widths", "ranks"), ("i32",) * n)
    signature |= dict.fromkeys(("norms", "value", "dvalue"), "*fp32")
    signature |= {"weight": "fp32", "count": "i32"}
    aligned = ("factors", "offsets", "residuals", "widths")
    for arch, gpu in ARCHITECTURES.items():
        precision = "ieee" if arch.startswith("gfx") else "tf32x3"
        for (rank, tiles), pointer in itertools.product(gpu.penalty.items(), ("*fp32", "*bf16")):
            types = signature | dict.fromkeys(("factors", "gradients"), (pointer,) * n)
            constants = {"N": n, "BR": rank, "SQUARED": False, "PRECISION": precision}
            tile = tiles.residual
            yield Case(
                penalty._residual_kernel, types, constants | {"BK": tile.columns},
                tile.options, (*aligned, "norms"), arch,
            )  # fmt: skip
            tile = tiles.gradient
            yield Case(
                penalty._gradient_kernel, types,
                constants | {"BJ": tile.depth, "BK": tile.columns}, tile.options,
                (*aligned, "gradients", "dvalue"), arch,
            )  # fmt: skip
        options = {"num_warps": 4, "num_stages": 3}
        yield Case(
            penalty._sum_kernel,
            signature,
            {"BLOCK": 1024},
            options,
            ("norms", "value"),
            arch,
        )


def spectral_step_cases() -> Iterator[Case]:
    """Two widths a side; all ranks that are compiled; factors in float32 and in 16 bits."""
    n, lists = 4, ("factors", "momenta", "gradients")
    ints = ("starts", "firsts", "skips", "widths", "matrices")
    doubles = (
        "grams", "totals", "cosines", "next_gain", "transforms", "eta", "scaling", "decay",
    )  # fmt: skip
    types: dict[str, Any] = dict.fromkeys(ints, ("i32",) * n)
    types |= {"n": "i32", "max_rank": "i32", "beta": "fp32", "moves": "*i32"}
    types |= {"gain_rate": "fp32"}
    types |= dict.fromkeys(doubles, "*fp64")
    types |= {"offsets": ("*i64",) * 3, "rows_p": "*i64", "rows_q": "*i64"}
    types |= dict.fromkeys(("lam", "mask", "candidates", "log_gain"), "*fp32")
    aligned = (*lists, "widths", "offsets", "grams", "transforms")
    for arch, rank in itertools.product(ARCHITECTURES, spectral_step.RANKS):
        entries = {"N": n, "NP": 2, "R": rank}
        found = [(triton_solve.solve_kernel, {"R": rank, "BM": 64}, "*fp32")]
        for pointer in ("*fp32", "*bf16"):
            found.append(
                (
                    spectral_step.gram_kernel,
                    entries | {"BK": spectral_step.columns_of(rank)},
                    pointer,
                )
            )
            found.append((spectral_step.write_kernel, entries | {"BK": spectral_step.BK}, pointer))
        for kernel, constants, pointer in found:
            own = types | dict.fromkeys(lists, (pointer,) * n)
            signature = {name: own[name] for name in kernel.arg_names if name not in constants}
            known = tuple(name for name in aligned if name in signature)
            options = {"num_warps": spectral_step.WARPS, "num_stages": 3}
            yield Case(kernel, signature, constants, options, known, arch)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "dropout": dropout_cases,
    "orthogonality_penalty": orthogonality_penalty_cases,
    "spectral_step": spectral_step_cases,
    "svd_linear": svd_cases.cases,
}
