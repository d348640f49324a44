"""The layers in plain PyTorch, for every device: a single layer is a group of one.

Without temporaries of x's or y's size. This is also what decides the shapes of all backends.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from .._library import accumulation_dtype
from ..dropout import keep_blocks

Factors = Sequence[torch.Tensor]
"""P, Λ or Q of each layer."""
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]
"""dx, dP and dΛ of all layers joined along the rank, dQ of each. Empty: not asked for."""


def flat(x: torch.Tensor) -> torch.Tensor:
    """``[..., d]`` as ``[T, d]``: a view where x's strides allow one."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def ranks_of(p: Factors) -> list[int]:
    """The layers' ranks: how what is joined comes apart."""
    return [t.shape[0] for t in p]


def joined(tensors: Factors) -> torch.Tensor:
    """`tensors` along their first dimension: a view if each begins where the one before ends."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    at, rows = first.storage_offset(), 0
    for t in tensors:
        if (
            t.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or t.stride() != first.stride()
            or t.storage_offset() != at + rows * first.stride(0)
        ):
            return torch.cat(list(tensors))
        rows += t.shape[0]
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def empty_outputs(
    x: torch.Tensor, p: Factors, q: Factors
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(y of each layer, h) to be written. No y is a view: autograd lets nobody write to one."""
    rows, rank = math.prod(x.shape[:-1]), sum(ranks_of(p))
    h = x.new_empty(rows, rank, dtype=accumulation_dtype(x.dtype))
    return [x.new_empty(*x.shape[:-1], t.shape[1]) for t in q], h


def empty_gradients(
    x: torch.Tensor,
    p: Factors,
    lam: Factors,
    q: Factors,
    tangent: float,
    needs_dx: bool,
    needs_factors: bool,
) -> Gradients:
    """All gradients, to be written."""
    rank = sum(ranks_of(p)) if needs_factors else 0
    return (
        x.new_empty(x.shape if needs_dx else (0,)),
        p[0].new_empty((rank, p[0].shape[1]) if needs_factors else (0,)),
        lam[0].new_empty(0 if tangent else rank),
        [t.new_empty(t.shape if needs_factors else (0,)) for t in q],
    )


class Shapes:
    """A backend that computes nothing."""

    @staticmethod
    def forward(
        x: torch.Tensor, weight: Any, base: Any, p: Factors, lam: Factors, q: Factors, *_: Any
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        return empty_outputs(x, p, q)

    @staticmethod
    def backward(
        dy: Any, x: torch.Tensor, h: Any, weight: Any, p: Factors, lam: Factors, q: Factors,
        scaling: float, dropout: float, seed: Any, *options: Any,
    ) -> Gradients:  # fmt: skip
        return empty_gradients(x, p, lam, q, *options)


def forward(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor | None],
    base: Sequence[torch.Tensor | None],
    p: Factors,
    lam: Factors,
    q: Factors,
    scaling: float,
    dropout: float,
    seed: torch.Tensor | None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(y of each layer, h of all ``[T, r_1 + … + r_n]`` in the accumulation dtype).

    A layer's `base` is its bias; without a weight it is what the adapter is added to.
    """
    rows, (outputs, h) = flat(x), empty_outputs(x, p, q)
    factor = joined(p).to(x.dtype).t()
    if seed is None:
        h = (rows @ factor).to(h.dtype)
    else:
        for block, keep in keep_blocks(rows, dropout, seed):
            h[block] = keep.mul_(rows[block]) @ factor
    layers = zip(outputs, weight, base, h.split(ranks_of(p), 1), lam, q, strict=True)
    for out, own_weight, own_base, own_h, own_lam, own_q in layers:
        y = flat(out)
        if own_weight is None:
            assert own_base is not None
            out.copy_(own_base)
        elif own_base is None:
            torch.mm(rows, own_weight.t(), out=y)
        else:
            torch.addmm(own_base, rows, own_weight.t(), out=y)
        y.addmm_((own_h * (own_lam.to(h.dtype) * scaling)).to(y.dtype), own_q.to(y.dtype))
    return outputs, h


def backward(
    dy: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    h: torch.Tensor,
    weight: Sequence[torch.Tensor | None],
    p: Factors,
    lam: Factors,
    q: Factors,
    scaling: float,
    dropout: float,
    seed: torch.Tensor | None,
    tangent: float,
    needs_dx: bool,
    needs_factors: bool,
) -> Gradients:
    """The gradients of those layers whose dy is given; the others' are zero."""
    rows, dtype, ranks = flat(x), x.dtype, ranks_of(p)
    scaled = joined(lam).to(h.dtype) * scaling
    weighted = (h if tangent else h * scaled).to(dtype)
    dx, us, dq = None, [], []
    layers = zip(dy, weight, q, weighted.split(ranks, 1), strict=True)
    for own_dy, own_weight, own_q, own_h in layers:
        if own_dy is None:
            us.append(torch.zeros_like(own_h, dtype=h.dtype))
            dq.append(torch.zeros_like(own_q))
            continue
        own_dy = flat(own_dy)
        us.append((own_dy @ own_q.to(dtype).t()).to(h.dtype))
        if needs_dx and own_weight is not None:
            dx = own_dy @ own_weight if dx is None else dx.addmm_(own_dy, own_weight)
        if needs_factors:
            dq.append((own_h.t() @ own_dy).to(own_q.dtype))
    if needs_dx and dx is None:
        dx = rows.new_zeros(rows.shape)
    u = us[0] if len(us) == 1 else torch.cat(us, 1)
    ul, factor = (u * scaled).to(dtype), joined(p)
    left = u.to(dtype) if tangent else ul  # of dP
    dp = None
    if seed is None:
        if dx is not None:
            dx.addmm_(ul, factor.to(dtype))
        if needs_factors:
            dp = left.t() @ rows
    else:
        dp = torch.zeros_like(factor, dtype=h.dtype)
        for block, keep in keep_blocks(rows, dropout, seed):
            if dx is not None:
                dx[block] += keep * (ul[block] @ factor.to(dtype))
            if needs_factors:
                dp += left[block].t() @ keep.mul_(rows[block])
    nothing = empty_gradients(x, p, lam, q, tangent, False, False)
    out = nothing[0] if dx is None else dx.view(x.shape)
    if not needs_factors or dp is None:
        return out, *nothing[1:]
    dp = dp.to(factor.dtype)
    if tangent:  # scaled last: 16-bit operands would lose what a small c makes of them
        return out, dp.mul_(tangent), nothing[2], [own.mul_(tangent) for own in dq]
    return out, dp, (h * u).sum(0).mul_(scaling).to(lam[0].dtype), dq
