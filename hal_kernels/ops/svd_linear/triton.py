# mypy: allow-untyped-defs
"""The SVD layers in Triton: what is launched for one layer or several that share x.

Three paths forward, of equal result up to rounding:

    prepare  shrink; expand writes s·(h ⊙ Λ)Q + b into y; the vendor's GEMM adds xWᵀ to it
             (beta = 1), so that y is read where matrix work hides the read. It adds in float32;
             what was prepared is rounded to y's dtype once.
    add      the vendor's GEMM; shrink; expand reads y, adds b and the adapter, and writes y.
    fused    one Triton GEMM with h as a second accumulator: x is read once, but multiplied with P
             in every column tile. For small T and narrow d_out: the rule is `configs.fused_tile`.

Without a `path` argument: fused where it pays for every layer, else what the architecture's config
says. Backward has the first two: prepare writes the adapters' part of dx, and dy·W is added to it.

Launches beyond the base GEMMs of n layers (of y forward, of dx backward): forward n + 1, fused none
(the one launch is the base GEMM); backward n + 2 (gradients of each dy, of x with dx, the
reduction), one less up to one block of rows, and 2n where the factors are frozen.
"""

import itertools
from collections.abc import Sequence

import torch
import triton

from ...kernels.configs import HIGHEST_RANK, Tile, architecture_of, chunk_of, fused_tile
from ...kernels.dropout import thresholds
from ...kernels.launch import DTYPES, aligned, dot_precision, on_device_of, padded
from .default import Factors, Gradients, empty_gradients, empty_outputs, flat, joined, ranks_of
from .triton_kernels import (
    expand_kernel,
    fused_kernel,
    gradients_dy_apart_kernel,
    gradients_dy_kernel,
    gradients_x_kernel,
    shrink_kernel,
)
from .triton_sums import penalty_kernel, reduce_kernel

PATHS = ("prepare", "add", "fused")
ONE_PASS = 32  # the highest padded rank for which u and dQ come of one pass over dy
REDUCE = {"BS": 4, "BE": 256}
PENALTY = {"BR": 16, "num_warps": 4}


def supported(x: torch.Tensor, p: Factors, q: Factors) -> bool:
    """Whether the kernels take these inputs.

    Not: float64 (tl.dot has no fast form of it), joined ranks above 128 (a tile of them does not
    fit shared memory) and sizes of zero (nothing to launch).
    """
    ranks = ranks_of(p)
    return (
        x.dtype in DTYPES
        and min(ranks) >= 1
        and sum(ranks) <= HIGHEST_RANK
        and x.numel() > 0
        and all(t.shape[1] > 0 for t in q)
    )


def forward(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor | None],
    base: Sequence[torch.Tensor | None],
    p: Factors,
    lam: Factors,
    q: Factors,
    scaling: float,
    dropout: float,
    seed: torch.Tensor | None,
    *,
    path: str | None = None,
    grams: list[torch.Tensor] | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """As `default.forward`, of what is `supported`. `path` is one of `PATHS`, to measure them.

    A single layer's partial Gram matrices of P and Q, for `penalty_of`, are appended to `grams`.
    """
    rows, ranks = rows_of(x), ranks_of(p)
    every, lam = dense(joined(p)), [t.contiguous() for t in lam]
    base = [
        b if b is None or w is None else b.contiguous() for b, w in zip(base, weight, strict=True)
    ]
    p, q = [every] if len(ranks) == 1 else [dense(t) for t in p], [dense(t) for t in q]
    path = "prepare" if grams is not None and path is None else path
    tiles = [tile_of_fused(rows, *own, path) for own in zip(weight, p, q, strict=True)]
    if None not in tiles:
        outputs, h = empty_outputs(x, p, q)
        layers = zip(outputs, columns_of(h, ranks), weight, base, p, lam, q, tiles, strict=True)
        for out, own_h, own_weight, own_base, own_p, own_lam, own_q, tile in layers:
            assert own_weight is not None and tile is not None
            fused_(
                flat(out), own_h, rows, own_weight, own_base, own_p, own_lam, own_q,
                scaling, dropout, seed, tile,
            )  # fmt: skip
        return outputs, h
    outputs = [x.new_empty(*x.shape[:-1], t.shape[1]) for t in q]
    parts = shrink(rows, every, dropout, seed, grams)
    h = total_of(parts)
    columns = zip(columns_of(parts, ranks), columns_of(h, ranks), strict=True)
    gemm_first = _gemm_first(x, path)
    layers = zip(outputs, weight, base, columns, lam, q, strict=True)
    for out, own_weight, own_base, (own_parts, own_h), own_lam, own_q in layers:
        y, bias, added = flat(out), own_base, None
        if own_weight is None:
            assert own_base is not None
            bias, added = None, rows_of(own_base)
        else:
            added = torch.mm(rows, own_weight.t(), out=y) if gemm_first else None
        expand_(
            y, own_parts, own_lam, own_q, scaling, h_sum=own_h, bias=bias, base=added, grams=grams
        )
        if own_weight is not None and not gemm_first:
            y.addmm_(rows, own_weight.t())
    return outputs, h


