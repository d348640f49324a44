"""Several SVD linear layers that read the same input: an attention's q, k and v, an MLP's gates.

    h = x[P_1 … P_n],   y_i = xW_iᵀ + b_i + s·(h_i ⊙ Λ_i)Q_i

x is read once for all h, and its gradient gathers every layer's part in one tensor. With
u_i = dy_i·Q_iᵀ, and h, u, Λ, P the layers' joined along the rank:

    dx = Σ_i dy_i·W_i + s·(u ⊙ Λ)Pᵀ      dP = s·xᵀ(u ⊙ Λ)
    dΛ = s·Σ_t h ⊙ u                     dQ_i = s·(h_i ⊙ Λ_i)ᵀ dy_i

With c = `tangent` other than 0, dP = c·uᵀx and dQ_i = c·h_iᵀdy_i instead (see `svd_adapter_add`).
What is saved for backward, and what Λ is, is as in `svd_linear`. No dropout: each layer would need
a mask, and a pass over x, of its own.

Backends: default (plain PyTorch, every device), cpu (csrc/svd_linear.cpp), cuda
(`kernels.svd_linear_group`, in Triton).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ._library import accumulation_dtype, define, expect_number
from .svd_adapter_add import expand_, flat, shrink, wants_factors
from .svd_linear import autocast_inputs, base_output, check_layer, svd_linear_reference


def svd_linear_group(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    p: Sequence[torch.Tensor],
    lam: Sequence[torch.Tensor],
    q: Sequence[torch.Tensor],
    *,
    scaling: float = 1.0,
    tangent: float = 0.0,
) -> list[torch.Tensor]:
    """``x·W_iᵀ + b_i + scaling · (x·P_i ⊙ Λ_i) Q_i`` for every layer i of a group.

    Where the P_i lie one behind the other in memory, as a patched model's packed factors do, they
    are read in place, and so are the Λ_i; else they are copied together.

    Args:
        x: ``[..., d_in]``, float32/bfloat16/float16/float64. Any strides, any leading dimensions.
        weight: each ``[d_out_i, d_in]``, x's dtype.
        bias: each ``[d_out_i]`` or None, x's dtype.
        p: each ``[r_i, d_in]``, one singular direction a row (Pᵀ), all of one float dtype.
        lam: each ``[r_i]`` effective singular values (Λ⊙mask), all of one float dtype.
        q: each ``[r_i, d_out_i]``, one singular direction a row. Ranks may differ, and be zero.
        scaling: s = alpha / rank, of all layers.
        tangent: as for `svd_linear`, of all layers.

    Under `torch.autocast`, x, weight and bias are cast to its dtype as for ``F.linear``.

    Returns:
        One ``[..., d_out_i]`` a layer, in x's dtype.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    groups = {"weight": weight, "bias": bias, "p": p, "lam": lam, "q": q}
    for name, group in groups.items():
        if not isinstance(group, list | tuple):
            raise TypeError(f"{name} is a {type(group).__name__}, expected a list of tensors")
        if len(group) != len(weight) or not group:
            raise ValueError(
                f"{name} has {len(group)} entries, expected {max(len(weight), 1)}: one a layer"
            )
    for i, layer in enumerate(zip(weight, bias, p, lam, q, strict=True)):
        check_layer(x, *layer, tangent=tangent, at=f"[{i}]")
    for name, group in (("p", p), ("lam", lam)):
        if any(t.dtype != group[0].dtype for t in group):
            raise TypeError(f"{name} has dtypes {[t.dtype for t in group]}, expected one dtype")
    scaling = expect_number("scaling", scaling)
    x, weights, biases = autocast_inputs(x, weight, bias)
    return svd_linear_group_of_layers(
        x, weights, biases, list(p), list(lam), list(q), scaling, float(tangent)
    )


def svd_linear_group_of_layers(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    p: list[torch.Tensor],
    lam: list[torch.Tensor],
    q: list[torch.Tensor],
    scaling: float,
    tangent: float = 0.0,
) -> list[torch.Tensor]:
    """`svd_linear_group` of an x that `svd_linear.fits` layers which were checked before."""
    # torch.library has no gradient for a list of optional tensors: an empty one stands for None.
    biases = [x.new_empty(0) if b is None else b for b in bias]
    outputs: list[torch.Tensor] = _svd_linear_group(
        x, weight, biases, p, lam, q, float(scaling), tangent
    )[0]
    return outputs


def svd_linear_group_reference(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    p: Sequence[torch.Tensor],
    lam: Sequence[torch.Tensor],
    q: Sequence[torch.Tensor],
    scaling: float = 1.0,
) -> list[torch.Tensor]:
    """The formula, differentiable by autograd: one layer after the other."""
    layers = zip(weight, bias, p, lam, q, strict=True)
    return [svd_linear_reference(x, *layer, scaling) for layer in layers]


def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`tensors` along their first dimension: a view if each begins where the one before ends."""
    first = tensors[0]
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


def ranks_of(p: Sequence[torch.Tensor]) -> list[int]:
    """The layers' ranks: how what is joined comes apart."""
    return [t.shape[0] for t in p]


