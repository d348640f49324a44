"""The SVD linear layer: frozen linear layer and SVD adapter in one operator.

    h = dropout(x)·P,   y = base + s·(h ⊙ Λ)Q,   base = xWᵀ + b

Three public functions share it: `svd_linear` of one layer; `svd_linear_group` of several layers
that read one x, which is read once for all h = x[P_1 … P_n]; and `svd_adapter_add`, whose base is
any layer's output y (quantized, sparse or foreign: its GEMM is not ours to run).

Λ is the effective one, Λ⊙mask. Gradients, with u_i = dy_i·Q_iᵀ, and h, u, Λ, P the layers' joined
along the rank:

    dx = Σ_i dy_i·W_i + s·(u ⊙ Λ)Pᵀ      dP = s·xᵀ(u ⊙ Λ)
    dΛ = s·Σ_t h ⊙ u                     dQ_i = s·(h_i ⊙ Λ_i)ᵀ dy_i

The gradient of Λ is dΛ_eff, unmasked: what the allocator scores pruned directions with. Saved for
backward: x, h and the factors; no ``[T, d]`` temporary exists beside y (forward) and dx (backward).

Tangent gradients, for steps along the matrices of rank r: with G = dyᵀ·x the gradient of ΔW,
``[d_out, d_in]``, and c = `tangent`, those of P and Q are instead

    dP = c·L,  L = QG = uᵀx ``[r, d_in]``          dQ = c·K,  K = PGᵀ = hᵀ dy ``[r, d_out]``

which do not vanish where Λ is zero, and Λ has none. c only keeps them in a range of one's choice.

Backends: `default` (plain PyTorch, every device), cpu (csrc/svd_linear.cpp), cuda (`triton`). The
base GEMM is the vendor library's, and low-rank product and GEMM accumulate into one output; where
it pays, the cuda backend does both in one GEMM of its own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._library import gradient, register
from ..dropout import draw_seed
from ..orthogonality_penalty import orthogonality_penalty
from . import default
from .checks import cast, casts, check_base, check_factors, check_layer, check_options, refuse
from .default import Factors, flat, ranks_of
from .reference import (
    svd_adapter_add_reference,
    svd_linear_group_reference,
    svd_linear_reference,
)

__all__ = [
    "svd_adapter_add",
    "svd_adapter_add_reference",
    "svd_linear",
    "svd_linear_group",
    "svd_linear_group_reference",
    "svd_linear_reference",
]


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
    check_layer(x, weight, bias, p, lam, q)
    lam = check_options(x, lam, mask, scaling, dropout, seed, tangent)
    return layer_output(x, weight, bias, p, lam, q, float(scaling), dropout, float(tangent), seed)


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
    are read in place, and so are the Λ_i; else they are copied together. No dropout: each layer
    would need a mask, and a pass over x, of its own.

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
        check_layer(x, *layer, at=f"[{i}]")
    for name, group in (("p", p), ("lam", lam)):
        if any(t.dtype != group[0].dtype for t in group):
            raise TypeError(f"{name} has dtypes {[t.dtype for t in group]}, expected one dtype")
    check_options(x, lam[0], None, scaling, 0.0, None, tangent)
    return list(group_outputs(x, weight, bias, p, lam, q, float(scaling), float(tangent)))


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
        p, lam, q, mask, scaling, dropout, seed, tangent: as for `svd_linear`.

    Returns:
        ``[..., d_out]`` in y's dtype; sums are accumulated in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    check_base(y, x)
    check_factors(x, p, lam, q, d_in=x.shape[-1], d_out=y.shape[-1])
    lam = check_options(x, lam, mask, scaling, dropout, seed, tangent)
    return layer_output(x, None, y, p, lam, q, float(scaling), dropout, float(tangent), seed)


# -- the layers, of factors that need no check -----------------------------------------------------


def layer_output(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    base: torch.Tensor | None,
    p: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    tangent: float = 0.0,
    seed: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    grams: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """`svd_linear`, or `svd_adapter_add` to `base` without a weight, of one layer's own tensors.

    Only what comes from outside is looked at: x, and the `base` that an adapter is added to. No
    gradient goes to `mask`. On a GPU and with gradients what `layer_penalty` needs is appended to
    `grams`, without a launch.
    """
    if weight is None:
        assert base is not None
        x, like = x.to(base.dtype), base
        if base is x:  # torch.compile takes no tensor twice
            base = base.view_as(base)
        fits = x.shape[:-1] == base.shape[:-1] and base.shape[-1:] == q.shape[1:]
    else:
        if torch._C._is_any_autocast_enabled() and casts(x):
            x, (weight,), (base,) = cast(x, [weight], [base])
        like, fits = weight, True
    if not fits or x.shape[-1:] != p.shape[1:] or x.dtype != like.dtype or x.device != like.device:
        refuse(x, weight, base, p, lam, q)
    if dropout == 0.0:
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    if torch.is_grad_enabled():
        if grams is not None and not _gives_grams(x, p, q):
            grams = None
        options = scaling, dropout, seed, tangent, mask, grams
        apply = _Layer.apply if _transformed() else _apply_layer
        y: torch.Tensor = apply(x, weight, base, p, lam, q, options)
        return y
    if mask is not None:
        lam = lam * mask
    return _svd_linear(x, weight, base, p, lam, q, scaling, dropout, seed)[0]


def group_outputs(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    p: Sequence[torch.Tensor],
    lam: Sequence[torch.Tensor],
    q: Sequence[torch.Tensor],
    scaling: float,
    tangent: float = 0.0,
) -> Sequence[torch.Tensor]:
    """`svd_linear_group` of layers' own tensors: only x is looked at."""
    if casts(x):
        x, weight, bias = cast(x, weight, bias)
    first = weight[0]
    if x.shape[-1:] != first.shape[1:] or x.dtype != first.dtype or x.device != first.device:
        refuse(x, first, bias[0], p[0], lam[0], q[0])
    if torch.is_grad_enabled():
        apply = _Group.apply if _transformed() else _apply_group
        y: Sequence[torch.Tensor] = apply(scaling, tangent, x, *weight, *bias, *p, *lam, *q)
        return y
    return _svd_linear_group(x, weight, bias, p, lam, q, scaling, 0.0, None)[0]


