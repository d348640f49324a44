"""What a tile is measured on by `hal_kernels.tune`: launches of its kernel, and the right results.

Shapes are those of a transformer's layers. A tile serves all element types, so each problem comes
in 16 bits and in 32.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..ops.svd_linear import triton as svd_kernels
from . import (
    hypernet_factors,
    hypernet_layer,
    hypernet_tokens,
    orthogonality_penalty,
)
from .configs import Architecture, Tile, architecture_of, using
from .tuned import SIZED, sized, with_tiles

Tensors = Sequence[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the problems are: (T, d) of a layer, and (matrices, rank) of the hypernetworks."""

    large: tuple[int, int] = (8192, 4096)
    small: tuple[int, int] = (512, 1024)
    few: tuple[int, int] = (48, 5)
    many: tuple[int, int] = (1200, 5)
    layers: int = 24
    hypernet: tuple[int, int, int] = (312, 1200, 12)  # hidden, inner, heads


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


def candidate(gpu: Architecture, name: str, tile: Tile) -> Architecture:
    """`gpu` with this tile; a hypernetwork's serves for any number of tokens, few and many."""
    gpu = with_tiles(gpu, {name: tile})
    kind, group, *_ = name.split(".")
    if kind in SIZED:
        both: dict[str, Any] = {kind: (sized(gpu, kind)[group],) * 2}
        return dataclasses.replace(gpu, **both)
    return gpu


def problems(name: str, device: torch.device, sizes: Sizes) -> Iterator[Problem]:
    """What the tile `name` is measured on; `svd.16.shrink` and so on, as in `tuned.tiles_of`."""
    kind, group, kernel, *number = name.split(".")
    for dtype in (torch.bfloat16, torch.float32):
        if kind in SIZED:
            matrices, rank = sizes.few if group == "few" else sizes.many
            if kind == "hypernet":
                yield hypernet_problem(matrices, rank, *sizes.hypernet, dtype, device)
            else:
                widths = (sizes.small[1], 4 * sizes.small[1])
                yield slots_problem(matrices, rank, sizes.hypernet[0], widths, dtype, device)
        elif kind == "penalty":
            yield penalty_problem(kernel, sizes.layers, int(group), sizes.small[1], dtype, device)
        elif kernel == "fused":
            # The first of the tiles is for many rows, the others for few.
            T, d = sizes.small
            T = 4 * T if number == ["0"] else T // 4
            yield svd_problem(kernel, T, d, int(group), dtype, device, int(number[0]))
        else:
            yield svd_problem(kernel, *sizes.small, int(group), dtype, device)
    if kind == "svd" and kernel != "fused":
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
        tile = architecture_of(device).svd_tiles(r, True).fused[number]
        svd_kernels.fused_(y, h, x, weight, None, p, lam, p, s, 0.0, None, tile)
        return [y, h]

    hidden = wide @ factor.t()
    adapter = (hidden * lam.double() * s).to(dtype).double() @ factor
    return Problem(fused, lambda out: out, [wide @ weight.double().t() + adapter, hidden], bound)


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
            lambda: orthogonality_penalty.forward([rows], [offsets], [r], True, 1.0)[1],
            lambda out: out,
            [residuals],
            2e-5,  # products of rounded operands are summed in float32
        )
    one, saved = rows.new_ones((), dtype=torch.float32), [residuals.float()]
    return Problem(
        lambda: orthogonality_penalty.backward(one, [rows], saved, [offsets], [r], True, 1.0),
        lambda out: out,
        [4 * (residuals @ matrices).view_as(rows)],
        _bound(dtype),
    )


