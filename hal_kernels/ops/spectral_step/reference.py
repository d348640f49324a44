"""One layer's spectral step as its formula stands: by QR and SVD, in the tensors' own precision."""

from typing import NamedTuple

import torch

LOWEST = 1e-5
"""A singular value of a momentum below this share of its largest is rounding: no direction."""

HIGHEST_GAIN = 2.5
"""The logarithm of a gain is learned within ± this: 12 times, or a twelfth."""


class Layer(NamedTuple):
    """What a step changes of one layer: factors and momenta."""

    p: torch.Tensor  # [r, d_in]
    lam: torch.Tensor  # [r]
    q: torch.Tensor  # [r, d_out]
    momentum_p: torch.Tensor  # [r, d_in]
    momentum_q: torch.Tensor  # [r, d_out]


def spectral_step_reference(
    layer: Layer,
    gradient_p: torch.Tensor,
    gradient_q: torch.Tensor,
    *,
    eta: float,
    scaling: float = 1.0,
    beta: float = 0.9,
    decay: float = 1.0,
    mask: torch.Tensor | None = None,
) -> tuple[Layer, torch.Tensor]:
    """The layer after one step, and its 2r candidate singular values, largest first.

    Arguments are those of `spectral_step_`, of one layer.
    """
    p, lam, q, momentum_p, momentum_q = layer
    r = len(lam)
    kept = torch.ones_like(lam, dtype=torch.bool) if mask is None else mask > 0
    values = torch.where(kept, scaling * lam, 0.0)  # of s·Λ⊙mask
    candidates = values.new_zeros(2 * r)
    total = gradient_p.abs().sum() + gradient_q.abs().sum()
    if not (total.isfinite() and total > 0):
        candidates[:r] = values.abs().sort(descending=True).values
        return layer, candidates

    momentum_p, momentum_q = beta * momentum_p + gradient_p, beta * momentum_q + gradient_q
    ahead_p, ahead_q = beta * momentum_p + gradient_p, beta * momentum_q + gradient_q
    a, b = torch.cat([p, msign(ahead_p)]), torch.cat([q, msign(ahead_q)])
    core = values.new_zeros(2 * r, 2 * r)
    core[:r, :r] = (decay * values).diag()
    core[range(r), range(r, 2 * r)] = core[range(r, 2 * r), range(r)] = -eta / 2
    basis_a, of_a = torch.linalg.qr(a.t())  # a = (basis_a·of_a)ᵀ
    basis_b, of_b = torch.linalg.qr(b.t())
    left, found, right = torch.linalg.svd(of_b @ core @ of_a.t())
    candidates[: len(found)] = found[: 2 * r]

    new_p, new_q = right[:r] @ basis_a.t(), left[:, :r].t() @ basis_b.t()
    overlap = new_p @ p.t()
    sign = overlap.gather(1, overlap.abs().argmax(1, keepdim=True)).sign()
    # The largest go to the rows that are kept, in their order; the next ones to the pruned rows.
    rows = torch.cat([kept.nonzero().flatten(), (~kept).nonzero().flatten()])
    changed = [torch.empty_like(t) for t in (p, lam, q)]
    changed[0][rows], changed[2][rows] = sign * new_p, sign * new_q
    changed[1][rows] = candidates[:r] / scaling
    p_, lam_, q_ = changed[0], torch.where(kept, changed[1], 0.0), changed[2]
    moved_p, moved_q = (q_ @ q.t()) @ momentum_p, (p_ @ p.t()) @ momentum_q
    return Layer(p_, lam_, q_, moved_p, moved_q), candidates


def msign(m: torch.Tensor) -> torch.Tensor:
    """(m mᵀ)^(−1/2) m: singular values become 1, those below `LOWEST` of the largest 0."""
    left, values, right = torch.linalg.svd(m, full_matrices=False)
    return (left * (values > LOWEST * values.max())) @ right


def next_gain(log_gain: torch.Tensor, cosines: torch.Tensor, rate: float) -> torch.Tensor:
    """The gain's logarithm after a step whose gradients have these cosines with their momenta.

    Those that are NaN, of matrices without a gradient, do not count.
    """
    mean = cosines.nanmean().nan_to_num()
    return (log_gain + rate * mean).clamp(-HIGHEST_GAIN, HIGHEST_GAIN)
