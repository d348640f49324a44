# mypy: allow-untyped-defs
"""Triton kernels from packed factors to padded tokens: every width in one launch, and backward.

A program of the forward takes a tile of the slots of one entry (`slots`) and of the columns of H;
one of the backward a tile of one weight and all slots of its entry, so that sums have one order.
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
def _tokens_kernel(
    factors, lam, mask, weights, lam_weight, biases, lam_bias, embedding, rows_p, rows_q,
    tokens, usable, starts, widths, offsets, firsts, counts, skips, matrices, rank,
    H: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, RAGGED: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """t = xWᵀ + b, or λ·wᵀ + b + e; usable = mask > 0: BT slots, BH columns. Zero without a row.

    factors: N × [R_w, width]; weights: N × [H, width]; biases: N × [H]; lam, mask: [R];
    embedding: [R, H]; tokens: [3, G, rank, H]; usable: [3, G, rank].
    """
    pid, i_h = tl.program_id(0), tl.program_id(1)
    entry = entry_of(pid, starts, N)
    first, slots = slots_of(entry, firsts, counts, matrices, rank, N, NP)
    slot = (pid - chosen(starts, entry, N + 1)) * BT + tl.arange(0, BT)
    row, holds = rows_of(slot, slots, entry, offsets, firsts, skips, rank, N, NP, RAGGED)
    o_h = i_h * BH + tl.arange(0, BH)
    m_h = o_h < H
    m_t = holds[:, None] & m_h[None, :]

    b_t = tl.zeros([BT, BH], dtype=tl.float32)
    if entry < N:
        width = chosen(widths, entry, N)
        p_x = chosen(factors, entry, N) + (row * width)[:, None]
        p_w = chosen(weights, entry, N) + (o_h.to(tl.int64) * width)[:, None]
        for d in tl.range(0, width, BD, disable_licm=True):
            o_d = d + tl.arange(0, BD)
            m_d = (o_d < width)[None, :]
            b_x = tl.load(p_x + o_d[None, :], mask=holds[:, None] & m_d, other=0.0)  # [BT, BD]
            b_w = tl.load(p_w + o_d[None, :], mask=m_h[:, None] & m_d, other=0.0)  # [BH, BD]
            b_t = tl.dot(b_x, tl.trans(b_w), b_t, input_precision=PRECISION)
        b_b = tl.load(chosen(biases, entry, N) + o_h, mask=m_h, other=0.0).to(tl.float32)
        direction = tl.where(entry < NP, rows_p, rows_q) + chosen(skips, entry, N) + row
        direction = tl.load(direction, mask=holds, other=0)
    else:
        b_l = tl.load(lam + row, mask=holds, other=0.0).to(tl.float32)
        b_w = tl.load(lam_weight + o_h, mask=m_h, other=0.0).to(tl.float32)
        p_e = embedding + (row * H)[:, None] + o_h[None, :]
        b_t = b_l[:, None] * b_w[None, :] + tl.load(p_e, mask=m_t, other=0.0).to(tl.float32)
        b_b = tl.load(lam_bias + o_h, mask=m_h, other=0.0).to(tl.float32)
        direction = row

    m_slot = slot < slots
    b_t = tl.where(holds[:, None], b_t + b_b[None, :], 0.0).to(tokens.dtype.element_ty)
    p_t = tokens + ((first + slot) * H)[:, None] + o_h[None, :]
    tl.store(p_t, b_t, mask=m_slot[:, None] & m_h[None, :])
    if i_h == 0:
        kept = tl.load(mask + direction, mask=holds, other=0.0).to(tl.float32) > 0.0
        tl.store(usable + first + slot, kept.to(tl.uint8), mask=m_slot)


@triton.jit
def _tokens_backward_kernel(
    dtokens, factors, lam, dweights, dlam_weight, dbiases, dlam_bias, dembedding,
    starts, widths, offsets, firsts, counts, skips, matrices, rank,
    H: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, RAGGED: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW = dtᵀx, db = Σ dt; for Λ dw = dtᵀλ and de = dt: BH rows of H, BD columns of a width.

    dtokens: [3, G, rank, H]; factors: N × [R_w, width]; lam: [R]; dweights: N × [H, width];
    dbiases: N × [H]; dembedding: [R, H].
    """
    pid, i_h = tl.program_id(0), tl.program_id(1)
    entry = entry_of(pid, starts, N)
    tile = pid - chosen(starts, entry, N + 1)
    first, slots = slots_of(entry, firsts, counts, matrices, rank, N, NP)
    o_h = i_h * BH + tl.arange(0, BH)
    m_h = o_h < H
    p_dt = dtokens + first * H + o_h[None, :]
    b_sum = tl.zeros([BT, BH], dtype=tl.float32)
    if entry < N:
        width = chosen(widths, entry, N)
        o_d = tile * BD + tl.arange(0, BD)
        m_d = o_d < width
        p_x = chosen(factors, entry, N) + o_d[None, :]
        b_dw = tl.zeros([BH, BD], dtype=tl.float32)
        for t in tl.range(0, slots, BT, disable_licm=True):
            slot = t + tl.arange(0, BT)
            row, holds = rows_of(slot, slots, entry, offsets, firsts, skips, rank, N, NP, RAGGED)
            m_dt, m_x = holds[:, None] & m_h[None, :], holds[:, None] & m_d[None, :]
            b_dt = tl.load(p_dt + (slot.to(tl.int64) * H)[:, None], mask=m_dt, other=0.0)
            b_x = tl.load(p_x + (row * width)[:, None], mask=m_x, other=0.0)  # [BT, BD]
            b_dw = tl.dot(tl.trans(b_dt), b_x, b_dw, input_precision=PRECISION)
            b_sum += b_dt.to(tl.float32)
        p_dw = chosen(dweights, entry, N)
        o_dw = (o_h.to(tl.int64) * width)[:, None] + o_d[None, :]
        tl.store(p_dw + o_dw, b_dw.to(p_dw.dtype.element_ty), mask=m_h[:, None] & m_d[None, :])
        p_db = chosen(dbiases, entry, N)
    else:
        b_dl = tl.zeros([BT, BH], dtype=tl.float32)
        for t in tl.range(0, slots, BT, disable_licm=True):
            slot = t + tl.arange(0, BT)
            row, holds = rows_of(slot, slots, entry, offsets, firsts, skips, rank, N, NP, RAGGED)
            m_dt = holds[:, None] & m_h[None, :]
            b_dt = tl.load(p_dt + (slot.to(tl.int64) * H)[:, None], mask=m_dt, other=0.0)
            tl.store(dembedding + (row * H)[:, None] + o_h[None, :], b_dt, mask=m_dt)
            b_l = tl.load(lam + row, mask=holds, other=0.0).to(tl.float32)
            b_dl += b_dt.to(tl.float32) * b_l[:, None]
            b_sum += b_dt.to(tl.float32)
        tl.store(dlam_weight + o_h, tl.sum(b_dl, 0).to(dlam_weight.dtype.element_ty), mask=m_h)
        p_db = dlam_bias
    b_db = tl.sum(b_sum, 0).to(p_db.dtype.element_ty)
    tl.store(p_db + o_h, b_db, mask=m_h & (tile == 0))


