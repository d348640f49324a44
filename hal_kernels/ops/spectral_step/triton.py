# mypy: allow-untyped-defs
"""The spectral step of all layers in three launches, for ranks up to 32.

    gram_kernel    Gram matrices of [P; v], v = β(βm + L) + L, one program a matrix
    solve_kernel   the small problems, one program a layer (`triton_solve`)
    write_kernel   P⁺ and m⁺, a program for some columns of a matrix

An entry is all matrices of one width: those of P, then those of Q. Entries' addresses and sizes are
tuples of arguments, and nothing waits for the device. Sums are kept in float64 (see
`ops.spectral_step.batched`): a few million products, which no GPU is short of.
"""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ...kernels.launch import DTYPES, on_device_of
from .triton_solve import solve_kernel

# Of 4 × 4 numbers ptxas makes code that spills (sm_80, sm_89), of 64 × 64 more than registers hold.
RANKS = (8, 16, 32)
BK = 64  # columns that `write_kernel` takes at a time
WARPS = 8  # threads share out R × R numbers of 64 bits, and of `gram_kernel` BK times as many


@triton.jit
def chosen(values, entry, COUNT: tl.constexpr):
    """The element of a tuple that belongs to `entry`."""
    value = values[0]
    for i in tl.static_range(1, COUNT):
        value = tl.where(entry == i, values[i], value)
    return value


@triton.jit
def entry_of(pid, starts, N: tl.constexpr):
    """The entry whose programs include `pid`."""
    entry = pid * 0
    for i in tl.static_range(1, N):
        entry += (pid >= starts[i]).to(tl.int32)
    return entry


@triton.jit
def rows_of(matrix, entry, offsets, firsts, skips, N: tl.constexpr, NP: tl.constexpr):
    """The first row of an entry's matrix among the entry's rows (int64), and its rank."""
    p_offset = tl.where(entry < NP, offsets[0], offsets[2]) + chosen(firsts, entry, N) + matrix
    first = tl.load(p_offset)
    return first - chosen(skips, entry, N), (tl.load(p_offset + 1) - first).to(tl.int32)


@triton.jit
def load_rows(pointer, o_rows, o_k, m):
    return tl.load(pointer + o_rows + o_k, mask=m, other=0.0).to(tl.float32).to(tl.float64)