def _gives_grams(x: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> bool:
    return (
        x.is_cuda and p.dtype == q.dtype != torch.float64 and _on_cuda(x, [p], [q]) is not default
    )


def layer_penalty(p: torch.Tensor, q: torch.Tensor, grams: list[torch.Tensor]) -> torch.Tensor:
    """‖PᵀP − I‖²_F + ‖QQᵀ − I‖²_F [eq. 7] of one layer: a scalar.

    `grams` is what `layer_output` left there for these very P and Q, or empty.
    """
    if not grams:
        return orthogonality_penalty([p[None], q[None]])
    penalty: torch.Tensor = _Penalty.apply(p, q, grams)
    return penalty


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: torch.Tensor, q: torch.Tensor, grams: list[torch.Tensor]) -> Any:
        penalty, residuals = _triton().penalty_of(grams)
        ctx.save_for_backward(p, q, *residuals)
        return penalty

    @staticmethod
    @gradient
    def backward(ctx: Any, dpenalty: torch.Tensor) -> tuple[Any, ...]:
        p, q, *residuals = ctx.saved_tensors
        rank = p.shape[0]
        offsets = [torch.arange(0, rank + 1, rank, device=p.device)] * 2
        dp, dq = torch.ops.hal.orthogonality_penalty_backward(
            dpenalty, [p, q], residuals, offsets, [rank] * 2, True, 1.0
        )
        return dp, dq, None


