"""The SVD adapter added to the output of any base layer.

    h = xP,   out = y + s·(h ⊙ Λ)Q

for base layers whose GEMM is not ours to run (quantized, sparse or foreign). With u = dout·Qᵀ:

    dy = dout            dx = s·(u ⊙ Λ)Pᵀ          dΛ = s·Σ_t h ⊙ u
    dP = s·xᵀ(u ⊙ Λ)     dQ = s·(h ⊙ Λ)ᵀ dout

Tangent gradients, for steps along the matrices of rank r: with G = doutᵀ·x the gradient of ΔW,
``[d_out, d_in]``, and c = `tangent`, those of P and Q are instead

    dP = c·L,  L = QG = uᵀx ``[r, d_in]``          dQ = c·K,  K = PGᵀ = hᵀ dout ``[r, d_out]``

which do not vanish where Λ is zero, and Λ has none. c only keeps them in a range of one's choice.

Λ here is the effective one, Λ⊙mask, so its gradient is dΛ_eff: what the allocator scores pruned
directions with. `svd_linear` shares `shrink`, `expand_` and `adapter_gradients` with this file.

Backends: default (plain PyTorch, every device), cpu (csrc/svd_adapter_add.cpp), cuda
(`kernels.svd_adapter_add`, in Triton).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ._library import (
    accumulation_dtype,
    define,
    expect_dtype,
    expect_floating,
    expect_number,
    expect_same_device,
    expect_shape,
)
from .dropout import draw_seed, keep_blocks


def svd_adapter_add(
    y: torch.Tensor,
    x: torch.Tensor,
    p: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    tangent: float = 0.0,
) -> torch.Tensor:
    """``y + scaling · (dropout(x)·P ⊙ (Λ⊙mask)) Q``.

    Args:
        y: base layer's output ``[..., d_out]``, floating point.
        x: its input ``[..., d_in]``, same leading dimensions; cast to y's dtype if they differ.
        p: ``[r, d_in]``, one singular direction a row (Pᵀ). Any float dtype; gradients keep it.
        lam: ``[r]`` singular values. With `mask` given its gradient is dΛ_eff ⊙ mask; pass
            ``lam * mask`` yourself to see the unmasked dΛ_eff as that tensor's gradient.
        q: ``[r, d_out]``, one singular direction a row.
        mask: ``[r]``, 1 keeps a direction, 0 prunes it.
        scaling: s = alpha / rank.
        dropout: probability of zeroing an element of x on the adapter's path, in [0, 1).
        seed: int64 scalar naming the dropout mask; drawn from torch's generator if None.
        tangent: c. Above 0, the gradients of p and q are the tangent ones, c·L and c·K, and lam has
            none; a power of two scales them without rounding.

    Returns:
        ``[..., d_out]`` in y's dtype; sums are accumulated in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    expect_floating("y", y)
    expect_floating("x", x)
    if y.dim() == 0:
        raise ValueError("y has shape (), expected [..., d_out]")
    if x.dim() == 0:
        raise ValueError("x has shape (), expected [..., d_in]")
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"y has leading dimensions {tuple(y.shape[:-1])}, expected {tuple(x.shape[:-1])} (x's)"
        )
    check_adapter(
        x, p, lam, q, d_in=x.shape[-1], d_out=y.shape[-1], dropout=dropout, tangent=tangent
    )
    expect_same_device("x", x, y=y)
    scaling = expect_number("scaling", scaling)
    lam, seed = effective(x, lam, mask, dropout, seed)
    x = x.to(y.dtype)
    return _svd_adapter_add(y, x, p, lam, q, scaling, dropout, seed, float(tangent))[0]


def svd_adapter_add_reference(
    y: torch.Tensor,
    x: torch.Tensor,
    p: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    scaling: float = 1.0,
) -> torch.Tensor:
    """The formula, differentiable by autograd, without dropout: what every backend is held to."""
    return y + scaling * ((x @ p.t()) * lam) @ q


