"""Initial directions: the top singular vectors of the weights' gradients in the first steps.

While Λ is zero an adapter is the identity whatever P and Q are, and learns nothing of them either.
So the first optimizer steps are spent on finding out in which directions the loss falls. In them
every layer computes with other factors,

    P' = [Ω; 0]    Λ' = 1    Q' = [0; Ω']      with Gaussian Ω and Ω',

whose product is zero. The gradients of their zero halves are sketches of the weight's gradient G,
GΩᵀ and Ω'G, of which the singular vectors are made (Tropp et al. 2017, "Practical sketching
algorithms for low-rank matrix approximation", alg. 4). They come out of the layers' own backward
pass: micro-batches add up, checkpointing and autocast change nothing, and G itself is never formed.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..config import HALConfig
from .allocation import pruned_count
from .layout import LayerSpec, Layout
from .packed import LayerFactors, Packed
from .processes import average_

STEPS = 4  # the gradient of one batch is noisy
OVERSAMPLING = 8  # columns of a sketch beyond the rank


def alignment_steps(config: HALConfig, layout: Layout) -> int:
    """How many optimizer steps choose directions: none that allocates, or comes after."""
    steps, budget, initial = 0, config.budget(layout.narrowest), layout.initial_rows
    if config.aligned:
        while steps < STEPS and pruned_count(config, budget, initial, steps + 1) is None:
            steps += 1
    return steps


def _columns(spec: LayerSpec) -> tuple[int, int]:
    """Rows of Ω and of Ω' for one layer."""
    narrowest = min(spec.d_in, spec.d_out)
    return min(spec.rank + OVERSAMPLING, narrowest), min(spec.rank + 2 * OVERSAMPLING, narrowest)


def sketch_size(layout: Layout) -> int:
    """How many numbers the sketches of all layers hold."""
    return sum(
        m * spec.d_in + k * spec.d_out for spec in layout.layers for k, m in [_columns(spec)]
    )


def saved_steps(config: HALConfig, layout: Layout, state: torch.Tensor) -> int:
    """The step that an adapter's extra state says; sketches follow it while they are under way.

    It has no sketches where Λ was not zero at the start, so that directions were not chosen.

    Raises:
        ValueError: it says no step, or is not what an adapter has then.
    """
    numbers = state.numel()
    first = float(state[0]) if state.dim() == 1 and numbers and not state.is_complex() else math.nan
    if not (first >= 0 and first.is_integer()):
        raise ValueError(
            f"_extra_state begins with {first} and has shape {tuple(state.shape)}, expected a "
            "vector that begins with a number of steps"
        )
    steps, sizes = int(state[0]), [1]
    if 0 < steps < alignment_steps(config, layout):
        sizes.append(1 + sketch_size(layout))
    if numbers not in sizes:
        raise ValueError(
            f"_extra_state has {numbers} numbers, expected {' or '.join(map(str, sizes))} after "
            f"{steps} steps"
        )
    if config.skip_nonfinite and not state.isfinite().all():
        raise ValueError("_extra_state holds NaN or Inf")
    return steps


