# mypy: allow-untyped-defs
"""The kernels of the SVD adapter, shared by `svd_linear` and `svd_adapter_add`.

    shrink:        h = dropout(x)·P
    expand:        y = s·(h ⊙ Λ)Q + b
    gradients_dy:  u = dy·Qᵀ,  dQ = s·(h ⊙ Λ)ᵀ dy
    gradients_x:   dP = s·xᵀ(u ⊙ Λ),  dΛ = s·Σ_t h ⊙ u,  dx = s·(u ⊙ Λ)Pᵀ
    reduce:        the sums of partial dP, dQ and dΛ

Each reads its ``[T, d]`` matrix once (gradients_dy of ranks above 32: twice, see there). There are
no atomics: where the columns of a block of rows are shared out, each program writes a partial h or
u ``[parts, T, r]`` that its reader sums; where rows are, a partial dP or dQ ``[splits, r, d]`` that
`reduce` sums. Parts and splits are bounded, and so are the buffers. Λ is the effective one, Λ⊙mask.

With c = `tangent` other than 0, dQ = c·hᵀdy, dP = c·xᵀu, and there is no dΛ.

P is ``[r, d_in]``, one direction a row. R is r padded to a power of two. Products take operands in
x's dtype, as the default backend does, and accumulate in float32.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ..ops.svd_adapter_add import factor_gradient_shapes, flat
from .cases import POINTERS, Case
from .configs import ARCHITECTURES, HIGHEST_RANK, Tile, architecture_of, chunk_of
from .dropout import thresholds
from .launch import DTYPES, aligned, dot_precision, on_device_of, padded
from .svd_blocks import (
    FREE,
    expand_block,
    gradient_block,
    gradient_weights,
    rank_dot,
    rank_rows,
    rank_zeros,
    shrink_block,
    store_rank_rows,
)
from .svd_variants import adapter_case, variants

ONE_PASS = 32  # the highest padded rank for which u and dQ come of one pass over dy
REDUCE = {"BS": 4, "BE": 256}


@triton.jit(**FREE)
def shrink_kernel(
    x, p, h, p_seed,
    scale, T, r, d, chunk, threshold, stride_x, stride_p, stride_ht, stride_hc,
    BT: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h[c] = dropout(x)[:, columns of c] · P[columns of c], [T, r] for each part c."""
    shrink_block(
        x, p, h, p_seed,
        scale, T, r, d, chunk, threshold, stride_x, stride_p, stride_ht, stride_hc,
        tl.program_id(0), tl.program_id(1), BT, BK, R, PRECISION,
    )  # fmt: skip


