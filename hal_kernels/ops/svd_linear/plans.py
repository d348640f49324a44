"""How the SVD layers' kernels are launched: grids, sizes and constants by the kinds of the tensors.

Everything here is computed once for each GPU, kinds and options (`kernels.plan`). Comments on what
the numbers mean are with the kernels.
"""

import itertools
import math
from typing import Any, NamedTuple

from ...kernels.configs import Architecture, Tile, chunk_of, fused_tile
from ...kernels.dropout import thresholds
from ...kernels.launch import padded
from ...kernels.plan import Kind, Launch, aligned, kept

ONE_PASS = 32  # the highest padded rank for which u and dQ come of one pass over dy
REDUCE = {"BS": 4, "BE": 256}
Shape = tuple[int, ...]


class Gram(NamedTuple):
    """Where partial Gram matrices of a factor go, if anywhere."""

    shape: Shape | None
    numbers: tuple[int, int]  # columns of each, how many


def _gram(gpu: Architecture, factor: Kind, columns: int, programs: int, wanted: bool) -> Gram:
    if not wanted:
        return Gram(None, (0, 0))
    r, d = factor.shape
    chunk = chunk_of(d, columns, min(gpu.column_parts, programs, -(-d // columns)))
    return Gram((-(-d // chunk), r, r), (chunk, -(-d // chunk)))


class Shrink(NamedTuple):
    h: Shape
    gram: Shape | None
    launch: Launch


@kept
def shrink(
    gpu: Architecture, x: Kind, p: Kind, seed: Kind | None, dropout: float, grams: bool,
    precision: str, gram_precision: str,
) -> Shrink:  # fmt: skip
    (T, d), r = x.shape, p.shape[0]
    tile = gpu.svd_tiles(r, aligned(x, p)).shrink
    columns, blocks = tile.columns_of(x.dtype), -(-T // tile.rows)
    parts = gpu.column_parts_of(blocks, d, columns)
    threshold, scale = thresholds(dropout, seed)
    gram = _gram(gpu, p, columns, blocks * parts, grams)
    launch = Launch(
        blocks, parts,
        numbers=(
            scale, T, r, d, chunk_of(d, columns, parts), threshold,
            x.stride[0], p.stride[0], r, T * r, *gram.numbers,
        ),
        BT=tile.rows, BK=columns, R=padded(r), PRECISION=precision, GRAM=gram_precision,
        **tile.options,
    )  # fmt: skip
    return Shrink((parts, T, r), gram.shape, launch)


class Expand(NamedTuple):
    gram: Shape | None
    launch: Launch


@kept
def expand(
    gpu: Architecture, y: Kind, h: Kind, lam: Kind, q: Kind, bias: Kind | None, base: Kind | None,
    h_sum: Kind | None, seed: Kind | None, scaling: float, dropout: float, grams: bool,
    precision: str, gram_precision: str,
) -> Expand:  # fmt: skip
    (T, d), (parts, _, r) = y.shape, h.shape
    tile = gpu.svd_tiles(r, aligned(y, q)).expand
    columns, blocks = tile.columns_of(y.dtype), -(-T // tile.rows)
    threshold, scale = thresholds(dropout, seed)
    chunks, chunk = gpu.chunks_of(blocks, d, columns)
    gram = _gram(gpu, q, columns, blocks * chunks, grams)
    launch = Launch(
        blocks, chunks,
        numbers=(
            scaling, scale, T, r, d, chunk, threshold, q.stride[0],
            0 if base is None else base.stride[0], h.stride[1], h.stride[0],
            0 if h_sum is None else h_sum.stride[0], *gram.numbers,
        ),
        BT=tile.rows, BN=columns, R=padded(r), PARTS=parts, STAGES=tile.num_stages,
        PRECISION=precision, GRAM=gram_precision, **tile.options,
    )  # fmt: skip
    return Expand(gram.shape, launch)


@kept
def parts_of_u(gpu: Architecture, dy: Kind, q: Kind) -> int:
    """In how many parts `gradients_dy` gives u best. It takes any number of them."""
    (T, d), r = dy.shape, q.shape[0]
    tile = gpu.svd_tiles(r, aligned(dy, q)).dy_of(dy.dtype)
    blocks = -(-T // tile.rows)
    if padded(r) <= ONE_PASS:
        blocks, _ = gpu.bound_rows(blocks, 4 * r * d)
    # Half as many as of h: all of them are read for each tile of columns of x.
    return gpu.column_parts_of(2 * blocks, d, tile.columns_of(dy.dtype))


class OfDy(NamedTuple):
    dq: Shape
    whole: bool  # dq is no partial sum
    apart: bool  # u and dQ come of two passes over dy
    launch: Launch


@kept
def gradients_dy(
    gpu: Architecture, dy: Kind, q: Kind, h: Kind, lam: Kind, u: Kind, scaling: float,
    tangent: float, precision: str,
) -> OfDy:  # fmt: skip
    (T, d), (parts, _, r) = dy.shape, u.shape
    tile, R = gpu.svd_tiles(r, aligned(dy, q)).dy_of(dy.dtype), padded(r)
    columns, blocks = tile.columns_of(dy.dtype), -(-T // tile.rows)
    tiles, chunk, apart = -(-d // columns), chunk_of(d, columns, parts), R > ONE_PASS
    splits, each = gpu.split_rows(blocks, tiles) if apart else gpu.bound_rows(blocks, 4 * r * d)
    # A single split that is summed in registers is the sum.
    whole = splits == 1 and (apart or each == 1)
    numbers: tuple[float, ...] = (scaling, tangent, T, r, d, chunk)
    strides = (dy.stride[0], q.stride[0], h.stride[0], u.stride[1], u.stride[0])
    grid: Shape = (splits, parts)
    if apart:
        programs = blocks * parts
        grid, numbers = (programs + splits * tiles,), (*numbers, programs, parts, splits, each)
    else:
        numbers = (*numbers, each)
    launch = Launch(
        *grid, numbers=(*numbers, *strides), BT=tile.rows, BN=columns, R=R, PRECISION=precision,
        **tile.options,
    )  # fmt: skip
    return OfDy((r, d) if whole else (splits, r, d), whole, apart, launch)


class OfX(NamedTuple):
    dp: Shape
    dlam: Shape
    whole: bool  # they are no partial sums
    launch: Launch


@kept
def gradients_x(
    gpu: Architecture, x: Kind, p: Kind, h: Kind, lam: Kind, u: Kind, dx: Kind | None,
    base: Kind | None, seed: Kind | None, scaling: float, tangent: float, dropout: float,
    precision: str,
) -> OfX:  # fmt: skip
    x = x.rows()
    (T, d), (parts, _, r) = x.shape, u.shape
    tile = gpu.svd_tiles(r, aligned(x, p)).x
    columns, blocks = tile.columns_of(x.dtype), -(-T // tile.rows)
    tiles = -(-d // columns)
    splits, each = gpu.split_rows(blocks, tiles)
    chunks, chunk = gpu.chunks_of(blocks, d, columns)
    threshold, scale = thresholds(dropout, seed)
    programs, of_lam = splits * tiles, 0 if tangent else splits
    launch = Launch(
        of_lam + programs + (0 if dx is None else blocks * chunks),
        numbers=(
            scaling, scale, tangent, T, r, d, programs, splits, each, chunks, chunk,
            threshold, x.stride[0], p.stride[0], h.stride[0], u.stride[1], u.stride[0],
        ),
        BT=tile.rows, BK=columns, R=padded(r), PARTS=parts, STAGES=tile.num_stages,
        PRECISION=precision, **tile.options,
    )  # fmt: skip
    lead = () if splits == 1 else (splits,)
    return OfX((*lead, r, d), (0,) if tangent else (*lead, r), splits == 1, launch)


class Backward(NamedTuple):
    u: Shape
    of_dy: list[OfDy | None]  # of each layer whose dy is given
    of_x: OfX


@kept
def backward(
    gpu: Architecture, x: Kind, h: Kind, seed: Kind | None, dx: Kind | None, p: Kind, lam: Kind,
    *rest: Any,
) -> Backward:  # fmt: skip
    """p and lam are the layers' joined; `rest`: every dy, Λ and Q, then options."""
    *layers, scaling, tangent, dropout, add, precision = rest
    n = len(layers) // 3
    dy, lams, q = (layers[i * n : (i + 1) * n] for i in range(3))
    parts = max(
        parts_of_u.__wrapped__(gpu, *own) for own in zip(dy, q, strict=True) if own[0] is not None
    )
    u = Kind((parts, *h.shape), (math.prod(h.shape), *h.stride), h.dtype, True)
    of_dy, first = [], 0
    for own_dy, own_lam, own_q in zip(dy, lams, q, strict=True):
        own_h, own_u = (t.columns(first, own_q.shape[0]) for t in (h, u))
        first += own_q.shape[0]
        own = (own_dy, own_q, own_h, own_lam, own_u, scaling, tangent, precision)
        of_dy.append(None if own_dy is None else gradients_dy.__wrapped__(gpu, *own))
    base = dx if add else None
    found = (x, p, h, lam, u, dx, base, seed, scaling, tangent, dropout, precision)
    return Backward(u.shape, of_dy, gradients_x.__wrapped__(gpu, *found))


@kept
def fused(gpu: Architecture, x: Kind, seed: Kind | None, *rest: Any) -> list[Launch] | None:
    """A launch a layer; None where two kernels and a GEMM cost less (`configs.fused_tile`).

    Args:
        rest: weights, bases, P, Λ and Q, of all layers each, then options.
    """
    x = x.rows()
    *layers, scaling, dropout, always, precision = rest
    n = len(layers) // 5
    weight, _, p, _, q = (layers[i * n : (i + 1) * n] for i in range(5))
    width = sum(own.shape[0] for own in p)
    launches = []
    for own in zip(weight, p, q, strict=True):
        tile = _fused_tile(gpu, x, *own, always, precision)
        if tile is None:
            return None
        launches.append(_fused(x, *own, tile, width, seed, scaling, dropout, precision))
    return launches


def _fused(
    x: Kind, weight: Kind, p: Kind, q: Kind, tile: Tile, h_stride: int, seed: Kind | None,
    scaling: float, dropout: float, precision: str,
) -> Launch:  # fmt: skip
    (T, d_in), (d_out, r) = x.shape, (weight.shape[0], p.shape[0])
    columns = tile.columns_of(x.dtype)
    threshold, scale = thresholds(dropout, seed)
    return Launch(
        -(-T // tile.rows) * -(-d_out // columns),
        numbers=(
            scaling, scale, T, r, d_in, d_out, threshold,
            x.stride[0], *weight.stride, p.stride[0], q.stride[0], h_stride,
        ),
        BT=tile.rows, BN=columns, BK=tile.depth_of(x.dtype), R=padded(r), PRECISION=precision,
        **tile.options,
    )  # fmt: skip


def _fused_tile(
    gpu: Architecture, x: Kind, weight: Kind, p: Kind, q: Kind, always: bool, precision: str
) -> Tile | None:
    if 1 not in weight.stride and not always:
        return None
    matrix = weight
    if weight.stride[1] != 1:
        matrix = weight._replace(shape=weight.shape[::-1], stride=weight.stride[::-1])
    tiles = gpu.svd_tiles(p.shape[0], aligned(x, matrix, p, q)).fused
    (T, d_in), d_out, r = x.shape, weight.shape[0], p.shape[0]
    full = precision != "tf32"
    return fused_tile(gpu, tiles, T, d_in, d_out, r, x.dtype.itemsize, full, always)


@kept
def reduce(gpu: Architecture, *found: Kind) -> Launch:
    """Of partial sums and, in the same order, their sums."""
    parts, outputs = found[: len(found) // 2], found[len(found) // 2 :]
    sizes = [math.prod(out.shape) for out in outputs]
    blocks = [-(-n // REDUCE["BE"]) for n in sizes]
    starts = tuple(itertools.accumulate(blocks[:-1], initial=0))
    odds = tuple(2 * part.shape[0] + 1 for part in parts)
    return Launch(
        sum(blocks), numbers=(starts, tuple(sizes), odds), M=len(parts), **REDUCE, num_warps=4
    )  # fmt: skip