def hypernet_problem(
    matrices: int,
    r: int,
    hidden: int,
    inner: int,
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Problem:
    """The hypernetworks' layer for P, Λ and Q, forward and backward."""
    from ..ops.hypernet_layer import _backward_default, _forward

    sets, options = 3, (heads, 1e-12, False)
    shapes = (
        (3 * hidden, hidden), (3 * hidden,), (hidden, hidden), (hidden,), (hidden,), (hidden,),
        (inner, hidden), (inner,), (hidden, inner), (hidden,), (hidden,), (hidden,),
    )  # fmt: skip

    def normal(*shape: int) -> torch.Tensor:
        scale = shape[-1] ** -0.5 if len(shape) == 3 else 1.0
        return (torch.randn(shape, device=device) * scale).to(dtype)

    tokens, dout = normal(sets, matrices, r, hidden), normal(sets, matrices, r, hidden)
    parameters = [normal(sets, *shape) for shape in shapes]
    keys = torch.ones(tokens.shape[:3], dtype=torch.bool, device=device)

    def run() -> Tensors:
        out, *saved = hypernet_layer.forward(tokens, keys, parameters, *options)
        dtokens, gradients = hypernet_layer.backward(dout, tokens, parameters, saved, *options)
        return [out, dtokens, *gradients]

    wide = [t.double() for t in (tokens, dout, *parameters)]
    out, *saved = _forward(wide[0], keys, wide[2:], *options)
    dtokens, gradients = _backward_default(wide[1], wide[0], wide[2:], list(saved), *options)
    # Several roundings to `dtype` follow one another.
    bound = 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    return Problem(run, lambda out: out, [out, dtokens, *gradients], bound)


def slots_problem(
    matrices: int,
    r: int,
    hidden: int,
    widths: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Problem:
    """From factors to tokens and back, forward and backward, half of the matrices of each width."""

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    rows, counts = matrices * r, [matrices // 2, matrices - matrices // 2]
    sizes, sides = [n * r for n in counts], [*widths, 1, *widths]
    own = list(zip(sizes, widths, strict=True))
    shapes: list[tuple[int, ...]] = [*own, (rows,), *own]  # of P, Λ and Q
    where = [torch.arange(0, rows + 1, r, device=device)] * 3, counts, counts
    directions = [torch.arange(rows, device=device)] * 2
    given = {
        "single": [normal(rows), normal(rows, hidden), *(normal(3, matrices, r, hidden),) * 2],
        "factors": [normal(*shape) for shape in shapes],
        "upstream": [normal(*shape) for shape in shapes],
        "maps": [normal(hidden, d, scale=d**-0.5) for d in sides],
        "biases": [normal(hidden) for _ in sides],
        "maps_back": [normal(d, hidden, scale=hidden**-0.5) for d in sides],
        "biases_back": [normal(d) for d in sides],
    }

    def results(i: dict[str, list[torch.Tensor]]) -> Tensors:
        mask, embedding, tokens, dtokens = i["single"]
        out, _ = hypernet_tokens.forward(
            i["factors"], mask, i["maps"], i["biases"], embedding, directions, *where, r
        )
        dmaps, dbiases, dembedding = hypernet_tokens.backward(dtokens, i["factors"], *where)
        factors = hypernet_factors.forward(
            tokens, i["maps_back"], i["biases_back"], i["factors"], *where, sizes, sizes
        )
        dback, *of_back = hypernet_factors.backward(i["upstream"], tokens, i["maps_back"], *where)
        return [out, *dmaps, *dbiases, dembedding, *factors, dback, *of_back[0], *of_back[1]]

    # In float64 the default implementation computes it.
    wide = {name: [t.double() for t in tensors] for name, tensors in given.items()}
    return Problem(lambda: results(given), lambda out: out, results(wide), _bound(dtype))


def seconds_per(
    gpu: Architecture,
    name: str,
    tile: Tile,
    cases: Sequence[Problem],
    bench: Callable[[Callable[[], object]], float],
) -> tuple[float, str]:
    """The geometric mean of the times of a tile, or infinity and why it cannot be taken."""
    logs = 0.0
    with using(candidate(gpu, name, tile)):
        for case in cases:
            try:
                wrong = case.wrong()
                logs += math.inf if wrong else math.log(bench(case.run))
            except Exception as error:  # the compiler's own, of many types: too large a tile, say
                wrong = f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"
            if wrong:
                return math.inf, wrong
    return math.exp(logs / len(cases)), ""
