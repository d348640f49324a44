# mypy: allow-untyped-defs
"""A group of SVD linear layers with one input, from the kernels of `svd_adapter`.

Forward: one shrink over x with all layers' P joined; for each layer an expand from its columns of
h, and the vendor's GEMM (see `svd_linear`: the paths "prepare" and "add"). Where the cost model has
the fused GEMM for every layer, each layer is that one launch instead. Backward: for each layer one
pass over its dy, which leaves u in its columns; then one pass over x for all dP and dΛ and the
adapters' dx, to which each layer's GEMM adds; one reduction.

Launches beyond the base GEMMs of n layers: forward n + 1, fused none; backward n + 2.
"""

from collections.abc import Sequence

import torch

from ..ops.svd_adapter_add import flat
from ..ops.svd_linear_group import (
    _backward_default,
    _forward,
    gradient_shapes,
    joined,
    ranks_of,
)
from .configs import HIGHEST_RANK, architecture_of
from .svd_adapter import (
    expand_,
    factors_of,
    gradients_dy,
    gradients_x,
    parts_of_u,
    reduce,
    rows_of,
    shrink,
    supported,
    total_of,
)
from .svd_linear import fused_, linear_, tile_of_fused


def _supported(x: torch.Tensor, p: Sequence[torch.Tensor], q: Sequence[torch.Tensor]) -> bool:
    """Whether the kernels take these inputs: a joined rank has to fit as one layer's does."""
    return sum(ranks_of(p)) <= HIGHEST_RANK and all(
        supported(x, own_p, own_q) for own_p, own_q in zip(p, q, strict=True)
    )


def forward(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    bias: list[torch.Tensor],
    p: list[torch.Tensor],
    lam: list[torch.Tensor],
    q: list[torch.Tensor],
    scaling: float,
    tangent: float,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(y of every layer, h [T, r_1 + … + r_n]): `hal::svd_linear_group`."""
    if not _supported(x, p, q):
        return _forward(x, weight, bias, p, lam, q, scaling, tangent)
    rows, ranks = rows_of(x), ranks_of(p)
    biases = [b.contiguous() if b.numel() else None for b in bias]
    factors = [factors_of(*own) for own in zip(p, lam, q, strict=True)]
    outputs = [x.new_empty(*x.shape[:-1], w.shape[0]) for w in weight]
    tiles = [tile_of_fused(rows, w, own[0], own[2]) for w, own in zip(weight, factors, strict=True)]
    if all(tile is not None for tile in tiles):
        h = x.new_empty(rows.shape[0], sum(ranks), dtype=torch.float32)
        for i, (tile, own_h) in enumerate(zip(tiles, h.split(ranks, 1), strict=True)):
            assert tile is not None
            own_p, own_lam, own_q = factors[i]
            fused_(
                flat(outputs[i]), own_h, rows, weight[i], biases[i], own_p, own_lam, own_q,
                scaling, 0.0, None, tile,
            )  # fmt: skip
        return outputs, h
    parts = shrink(rows, factors_of(joined(p), lam[0], q[0])[0])
    h = total_of(parts)
    prepare = architecture_of(x.device).prepare
    columns = zip(parts.split(ranks, 2), h.split(ranks, 1), strict=True)
    layers = zip(outputs, weight, biases, factors, columns, strict=True)
    for out, w, b, (_, own_lam, own_q), (own_parts, own_h) in layers:
        linear_(flat(out), rows, w, b, own_parts, own_h, own_lam, own_q, scaling, prepare)
    return outputs, h


def backward(
    dy: list[torch.Tensor | None],
    x: torch.Tensor,
    h: torch.Tensor,
    weight: list[torch.Tensor],
    p: list[torch.Tensor],
    lam: list[torch.Tensor],
    q: list[torch.Tensor],
    scaling: float,
    tangent: float,
    needs_dx: bool,
    needs_factors: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """(dx, dP of all layers, dΛ of all layers, dQ of each): `hal::svd_linear_group_backward`."""
    if not _supported(x, p, q) or all(g is None for g in dy):
        return _backward_default(
            dy, x, h, weight, p, lam, q, scaling, tangent, needs_dx, needs_factors
        )
    rows, h = rows_of(x), h.contiguous()
    upstream = [None if g is None else rows_of(g) for g in dy]
    factors = [factors_of(*own) for own in zip(p, lam, q, strict=True)]
    dx = x.new_empty(rows.shape if needs_dx else (0,))
    gradients = gradient_shapes(p, lam, q, tangent, False)
    if needs_factors:
        prepared = dx if needs_dx else None
        gradients = _gradients(
            upstream, rows, h, joined(p), joined(lam), factors, scaling, tangent, prepared
        )
    elif needs_dx:
        base = None
        for g, (own_p, own_lam, own_q) in zip(upstream, factors, strict=True):
            if g is not None:
                expand_(dx, shrink(g, own_q), own_lam, own_p, scaling, base=base)
                base = dx
    if needs_dx:
        for g, w in zip(upstream, weight, strict=True):
            if g is not None:
                dx.addmm_(g, w)
    return dx.view(x.shape) if needs_dx else dx, *gradients


def _gradients(
    dy: list[torch.Tensor | None],
    x: torch.Tensor,
    h: torch.Tensor,
    p: torch.Tensor,
    lam: torch.Tensor,
    factors: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    scaling: float,
    tangent: float,
    dx: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """dP and dΛ, joined, and each layer's dQ; the adapters' dx is written to `dx`.

    p and lam are joined; `factors` are each layer's own.
    """
    ranks = ranks_of([own_p for own_p, _, _ in factors])
    parts = max(
        parts_of_u(g, own_q) for g, (_, _, own_q) in zip(dy, factors, strict=True) if g is not None
    )
    make = h.new_zeros if any(g is None for g in dy) else h.new_empty
    u = make(parts, *h.shape)
    sums = []
    columns = zip(dy, factors, h.split(ranks, 1), u.split(ranks, 2), strict=True)
    for g, (_, own_lam, own_q), own_h, own_u in columns:
        if g is None:
            sums.append(torch.zeros_like(own_q))
        else:
            sums.append(gradients_dy(g, own_h, own_u, own_lam, own_q, scaling, tangent))
    p, lam, _ = factors_of(p, lam, p)
    dp, dlam = gradients_x(x, h, u, p, lam, scaling, tangent=tangent, dx=dx)
    dp, dlam, *dq = reduce([dp, dlam, *sums], [p, lam, *(own_q for _, _, own_q in factors)])
    return dp, dlam, dq
