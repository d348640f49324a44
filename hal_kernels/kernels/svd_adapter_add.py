"""The SVD adapter added to the output of any base layer, in Triton.

    h = dropout(x)·P,   out = y + s·(h ⊙ Λ)Q

The kernels are those of `svd_adapter`. Launches: 2 forward (shrink, expand); 3 backward (gradients
of dy, of x with dx, the reduction), 2 up to one block of rows or where the factors are frozen.
"""

import torch

from ..ops.svd_adapter_add import _backward_default, _forward, flat
from .svd_adapter import expand_, factors_of, gradients, rows_of, shrink, supported, total_of


def forward(
    y: torch.Tensor,
    x: torch.Tensor,
    p: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    scaling: float,
    dropout: float,
    seed: torch.Tensor | None,
    tangent: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, h [T, r]): `hal::svd_adapter_add`."""
    if not supported(x, p, q):
        return _forward(y, x, p, lam, q, scaling, dropout, seed, tangent)
    p, lam, q = factors_of(p, lam, q)
    out = y.new_empty(y.shape)
    parts = shrink(rows_of(x), p, dropout, seed)
    h = total_of(parts)
    expand_(flat(out), parts, lam, q, scaling, h_sum=h, base=rows_of(y))
    return out, h


def backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    p: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    scaling: float,
    dropout: float,
    seed: torch.Tensor | None,
    tangent: float,
    needs_dx: bool,
    needs_factors: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dP, dΛ, dQ): `hal::svd_adapter_add_backward`."""
    if not supported(x, p, q):
        return _backward_default(
            dout, x, h, p, lam, q, scaling, dropout, seed, tangent, needs_dx, needs_factors
        )
    p, lam, q = factors_of(p, lam, q)
    dx = x.new_empty(x.shape if needs_dx else (0,))
    dp, dlam, dq = gradients(
        rows_of(dout), rows_of(x), h, p, lam, q, scaling, dropout, seed, tangent,
        flat(dx) if needs_dx else None, needs_factors,
    )  # fmt: skip
    return dx, dp, dlam, dq