class _Layer(torch.autograd.Function):
    """The gradient of one layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        base: torch.Tensor | None,
        p: torch.Tensor,
        lam: torch.Tensor,
        q: torch.Tensor,
        options: tuple[Any, ...],
    ) -> torch.Tensor:
        scaling, dropout, seed, tangent, mask, grams = options
        if mask is not None:  # here, where it makes no node of the graph
            lam = lam * mask
        if grams is None:
            y, h = _svd_linear(x, weight, base, p, lam, q, scaling, dropout, seed)
        else:
            layer = [weight], [base], [p], [lam], [q]
            (y,), h = _triton().forward(x, *layer, scaling, dropout, seed, grams=grams)
        ctx.save_for_backward(x, h, weight, p, lam, q, seed, mask)
        ctx.options = scaling, dropout, tangent
        return y

    @staticmethod
    @gradient
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, h, weight, p, lam, q, seed, mask = ctx.saved_tensors
        scaling, dropout, tangent = ctx.options
        needs = ctx.needs_input_grad
        wanted = _wants_factors(needs[3:6], tangent)
        dx, dp, dlam, dq = _svd_linear_backward(
            dy, x, h, weight, p, lam, q, scaling, dropout, seed, tangent, needs[0], wanted
        )
        dweight = flat(dy).t() @ flat(x) if needs[1] else None
        dbase = None
        if needs[2]:
            dbase = dy if weight is None else flat(dy).sum(0)
        factors = (None, None, None)
        if wanted:
            dlam = None if tangent else dlam if mask is None else dlam.mul_(mask)
            factors = dp, dlam, dq
        return dx if needs[0] else None, dweight, dbase, *factors, None


class _Group(torch.autograd.Function):
    """The gradient of layers that share x. Lists come flat: autograd does not look into them."""

    @staticmethod
    def forward(
        ctx: Any, scaling: float, tangent: float, x: torch.Tensor, *tensors: Any
    ) -> tuple[torch.Tensor, ...]:
        weight, bias, p, lam, q = _lists(tensors, 5)
        outputs, h = _svd_linear_group(x, weight, bias, p, lam, q, scaling, 0.0, None)
        ctx.set_materialize_grads(False)  # a layer that is not used costs its backward nothing
        ctx.save_for_backward(x, h, *weight, *p, *lam, *q)
        ctx.options = scaling, tangent
        return tuple(outputs)

    @staticmethod
    @gradient
    def backward(ctx: Any, *dy: torch.Tensor | None) -> tuple[Any, ...]:
        if all(g is None for g in dy):
            return (None,) * len(ctx.needs_input_grad)
        x, h, *tensors = ctx.saved_tensors
        weight, p, lam, q = _lists(tensors, 4)
        scaling, tangent = ctx.options
        needs_x, *needs = ctx.needs_input_grad[2:]
        needs_weight, needs_bias, *needs_factors = _lists(needs, 5)
        wanted = _wants_factors([any(needs) for needs in needs_factors], tangent)
        dx, dp, dlam, dq = _svd_linear_group_backward(
            dy, x, h, weight, p, lam, q, scaling, 0.0, None, tangent, needs_x, wanted
        )
        dweight = [
            flat(g).t() @ flat(x) if needed and g is not None else None
            for g, needed in zip(dy, needs_weight, strict=True)
        ]
        dbias = [
            flat(g).sum(0) if needed and g is not None else None
            for g, needed in zip(dy, needs_bias, strict=True)
        ]
        none = [None] * len(dy)
        factors = (none, none, none)
        if wanted:
            ranks = ranks_of(p)
            factors = (
                dp.split_with_sizes(ranks),
                none if tangent else dlam.split_with_sizes(ranks),
                dq,
            )
        dfactors = (g for group in factors for g in group)
        return None, None, dx if needs_x else None, *dweight, *dbias, *dfactors


# `Function.apply` unwraps every argument for torch.func, which takes as long as the operator; its
# base class's does nothing of the kind.
_apply_layer: Callable[..., Any] = super(torch.autograd.Function, _Layer).apply
_apply_group: Callable[..., Any] = super(torch.autograd.Function, _Group).apply


# Private to torch: a version without it is served by `Function.apply`.
_in_torch_func = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def _transformed() -> bool:
    """Whether torch.compile traces, or torch.func asks for what these Functions refuse."""
    return torch.compiler.is_compiling() or _in_torch_func()


def _lists(values: Sequence[Any], count: int) -> list[list[Any]]:
    """`values` as `count` lists of equal length."""
    n = len(values) // count
    return [list(values[i * n : (i + 1) * n]) for i in range(count)]


def _wants_factors(needs: Sequence[bool], tangent: float) -> bool:
    """Whether a gradient of P, Λ or Q is asked for; with `tangent` Λ has none."""
    p, lam, q = needs
    return p or q or (lam and not tangent)


# -- operators, all below autograd -----------------------------------------------------------------


@functools.cache
def _triton() -> Any:
    from . import triton  # when it is first needed: the package works without triton

    return triton


def _on_cuda(x: torch.Tensor, p: Factors, q: Factors) -> Any:
    triton = _triton()
    return triton if triton.supported(x, p, q) else default


def _anywhere(x: torch.Tensor, p: Factors, q: Factors) -> Any:
    return default


def _of_group(backend: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward(x: Any, weight: Any, base: Any, p: Any, lam: Any, q: Any, *options: Any) -> Any:
        return backend(x, p, q).forward(x, weight, base, p, lam, q, *options)

    def backward(
        dy: Any, x: Any, h: Any, weight: Any, p: Any, lam: Any, q: Any, *options: Any
    ) -> Any:
        return backend(x, p, q).backward(dy, x, h, weight, p, lam, q, *options)

    return forward, backward


def _of_layer(backend: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A single layer is a group of one."""

    def forward(x: Any, weight: Any, base: Any, p: Any, lam: Any, q: Any, *options: Any) -> Any:
        p, q = [p], [q]
        (y,), h = backend(x, p, q).forward(x, [weight], [base], p, [lam], q, *options)
        return y, h

    def backward(
        dy: Any, x: Any, h: Any, weight: Any, p: Any, lam: Any, q: Any, *options: Any
    ) -> Any:
        p, q = [p], [q]
        gradients = backend(x, p, q).backward([dy], x, h, [weight], p, [lam], q, *options)
        dx, dp, dlam, (dq,) = gradients
        return dx, dp, dlam, dq

    return forward, backward


