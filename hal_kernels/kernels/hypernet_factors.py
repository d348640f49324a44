# mypy: allow-untyped-defs
"""Triton kernels from padded tokens to packed factors: every width in one launch, and backward.

A program takes a tile of the slots of one entry (`slots`), or for the weights' gradients a tile of
one weight and all slots of its entry, so that sums have one order.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .cases import Case
from .launch import on_device_of
from .slots import (
    Entries,
    chosen,
    entry_of,
    options,
    rows_of,
    slot_cases,
    slots_of,
    starts_of,
    suits,
    tiles_for,
)


@triton.jit
def _factors_kernel(
    tokens, weights, lam_weight, biases, lam_bias, base, lam_base, factors, lam, add,
    starts, widths, offsets, firsts, counts, skips, matrices, rank,
    H: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, RAGGED: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """factor = base + tWᵀ + b: BT slots, BD columns of a width. The base counts where add is 1.

    tokens: [3, G, rank, H]; weights: N × [width, H]; biases: N × [width]; lam_weight: [H];
    factors, base: N × [R_w, width]; lam, lam_base: [R].
    """
    pid = tl.program_id(0)
    entry = entry_of(pid, starts, N)
    first, slots = slots_of(entry, firsts, counts, matrices, rank, N, NP)
    tile = pid - chosen(starts, entry, N + 1)
    width = chosen(widths, entry, N)
    tiles = tl.where(entry < N, tl.cdiv(width, BD), 1)  # side by side
    slot = tile // tiles * BT + tl.arange(0, BT)
    row, holds = rows_of(slot, slots, entry, offsets, firsts, skips, rank, N, NP, RAGGED)
    p_t = tokens + ((first + slot) * H)[:, None]
    if entry < N:
        o_d = tile % tiles * BD + tl.arange(0, BD)
        m_d = o_d < width
        p_w = chosen(weights, entry, N) + (o_d.to(tl.int64) * H)[:, None]
        b_y = tl.zeros([BT, BD], dtype=tl.float32)
        for h in tl.range(0, H, BH, disable_licm=True):
            o_h = h + tl.arange(0, BH)
            m_h = (o_h < H)[None, :]
            b_t = tl.load(p_t + o_h[None, :], mask=holds[:, None] & m_h, other=0.0)  # [BT, BH]
            b_w = tl.load(p_w + o_h[None, :], mask=m_d[:, None] & m_h, other=0.0)  # [BD, BH]
            b_y = tl.dot(b_t, tl.trans(b_w), b_y, input_precision=PRECISION)
        b_y += tl.load(chosen(biases, entry, N) + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        o_y = (row * width)[:, None] + o_d[None, :]
        m_y = holds[:, None] & m_d[None, :]
        b_base = tl.load(chosen(base, entry, N) + o_y, mask=m_y & (add != 0), other=0.0)
        b_y += b_base.to(tl.float32)
        p_y = chosen(factors, entry, N)
        tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_y)
    else:
        b_sum = tl.zeros([BT, BH], dtype=tl.float32)
        for h in tl.range(0, H, BH, disable_licm=True):
            o_h = h + tl.arange(0, BH)
            m_h = o_h < H
            b_t = tl.load(p_t + o_h[None, :], mask=holds[:, None] & m_h[None, :], other=0.0)
            b_w = tl.load(lam_weight + o_h, mask=m_h, other=0.0)
            b_sum += b_t.to(tl.float32) * b_w.to(tl.float32)[None, :]
        b_l = tl.sum(b_sum, 1) + tl.load(lam_bias).to(tl.float32)
        b_l += tl.load(lam_base + row, mask=holds & (add != 0), other=0.0).to(tl.float32)
        tl.store(lam + row, b_l.to(lam.dtype.element_ty), mask=holds)


@triton.jit
def _token_gradient_kernel(
    dfactors, dlam, weights, lam_weight, dtokens,
    starts, widths, offsets, firsts, counts, skips, matrices, rank,
    H: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, RAGGED: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dt = dy·W, or dλ·w: BT slots, BH columns. Zero where no row lies.

    dfactors: N × [R_w, width]; dlam: [R]; weights: N × [width, H]; dtokens: [3, G, rank, H].
    """
    pid, i_h = tl.program_id(0), tl.program_id(1)
    entry = entry_of(pid, starts, N)
    first, slots = slots_of(entry, firsts, counts, matrices, rank, N, NP)
    slot = (pid - chosen(starts, entry, N + 1)) * BT + tl.arange(0, BT)
    row, holds = rows_of(slot, slots, entry, offsets, firsts, skips, rank, N, NP, RAGGED)
    o_h = i_h * BH + tl.arange(0, BH)
    m_h = o_h < H

    b_dt = tl.zeros([BT, BH], dtype=tl.float32)
    if entry < N:
        width = chosen(widths, entry, N)
        p_dy = chosen(dfactors, entry, N) + (row * width)[:, None]
        p_w = chosen(weights, entry, N) + o_h[None, :]
        for d in tl.range(0, width, BD, disable_licm=True):
            o_d = d + tl.arange(0, BD)
            m_d = o_d < width
            m_dy, m_w = holds[:, None] & m_d[None, :], m_d[:, None] & m_h[None, :]
            b_dy = tl.load(p_dy + o_d[None, :], mask=m_dy, other=0.0)  # [BT, BD]
            b_w = tl.load(p_w + (o_d.to(tl.int64) * H)[:, None], mask=m_w, other=0.0)  # [BD, BH]
            b_dt = tl.dot(b_dy, b_w, b_dt, input_precision=PRECISION)
    else:
        b_dl = tl.load(dlam + row, mask=holds, other=0.0).to(tl.float32)
        b_w = tl.load(lam_weight + o_h, mask=m_h, other=0.0).to(tl.float32)
        b_dt = b_dl[:, None] * b_w[None, :]
    p_dt = dtokens + ((first + slot) * H)[:, None] + o_h[None, :]
    m_dt = (slot < slots)[:, None] & m_h[None, :]
    tl.store(p_dt, b_dt.to(dtokens.dtype.element_ty), mask=m_dt)