class Alignment:
    """The factors that all layers compute with in the first steps.

    Args:
        layout: of the adapter's factors.
        dtype: of its factors; 16-bit ones are sketched in float32.
        device: of its factors.
    """

    def __init__(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        self.layout = layout
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        generator = torch.Generator().manual_seed(0)  # on every process the same
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.columns: list[int] = []  # rows of Ω; the others belong to Ω'
        for spec in layout.layers:
            k, m = _columns(spec)
            p, q = torch.zeros(k + m, spec.d_in), torch.zeros(k + m, spec.d_out)
            p[:k].normal_(std=1 / math.sqrt(spec.d_in), generator=generator)
            q[k:].normal_(std=1 / math.sqrt(spec.d_out), generator=generator)
            p, q = (t.to(device, dtype).requires_grad_() for t in (p, q))
            self.pairs.append((p, q))
            self.columns.append(k)
        self.sums = [torch.zeros_like(part) for part in self._parts(self.leaves())]
        """The sketches of the steps so far, Ω'G and GΩᵀ of each layer in turn."""
        self.ones = [torch.ones(p.shape[0], dtype=dtype, device=device) for p, _ in self.pairs]

    def leaves(self) -> list[torch.Tensor]:
        """What gradients are left in."""
        return [t for pair in self.pairs for t in pair]

    def _parts(self, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Of tensors like the leaves, the rows in which a leaf is zero: their gradients count."""
        starts = [slice(k, None) for k in self.columns], [slice(k) for k in self.columns]
        rows = [which for pair in zip(*starts, strict=True) for which in pair]
        return [leaf[which] for leaf, which in zip(leaves, rows, strict=True)]

    @torch.no_grad()
    def end_step(self, process_group: Any) -> None:
        """Add this step's gradients to the sketches, averaged over all processes."""
        gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in self.leaves()]
        sketches = self._parts(gradients)
        average_(sketches, process_group)
        torch._foreach_add_(self.sums, sketches)

    def take(self, sketches: torch.Tensor) -> None:
        """Go on with the sketches of a saved state, laid end to end."""
        parts = sketches.split([t.numel() for t in self.sums])
        for total, part in zip(self.sums, parts, strict=True):
            total.copy_(part.view(total.shape))

    def views(self, effective: Sequence[torch.Tensor]) -> list[LayerFactors]:
        """Every layer's factors; `effective`, the adapter's own, get gradients of zero.

        Else their parameters would have none in these steps, which DistributedDataParallel forbids.
        """
        zero = nothing(effective)
        return [(p, one + zero, q) for (p, q), one in zip(self.pairs, self.ones, strict=True)]

    @torch.no_grad()
    def directions(self) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
        """Every layer's P ``[r, d_in]`` and Q ``[r, d_out]``; None where no gradient arrived.

        With the sign at which Λ grows: a positive Λ lowers the loss.
        """
        found: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(self.pairs)
        sums_p, sums_q = self.sums[::2], self.sums[1::2]
        alike: dict[tuple[torch.Size, torch.Size], list[int]] = {}
        for i, (p, q) in enumerate(self.pairs):
            if self.layout.ranks[i] > 0:
                alike.setdefault((p.shape, q.shape), []).append(i)
        for members in alike.values():
            k = self.columns[members[0]]
            of_rows = torch.stack([sums_q[i] for i in members])
            of_columns = torch.stack([sums_p[i] for i in members])
            # Without skip_nonfinite a sketch may hold NaN. That of an unused layer is zero.
            finite = of_rows.flatten(1).isfinite().all(1) & of_columns.flatten(1).isfinite().all(1)
            seen = (finite & of_rows.flatten(1).any(1)).tolist()
            of_rows, of_columns = (
                torch.nan_to_num(t, 0.0, 0.0, 0.0) for t in (of_rows, of_columns)
            )
            test = torch.stack([self.pairs[i][1][k:] for i in members])
            left = torch.linalg.qr(of_rows.mT)[0]  # [n, d_out, k]: the range of G
            core = torch.linalg.pinv(test @ left) @ of_columns  # [n, k, d_in]: leftᵀG
            u, _, vh = torch.linalg.svd(core, full_matrices=False)
            q_rows = (left @ u).mT
            for n, (i, usable) in enumerate(zip(members, seen, strict=True)):
                if usable:
                    rank = self.layout.ranks[i]
                    found[i] = (-vh[n, :rank], q_rows[n, :rank])
        return found

    @torch.no_grad()
    def write(self, starts: Sequence[Packed]) -> None:
        """Put the directions where an adapter's factors start: all of `starts` alike."""
        sides = [(self.layout.p.split(s.p), self.layout.q.split(s.q)) for s in starts]
        for i, directions in enumerate(self.directions()):
            if directions is not None:
                for p, q in sides:
                    p[i].copy_(directions[0])
                    q[i].copy_(directions[1])


def nothing(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Zero, made of tensors to which it gives gradients of zero."""
    zero: torch.Tensor = _Nothing.apply(*tensors)
    return zero


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.like = [(t.shape, t.dtype, t.device) for t in tensors]  # type: ignore[attr-defined]
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        like = ctx.like  # type: ignore[attr-defined]
        return tuple(torch.zeros(s, dtype=t, device=d) for s, t, d in like)