def _operators(form: Callable[..., Any], *schemas: str) -> list[Callable[..., Any]]:
    """Forward and backward, and which backend serves which device (csrc registers itself)."""
    plain, triton, shapes = form(_anywhere), form(_on_cuda), form(lambda *_: default.Shapes)
    return [
        register(schema, default=plain[i], cuda=triton[i], fake=shapes[i])
        for i, schema in enumerate(schemas)
    ]


_svd_linear, _svd_linear_backward = _operators(
    _of_layer,
    "svd_linear(Tensor x, Tensor? weight, Tensor? base, Tensor p, Tensor lam, Tensor q,"
    " float scaling, float dropout, Tensor? seed) -> (Tensor, Tensor)",
    "svd_linear_backward(Tensor dy, Tensor x, Tensor h, Tensor? weight, Tensor p, Tensor lam,"
    " Tensor q, float scaling, float dropout, Tensor? seed, float tangent, bool needs_dx,"
    " bool needs_factors) -> (Tensor, Tensor, Tensor, Tensor)",
)
_svd_linear_group, _svd_linear_group_backward = _operators(
    _of_group,
    "svd_linear_group(Tensor x, Tensor[] weight, Tensor?[] bias, Tensor[] p, Tensor[] lam,"
    " Tensor[] q, float scaling, float dropout, Tensor? seed) -> (Tensor[], Tensor)",
    "svd_linear_group_backward(Tensor?[] dy, Tensor x, Tensor h, Tensor[] weight, Tensor[] p,"
    " Tensor[] lam, Tensor[] q, float scaling, float dropout, Tensor? seed, float tangent,"
    " bool needs_dx, bool needs_factors) -> (Tensor, Tensor, Tensor, Tensor[])",
)
