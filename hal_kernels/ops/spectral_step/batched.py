"""All layers' spectral steps in plain PyTorch: as many torch calls for many layers as for few.

Everything a step needs of P and its direction v is their Gram matrix: O = (v vᵀ)^(−1/2) v and an
orthonormal basis of both are linear in [P; v], and so is what is written, P⁺ = T·[P; v]. So the
packed tensors are read once for Gram matrices ``[2r, 2r]`` and once to be multiplied with T, and
all between is small (`solve`). It is done in float64: a Gram matrix squares condition numbers.

Ranks are padded to the largest one: a padded row is a direction of its own that nothing leads to.
On a CPU, where ranks are equal, matrices come in blocks that stay in the cache.
"""

from collections.abc import Iterator, Sequence

import torch

from ..ragged import Slots, pad, unpad
from .reference import next_gain
from .solve import solve

BLOCK = 2**17  # numbers of [P; v] at a time, of 8 bytes


class Block:
    """Some matrices of one width: their layers, offsets in `tensors`, and rank when padded."""

    def __init__(
        self, layers: torch.Tensor, offsets: torch.Tensor, tensors: list[torch.Tensor], rank: int
    ) -> None:
        self.layers, self.offsets, self.tensors, self.rank = layers, offsets, tensors, rank

    def stacked(self, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
        """[P; v], ``[G, 2r, d]``, and m⁺ ``[G, r, d]``; float64."""
        factor, momentum, gradient = (self.padded(t) for t in self.tensors)
        shape = (len(factor), 2 * self.rank, factor.shape[2])
        stacked = factor.new_empty(shape, dtype=torch.float64)
        stacked[:, : self.rank] = factor
        moved = torch.empty_like(gradient, dtype=torch.float64)
        torch.add(gradient, momentum, alpha=beta, out=moved)
        torch.add(gradient, moved, alpha=beta, out=stacked[:, self.rank :])
        return stacked, moved

    def total(self) -> torch.Tensor:
        """Σ|L| of each matrix ``[G]``, float64."""
        return self.padded(self.tensors[2]).flatten(1).abs().sum(1, dtype=torch.float64)

    def cosine(self) -> torch.Tensor:
        """The cosine between L and m of each matrix ``[G]``, 0 where one of them is zero."""
        at_least = torch.promote_types(self.tensors[1].dtype, torch.float32)
        momentum, gradient = (self.padded(t).flatten(1).to(at_least) for t in self.tensors[1:])
        norms = [torch.linalg.vector_norm(t, dim=1).double() for t in (momentum, gradient)]
        product = norms[0] * norms[1]
        inner = torch.linalg.vecdot(momentum, gradient).double()
        return inner / torch.where(product == 0, 1.0, product)

    def padded(self, rows: torch.Tensor) -> torch.Tensor:
        if len(rows) == 0:
            return rows.new_zeros(len(self.offsets) - 1, self.rank, rows.shape[1])
        return pad(rows, self.offsets, self.rank)

    def write(self, transforms: torch.Tensor, beta: float, active: torch.Tensor | None) -> None:
        """P⁺ and m⁺ to the packed rows: of the matrices of active layers, or of all."""
        factor, momentum, _ = self.tensors
        if len(factor) > 0:
            r, (stacked, moved) = self.rank, self.stacked(beta)
            transforms = transforms[self.layers]
            active = None if active is None else active[self.layers, :, None]
            write(factor, transforms[:, :r] @ stacked, active, self.offsets)
            write(momentum, transforms[:, r:, r:] @ moved, active, self.offsets)


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
        self.count, self.max_rank = slots.counts[side], slots.max_rank
        self.size = slots.sizes[side]
        self.offsets = []  # of each width's matrices, in its own rows
        first = at = 0
        for count, size in zip(self.count, self.size, strict=True):
            self.offsets.append(offsets[at : at + count + 1] - first)
            first, at = first + size, at + count

    def blocks(self, tensors: Sequence[Sequence[torch.Tensor]]) -> Iterator[Block]:
        """Some matrices at a time of each width: `tensors` are lists by width."""
        first = 0
        for width, own in enumerate(zip(*tensors, strict=True)):
            count, size, r = self.count[width], self.size[width], self.max_rank
            whole = size == count * r and own[0].is_cpu
            step = max(1, BLOCK // (2 * r * own[0].shape[1])) if whole else max(1, count)
            for begin in range(0, count, step):
                end = min(begin + step, count)
                rows = slice(begin * r, end * r) if whole else slice(0, size)
                yield Block(
                    self.layer[first + begin : first + end],
                    self.offsets[width][begin : end + 1], [t[rows] for t in own], r,
                )  # fmt: skip
            first += count


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
    log_gain: torch.Tensor | None,
    beta: float,
    gain_rate: float,
) -> torch.Tensor:
    """`spectral_step_`, of checked arguments."""
    sides, grams, totals, cosines = [], [], [], []
    for i, tensors in enumerate(((p, momentum_p, gradient_p), (q, momentum_q, gradient_q))):
        side = Side(slots, i)
        blocks, gram, total = [*side.blocks(tensors)], [], []
        for block in blocks:
            stacked, _ = block.stacked(beta)
            gram.append(stacked @ stacked.mT)
            total.append(block.total())
            if log_gain is not None:
                used = total[-1].isfinite() & (total[-1] > 0)
                cosines.append(torch.where(used, block.cosine(), torch.nan))
        sides.append(blocks)
        grams.append(torch.cat(gram)[side.place])
        totals.append(torch.cat(total)[side.place])
    total_of, offsets, r = totals[0] + totals[1], slots.offsets[1], slots.max_rank
    eta, scaling, decay = (t.double() for t in (eta, scaling, decay))
    if log_gain is not None:
        log_gain.copy_(next_gain(log_gain.double(), torch.cat(cosines), gain_rate))
        eta = eta * log_gain.double().exp()
    real = torch.arange(r, device=lam.device) < offsets.diff()[:, None]
    kept = real if mask is None else real & (pad(mask, offsets, r) > 0)
    values = torch.where(kept, pad(lam, offsets, r), 0.0).double()
    small = solve(
        torch.stack(grams), values * scaling[:, None], real, kept, eta, decay,
        total_of.isfinite() & (total_of > 0),
    )  # fmt: skip
    # Most often all move: then nothing old is to be kept.
    active = None if small.active.all() else small.active[:, None]
    write(lam, torch.where(kept, small.values / scaling[:, None], 0.0), active, offsets)
    for blocks, transforms in zip(sides, small.transforms, strict=True):
        for block in blocks:
            block.write(transforms, beta, active)
    return small.candidates.to(lam.dtype)


def write(
    to: torch.Tensor, padded: torch.Tensor, active: torch.Tensor | None, offsets: torch.Tensor
) -> None:
    """Padded rows to packed ones: of those matrices that are active ``[G, 1, …]``; None: of all."""
    new = unpad(padded, offsets, len(to))
    if active is not None:
        moved = unpad(active.expand(padded.shape), offsets, len(to))
        new = torch.where(moved, new.to(to.dtype), to)
    to.copy_(new)
