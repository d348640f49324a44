"""The SVD linear layer: frozen linear layer and SVD adapter in one operator.

    h = xP,   y = xWᵀ + b + s·(h ⊙ Λ)Q

Λ is the effective one, Λ⊙mask. Gradients, with u = dy·Qᵀ:

    dx = dy·W + s·(u ⊙ Λ)Pᵀ      dP = s·xᵀ(u ⊙ Λ)
    dΛ = s·Σ_t h ⊙ u             dQ = s·(h ⊙ Λ)ᵀ dy

With c = `tangent` other than 0, dP = c·uᵀx and dQ = c·hᵀdy instead (see `svd_adapter_add`).

The gradient of Λ is dΛ_eff, unmasked: what the allocator scores pruned directions with. Saved for
backward: x, h and the factors; no ``[T, d]`` temporary exists beside y (forward) and dx (backward).

Backends: default (plain PyTorch, every device), cpu (csrc/svd_linear.cpp), cuda
(`kernels.svd_linear`, in Triton). The base GEMM is the vendor library's, and low-rank product and
GEMM accumulate into one output; where it pays, the cuda backend does both in one GEMM of its own.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ._library import (
    accumulation_dtype,
    define,
    expect_floating,
    expect_number,
    expect_same_device,
    expect_shape,
)
from .svd_adapter_add import (
    adapter_gradients,
    check_adapter,
    effective,
    expand_,
    factor_gradient_shapes,
    flat,
    shrink,
    wants_factors,
)


def svd_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
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
    """``x·Wᵀ + b + scaling · (dropout(x)·P ⊙ (Λ⊙mask)) Q``.

    Args:
        x: ``[..., d_in]``, float32/bfloat16/float16/float64. Any strides, any leading dimensions.
        weight: ``[d_out, d_in]``, x's dtype. A transposed view (Conv1D) is as good.
        bias: ``[d_out]`` or None, x's dtype.
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

    Under `torch.autocast`, x, weight and bias are cast to its dtype as for ``F.linear``.

    Returns:
        ``[..., d_out]`` in x's dtype; sums are accumulated in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    check_layer(x, weight, bias, p, lam, q, dropout=dropout, tangent=tangent)
    scaling = expect_number("scaling", scaling)
    x, (weight,), (bias,) = autocast_inputs(x, [weight], [bias])
    lam, seed = effective(x, lam, mask, dropout, seed)
    return _svd_linear(x, weight, bias, p, lam, q, scaling, dropout, seed, float(tangent))[0]


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x goes with a layer's weight ``[d_out, d_in]`` as it is: no cast, no error."""
    return (
        x.dtype is weight.dtype
        and x.shape[-1:] == weight.shape[1:]
        and x.device == weight.device
        and not torch._C._is_any_autocast_enabled()
    )


def svd_linear_of_layer(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    p: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    scaling: float,
    tangent: float = 0.0,
) -> torch.Tensor:
    """`svd_linear` of an x that `fits` a layer whose own tensors were checked when it was made.

    The checks take about as long as the operator does for a few rows.
    """
    y: torch.Tensor = _svd_linear(x, weight, bias, p, lam, q, float(scaling), 0.0, None, tangent)[0]
    return y


def check_layer(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    p: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    *,
    dropout: float = 0.0,
    tangent: float = 0.0,
    at: str = "",
) -> None:
    """Raise TypeError or ValueError, naming the argument, for inputs no backend accepts.

    Args:
        at: what follows the names of a layer's tensors, "[1]" in a list of layers.
    """
    expect_floating("x", x)
    expect_floating(f"weight{at}", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight{at} has shape {tuple(weight.shape)}, expected [d_out, d_in]")
    d_out, d_in = weight.shape
    if x.dim() == 0 or x.shape[-1] != d_in:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected [..., {d_in}] "
            f"(weight{at} is [{d_out}, {d_in}])"
        )
    if bias is not None:
        expect_shape(f"bias{at}", bias, (d_out,), "[d_out]")
    check_adapter(x, p, lam, q, d_in=d_in, d_out=d_out, dropout=dropout, tangent=tangent, at=at)
    expect_same_device("x", x, **{f"weight{at}": weight, f"bias{at}": bias})
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise TypeError(
            f"x has dtype {x.dtype}, weight{at} {weight.dtype}"
            + ("" if bias is None else f", bias{at} {bias.dtype}")
            + ": expected one dtype (cast x, or use torch.autocast)"
        )


