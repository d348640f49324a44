"""The SVD linear layer and its own orthogonality penalty, in one operator.

    h = xP,   y = xWᵀ + b + s·(h ⊙ Λ)Q
    penalty = ‖PᵀP − I‖²_F + ‖QQᵀ − I‖²_F          ("frobenius": the norms themselves)

y and its gradients are those of `svd_linear`, the penalty and its gradients those of
`orthogonality_penalty` for this layer's two matrices with weight 1; dP and dQ are the sums of both.
The forward kernels, which have P and Q at hand, also multiply them with themselves. A model's
penalty of all layers costs less by `orthogonality_penalty`, which a patched model uses: see
docs/operators.md. This operator is for a layer that stands alone.

Backends: default (plain PyTorch, every device), cuda (`kernels.svd_linear_penalty`, in Triton).
"""

from typing import Any

import torch

from ._library import accumulation_dtype, define, expect_dtype, expect_number
from .orthogonality_penalty import KINDS, orthogonality_penalty_reference
from .svd_adapter_add import effective, flat
from .svd_linear import _forward_fake as linear_fake
from .svd_linear import autocast_inputs, check_layer, svd_linear_reference


def svd_linear_penalty(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    p: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    *,
    kind: str = "squared",
    mask: torch.Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x·Wᵀ + b + scaling · (dropout(x)·P ⊙ (Λ⊙mask)) Q``, and the penalty of P and Q.

    Args:
        x, weight, bias, p, lam, q, mask, scaling, dropout, seed: as for `svd_linear`; q in p's
            dtype.
        kind: "squared" [eq. 7] or "frobenius" (PEFT).

    Returns:
        y ``[..., d_out]`` in x's dtype, and the penalty: a scalar in float32 (float64 for float64
        factors). It counts every direction, masked or not, as `orthogonality_penalty` does.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {KINDS}")
    check_layer(x, weight, bias, p, lam, q, dropout=dropout)
    expect_dtype("q", q, p.dtype, "the dtype of p")
    scaling = expect_number("scaling", scaling)
    x, (weight,), (bias,) = autocast_inputs(x, [weight], [bias])
    lam, seed = effective(x, lam, mask, dropout, seed)
    y, _, penalty, _ = _svd_linear_penalty(
        x, weight, bias, p, lam, q, scaling, dropout, seed, kind == "squared"
    )
    return y, penalty


def svd_linear_penalty_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    p: torch.Tensor,
    lam: torch.Tensor,
    q: torch.Tensor,
    kind: str = "squared",
    scaling: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formulas, differentiable by autograd, without dropout."""
    y = svd_linear_reference(x, weight, bias, p, lam, q, scaling)
    return y, orthogonality_penalty_reference([p, q], kind)


def offsets_of(p: torch.Tensor) -> list[torch.Tensor]:
    """P and Q as packed rows of one matrix each: its first row and its end."""
    return [torch.arange(2, device=p.device) * p.shape[0]] * 2


Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]


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
    squared: bool,
) -> Outputs:
    y, h = torch.ops.hal.svd_linear(x, weight, bias, p, lam, q, scaling, dropout, seed, 0.0)
    penalty, residuals = torch.ops.hal.orthogonality_penalty(
        [p, q], offsets_of(p), [p.shape[0]] * 2, squared, 1.0
    )
    return y, h, penalty, residuals


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
    squared: bool,
) -> Outputs:
    y, h = linear_fake(x, weight, bias, p, lam, q, scaling, dropout, seed, 0.0)
    dtype, r = accumulation_dtype(p.dtype), p.shape[0]
    residuals = [p.new_empty(1, r, r, dtype=dtype) for _ in range(2)]
    return y, h, p.new_empty((), dtype=dtype), residuals


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, weight, _, p, lam, q, ctx.scaling, ctx.dropout, seed, ctx.squared = inputs
    _, h, _, residuals = output
    ctx.mark_non_differentiable(h, *residuals)
    ctx.set_materialize_grads(False)  # an output that is not used costs its backward nothing
    ctx.save_for_backward(x, h, weight, p, lam, q, seed, *residuals)


def _autograd_backward(
    ctx: Any, dy: torch.Tensor | None, _dh: Any, dpenalty: torch.Tensor | None, _dresiduals: Any
) -> tuple[Any, ...]:
    x, h, weight, p, lam, q, seed, *residuals = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dx = dweight = dbias = dp = dlam = dq = None
    if dy is not None:
        dx, dp, dlam, dq = torch.ops.hal.svd_linear_backward(
            dy,
            x,
            h,
            weight,
            p,
            lam,
            q,
            ctx.scaling,
            ctx.dropout,
            seed,
            0.0,
            needs[0],
            any(needs[3:6]),
        )
        dx = dx if needs[0] else None
        dweight = flat(dy).t() @ flat(x) if needs[1] else None
        dbias = flat(dy).sum(0) if needs[2] else None
    if not any(needs[3:6]):
        dp = dlam = dq = None
    elif dpenalty is not None and (needs[3] or needs[5]):
        gradients = torch.ops.hal.orthogonality_penalty_backward(
            dpenalty, [p, q], residuals, offsets_of(p), [p.shape[0]] * 2, ctx.squared, 1.0
        )
        if dp is not None and dq is not None:
            gradients = torch._foreach_add(gradients, [dp, dq])
        dp, dq = gradients
    return dx, dweight, dbias, dp, dlam, dq, None, None, None, None


def _forward_cuda(*args: Any) -> Outputs:
    from ..kernels.svd_linear_penalty import forward

    return forward(*args)


_svd_linear_penalty = define(
    "svd_linear_penalty(Tensor x, Tensor weight, Tensor? bias, Tensor p, Tensor lam, Tensor q,"
    " float scaling, float dropout, Tensor? seed, bool squared)"
    " -> (Tensor, Tensor, Tensor, Tensor[])",
    default=_forward,
    cuda=_forward_cuda,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_autograd_backward,
)