@triton.jit
def _weight_gradient_kernel(
    dfactors, dlam, tokens, dweights, dlam_weight, dbiases, dlam_bias,
    starts, widths, offsets, firsts, counts, skips, matrices, rank,
    H: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, RAGGED: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW = dyᵀt, db = Σ dy; for Λ dw = dλᵀt: BD rows of a width, BH columns of H.

    dfactors: N × [R_w, width]; dlam: [R]; tokens: [3, G, rank, H]; dweights: N × [width, H];
    dbiases: N × [width]; dlam_weight: [H]; dlam_bias: [1].
    """
    pid, i_h = tl.program_id(0), tl.program_id(1)
    entry = entry_of(pid, starts, N)
    first, slots = slots_of(entry, firsts, counts, matrices, rank, N, NP)
    o_h = i_h * BH + tl.arange(0, BH)
    m_h = o_h < H
    p_t = tokens + first * H + o_h[None, :]
    if entry < N:
        width = chosen(widths, entry, N)
        o_d = (pid - chosen(starts, entry, N + 1)) * BD + tl.arange(0, BD)
        m_d = o_d < width
        p_dy = chosen(dfactors, entry, N) + o_d[None, :]
        b_dw = tl.zeros([BD, BH], dtype=tl.float32)
        b_sum = tl.zeros([BT, BD], dtype=tl.float32)
        for t in tl.range(0, slots, BT, disable_licm=True):
            slot = t + tl.arange(0, BT)
            row, holds = rows_of(slot, slots, entry, offsets, firsts, skips, rank, N, NP, RAGGED)
            m_t, m_dy = holds[:, None] & m_h[None, :], holds[:, None] & m_d[None, :]
            b_t = tl.load(p_t + (slot.to(tl.int64) * H)[:, None], mask=m_t, other=0.0)  # [BT, BH]
            b_dy = tl.load(p_dy + (row * width)[:, None], mask=m_dy, other=0.0)  # [BT, BD]
            b_dw = tl.dot(tl.trans(b_dy), b_t, b_dw, input_precision=PRECISION)
            b_sum += b_dy.to(tl.float32)
        p_dw = chosen(dweights, entry, N)
        o_dw = (o_d.to(tl.int64) * H)[:, None] + o_h[None, :]
        tl.store(p_dw + o_dw, b_dw.to(p_dw.dtype.element_ty), mask=m_d[:, None] & m_h[None, :])
        p_db = chosen(dbiases, entry, N) + o_d
        tl.store(p_db, tl.sum(b_sum, 0).to(p_db.dtype.element_ty), mask=m_d & (i_h == 0))
    else:
        b_dl = tl.zeros([BT, BH], dtype=tl.float32)
        b_bias = tl.zeros([BT], dtype=tl.float32)
        for t in tl.range(0, slots, BT, disable_licm=True):
            slot = t + tl.arange(0, BT)
            row, holds = rows_of(slot, slots, entry, offsets, firsts, skips, rank, N, NP, RAGGED)
            m_t = holds[:, None] & m_h[None, :]
            b_t = tl.load(p_t + (slot.to(tl.int64) * H)[:, None], mask=m_t, other=0.0)
            b_l = tl.load(dlam + row, mask=holds, other=0.0).to(tl.float32)
            b_dl += b_t.to(tl.float32) * b_l[:, None]
            b_bias += b_l
        tl.store(dlam_weight + o_h, tl.sum(b_dl, 0).to(dlam_weight.dtype.element_ty), mask=m_h)
        tl.store(dlam_bias, tl.sum(b_bias).to(dlam_bias.dtype.element_ty), mask=i_h == 0)


def forward(
    tokens: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    base: list[torch.Tensor],
    offsets: list[torch.Tensor],
    counts_p: list[int],
    counts_q: list[int],
    sizes_p: list[int],
    sizes_q: list[int],
) -> list[torch.Tensor]:
    """One launch."""
    if not suits([tokens, *weights, *biases, *base], tokens.shape):
        from ..ops.hypernet_factors import _forward

        return _forward(
            tokens, weights, biases, base, offsets, counts_p, counts_q, sizes_p, sizes_q
        )
    _, _, rank, hidden = tokens.shape
    heights = [*sizes_p, sum(sizes_p), *sizes_q]
    entries = Entries(offsets, counts_p, counts_q, rank)
    factors = [tokens.new_empty(n, w.shape[0]) for n, w in zip(heights, weights, strict=True)]
    factors[len(sizes_p)] = factors[len(sizes_p)].flatten()
    *widths, _ = entries.ordered([w.shape[0] for w in weights])
    tile = tiles_for(tokens.device, tokens.shape).factors
    columns = [triton.cdiv(width, tile.depth) for width in (*widths, 1)]
    tiles = [n * c for n, c in zip(entries.tiles(tile.rows), columns, strict=True)]
    if sum(tiles):
        with on_device_of(tokens):
            _factors_kernel[(sum(tiles),)](
                tokens.contiguous(), *entries.maps(weights), *entries.maps(biases),
                *entries.maps(base or factors), *entries.maps(factors), int(bool(base)),
                starts_of(tiles), tuple(widths), H=hidden, **entries.arguments(heights),
                **options(tile, tokens.dtype),
            )  # fmt: skip
    return factors


def backward(
    dfactors: list[torch.Tensor],
    tokens: torch.Tensor,
    weights: list[torch.Tensor],
    offsets: list[torch.Tensor],
    counts_p: list[int],
    counts_q: list[int],
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Two launches."""
    if not suits([tokens, *dfactors, *weights], tokens.shape):
        from ..ops.hypernet_factors import _backward_default

        return _backward_default(dfactors, tokens, weights, offsets, counts_p, counts_q)
    _, _, rank, hidden = tokens.shape
    entries = Entries(offsets, counts_p, counts_q, rank)
    arguments = entries.arguments([dy.shape[0] for dy in dfactors])
    several = entries.maps(dfactors)
    *widths, _ = entries.ordered([w.shape[0] for w in weights])
    dtokens = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    dweights = [w.new_empty(w.shape) for w in weights]
    dbiases = [w.new_empty(w.shape[0]) for w in weights]
    sizes = tiles_for(tokens.device, tokens.shape)
    with on_device_of(tokens):
        tile = sizes.tokens
        tiles = entries.tiles(tile.rows)
        if sum(tiles):
            _token_gradient_kernel[(sum(tiles), triton.cdiv(hidden, tile.columns))](
                *several, *entries.maps(weights), dtokens, starts_of(tiles), tuple(widths),
                H=hidden, **arguments, **options(tile, tokens.dtype),
            )  # fmt: skip
        tile = sizes.weights
        tiles = [triton.cdiv(width, tile.depth) for width in (*widths, 1)]
        _weight_gradient_kernel[(sum(tiles), triton.cdiv(hidden, tile.columns))](
            *several, tokens.contiguous(), *entries.maps(dweights), *entries.maps(dbiases),
            starts_of(tiles), tuple(widths),
            H=hidden, **arguments, **options(tile, tokens.dtype),
        )  # fmt: skip
    return dtokens, dweights, dbiases


def cases() -> Iterator[Case]:
    """The projections behind the body of `hal_kernels.nn.hypernet`."""
    several = ("weights", "biases", "base", "factors")
    yield from slot_cases(_factors_kernel, "factors", several, {"add": "i32"})
    several = ("dfactors", "weights", "dweights", "dbiases")
    yield from slot_cases(_token_gradient_kernel, "tokens", several)
    yield from slot_cases(_weight_gradient_kernel, "weights", several)
