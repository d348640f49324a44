"""The small problems of a spectral step, of all layers at once, from their Gram matrices.

Vectors of either side are rows of coordinates in an orthonormal basis [P̂; Ô] of P and O = msign(v):

    P = root·P̂,   O = inside·P̂ + outside·Ô,   Ô = back·(direction·v − inside·P̂)

and the candidates are the singular values of R_Qᵀ [[s·Λ, −η/2], [−η/2, 0]] R_P, with
R = [[root, 0], [inside, outside]] of the two sides.
"""

from typing import NamedTuple

import torch
from torch.linalg import solve_triangular

from .reference import LOWEST

INSIDE = 1e-10  # the part of a unit vector outside the span of P, squared: less counts as none
ZERO = 1e-11  # a candidate below this share of the largest is 0, and its vectors mean nothing


class Small(NamedTuple):
    """The solution of all layers, rows in the order of the packed ones."""

    transforms: torch.Tensor  # P⁺ of [P; v], and m⁺ of m; Q likewise: [2, n, 2r, 2r]
    values: torch.Tensor  # s·Λ⁺, [n, r]
    candidates: torch.Tensor  # [n, 2r], largest first
    active: torch.Tensor  # which layers move, [n]


class Basis(NamedTuple):
    """See above; of both sides, ``[2, n, r, r]``."""

    root: torch.Tensor
    inside: torch.Tensor
    outside: torch.Tensor
    back: torch.Tensor
    direction: torch.Tensor
    valid: torch.Tensor  # which rows Ô has, [2, n, r]


def solve(
    gram: torch.Tensor,
    values: torch.Tensor,
    real: torch.Tensor,
    kept: torch.Tensor,
    eta: torch.Tensor,
    decay: torch.Tensor,
    active: torch.Tensor,
) -> Small:
    """All of a step but its two passes over the packed tensors.

    Args:
        gram: of [P; v] and of [Q; v], ``[2, n, 2r, 2r]`` float64, zero where ranks are padded.
        values: s·Λ⊙mask ``[n, r]``.
        real, kept: which rows there are, and which of those are not pruned ``[n, r]``.
        eta, decay: ``[n]``.
        active: which layers got a gradient that is finite and not zero ``[n]``.
    """
    r = values.shape[1]
    start = values * decay[:, None]
    active = active & gram.flatten(2).isfinite().all(2).all(0)
    active = active & start.isfinite().all(1) & eta.isfinite() & real.any(1)
    used = active[:, None]
    gram = torch.where(used[..., None], gram, 0.0)
    basis = basis_of(gram, (~(real & used)).double())
    core = core_of(basis, torch.where(used, start, 0.0), torch.where(active, eta, 0.0))
    left, candidates, right = torch.linalg.svd(core)
    candidates = candidates * (candidates > ZERO * candidates[:, :1])
    found = (candidates[:, :r] > 0) & real
    frames = torch.stack([right[:, :r], left.mT[:, :r]])
    if not (found | ~(real & used)).all():
        frames = completed(frames, found, real, basis.valid)
    largest = frames[0].abs().argmax(2, keepdim=True)
    frames = frames * frames[0].gather(2, largest).sign()
    # The largest go to the rows that are kept, in their order; the next ones to the pruned rows.
    place = torch.where(kept, kept.cumsum(1), kept.sum(1, keepdim=True) + (~kept).cumsum(1)) - 1
    frames = frames.gather(2, place[None, :, :, None].expand(2, -1, -1, 2 * r))
    taken = (candidates[:, :r] * found).gather(1, place) * kept
    unmoved = torch.nn.functional.pad(values.abs().sort(1, descending=True).values, (0, r))
    return Small(
        transforms_of(basis, frames), taken, torch.where(used, candidates, unmoved), active
    )


def basis_of(gram: torch.Tensor, unused: torch.Tensor) -> Basis:
    """The basis of each [P; O] from the Gram matrix of [P; v]; `unused` rows of P are made up."""
    r = unused.shape[1]
    root, _ = torch.linalg.cholesky_ex(gram[..., :r, :r] + torch.diag_embed(unused))
    of_m, vectors = torch.linalg.eigh(gram[..., r:, r:])
    nonzero = of_m > LOWEST**2 * of_m[..., -1:]
    of_m = torch.where(nonzero, of_m, 1.0).rsqrt() * nonzero
    direction = (vectors * of_m[..., None, :]) @ vectors.mT
    inside = direction @ solve_triangular(root.mT, gram[..., r:, :r], upper=True, left=False)
    of_o = (vectors * nonzero[..., None, :]) @ vectors.mT
    rest, vectors = torch.linalg.eigh(of_o - inside @ inside.mT)
    valid = rest > INSIDE
    rest = torch.where(valid, rest, 1.0)
    outside = vectors * (rest.sqrt() * valid)[..., None, :]
    back = (vectors * (rest.rsqrt() * valid)[..., None, :]).mT
    return Basis(root, inside, outside, back, direction, valid)


def core_of(basis: Basis, values: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
    """R_Qᵀ [[s·Λ, −η/2], [−η/2, 0]] R_P, ``[n, 2r, 2r]``."""
    r, half = values.shape[1], (-eta / 2)[:, None, None]
    upper = torch.cat([basis.root, torch.zeros_like(basis.root)], -1)
    lower = torch.cat([basis.inside, basis.outside], -1)
    right = torch.cat([values[..., None] * upper[0] + half * lower[0], half * upper[0]], -2)
    return upper[1].mT @ right[:, :r] + lower[1].mT @ right[:, r:]


def completed(
    frames: torch.Tensor, found: torch.Tensor, real: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """`frames` with new rows for those not `found`: orthonormal ones, in the span of P.

    The rows found, at most as many as P has, leave a part of its span: the eigenvectors of
    I − FᵀF with the eigenvalue 1. Padded rows get an eigenvalue of 2, and so come last.
    """
    r = real.shape[1]
    there = torch.cat([real.expand_as(valid), valid], -1)
    frames = frames * (found[..., None] & there[..., None, :])
    on_p = frames[..., :r]
    left_over = torch.diag_embed(2.0 - real.double()) - on_p.mT @ on_p
    rows = torch.linalg.eigh(left_over).eigenvectors.mT
    rows = torch.nn.functional.pad(rows, (0, r)) - (rows @ on_p.mT) @ frames
    rows = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return torch.where(found[..., None], frames, rows)


def transforms_of(basis: Basis, frames: torch.Tensor) -> torch.Tensor:
    """P⁺ of [P; v], and m⁺ of m, ``[2, n, 2r, 2r]``."""
    r = frames.shape[2]
    on_p, on_o = frames[..., :r], frames[..., r:] @ basis.back
    of_p = solve_triangular(basis.root, on_p - on_o @ basis.inside, upper=False, left=False)
    moved = (on_p @ basis.root.mT).flip(0)  # P⁺Pᵀ is what m_K moves by, and Q⁺Qᵀ m_L
    upper = torch.cat([of_p, on_o @ basis.direction], -1)
    return torch.cat([upper, torch.cat([torch.zeros_like(moved), moved], -1)], -2)