@triton.jit
def gram_kernel(
    factors, momenta, gradients, offsets, grams, totals, cosines, starts, firsts, skips, widths,
    beta, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """PPᵀ, vPᵀ and vvᵀ of one matrix, v = β(βm + L) + L, Σ|L|, and the cosine between L and m."""
    pid = tl.program_id(0)
    entry = entry_of(pid, starts, N)
    width = chosen(widths, entry, N)
    matrix = pid - chosen(starts, entry, N)
    first, rank = rows_of(matrix, entry, offsets, firsts, skips, N, NP)
    p_f, p_m = chosen(factors, entry, N), chosen(momenta, entry, N)
    p_g = chosen(gradients, entry, N)
    o_r = tl.arange(0, R)
    o_rows = (first + o_r)[:, None] * width
    ff, mf = tl.zeros([R, R], tl.float64), tl.zeros([R, R], tl.float64)
    mm = tl.zeros([R, R], tl.float64)
    total, along = tl.zeros([R, BK], tl.float64), tl.zeros([R, BK], tl.float64)
    of_g, of_n = tl.zeros([R, BK], tl.float64), tl.zeros([R, BK], tl.float64)
    for k in range(0, width, BK):
        o_k = k + tl.arange(0, BK)[None, :]
        m = (o_r < rank)[:, None] & (o_k < width)
        f, g = load_rows(p_f, o_rows, o_k, m), load_rows(p_g, o_rows, o_k, m)
        n = load_rows(p_m, o_rows, o_k, m)
        v = (n * beta + g) * beta + g
        ff += tl.sum(f[:, None, :] * f[None, :, :], 2)
        mf += tl.sum(v[:, None, :] * f[None, :, :], 2)
        mm += tl.sum(v[:, None, :] * v[None, :, :], 2)
        total += tl.abs(g)
        along += n * g
        of_g += g * g
        of_n += n * n
    p_gram = grams + pid.to(tl.int64) * 3 * R * R + o_r[:, None] * R + o_r[None, :]
    tl.store(p_gram, ff)
    tl.store(p_gram + R * R, mf)
    tl.store(p_gram + 2 * R * R, mm)
    norms = tl.sqrt(tl.sum(of_g)) * tl.sqrt(tl.sum(of_n))
    tl.store(totals + pid, tl.sum(total))
    tl.store(cosines + pid, tl.sum(along) / tl.where(norms == 0.0, 1.0, norms))


@triton.jit
def write_kernel(
    factors, momenta, gradients, offsets, transforms, moves, log_gain, next_gain, starts, matrices,
    firsts, skips, widths, beta, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """P⁺ = T_P·P + T_v·v and m⁺ = M·n in place, for BK columns of one matrix.

    n = βm + L and v = βn + L. The first program also takes over the gain.
    """
    pid = tl.program_id(0)
    if log_gain is not None:  # noqa: SIM102
        if pid == 0:
            tl.store(log_gain, tl.load(next_gain).to(tl.float32).to(log_gain.dtype.element_ty))
    entry = entry_of(pid, starts, N)
    width = chosen(widths, entry, N)
    tiles = tl.cdiv(width, BK)
    own = pid - chosen(starts, entry, N)
    matrix = own // tiles
    first, rank = rows_of(matrix, entry, offsets, firsts, skips, N, NP)
    index = chosen(matrices, entry, N) + matrix
    if rank > 0:  # noqa: SIM102
        if tl.load(moves + index) > 0:
            p_f, p_m = chosen(factors, entry, N), chosen(momenta, entry, N)
            p_g = chosen(gradients, entry, N)
            o_k = own % tiles * BK + tl.arange(0, BK)
            o_r = tl.arange(0, R)
            p_t = transforms + index.to(tl.int64) * 3 * R * R + o_r * R
            new_f, new_m = tl.zeros([R, BK], tl.float64), tl.zeros([R, BK], tl.float64)
            for i in range(rank):
                f = load_rows(p_f, (first + i) * width, o_k, o_k < width)[None, :]
                g = load_rows(p_g, (first + i) * width, o_k, o_k < width)[None, :]
                moved = load_rows(p_m, (first + i) * width, o_k, o_k < width)[None, :] * beta + g
                v = moved * beta + g
                new_f += tl.load(p_t + i)[:, None] * f + tl.load(p_t + R * R + i)[:, None] * v
                new_m += tl.load(p_t + 2 * R * R + i)[:, None] * moved
            m = (o_r < rank)[:, None] & (o_k < width)[None, :]
            o = (first + o_r)[:, None] * width + o_k[None, :]
            tl.debug_barrier()  # all rows are read before any is written
            tl.store(p_f + o, new_f.to(tl.float32).to(p_f.dtype.element_ty), mask=m)
            tl.store(p_m + o, new_m.to(tl.float32).to(p_m.dtype.element_ty), mask=m)


def supported(changed: Sequence[torch.Tensor], max_rank: int) -> bool:
    """float64, higher ranks and tensors with gaps are left to the default implementation."""
    return max_rank <= RANKS[-1] and all(t.dtype in DTYPES and t.is_contiguous() for t in changed)


def step_(
    p: list[torch.Tensor],
    lam: torch.Tensor,
    q: list[torch.Tensor],
    momentum_p: list[torch.Tensor],
    momentum_q: list[torch.Tensor],
    gradient_p: list[torch.Tensor],
    gradient_q: list[torch.Tensor],
    mask: torch.Tensor | None,
    eta: torch.Tensor,
    scaling: torch.Tensor,
    decay: torch.Tensor,
    log_gain: torch.Tensor | None,
    beta: float,
    gain_rate: float,
    rows: Sequence[torch.Tensor],
    offsets: Sequence[torch.Tensor],
    counts_p: list[int],
    counts_q: list[int],
    sizes_p: list[int],
    sizes_q: list[int],
    max_rank: int,
) -> torch.Tensor:
    """`hal::spectral_step_`, in three launches."""
    n, rank = offsets[1].shape[0] - 1, next(r for r in RANKS if r >= max_rank)
    factors, momenta, gradients = (
        tuple(t.contiguous() for t in (*of_p, *of_q))
        for of_p, of_q in ((p, q), (momentum_p, momentum_q), (gradient_p, gradient_q))
    )
    grams = lam.new_empty(2, n, 3, rank, rank, dtype=torch.float64)
    totals, cosines, next_gain = (grams.new_empty(size) for size in (2 * n, 2 * n, 1))
    transforms, moves = torch.empty_like(grams), lam.new_empty(2 * n, dtype=torch.int32)
    candidates = lam.new_empty(n, 2 * max_rank)
    widths, counts = tuple(f.shape[1] for f in factors), (*counts_p, *counts_q)
    where = {
        "firsts": (*starts_of(counts_p), *starts_of(counts_q)),
        "skips": (*starts_of(sizes_p), *starts_of(sizes_q)),
        "widths": widths,
        "beta": beta,
        "N": len(widths), "NP": len(p), "R": rank, "num_warps": WARPS,
    }  # fmt: skip
    offsets, starts = tuple(o.contiguous() for o in offsets), starts_of(counts)
    tiles = [count * -(-width // BK) for count, width in zip(counts, widths, strict=True)]
    with on_device_of(lam):
        gram_kernel[(2 * n,)](
            factors, momenta, gradients, offsets, grams, totals, cosines, starts,
            BK=columns_of(rank), **where,
        )  # fmt: skip
        solve_kernel[(n,)](
            grams, totals, cosines, log_gain, next_gain, gain_rate, lam, mask,
            *(t.contiguous() for t in (eta, scaling, decay)),
            *(r.contiguous() for r in rows), offsets, transforms, moves, candidates, n, max_rank,
            R=rank, BM=64, num_warps=WARPS,
        )  # fmt: skip
        write_kernel[(sum(tiles),)](
            factors, momenta, gradients, offsets, transforms, moves, log_gain, next_gain,
            starts_of(tiles), starts, BK=BK, **where,
        )  # fmt: skip
    return candidates


def starts_of(counts: Sequence[int]) -> tuple[int, ...]:
    """Where each of several runs begins that follow each other."""
    return tuple(itertools.accumulate(counts[:-1], initial=0))


def columns_of(rank: int) -> int:
    """Columns that `gram_kernel` takes at a time."""
    return min(64, 8192 // rank**2)