def gradient_shapes(
    p: Sequence[torch.Tensor],
    lam: Sequence[torch.Tensor],
    q: Sequence[torch.Tensor],
    tangent: float,
    needs_factors: bool,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Empty gradients of the factors: dP and dΛ of all layers joined, dQ of each."""
    if not needs_factors:
        return p[0].new_empty(0), lam[0].new_empty(0), [t.new_empty(0) for t in q]
    rows = sum(ranks_of(p))
    dq = [t.new_empty(t.shape) for t in q]
    return p[0].new_empty(rows, p[0].shape[1]), lam[0].new_empty(0 if tangent else rows), dq


def _forward(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    bias: list[torch.Tensor],
    p: list[torch.Tensor],
    lam: list[torch.Tensor],
    q: list[torch.Tensor],
    scaling: float,
    tangent: float,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    rows = flat(x)
    h = shrink(rows, joined(p), 0.0, None)
    outputs = []
    layers = zip(weight, bias, h.split(ranks_of(p), 1), lam, q, strict=True)
    for own_weight, own_bias, own_h, own_lam, own_q in layers:
        y = base_output(x, own_weight, own_bias if own_bias.numel() else None)
        expand_(flat(y), own_h, own_lam, own_q, scaling)
        outputs.append(y)
    return outputs, h


def _forward_fake(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    bias: list[torch.Tensor],
    p: list[torch.Tensor],
    lam: list[torch.Tensor],
    q: list[torch.Tensor],
    scaling: float,
    tangent: float,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    h = x.new_empty(math.prod(x.shape[:-1]), sum(ranks_of(p)), dtype=accumulation_dtype(x.dtype))
    return [x.new_empty(*x.shape[:-1], w.shape[0]) for w in weight], h


def _backward_default(
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
    rows, dtype = flat(x), x.dtype
    dx = rows.new_zeros(rows.shape) if needs_dx else None
    scaled = joined(lam).to(h.dtype) * scaling
    hl, u = (h if tangent else h * scaled).to(dtype), torch.zeros_like(h)
    dq = []
    parts = (t.split(ranks_of(p), 1) for t in (hl, u))
    for own_dy, own_weight, own_q, own_hl, own_u in zip(dy, weight, q, *parts, strict=True):
        if own_dy is None:
            dq.append(torch.zeros_like(own_q))
            continue
        own_dy = flat(own_dy)
        if dx is not None:
            dx.addmm_(own_dy, own_weight)
        own_u.copy_(own_dy @ own_q.to(dtype).t())
        dq.append((own_hl.t() @ own_dy).to(own_q.dtype))
    ul = (u * scaled).to(dtype)
    if dx is not None:
        dx.addmm_(ul, joined(p).to(dtype))
    out = x.new_empty(0) if dx is None else dx.view(x.shape)
    if not needs_factors:
        return out, *gradient_shapes(p, lam, q, tangent, needs_factors)
    if tangent:  # scaled last: 16-bit operands would lose what a small c makes of them
        dp = (u.to(dtype).t() @ rows).to(p[0].dtype).mul_(tangent)
        return out, dp, lam[0].new_empty(0), [own.mul_(tangent) for own in dq]
    dp = (ul.t() @ rows).to(p[0].dtype)
    dlam = (h * u).sum(0).mul_(scaling).to(lam[0].dtype)
    return out, dp, dlam, dq


def _backward_fake(
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
    dx = x.new_empty(x.shape) if needs_dx else x.new_empty(0)
    return dx, *gradient_shapes(p, lam, q, tangent, needs_factors)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, weight, _, p, lam, q, ctx.scaling, ctx.tangent = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # a layer that is not used costs its backward nothing
    ctx.count = len(weight)
    ctx.save_for_backward(x, output[1], *weight, *p, *lam, *q)


def _autograd_backward(
    ctx: Any, dy: Sequence[torch.Tensor | None] | None, _dh: Any
) -> tuple[Any, ...]:
    x, h, *rest = ctx.saved_tensors
    n = ctx.count
    weight, p, lam, q = (rest[i * n : (i + 1) * n] for i in range(4))
    needs_x, needs_weight, needs_bias, *needs_factors = ctx.needs_input_grad[:6]
    dy = [None] * n if dy is None else list(dy)
    wanted = wants_factors([any(needs) for needs in needs_factors], ctx.tangent)
    dx, dp, dlam, dq = _svd_linear_group_backward(
        dy, x, h, weight, p, lam, q, ctx.scaling, ctx.tangent, needs_x, wanted
    )
    dweight = [
        flat(g).t() @ flat(x) if needed and g is not None else None
        for g, needed in zip(dy, needs_weight, strict=True)
    ]
    dbias = [
        flat(g).sum(0) if needed and g is not None else None
        for g, needed in zip(dy, needs_bias, strict=True)
    ]
    none: list[None] = [None] * n
    factors = (none, none, none)
    if wanted:
        own_dlam = none if ctx.tangent else list(dlam.split(ranks_of(p)))
        factors = (list(dp.split(ranks_of(p))), own_dlam, dq)
    return dx if needs_x else None, dweight, dbias, *factors, None, None


def _forward_cuda(*args: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    from ..kernels.svd_linear_group import forward

    return forward(*args)


def _backward_cuda(
    *args: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    from ..kernels.svd_linear_group import backward

    return backward(*args)


_svd_linear_group = define(
    "svd_linear_group(Tensor x, Tensor[] weight, Tensor[] bias, Tensor[] p, Tensor[] lam,"
    " Tensor[] q, float scaling, float tangent) -> (Tensor[], Tensor)",
    default=_forward,
    cuda=_forward_cuda,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_autograd_backward,
)
_svd_linear_group_backward = define(
    "svd_linear_group_backward(Tensor?[] dy, Tensor x, Tensor h, Tensor[] weight, Tensor[] p,"
    " Tensor[] lam, Tensor[] q, float scaling, float tangent, bool needs_dx, bool needs_factors)"
    " -> (Tensor, Tensor, Tensor, Tensor[])",
    default=_backward_default,
    cuda=_backward_cuda,
    fake=_backward_fake,
)
