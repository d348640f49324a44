"""All layers' spectral steps in plain PyTorch: as many torch calls for many layers as for few.

Everything a step needs of P and its momentum m is their Gram matrix: O = (m mᵀ)^(−1/2) m and an
orthonormal basis of both are linear in [P; m], and so is what is written, P⁺ = T·[P; m]. So the
packed tensors are read once for Gram matrices ``[2r, 2r]`` and once to be multiplied with T, and
all between is small (`solve`). It is done in float64: a Gram matrix squares condition numbers.

Ranks are padded to the largest one: a padded row is a direction of its own that nothing leads to.
"""

import torch

from ..ragged import Slots, pad, unpad
from .solve import solve


class Side:
    """The matrices of one side (0: P, 1: Q): by width, and which layer each belongs to."""

    def __init__(self, slots: Slots, side: int) -> None:
        layers, offsets = slots.offsets[1], slots.offsets[2 * side]
        n, rows = layers.shape[0] - 1, slots.rows[side]
        layer = torch.searchsorted(layers, rows[offsets[:-1].clamp(max=len(rows) - 1)], right=True)
        # A matrix without rows is known by none: no layer looks for it.
        layer = torch.where(offsets.diff() > 0, layer - 1, n)
        self.layer = layer.clamp(max=n - 1)
        """For each matrix its layer; for those without rows any."""
        self.place = torch.zeros(n + 1, dtype=torch.int64, device=layer.device)
        """For each layer its matrix."""
        self.place = self.place.scatter_(0, layer, torch.arange(n, device=layer.device))[:-1]
        self.counts, self.max_rank = slots.counts[side], slots.max_rank
        self.offsets = []  # of each width's matrices, in its own rows
        first = at = 0
        for count, size in zip(self.counts, slots.sizes[side], strict=True):
            self.offsets.append(offsets[at : at + count + 1] - first)
            first, at = first + size, at + count

    def pad(self, rows: torch.Tensor, width: int) -> torch.Tensor:
        """``[R_w, d]`` -> ``[G_w, r, d]``."""
        if rows.shape[0] == 0:
            return rows.new_zeros(self.counts[width], self.max_rank, rows.shape[1])
        return pad(rows, self.offsets[width], self.max_rank)

    def stacked(
        self, factor: torch.Tensor, momentum: torch.Tensor, gradient: torch.Tensor, beta: float,
        width: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """[P; βm + L] of one width, ``[G_w, 2r, d]`` float64, and Σ|L| of each ``[G_w]``."""
        r, gradient = self.max_rank, self.pad(gradient, width)
        stacked = factor.new_empty(len(gradient), 2 * r, factor.shape[1], dtype=torch.float64)
        stacked[:, :r] = self.pad(factor, width)
        torch.add(gradient, self.pad(momentum, width), alpha=beta, out=stacked[:, r:])
        return stacked, gradient.flatten(1).abs().sum(1, dtype=torch.float64)


def step_(
    slots: Slots,
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
    beta: float,
) -> torch.Tensor:
    """`spectral_step_`, of checked arguments."""
    sides = (Side(slots, 0), Side(slots, 1))
    factors, momenta, gradients = (p, q), (momentum_p, momentum_q), (gradient_p, gradient_q)
    stacks: list[list[torch.Tensor]] = []
    grams, totals = [], []
    for i, side in enumerate(sides):
        own = [
            side.stacked(*tensors, beta, width)
            for width, tensors in enumerate(zip(factors[i], momenta[i], gradients[i], strict=True))
        ]
        stacks.append([stack for stack, _ in own])
        grams.append(torch.cat([stack @ stack.mT for stack in stacks[i]])[side.place])
        totals.append(torch.cat([total for _, total in own])[side.place])
    total, eta, scaling, decay = totals[0] + totals[1], *(t.double() for t in (eta, scaling, decay))
    offsets, r = slots.offsets[1], slots.max_rank
    real = torch.arange(r, device=lam.device) < offsets.diff()[:, None]
    kept = real if mask is None else real & (pad(mask, offsets, r) > 0)
    values = torch.where(kept, pad(lam, offsets, r), 0.0).double()
    small = solve(
        torch.stack(grams), values * scaling[:, None], real, kept, eta, decay,
        total.isfinite() & (total > 0),
    )  # fmt: skip
    # Most often all move: then nothing old is to be kept.
    active = None if small.active.all() else small.active[:, None]
    _write(lam, torch.where(kept, small.values / scaling[:, None], 0.0), active, offsets)
    for i, side in enumerate(sides):
        of_width = zip(
            stacks[i], side.layer.split(side.counts), factors[i], momenta[i], side.offsets,
            strict=True,
        )  # fmt: skip
        for stack, layers, factor, momentum, rows in of_width:
            if len(factor) > 0:
                transform = small.transforms[i][layers]
                move = None if active is None else active[layers, :, None]
                _write(factor, transform[:, :r] @ stack, move, rows)
                _write(momentum, transform[:, r:, r:] @ stack[:, r:], move, rows)
    return small.candidates.to(lam.dtype)


def _write(
    to: torch.Tensor, padded: torch.Tensor, active: torch.Tensor | None, offsets: torch.Tensor
) -> None:
    """Padded rows to packed ones: of those matrices that are active ``[G, 1, …]``; None: of all."""
    new = unpad(padded, offsets, len(to))
    if active is not None:
        new = torch.where(
            unpad(active.expand(padded.shape), offsets, len(to)), new.to(to.dtype), to
        )
    to.copy_(new)