@triton.jit(**FREE)
def expand_kernel(
    h, lam, q, bias, base, y, h_sum, p_seed,
    scaling, scale, T, r, d, parts, threshold, stride_q, stride_base,
    stride_ht, stride_hc, stride_sum,
    BT: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = base + b + s·dropout((Σ_c h[c] ⊙ Λ) Q), [T, d]; h_sum = Σ_c h[c]."""
    expand_block(
        h, lam, q, bias, base, y, h_sum, p_seed,
        scaling, scale, T, r, d, parts, threshold, stride_q, stride_base,
        stride_ht, stride_hc, stride_sum,
        tl.program_id(0), tl.program_id(1), BT, BN, R, PRECISION,
    )  # fmt: skip


@triton.jit(**FREE)
def gradients_dy_kernel(
    dy, q, h, lam, u, dq,
    scaling, tangent, T, r, d, chunk, blocks, stride_dy, stride_q, stride_ht, stride_ut, stride_uc,
    BT: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u[c] = dy[:, columns of c] · Q[columns of c]ᵀ;  dQ[i] = s·(h ⊙ Λ)ᵀ dy, rows of split i only.

    One pass over dy, for ranks up to 32: a program takes blocks of rows and adds each one's part of
    dQ[i] to memory, 8·R/BT bytes for each of dy's elements.
    """
    i_s, i_c = tl.program_id(0), tl.program_id(1)
    o_r = tl.arange(0, R)
    m_r = o_r < r
    b_lam, after = gradient_weights(lam, scaling, tangent, r, o_r)
    p_q = q + o_r.to(tl.int64)[:, None] * stride_q
    p_dq = dq + (i_s.to(tl.int64) * r + o_r[:, None]) * d
    first = i_c * chunk
    last = min(first + chunk, d)
    for i in range(0, min(blocks, tl.cdiv(T, BT) - i_s * blocks)):
        o_t = (i_s * blocks + i) * BT + tl.arange(0, BT)
        p_dy = dy + o_t.to(tl.int64)[:, None] * stride_dy
        b_h = rank_rows(h, stride_ht, 0, None, T, r, o_t, o_r)
        b_hl = tl.trans((b_h * b_lam).to(dy.dtype.element_ty))  # [R, BT]
        b_u = rank_zeros(BT, R)
        for n in range(first, last, BN):
            o_n = n + tl.arange(0, BN)
            m_n = o_n < d
            m_q = m_r[:, None] & m_n[None, :]
            b_dy = tl.load(p_dy + o_n[None, :], mask=(o_t < T)[:, None] & m_n[None, :], other=0.0)
            b_q = tl.load(p_q + o_n[None, :], mask=m_q, other=0.0)  # [R, BN]
            b_u = rank_dot(b_dy, b_q, b_u, PRECISION)
            b_dq = tl.dot(b_hl, b_dy, input_precision=PRECISION) * after  # [R, BN]
            # What this very program stored for its earlier blocks of rows.
            b_dq += tl.load(p_dq + o_n[None, :], mask=m_q & (i > 0), other=0.0).to(tl.float32)
            tl.store(p_dq + o_n[None, :], b_dq.to(dq.dtype.element_ty), mask=m_q)
        store_rank_rows(u + i_c * stride_uc.to(tl.int64), stride_ut, b_u, T, r, o_t, R)
        tl.debug_barrier()


@triton.jit(**FREE)
def gradients_dy_apart_kernel(
    dy, q, h, lam, u, dq,
    scaling, tangent, T, r, d, chunk, programs_u, parts, splits, blocks, stride_dy, stride_q,
    stride_ht, stride_ut, stride_uc,
    BT: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `gradients_dy_kernel`, for ranks above 32: some programs give u and others dQ.

    Both read dy, which costs less than sums in memory do: dQ[i] stays in registers.
    """
    i = tl.program_id(0)
    if i < programs_u:
        shrink_block(
            dy, q, u, None,
            1.0, T, r, d, chunk, 0, stride_dy, stride_q, stride_ut, stride_uc,
            i // parts, i % parts, BT, BN, R, PRECISION,
        )  # fmt: skip
    else:
        i -= programs_u
        gradient_block(
            dy, h, None, lam, dq, None, None,
            scaling, 1.0, tangent, T, r, d, None, blocks, 0, stride_dy, stride_ht, 0, 0,
            i % splits, i // splits,
            BT, BN, R, PRECISION,
        )  # fmt: skip


@triton.jit(**FREE)
def gradients_x_kernel(
    x, p, h, lam, u, dp, dlam, base, dx, p_seed,
    scaling, scale, tangent, T, r, d, programs_dp, parts, splits, blocks, threshold, stride_x,
    stride_p, stride_ht, stride_ut, stride_uc,
    BT: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With u = Σ_c u[c], over the rows of split i:

    dP[i] = s·dropout(x)ᵀ(u ⊙ Λ);  dΛ[i] = s·Σ_t h ⊙ u;  dx = base + s·dropout((u ⊙ Λ)Pᵀ)

    Some programs read x and give dP and dΛ; others, if there is dx, write dx, which needs no x.
    """
    i = tl.program_id(0)
    if i < programs_dp:
        gradient_block(
            x, u, h, lam, dp, dlam, p_seed,
            scaling, scale, tangent, T, r, d, parts, blocks, threshold, stride_x,
            stride_ut, stride_uc, stride_ht, i % splits, i // splits,
            BT, BK, R, PRECISION,
        )  # fmt: skip
    elif dx is not None:
        i -= programs_dp
        tiles = tl.cdiv(d, BK)
        expand_block(
            u, lam, p, None, base, dx, None, p_seed,
            scaling, scale, T, r, d, parts, threshold, stride_p, d,
            stride_ut, stride_uc, 0, i // tiles, i % tiles,
            BT, BK, R, PRECISION,
        )  # fmt: skip


@triton.jit
def sum_parts(parts, out, i, n, splits, BS: tl.constexpr, BE: tl.constexpr):
    """out[e] = Σ_c parts[c, e] for the i-th block of e; BS parts are loaded at a time."""
    o_e = i * BE + tl.arange(0, BE)
    o_s = tl.arange(0, BS)
    p_parts = parts + o_s.to(tl.int64)[:, None] * n + o_e[None, :]
    b_sum = tl.zeros([BS, BE], tl.float32)
    for c in range(0, splits, BS):
        m = (c + o_s < splits)[:, None] & (o_e < n)[None, :]
        b_sum += tl.load(p_parts, mask=m, other=0.0)
        p_parts += BS * n
    tl.store(out + o_e, tl.sum(b_sum, 0).to(out.dtype.element_ty), mask=o_e < n)


@triton.jit
def reduce_kernel(
    parts, outputs, starts, sizes, odds, M: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr
):
    """Σ_i parts[i] for M lists of partial sums of any size and dtype, always in the same order.

    parts: M × [splits, size]; outputs: M × [size]. A program finds its list by comparing its index
    with the lists' first programs. `odds` are 2·splits + 1: numbers in a tuple that are 1 or
    divisible by 16 would each have a kernel compiled for them, and splits change with T.
    """
    pid = tl.program_id(0)
    for m in tl.static_range(M):
        i = pid - starts[m]
        if (i >= 0) & (i * BE < sizes[m]):
            sum_parts(parts[m], outputs[m], i, sizes[m], odds[m] // 2, BS, BE)


def supported(x: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> bool:
    """Whether the kernels take these inputs; the default implementation takes all others.

    Those are: float64 (tl.dot has no fast form of it), ranks above 128 (a tile of them does not fit
    shared memory) and sizes of zero (nothing to launch).
    """
    rank = p.shape[0]
    return x.dtype in DTYPES and 1 <= rank <= HIGHEST_RANK and x.numel() > 0 and q.shape[1] > 0


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """``[..., d]`` as ``[T, d]`` with adjacent columns and rows apart; copied only if need be."""
    x = flat(x)
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def factors_of(
    p: torch.Tensor, lam: torch.Tensor, q: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """P, Λ, Q with adjacent columns: the packed factors' own rows are, and are not copied."""
    p, q = (t if t.stride(1) == 1 else t.contiguous() for t in (p, q))
    return p, lam.contiguous(), q


def shrink(
    x: torch.Tensor, p: torch.Tensor, dropout: float = 0.0, seed: torch.Tensor | None = None
) -> torch.Tensor:
    """Partial sums ``[parts, T, r]`` of h = dropout(x)·P. One launch."""
    (T, d), r, gpu = x.shape, p.shape[0], architecture_of(x.device)
    tile = gpu.svd_tiles(r, aligned(x, p)).shrink
    columns, blocks = tile.columns_of(x.dtype), triton.cdiv(T, tile.rows)
    parts = gpu.column_parts_of(blocks, d, columns)
    h = x.new_empty(parts, T, r, dtype=torch.float32)
    threshold, scale = thresholds(dropout, seed)
    with on_device_of(x):
        shrink_kernel[(blocks, parts)](
            x, p, h, seed, scale, T, r, d, chunk_of(d, columns, parts), threshold,
            x.stride(0), p.stride(0), h.stride(1), h.stride(0),
            BT=tile.rows, BK=columns, R=padded(r), PRECISION=dot_precision(x.dtype), **tile.options,
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
) -> None:
    """y = base + b + s·dropout((Σ_c h[c] ⊙ Λ)Q), written to ``[T, d]``. One launch.

    h is ``[parts, T, r]``, or columns of a wider one. `base` may be y itself. Where h has several
    parts, their sum is written to `h_sum` ``[T, r]``, which may be columns of a wider one too.
    """
    (T, d), (parts, _, r) = y.shape, h.shape
    tile = architecture_of(y.device).svd_tiles(r, aligned(y, q)).expand
    columns = tile.columns_of(y.dtype)
    h_sum = h_sum if parts > 1 else None
    threshold, scale = thresholds(dropout, seed)
    with on_device_of(y):
        expand_kernel[(triton.cdiv(T, tile.rows), triton.cdiv(d, columns))](
            h, lam, q, bias, base, y, h_sum, seed, scaling, scale, T, r, d,
            parts if parts > 1 else None, threshold, q.stride(0),
            0 if base is None else base.stride(0), h.stride(1), h.stride(0),
            0 if h_sum is None else h_sum.stride(0),
            BT=tile.rows, BN=columns, R=padded(r), PRECISION=dot_precision(y.dtype), **tile.options,
        )  # fmt: skip


def parts_of_u(dy: torch.Tensor, q: torch.Tensor) -> int:
    """In how many parts `gradients_dy` gives u best. It takes any number of them."""
    (T, d), r, gpu = dy.shape, q.shape[0], architecture_of(dy.device)
    tile = gpu.svd_tiles(r, aligned(dy, q)).dy
    blocks = triton.cdiv(T, tile.rows)
    if padded(r) <= ONE_PASS:
        blocks, _ = gpu.bound_rows(blocks, 4 * r * d)
    return gpu.column_parts_of(blocks, d, tile.columns_of(dy.dtype))


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
    tile, R = gpu.svd_tiles(r, aligned(dy, q)).dy, padded(r)
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
    tiles = triton.cdiv(d, columns)
    splits, each = gpu.split_rows(blocks, tiles)
    dp = p.new_empty(r, d) if splits == 1 else h.new_empty(splits, r, d)
    dlam = lam.new_empty(r) if splits == 1 else h.new_empty(splits, r)
    if tangent:
        dlam = lam.new_empty(0)
    threshold, scale = thresholds(dropout, seed)
    programs = splits * tiles
    with on_device_of(x):
        gradients_x_kernel[(programs + (0 if dx is None else blocks * tiles),)](
            x, p, h, lam, u, dp, None if tangent else dlam, dx if add else None, dx, seed,
            scaling, scale, tangent, T, r, d, programs, parts if parts > 1 else None, splits, each,
            threshold, x.stride(0), p.stride(0), h.stride(0), u.stride(1), u.stride(0),
            BT=tile.rows, BK=columns, R=padded(r), PRECISION=dot_precision(x.dtype), **tile.options,
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


def gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    p: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    scaling: float,
    dropout: float,
    seed: torch.Tensor | None,
    tangent: float,
    dx: torch.Tensor | None,
    needs_factors: bool,
    add: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dP, dΛ, dQ) of dy ``[T, d_out]`` and x ``[T, d_in]``; the adapter's dx is written to `dx`.

    With `add` it is added to what `dx` holds. Without `needs_factors` the three are empty. At most
    three launches; two where no rows are shared out, or for dx alone.
    """
    if not needs_factors:
        if dx is not None:
            u, base = shrink(dy, q), dx if add else None
            expand_(dx, u, lam, p, scaling, base=base, dropout=dropout, seed=seed)
        return factor_gradient_shapes(p, lam, q, tangent, needs_factors)
    h = h.contiguous()
    u = h.new_empty(parts_of_u(dy, q), *h.shape)
    dq = gradients_dy(dy, h, u, lam, q, scaling, tangent)
    dp, dlam = gradients_x(
        x, h, u, p, lam, scaling, tangent=tangent, dropout=dropout, seed=seed, dx=dx, add=add
    )
    dp, dlam, dq = reduce([dp, dlam, dq], [p, lam, q])
    return dp, dlam, dq


def cases() -> Iterator[Case]:
    """What is compiled ahead of time: every kernel in every shipped config."""
    for name, tiles, dtype, even, constants in variants():
        plain, R = "p_seed" in constants, constants["R"]

        def case(kernel: Any, tile: Tile, side: str, **more: Any) -> Case:
            sizes = {"BT": tile.rows, side: tile.columns_of(dtype)}  # noqa: B023
            return adapter_case(kernel, name, tile, dtype, even, **sizes, **more)  # noqa: B023

        yield case(shrink_kernel, tiles.shrink, "BK", **constants)
        # As for y with a bias, or added to one in place; and for dx where the factors are frozen.
        absent = {"parts": None} if plain else {"bias": None, "h_sum": None}
        yield case(expand_kernel, tiles.expand, "BN", **constants, **absent)
        absent = {"parts": None, "base": None} if plain else {}
        yield case(gradients_x_kernel, tiles.x, "BK", **constants, **absent)
        if plain:  # tangent gradients
            yield case(gradients_x_kernel, tiles.x, "BK", **constants, **absent, dlam=None)
        if not plain:
            kernel = gradients_dy_apart_kernel if R > ONE_PASS else gradients_dy_kernel
            yield case(kernel, tiles.dy, "BN", **constants)
    yield from reduce_cases()


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
