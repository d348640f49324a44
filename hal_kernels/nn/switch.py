"""From another update to update="spectral": the same ΔW, with orthonormal directions."""

import dataclasses

import torch

from .adapter import HyperAdapter
from .packed import LayerFactors


@torch.no_grad()
def to_spectral(adapter: HyperAdapter) -> HyperAdapter:
    """An adapter of the same function, ranks and step, whose factors move by spectral steps.

    Its momenta are zero, as another update's moments are of other numbers.
    """
    score = "sensitivity" if adapter.config.allocation == "ema" else adapter.config.allocation
    config = dataclasses.replace(
        adapter.config, update="spectral", hypernet="direct", hidden=None, allocation=score
    )
    made = HyperAdapter(config, adapter.layout, adapter.mask.device)
    made.to(adapter.lam.dtype)
    made.mask.copy_(adapter.mask)
    made.never_called.copy_(adapter.never_called)
    views = zip(
        adapter.current().views, made.current().views, adapter.mask.split(adapter.layout.ranks),
        strict=True,
    )  # fmt: skip
    for factors, new, mask in views:
        if len(mask) > 0:
            for to, value in zip(new, _decomposed(factors, mask), strict=True):
                to.copy_(value)
    made.steps = adapter.steps
    return made


def _decomposed(factors: LayerFactors, mask: torch.Tensor) -> LayerFactors:
    """The SVD of Qᵀ diag(Λ) P, largest first along the rows that are kept."""
    p, lam, q = (t.double() for t in factors)
    basis_p, of_p = torch.linalg.qr(p.t())
    basis_q, of_q = torch.linalg.qr(q.t())
    left, values, right = torch.linalg.svd(of_q @ lam.diag() @ of_p.t())
    rows = torch.cat([(mask > 0).nonzero().flatten(), (mask <= 0).nonzero().flatten()])
    place = rows.argsort()
    return right[place] @ basis_p.t(), values[place] * (mask > 0), left.t()[place] @ basis_q.t()
