"""What a tile is measured on by `tools.tune`: launches of its kernel, and the right results.

Shapes are those of a transformer's layers. A tile serves all element types, so each problem comes
in 16 bits and in 32.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from hal_kernels.kernels.configs import Architecture, Tile, architecture_of, using
from hal_kernels.ops.orthogonality_penalty import triton as penalty_kernels
from hal_kernels.ops.svd_linear import triton as svd_kernels

from .tiles import with_tiles

Tensors = Sequence[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the problems are: (T, d) of a layer, and how many layers have a penalty."""

    large: tuple[int, int] = (8192, 4096)
    small: tuple[int, int] = (512, 1024)
    layers: int = 24


@dataclasses.dataclass(frozen=True)
class Problem:
    """Launches of one kernel. `run` is what is timed, `results` of what it returns are checked."""

    run: Callable[[], Tensors]
    results: Callable[[Tensors], Tensors]
    expected: Tensors
    bound: float  # of the relative error of each result

    def wrong(self) -> str:
        """What is wrong with the results, if anything."""
        results = self.results(self.run())
        for number, (out, ref) in enumerate(zip(results, self.expected, strict=True)):
            error = ((out.double() - ref).norm() / ref.norm()).item()
            if not error <= self.bound:
                return f"result {number} has relative error {error:.2g}, allowed {self.bound:.2g}"
        return ""


def problems(name: str, device: torch.device, sizes: Sizes) -> Iterator[Problem]:
    """What the tile `name` is measured on; `svd.16.shrink` and so on, as in `tiles.tiles_of`."""
    kind, group, kernel, *number = name.split(".")
    # Gradients of dy have tiles of their own for elements of 16 and of 32 bits.
    only = {"dy": torch.bfloat16, "dy32": torch.float32}.get(kernel)
    kernel = kernel.removesuffix("32")
    for dtype in (only,) if only else (torch.bfloat16, torch.float32):
        if kind == "penalty":
            yield penalty_problem(kernel, sizes.layers, int(group), sizes.small[1], dtype, device)
        elif kernel == "fused":
            # The first of the tiles is for many rows, the others for few.
            T, d = sizes.small
            T = 4 * T if number == ["0"] else T // 4
            yield svd_problem(kernel, T, d, int(group), dtype, device, int(number[0]))
        else:
            yield svd_problem(kernel, *sizes.small, int(group), dtype, device)
    if kind == "svd" and kernel != "fused" and only != torch.float32:
        yield svd_problem(kernel, *sizes.large, int(group), torch.bfloat16, device)


def _bound(dtype: torch.dtype) -> float:
    """Roundings of operands and results to `dtype`, each eps/2, or sums of TF32 products."""
    return 2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps


def svd_problem(
    kernel: str,
    T: int,
    d: int,
    r: int,
    dtype: torch.dtype,
    device: torch.device,
    number: int = 0,
) -> Problem:
    """One kernel of the SVD adapter, on T rows of d columns."""

    def normal(*shape: int, kind: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device=device) * scale).to(kind)

    x, p = normal(T, d, kind=dtype), normal(r, d, scale=d**-0.5)
    lam, h, u = normal(r), normal(T, r), normal(1, T, r)
    s = 0.5
    # Operands are rounded to x's dtype: so are the reference's, and the sums are what is checked.
    wide, factor = x.double(), p.to(dtype).double()
    hl, ul = ((t * lam * s).to(dtype).double() for t in (h, u[0]))
    y = torch.empty_like(x)
    bound = _bound(dtype)

    def expand() -> Tensors:
        svd_kernels.expand_(y, u, lam, p, s)
        return [y]

    def gradients_dy() -> Tensors:
        parts = h.new_empty(svd_kernels.parts_of_u(x, p), T, r)
        return [parts, svd_kernels.gradients_dy(x, h, parts, lam, p, s)]

    def gradients_x() -> Tensors:
        return [*svd_kernels.gradients_x(x, h, u, p, lam, s, dx=y), y]

    def total(t: torch.Tensor, dim: int) -> torch.Tensor:
        return t.sum(0) if t.dim() > dim else t

    if kernel == "shrink":
        return Problem(
            lambda: [svd_kernels.shrink(x, p)],
            lambda out: [out[0].sum(0)],
            [wide @ factor.t()],
            bound,
        )
    if kernel == "expand":
        return Problem(expand, lambda out: out, [ul @ factor], bound)
    if kernel == "dy":
        return Problem(
            gradients_dy,
            lambda out: [out[0].sum(0), total(out[1], 2)],
            [wide @ factor.t(), hl.t() @ wide],
            bound,
        )
    if kernel == "x":
        return Problem(
            gradients_x,
            lambda out: [total(out[0], 2), total(out[1], 1), out[2]],
            [ul.t() @ wide, s * (h.double() * u[0].double()).sum(0), ul @ factor],
            bound,
        )
    weight = normal(d, d, kind=dtype, scale=d**-0.5)

    def fused() -> Tensors:
        with using(_with_one_fused_tile(architecture_of(device), r, number)):
            layer = [weight], [None], [p], [lam], [p]
            (out,), hidden = svd_kernels.forward(x, *layer, s, 0.0, None, path="fused")
        return [out, hidden]

    hidden = wide @ factor.t()
    adapter = (hidden * lam.double() * s).to(dtype).double() @ factor
    return Problem(fused, lambda out: out, [wide @ weight.double().t() + adapter, hidden], bound)


@functools.cache
def _with_one_fused_tile(gpu: Architecture, rank: int, number: int) -> Architecture:
    """`gpu` without the other tiles, for layers of this rank."""
    tiles = gpu.svd_tiles(rank, True)
    one = dataclasses.replace(tiles, fused=tiles.fused[number : number + 1])
    return dataclasses.replace(gpu, svd={rank: one})


def penalty_problem(
    kernel: str, layers: int, r: int, d: int, dtype: torch.dtype, device: torch.device
) -> Problem:
    """The penalty of `layers` matrices, or its gradient."""
    rows = (torch.randn(layers * r, d, device=device) * d**-0.5).to(dtype)
    offsets = torch.arange(0, layers * r + 1, r, device=device)
    matrices = rows.double().view(layers, r, d)
    residuals = matrices @ matrices.mT - torch.eye(r, device=device, dtype=torch.float64)
    if kernel == "residual":
        return Problem(
            lambda: penalty_kernels.forward([rows], [offsets], [r], True, 1.0)[1],
            lambda out: out,
            [residuals],
            2e-5,  # products of rounded operands are summed in float32
        )
    one, saved = rows.new_ones((), dtype=torch.float32), [residuals.float()]
    return Problem(
        lambda: penalty_kernels.backward(one, [rows], saved, [offsets], [r], True, 1.0),
        lambda out: out,
        [4 * (residuals @ matrices).view_as(rows)],
        _bound(dtype),
    )


def seconds_per(
    gpu: Architecture,
    name: str,
    tile: Tile,
    cases: Sequence[Problem],
    bench: Callable[[Callable[[], object]], float],
) -> tuple[float, str]:
    """The geometric mean of the times of a tile, or infinity and why it cannot be taken."""
    logs = 0.0
    with using(with_tiles(gpu, {name: tile})):
        for case in cases:
            try:
                wrong = case.wrong()
                logs += math.inf if wrong else math.log(bench(case.run))
            except Exception as error:  # the compiler's own, of many types: too large a tile, say
                wrong = f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"
            if wrong:
                return math.inf, wrong
    return math.exp(logs / len(cases)), ""
