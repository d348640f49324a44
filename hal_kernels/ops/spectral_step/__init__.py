"""A step along the matrices of rank r: an optimizer of factors in SVD form, for all layers at once.

With ΔW = s·Qᵀ diag(Λ) P, where P ``[r, d_in]`` and Q ``[r, d_out]`` have orthonormal rows, and its
gradient G:

    1.  K = PGᵀ,  L = QG                          gradients (`svd_linear` with `tangent`)
    2.  m_K ← β m_K + K,  m_L ← β m_L + L         momentum
        v_K = β m_K + K,  v_L = β m_L + L         where it will be: Nesterov's
    3.  O = msign(v) = (v vᵀ)^(−1/2) v            a direction of spectral norm 1, for both
    4.  ΔW⁺ = the best rank-r matrix to s·Qᵀ diag(Λ) P − η/2·(O_KᵀP + QᵀO_L)
    5.  m_K ← (P⁺Pᵀ) m_K,  m_L ← (Q⁺Qᵀ) m_L      momentum in the new frames

Step 4 is an SVD of 2r × 2r numbers. Its 2r singular values are the candidates: the r largest stay,
of a pruned layer as many as are kept. η is a spectral norm: no step is longer, or twice as long if
directions are pruned (what is left out of step 4's matrix is no larger than the step to it). The
gradients' scale does not matter.

One gain for all layers' η can be learned along the way. ⟨∂L/∂ΔW, last step⟩ is the loss's
derivative by the last step's length, so where gradients agree with their momenta steps were too
short, and too long where they oppose them: the logarithm of the gain moves by the mean cosine
between the two, over the matrices that have a gradient, within ± 2.5.

After a step Λ ≥ 0 (for s > 0) descends along the rows that are kept. A pruned row has Λ = 0 and the
vectors of the next candidate: orthonormal to the others, and the first to come back.

Backends: default (`batched`, plain PyTorch, every device), cuda (`triton`, in
Triton, for ranks up to 32).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from .._library import define, expect_dtype, expect_floating, expect_same_device, expect_shape
from ..ragged import Slots, expect_slots
from .batched import step_
from .reference import Layer, msign, next_gain, spectral_step_reference

__all__ = ["Layer", "msign", "next_gain", "spectral_step_", "spectral_step_reference"]


@torch.no_grad()
def spectral_step_(
    p: Sequence[torch.Tensor],
    lam: torch.Tensor,
    q: Sequence[torch.Tensor],
    momentum_p: Sequence[torch.Tensor],
    momentum_q: Sequence[torch.Tensor],
    gradient_p: Sequence[torch.Tensor | None],
    gradient_q: Sequence[torch.Tensor | None],
    slots: Slots,
    *,
    eta: torch.Tensor | float,
    scaling: torch.Tensor | float = 1.0,
    beta: float = 0.9,
    decay: torch.Tensor | float = 1.0,
    mask: torch.Tensor | None = None,
    log_gain: torch.Tensor | None = None,
    gain_rate: float = 0.5,
) -> torch.Tensor:
    """Advance the packed factors and momenta of n layers in place.

    A layer stays as it is, momentum too, if its gradients are zero (or missing), or if a number in
    them, in its factors or in its momentum is NaN or Inf.

    Args:
        p: by width ``[R_w, d_in]``, rows of each layer orthonormal. Their rank is at most d_in.
        lam: Λ ``[R]``.
        q: by width ``[R_w, d_out]``, as p.
        momentum_p, momentum_q: m_L and m_K, as p and q; zeros before the first step.
        gradient_p, gradient_q: c·L and c·K, as p and q, for any c > 0. None stands for zeros.
        slots: where each layer's rows lie.
        eta: η, one number or one a layer ``[n]`` in the order of Λ.
        scaling: s, likewise; not 0.
        beta: β, in [0, 1).
        decay: what ΔW is multiplied by before the step, as eta: 1 − lr·weight_decay.
        mask: ``[R]``, above 0 where a direction is kept; None keeps all. ΔW is that of Λ⊙mask.
        log_gain: one number, in lam's dtype, changed in place: η is multiplied by its exponential,
            which is learned (see above). None: η is what it is.
        gain_rate: what one step adds to it is this times the mean cosine.

    Returns:
        The candidates, ``[n, 2·max_rank]`` in lam's dtype: singular values of the matrix that each
        layer's new one is the best approximation to, largest first, zeros beyond twice its rank.
        Of a layer that stays as it is, those of ΔW.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    expect_floating("lam", lam)
    expect_slots(slots, "lam", lam)
    n, rows = slots.offsets[1].shape[0] - 1, slots.rows[0].shape[0]
    expect_shape("lam", lam, (rows,), "[R]")
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"beta is {beta}, expected a number in [0, 1)")
    if log_gain is not None:
        expect_shape("log_gain", log_gain, (), "one number")
        expect_dtype("log_gain", log_gain, lam.dtype, "the dtype of lam")
        expect_same_device("lam", lam, log_gain=log_gain)
    if not 0.0 <= gain_rate < math.inf:
        raise ValueError(f"gain_rate is {gain_rate}, expected a finite number, at least 0")
    if mask is not None:
        expect_shape("mask", mask, (rows,), "[R], as lam")
        expect_same_device("lam", lam, mask=mask)
    gradients = []
    for side, (name, factors, momenta, own) in enumerate(
        (("p", p, momentum_p, gradient_p), ("q", q, momentum_q, gradient_q))
    ):
        _check_side(name, factors, slots.sizes[side], lam)
        _check_like(f"momentum_{name}", momenta, name, factors)
        if isinstance(own, list | tuple) and len(own) == len(factors):
            own = [
                torch.zeros_like(f) if g is None else g for g, f in zip(own, factors, strict=True)
            ]
        _check_like(f"gradient_{name}", own, name, factors)
        gradients.append(own)
    numbers = [
        _one_a_layer(name, value, n, lam)
        for name, value in (("eta", eta), ("scaling", scaling), ("decay", decay))
    ]
    changed = [[*p], lam, [*q], [*momentum_p], [*momentum_q]]
    if slots.max_rank == 0 or rows == 0:
        return lam.new_zeros(n, 2 * slots.max_rank)
    candidates: torch.Tensor = _spectral_step_(
        *changed, *map(list, gradients), mask, *numbers, log_gain, float(beta), float(gain_rate),
        list(slots.rows), list(slots.offsets), *slots.counts, *slots.sizes, slots.max_rank,
    )  # fmt: skip
    learned = [] if log_gain is None else [log_gain]
    for tensor in (*p, lam, *q, *momentum_p, *momentum_q, *learned):
        torch.autograd.graph.increment_version(tensor)  # Triton writes past torch's own count
    return candidates