def backward(
    dy: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    h: torch.Tensor,
    weight: Sequence[torch.Tensor | None],
    p: Factors,
    lam: Factors,
    q: Factors,
    scaling: float,
    dropout: float,
    seed: torch.Tensor | None,
    tangent: float,
    needs_dx: bool,
    needs_factors: bool,
    *,
    path: str | None = None,
) -> Gradients:
    """As `default.backward`, where at least one dy is given. `path` is "prepare" or "add"."""
    rows, upstream = rows_of(x), [None if g is None else rows_of(g) for g in dy]
    dx, dp, dlam, dq = empty_gradients(x, p, lam, q, tangent, needs_dx, False)
    dx = flat(dx) if needs_dx else dx
    gemms = [
        (g, w)
        for g, w in zip(upstream, weight, strict=True)
        if needs_dx and g is not None and w is not None
    ]
    add = gemm_first = bool(gemms) and _gemm_first(x, path)
    if gemm_first:
        _multiply_(dx, gemms, add=False)
    if needs_factors:
        prepared = dx if needs_dx else None
        dp, dlam, dq = _factor_gradients(
            upstream,
            rows,
            h.contiguous(),
            p,
            lam,
            q,
            scaling,
            dropout,
            seed,
            tangent,
            prepared,
            add,
        )
    elif needs_dx:
        for g, own_p, own_lam, own_q in zip(upstream, p, lam, q, strict=True):
            if g is not None:
                u, base = shrink(g, dense(own_q)), dx if add else None
                lam_, p_ = own_lam.contiguous(), dense(own_p)
                expand_(dx, u, lam_, p_, scaling, base=base, dropout=dropout, seed=seed)
                add = True
    if not gemm_first:
        _multiply_(dx, gemms, add=True)
    return dx.view(x.shape) if needs_dx else dx, dp, dlam, dq


def _gemm_first(x: torch.Tensor, path: str | None) -> bool:
    return not architecture_of(x.device).prepare if path is None else path == "add"


def _multiply_(
    out: torch.Tensor, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], *, add: bool
) -> None:
    """out (+)= Σ a·b."""
    for a, b in pairs:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
        add = True