def check_adapter(
    x: torch.Tensor,
    p: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    *,
    d_in: int,
    d_out: int,
    dropout: float,
    tangent: float,
    at: str = "",
) -> None:
    """Raise TypeError or ValueError, naming the argument, for inputs no backend accepts.

    Args:
        at: what follows the names of a layer's tensors, "[1]" in a list of layers.
    """
    expect_floating("x", x)
    expect_floating(f"p{at}", p)
    expect_floating(f"lam{at}", lam)
    expect_floating(f"q{at}", q)
    if x.dim() == 0:
        raise ValueError("x has shape (), expected [..., d_in]")
    rank = p.shape[0] if p.dim() == 2 else -1
    expect_shape(f"p{at}", p, (rank, d_in), "[r, d_in]")
    expect_shape(f"lam{at}", lam, (rank,), "[r]")
    expect_shape(f"q{at}", q, (rank, d_out), "[r, d_out]")
    expect_same_device("x", x, **{f"p{at}": p, f"lam{at}": lam, f"q{at}": q})
    expect_number("dropout", dropout, least=0.0, below=1.0)
    expect_number("tangent", tangent, least=0.0)


def effective(
    x: torch.Tensor,
    lam: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Λ⊙mask, and the seed of the dropout mask (None without dropout)."""
    if mask is not None:
        expect_shape("mask", mask, tuple(lam.shape), "[r]")
        expect_same_device("lam", lam, mask=mask)
        lam = lam * mask
    if seed is not None:
        expect_dtype("seed", seed, torch.int64, "a scalar")
        expect_shape("seed", seed, (), "a scalar")
        expect_same_device("x", x, seed=seed)
    elif dropout > 0.0:
        seed = draw_seed(x.device)
    return lam, seed if dropout > 0.0 else None


def shrink(
    x: torch.Tensor, p: torch.Tensor, dropout: float, seed: torch.Tensor | None
) -> torch.Tensor:
    """h = dropout(x)·P, ``[T, r]`` in the accumulation dtype."""
    p = p.to(x.dtype).t()
    if seed is None:
        return (x @ p).to(accumulation_dtype(x.dtype))
    h = x.new_empty(x.shape[0], p.shape[1], dtype=accumulation_dtype(x.dtype))
    for rows, keep in keep_blocks(x, dropout, seed):
        h[rows] = keep.mul_(x[rows]) @ p
    return h


def expand_(
    y: torch.Tensor, h: torch.Tensor, lam: torch.Tensor, q: torch.Tensor, scaling: float
) -> None:
    """y += s·(h ⊙ Λ)Q in place, ``[T, d_out]``."""
    y.addmm_((h * (lam.to(h.dtype) * scaling)).to(y.dtype), q.to(y.dtype))


def adapter_gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    p: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    scaling: float,
    dropout: float,
    seed: torch.Tensor | None,
    tangent: float,
    dx: torch.Tensor | None,
    needs_factors: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dP, dΛ_eff, dQ) from dy and x ``[T, d]``; adds the adapter's part to `dx` unless None.

    Without `needs_factors` the three are empty: only `dx` is computed. With `tangent` dΛ is.
    """
    dtype = x.dtype
    scaled = lam.to(h.dtype) * scaling
    u = (dy @ q.to(dtype).t()).to(h.dtype)
    ul = (u * scaled).to(dtype)
    left = u.to(dtype) if tangent else ul  # of dP
    if seed is None:
        if dx is not None:
            dx.addmm_(ul, p.to(dtype))
        dp = left.t() @ x if needs_factors else None
    else:
        dp = torch.zeros_like(p, dtype=h.dtype)
        for rows, keep in keep_blocks(x, dropout, seed):
            if dx is not None:
                dx[rows] += keep * (ul[rows] @ p.to(dtype))
            if needs_factors:
                dp += left[rows].t() @ keep.mul_(x[rows])
    if not needs_factors or dp is None:
        return p.new_empty(0), lam.new_empty(0), q.new_empty(0)
    if tangent:
        dq = h.to(dtype).t() @ dy
        # Scaled last: 16-bit operands would lose what a small c makes of them.
        return dp.to(p.dtype).mul_(tangent), lam.new_empty(0), dq.to(q.dtype).mul_(tangent)
    dlam = (h * u).sum(0).mul_(scaling)
    dq = (h * scaled).to(dtype).t() @ dy
    return dp.to(p.dtype), dlam.to(lam.dtype), dq.to(q.dtype)


def factor_gradient_shapes(
    p: torch.Tensor, lam: torch.Tensor, q: torch.Tensor, tangent: float, needs_factors: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Empty outputs of `adapter_gradients`, for shape functions."""
    if needs_factors:
        rank = 0 if tangent else lam.shape[0]
        return p.new_empty(p.shape), lam.new_empty(rank), q.new_empty(q.shape)
    return p.new_empty(0), lam.new_empty(0), q.new_empty(0)


def wants_factors(needs: Sequence[bool], tangent: float) -> bool:
    """Whether a gradient of P, Λ or Q is asked for; with `tangent` Λ has none."""
    p, lam, q = needs
    return p or q or (lam and not tangent)


def flat(x: torch.Tensor) -> torch.Tensor:
    """``[..., d]`` as ``[T, d]``: a view where x's strides allow one."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _forward(
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
    h = shrink(flat(x), p, dropout, seed)
    out = y.clone(memory_format=torch.contiguous_format)
    expand_(flat(out), h, lam, q, scaling)
    return out, h


def _forward_fake(
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
    h = x.new_empty(math.prod(x.shape[:-1]), p.shape[0], dtype=accumulation_dtype(x.dtype))
    return y.new_empty(y.shape), h


def _backward_default(
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
    dx = x.new_zeros(x.shape) if needs_dx else None
    dp, dlam, dq = adapter_gradients(
        flat(dout), flat(x), h, p, lam, q, scaling, dropout, seed, tangent,
        None if dx is None else flat(dx), needs_factors,
    )  # fmt: skip
    return x.new_empty(0) if dx is None else dx, dp, dlam, dq


def _backward_fake(
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
    dx = x.new_empty(x.shape) if needs_dx else x.new_empty(0)
    return dx, *factor_gradient_shapes(p, lam, q, tangent, needs_factors)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, x, p, lam, q, ctx.scaling, ctx.dropout, seed, ctx.tangent = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], p, lam, q, seed)


def _autograd_backward(ctx: Any, dout: torch.Tensor, _dh: torch.Tensor) -> tuple[Any, ...]:
    x, h, p, lam, q, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = wants_factors(needs[2:5], ctx.tangent)
    dx, dp, dlam, dq = _svd_adapter_add_backward(
        dout, x, h, p, lam, q, ctx.scaling, ctx.dropout, seed, ctx.tangent, needs[1], wanted
    )
    factors = (dp, None if ctx.tangent else dlam, dq) if wanted else (None, None, None)
    return dout, dx if needs[1] else None, *factors, None, None, None, None


def _forward_cuda(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from ..kernels.svd_adapter_add import forward

    return forward(*args)


def _backward_cuda(
    *args: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from ..kernels.svd_adapter_add import backward

    return backward(*args)


_svd_adapter_add = define(
    "svd_adapter_add(Tensor y, Tensor x, Tensor p, Tensor lam, Tensor q, float scaling,"
    " float dropout, Tensor? seed, float tangent) -> (Tensor, Tensor)",
    default=_forward,
    cuda=_forward_cuda,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_autograd_backward,
    first_only=True,
)
_svd_adapter_add_backward = define(
    "svd_adapter_add_backward(Tensor dout, Tensor x, Tensor h, Tensor p, Tensor lam, Tensor q,"
    " float scaling, float dropout, Tensor? seed, float tangent, bool needs_dx,"
    " bool needs_factors)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    default=_backward_default,
    cuda=_backward_cuda,
    fake=_backward_fake,
)