def forward(
    factors: list[torch.Tensor],
    mask: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    embedding: torch.Tensor,
    rows: list[torch.Tensor],
    offsets: list[torch.Tensor],
    counts_p: list[int],
    counts_q: list[int],
    max_rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch."""
    shape = (3, offsets[0].shape[0] - 1, max_rank, embedding.shape[1])
    if not suits([*factors, *weights, *biases, embedding], shape):
        from ..ops.hypernet_tokens import _forward

        return _forward(
            factors, mask, weights, biases, embedding, rows, offsets, counts_p, counts_q, max_rank
        )
    tokens = embedding.new_empty(shape)
    usable = embedding.new_empty(shape[:3], dtype=torch.bool)
    if not tokens.numel():
        return tokens, usable
    entries = Entries(offsets, counts_p, counts_q, max_rank)
    tile = tiles_for(tokens.device, shape).tokens
    tiles = entries.tiles(tile.rows)
    several, lam = entries.maps(factors)
    with on_device_of(tokens):
        _tokens_kernel[(sum(tiles), triton.cdiv(shape[3], tile.columns))](
            several, lam, mask.contiguous(), *entries.maps(weights), *entries.maps(biases),
            embedding.contiguous(), *(r.contiguous() for r in rows), tokens,
            usable.view(torch.uint8), starts_of(tiles), tuple(f.shape[1] for f in several),
            H=shape[3], **entries.arguments([f.shape[0] for f in factors]),
            **options(tile, tokens.dtype),
        )  # fmt: skip
    return tokens, usable


def backward(
    dtokens: torch.Tensor,
    factors: list[torch.Tensor],
    offsets: list[torch.Tensor],
    counts_p: list[int],
    counts_q: list[int],
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """One launch."""
    if not suits([dtokens, *factors], dtokens.shape):
        from ..ops.hypernet_tokens import _backward_default

        return _backward_default(dtokens, factors, offsets, counts_p, counts_q)
    _, _, rank, hidden = dtokens.shape
    entries = Entries(offsets, counts_p, counts_q, rank)
    several, lam = entries.maps(factors)
    dweights = [dtokens.new_empty(hidden, 1 if f.dim() == 1 else f.shape[1]) for f in factors]
    dbiases = [dtokens.new_empty(hidden) for _ in factors]
    dembedding = dtokens.new_empty(lam.shape[0], hidden)
    tile = tiles_for(dtokens.device, dtokens.shape).weights
    widths = tuple(f.shape[1] for f in several)
    tiles = [*(max(1, triton.cdiv(width, tile.depth)) for width in widths), 1]  # 1 for the bias
    with on_device_of(dtokens):
        _tokens_backward_kernel[(sum(tiles), triton.cdiv(hidden, tile.columns))](
            dtokens.contiguous(), several, lam, *entries.maps(dweights), *entries.maps(dbiases),
            dembedding, starts_of(tiles), widths,
            H=hidden, **entries.arguments([f.shape[0] for f in factors]),
            **options(tile, dtokens.dtype),
        )  # fmt: skip
    return dweights, dbiases, dembedding


def cases() -> Iterator[Case]:
    """The projections in front of the body of `hal_kernels.nn.hypernet`."""
    yield from slot_cases(
        _tokens_kernel, "tokens", ("factors", "weights", "biases"),
        {"rows_p": "*i64", "rows_q": "*i64", "usable": "*u8"},
    )  # fmt: skip
    yield from slot_cases(_tokens_backward_kernel, "weights", ("factors", "dweights", "dbiases"))