def _factor_gradients(
    dy: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    h: torch.Tensor,
    p: Factors,
    lam: Factors,
    q: Factors,
    scaling: float,
    dropout: float,
    seed: torch.Tensor | None,
    tangent: float,
    dx: torch.Tensor | None,
    add: bool,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """dP and dΛ, joined, and each layer's dQ; the adapters' dx is written to `dx`, or added."""
    ranks, q = ranks_of(p), [dense(t) for t in q]
    every_p, every_lam = dense(joined(p)), joined(lam).contiguous()
    parts = max(parts_of_u(g, t) for g, t in zip(dy, q, strict=True) if g is not None)
    u = (h.new_zeros if any(g is None for g in dy) else h.new_empty)(parts, *h.shape)
    sums = []
    columns = zip(dy, columns_of(h, ranks), columns_of(u, ranks), lam, q, strict=True)
    for g, own_h, own_u, own_lam, own_q in columns:
        if g is None:
            sums.append(torch.zeros_like(own_q))
        else:
            sums.append(
                gradients_dy(g, own_h, own_u, own_lam.contiguous(), own_q, scaling, tangent)
            )
    dp, dlam = gradients_x(
        x, h, u, every_p, every_lam, scaling,
        tangent=tangent, dropout=dropout, seed=seed, dx=dx, add=add,
    )  # fmt: skip
    dp, dlam, *dq = reduce([dp, dlam, *sums], [every_p, every_lam, *q])
    return dp, dlam, dq


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """``[..., d]`` as ``[T, d]`` with adjacent columns and rows apart; copied only if need be."""
    x = flat(x)
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def dense(p: torch.Tensor) -> torch.Tensor:
    """P or Q with adjacent columns: the packed factors' own rows are, and are not copied."""
    return p if p.stride(1) == 1 else p.contiguous()


def columns_of(t: torch.Tensor, ranks: list[int]) -> Sequence[torch.Tensor]:
    """Each layer's columns of h, u or partial sums of them."""
    return [t] if len(ranks) == 1 else t.split(ranks, -1)


def shrink(
    x: torch.Tensor,
    p: torch.Tensor,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    grams: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Partial sums ``[parts, T, r]`` of h = dropout(x)·P. One launch.

    Partial sums ``[splits, r, r]`` of PᵀP are appended to `grams`, if it is given.
    """
    (T, d), r, gpu = x.shape, p.shape[0], architecture_of(x.device)
    tile = gpu.svd_tiles(r, aligned(x, p)).shrink
    columns, blocks = tile.columns_of(x.dtype), triton.cdiv(T, tile.rows)
    parts = gpu.column_parts_of(blocks, d, columns)
    h = x.new_empty(parts, T, r, dtype=torch.float32)
    threshold, scale = thresholds(dropout, seed)
    gram, sizes = _gram(grams, h, p, columns, blocks * parts)
    with on_device_of(x):
        shrink_kernel[(blocks, parts)](
            x, p, h, seed, gram, scale, T, r, d, chunk_of(d, columns, parts), threshold,
            x.stride(0), p.stride(0), h.stride(1), h.stride(0), *sizes,
            BT=tile.rows, BK=columns, R=padded(r), PRECISION=dot_precision(x.dtype),
            GRAM=dot_precision(p.dtype), **tile.options,
        )  # fmt: skip
    return h


def total_of(h: torch.Tensor) -> torch.Tensor:
    """Where Σ_c h[c] ``[T, r]`` is to be found once `expand_` has summed: h itself if it can be."""
    return h[0] if h.shape[0] == 1 else h.new_empty(h.shape[1:])


def expand_(
    y: torch.Tensor,
    h: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    scaling: float,
    *,
    h_sum: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    grams: list[torch.Tensor] | None = None,
) -> None:
    """y = base + b + s·dropout((Σ_c h[c] ⊙ Λ)Q), written to ``[T, d]``. One launch.

    h is ``[parts, T, r]``, or columns of a wider one. `base` may be y itself. Where h has several
    parts, their sum is written to `h_sum` ``[T, r]``, which may be columns of a wider one too.
    Partial sums ``[splits, r, r]`` of QQᵀ are appended to `grams`, if it is given.
    """
    (T, d), (parts, _, r), gpu = y.shape, h.shape, architecture_of(y.device)
    tile = gpu.svd_tiles(r, aligned(y, q)).expand
    columns, blocks = tile.columns_of(y.dtype), triton.cdiv(T, tile.rows)
    h_sum = h_sum if parts > 1 else None
    threshold, scale = thresholds(dropout, seed)
    chunks, chunk = gpu.chunks_of(blocks, d, columns)
    gram, sizes = _gram(grams, h, q, columns, blocks * chunks)
    with on_device_of(y):
        expand_kernel[(blocks, chunks)](
            h, lam, q, bias, base, y, h_sum, seed, gram, scaling, scale, T, r, d,
            chunk, threshold, q.stride(0),
            0 if base is None else base.stride(0), h.stride(1), h.stride(0),
            0 if h_sum is None else h_sum.stride(0), *sizes,
            BT=tile.rows, BN=columns, R=padded(r), PARTS=parts, STAGES=tile.num_stages,
            PRECISION=dot_precision(y.dtype), GRAM=dot_precision(q.dtype), **tile.options,
        )  # fmt: skip


def _gram(
    grams: list[torch.Tensor] | None, h: torch.Tensor, f: torch.Tensor, columns: int, programs: int
) -> tuple[torch.Tensor | None, tuple[int, int]]:
    """A buffer for partial Gram matrices of F, the columns of each, and how many they are."""
    if grams is None:
        return None, (0, 0)
    r, d = f.shape
    splits = min(architecture_of(h.device).column_parts, programs, triton.cdiv(d, columns))
    chunk = chunk_of(d, columns, splits)
    grams.append(h.new_empty(triton.cdiv(d, chunk), r, r))
    return grams[-1], (chunk, len(grams[-1]))


def penalty_of(grams: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The penalty ‖R_P‖² + ‖R_Q‖² and [R_P, R_Q] ``[1, r, r]`` from partial Gram matrices."""
    r = grams[0].shape[-1]
    residuals = [t.new_empty(1, r, r) for t in grams]
    penalty = grams[0].new_empty(())
    with on_device_of(penalty):
        penalty_kernel[(1,)](
            *grams, *residuals, penalty, r, *map(len, grams), R=padded(r), **PENALTY
        )
    return penalty, residuals


def parts_of_u(dy: torch.Tensor, q: torch.Tensor) -> int:
    """In how many parts `gradients_dy` gives u best. It takes any number of them."""
    (T, d), r, gpu = dy.shape, q.shape[0], architecture_of(dy.device)
    tile = gpu.svd_tiles(r, aligned(dy, q)).dy_of(dy.dtype)
    blocks = triton.cdiv(T, tile.rows)
    if padded(r) <= ONE_PASS:
        blocks, _ = gpu.bound_rows(blocks, 4 * r * d)
    # Half as many as of h: all of them are read for each tile of columns of x.
    return gpu.column_parts_of(2 * blocks, d, tile.columns_of(dy.dtype))


def gradients_dy(
    dy: torch.Tensor,
    h: torch.Tensor,
    u: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    scaling: float,
    tangent: float = 0.0,
) -> torch.Tensor:
    """Writes partial sums ``[parts, T, r]`` of dy·Qᵀ to `u`; returns dQ. One launch.

    dQ is ``[r, d]`` in Q's dtype, or partial sums of it ``[splits, r, d]``, which `reduce` takes.
    h ``[T, r]`` and u may be columns of wider ones; parts of u beyond dy's columns become zero.
    """
    (T, d), (parts, _, r), gpu = dy.shape, u.shape, architecture_of(dy.device)
    tile, R = gpu.svd_tiles(r, aligned(dy, q)).dy_of(dy.dtype), padded(r)
    columns, blocks = tile.columns_of(dy.dtype), triton.cdiv(T, tile.rows)
    tiles, chunk, apart = triton.cdiv(d, columns), chunk_of(d, columns, parts), R > ONE_PASS
    splits, each = gpu.split_rows(blocks, tiles) if apart else gpu.bound_rows(blocks, 4 * r * d)
    # A single split that is summed in registers is the sum.
    whole = splits == 1 and (apart or each == 1)
    dq = q.new_empty(r, d) if whole else h.new_empty(splits, r, d)
    sizes = {"BT": tile.rows, "BN": columns, "R": R, "PRECISION": dot_precision(dy.dtype)}
    strides = (dy.stride(0), q.stride(0), h.stride(0), u.stride(1), u.stride(0))
    with on_device_of(dy):
        if apart:
            programs = blocks * parts
            gradients_dy_apart_kernel[(programs + splits * tiles,)](
                dy, q, h, lam, u, dq, scaling, tangent, T, r, d, chunk, programs, parts, splits,
                each, *strides, **sizes, **tile.options,
            )  # fmt: skip
        else:
            gradients_dy_kernel[(splits, parts)](
                dy, q, h, lam, u, dq, scaling, tangent, T, r, d, chunk, each,
                *strides, **sizes, **tile.options,
            )  # fmt: skip
    return dq


def gradients_x(
    x: torch.Tensor,
    h: torch.Tensor,
    u: torch.Tensor,
    p: torch.Tensor,
    lam: torch.Tensor,
    scaling: float,
    *,
    tangent: float = 0.0,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    dx: torch.Tensor | None = None,
    add: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dP and dΛ; the adapter's dx is written to `dx`, or with `add` added to it. One launch.

    dP is ``[r, d]`` in P's dtype and dΛ ``[r]`` in its own, or both are partial sums
    ``[splits, ...]``, which `reduce` takes. With `tangent` dΛ is empty. h ``[T, r]`` and u
    ``[parts, T, r]`` may be columns of wider ones.
    """
    (T, d), (parts, _, r), gpu = x.shape, u.shape, architecture_of(x.device)
    tile = gpu.svd_tiles(r, aligned(x, p)).x
    columns, blocks = tile.columns_of(x.dtype), triton.cdiv(T, tile.rows)
    splits, each = gpu.split_rows(blocks, tiles := triton.cdiv(d, columns))
    chunks, chunk = gpu.chunks_of(blocks, d, columns)
    dp = p.new_empty(r, d) if splits == 1 else h.new_empty(splits, r, d)
    dlam = lam.new_empty(r) if splits == 1 else h.new_empty(splits, r)
    if tangent:
        dlam = lam.new_empty(0)
    threshold, scale = thresholds(dropout, seed)
    programs, of_lam = splits * tiles, 0 if tangent else splits
    with on_device_of(x):
        gradients_x_kernel[(of_lam + programs + (0 if dx is None else blocks * chunks),)](
            x, p, h, lam, u, dp, None if tangent else dlam, dx if add else None, dx, seed,
            scaling, scale, tangent, T, r, d, programs, splits, each, chunks, chunk,
            threshold, x.stride(0), p.stride(0), h.stride(0), u.stride(1), u.stride(0),
            BT=tile.rows, BK=columns, R=padded(r), PARTS=parts, STAGES=tile.num_stages,
            PRECISION=dot_precision(x.dtype), **tile.options,
        )  # fmt: skip
    return dp, dlam


def reduce(sums: Sequence[torch.Tensor], like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each of `sums` that is partial, ``[splits, ...]``, summed to the shape and dtype of `like`.

    One launch for all of them, none where all are whole.
    """
    outputs = [
        t if t.dim() == of.dim() else of.new_empty(of.shape)
        for t, of in zip(sums, like, strict=True)
    ]
    partial = [(t, out) for t, out in zip(sums, outputs, strict=True) if t is not out]
    if partial:
        sizes = [out.numel() for _, out in partial]
        blocks = [triton.cdiv(n, REDUCE["BE"]) for n in sizes]
        with on_device_of(partial[0][0]):
            reduce_kernel[(sum(blocks),)](
                tuple(t for t, _ in partial), tuple(out for _, out in partial),
                tuple(itertools.accumulate(blocks[:-1], initial=0)), tuple(sizes),
                tuple(2 * t.shape[0] + 1 for t, _ in partial), M=len(partial), **REDUCE,
                num_warps=4,
            )  # fmt: skip
    return outputs


def tile_of_fused(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    p: torch.Tensor,
    q: torch.Tensor,
    path: str | None,
) -> Tile | None:
    """The tile to compute y and h with in one launch; None where two kernels and a GEMM cost less.

    The rule is `configs.fused_tile`. A weight must have adjacent rows or adjacent columns.
    """
    always = path == "fused"
    if weight is None or path in ("prepare", "add") or (1 not in weight.stride() and not always):
        return None
    gpu, matrix = architecture_of(x.device), weight if weight.stride(1) == 1 else weight.t()
    tiles = gpu.svd_tiles(p.shape[0], aligned(x, matrix, p, q)).fused
    size = (*x.shape, weight.shape[0], p.shape[0], x.dtype.itemsize)
    return fused_tile(gpu, tiles, *size, dot_precision(x.dtype) != "tf32", always)


def fused_(
    y: torch.Tensor,
    h: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    p: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    scaling: float,
    dropout: float,
    seed: torch.Tensor | None,
    tile: Tile,
) -> None:
    """Writes y ``[T, d_out]`` and h ``[T, r]``, or columns of a wider h. One launch."""
    (T, d_in), (d_out, r) = x.shape, (weight.shape[0], p.shape[0])
    columns = tile.columns_of(x.dtype)
    threshold, scale = thresholds(dropout, seed)
    with on_device_of(x):
        fused_kernel[(triton.cdiv(T, tile.rows) * triton.cdiv(d_out, columns),)](
            x, weight, bias, p, lam, q, y, h, seed, scaling, scale, T, r, d_in, d_out, threshold,
            x.stride(0), weight.stride(0), weight.stride(1), p.stride(0), q.stride(0), h.stride(0),
            BT=tile.rows, BN=columns, BK=tile.depth_of(x.dtype), R=padded(r),
            PRECISION=dot_precision(x.dtype), **tile.options,
        )  # fmt: skip