def autocast_inputs(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor | None]]:
    """x, weights and biases in autocast's dtype, where autocast is on."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        biases = [None if b is None else b.to(dtype) for b in biases]
        x, weights = x.to(dtype), [w.to(dtype) for w in weights]
    return x, list(weights), list(biases)


def svd_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    p: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    scaling: float = 1.0,
) -> torch.Tensor:
    """The formula, differentiable by autograd, without dropout: what every backend is held to."""
    return F.linear(x, weight, bias) + scaling * ((x @ p.t()) * lam) @ q


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    p: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    scaling: float,
    dropout: float,
    seed: torch.Tensor | None,
    tangent: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = flat(x)
    y = base_output(x, weight, bias)
    h = shrink(rows, p, dropout, seed)
    expand_(flat(y), h, lam, q, scaling)
    return y, h


def base_output(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x·Wᵀ + b`` in a tensor that is no view: autograd lets nobody write to an output that is."""
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    if bias is None:
        torch.mm(flat(x), weight.t(), out=flat(y))
    else:
        torch.addmm(bias, flat(x), weight.t(), out=flat(y))
    return y


def _forward_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    p: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    scaling: float,
    dropout: float,
    seed: torch.Tensor | None,
    tangent: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    h = x.new_empty(math.prod(x.shape[:-1]), p.shape[0], dtype=accumulation_dtype(x.dtype))
    return x.new_empty(*x.shape[:-1], weight.shape[0]), h


def _backward_default(
    dy: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
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
    dy = flat(dy)
    dx = dy @ weight if needs_dx else None
    dp, dlam, dq = adapter_gradients(
        dy, flat(x), h, p, lam, q, scaling, dropout, seed, tangent, dx, needs_factors
    )
    return x.new_empty(0) if dx is None else dx.view(x.shape), dp, dlam, dq


def _backward_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
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
    x, weight, _, p, lam, q, ctx.scaling, ctx.dropout, seed, ctx.tangent = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], weight, p, lam, q, seed)


def _autograd_backward(ctx: Any, dy: torch.Tensor, _dh: torch.Tensor) -> tuple[Any, ...]:
    x, h, weight, p, lam, q, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = wants_factors(needs[3:6], ctx.tangent)
    dx, dp, dlam, dq = _svd_linear_backward(
        dy, x, h, weight, p, lam, q, ctx.scaling, ctx.dropout, seed, ctx.tangent, needs[0], wanted
    )
    dweight = flat(dy).t() @ flat(x) if needs[1] else None
    dbias = flat(dy).sum(0) if needs[2] else None
    factors = (dp, None if ctx.tangent else dlam, dq) if wanted else (None, None, None)
    return dx if needs[0] else None, dweight, dbias, *factors, None, None, None, None


def _forward_cuda(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from ..kernels.svd_linear import forward

    return forward(*args)


def _backward_cuda(
    *args: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from ..kernels.svd_linear import backward

    return backward(*args)


_svd_linear = define(
    "svd_linear(Tensor x, Tensor weight, Tensor? bias, Tensor p, Tensor lam, Tensor q,"
    " float scaling, float dropout, Tensor? seed, float tangent) -> (Tensor, Tensor)",
    default=_forward,
    cuda=_forward_cuda,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_autograd_backward,
    first_only=True,
)
_svd_linear_backward = define(
    "svd_linear_backward(Tensor dy, Tensor x, Tensor h, Tensor weight, Tensor p, Tensor lam,"
    " Tensor q, float scaling, float dropout, Tensor? seed, float tangent, bool needs_dx,"
    " bool needs_factors)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    default=_backward_default,
    cuda=_backward_cuda,
    fake=_backward_fake,
)