def _check_side(
    name: str, factors: Sequence[torch.Tensor], sizes: list[int], lam: torch.Tensor
) -> None:
    if not isinstance(factors, list | tuple) or len(factors) != len(sizes):
        raise ValueError(f"{name} is {_kind(factors)}, expected {len(sizes)} tensors: one a width")
    for width, (factor, size) in enumerate(zip(factors, sizes, strict=True)):
        label = f"{name}[{width}]"
        expect_floating(label, factor)
        if factor.dim() != 2 or factor.shape[0] != size:
            raise ValueError(
                f"{label} has shape {tuple(factor.shape)}, expected [{size}, d] (slots.sizes)"
            )
        expect_dtype(label, factor, lam.dtype, "the dtype of lam")
        expect_same_device("lam", lam, **{label: factor})


def _check_like(
    name: str, tensors: Sequence[torch.Tensor | None], like: str, factors: Sequence[torch.Tensor]
) -> None:
    if not isinstance(tensors, list | tuple) or len(tensors) != len(factors):
        raise ValueError(f"{name} is {_kind(tensors)}, expected {len(factors)} tensors (as {like})")
    for width, (tensor, factor) in enumerate(zip(tensors, factors, strict=True)):
        label, of = f"{name}[{width}]", f"as {like}[{width}]"
        expect_dtype(label, tensor, factor.dtype, of)
        expect_shape(label, tensor, tuple(factor.shape), of)
        expect_same_device(f"{like}[{width}]", factor, **{label: tensor})


def _kind(value: Any) -> str:
    return f"{len(value)} of them" if isinstance(value, list | tuple) else type(value).__name__


def _one_a_layer(name: str, value: torch.Tensor | float, n: int, lam: torch.Tensor) -> torch.Tensor:
    """``[n]`` on lam's device: one number for all is filled in, not copied there."""
    if not isinstance(value, torch.Tensor):
        if not math.isfinite(value) or (name == "scaling" and value == 0.0):
            raise ValueError(f"{name} is {value}, expected a finite number")
        return torch.full((n,), value, dtype=torch.float64, device=lam.device)
    expect_floating(name, value)
    expect_same_device("lam", lam, **{name: value})
    if value.dim() > 0:
        expect_shape(name, value, (n,), "one a layer")
    return value.expand(n)


def _default(*args: Any) -> torch.Tensor:
    *tensors, rows, offsets, counts_p, counts_q, sizes_p, sizes_q, max_rank = args
    counts, sizes = (counts_p, counts_q), (sizes_p, sizes_q)
    return step_(Slots(tuple(rows), tuple(offsets), counts, sizes, max_rank), *tensors)


def _cuda(*args: Any) -> torch.Tensor:
    from .triton import step_ as in_triton
    from .triton import supported

    p, lam, q, momentum_p, momentum_q, *_, max_rank = args
    if supported([*p, lam, *q, *momentum_p, *momentum_q], max_rank):
        return in_triton(*args)
    return _default(*args)


def _fake(p: list[torch.Tensor], lam: torch.Tensor, *rest: Any) -> torch.Tensor:
    *_, offsets, _, _, _, _, max_rank = rest
    return lam.new_empty(offsets[1].shape[0] - 1, 2 * max_rank)


_spectral_step_ = define(
    "spectral_step_(Tensor(a!)[] p, Tensor(b!) lam, Tensor(c!)[] q, Tensor(d!)[] momentum_p,"
    " Tensor(e!)[] momentum_q, Tensor[] gradient_p, Tensor[] gradient_q, Tensor? mask, Tensor eta,"
    " Tensor scaling, Tensor decay, Tensor(f!)? log_gain, float beta, float gain_rate,"
    " Tensor[] rows, Tensor[] offsets, int[] counts_p, int[] counts_q, int[] sizes_p,"
    " int[] sizes_q, int max_rank) -> Tensor",
    default=_default,
    cuda=_cuda,
    fake=_fake,
)
