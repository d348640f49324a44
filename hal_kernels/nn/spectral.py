"""update="spectral": factors that move by steps of unit spectral norm, made for the SVD form.

Layers leave c·L and c·K, the gradient of ΔW seen from Q and from P, as the gradients of P and Q
(the operators' `tangent`). They are ordinary gradients of ordinary parameters until an optimizer is
about to step: accumulation, averaging over processes, loss scaling and clipping have nothing to
know. Then they are taken, so that the optimizer neither moves the factors nor keeps moments of
them, and after its step the factors take theirs (`ops.spectral_step_`), of a length in proportion
to its learning rate.
"""

from typing import TYPE_CHECKING

import torch

from ..ops import spectral_step_
from .packed import Packed

if TYPE_CHECKING:
    from .adapter import HyperAdapter

TANGENT = 2.0**-24
"""c. K and L are far larger than dP and dQ; so small they take no part in clipping by the norm."""

RATE = 0.8
"""η of a layer over the optimizer's learning rate and √max(d_in, d_out), so that a rate of 1e-3
suits adapter and head alike. Elements of such a step are of one size in layers of all shapes."""

BETA = 0.9

GAIN_RATE, FULL_GAIN_RATE = 0.5, 1e-3
"""What a step's mean cosine counts in the logarithm of the gain, and the learning rate from which
on it counts so much: steps that hardly move, in a warm-up, would all seem too short."""


def register_scalings(adapter: "HyperAdapter") -> None:
    """Give the adapter, on its device, s of each layer ``[n]`` and of each direction ``[R]``, and
    what each layer's η is at a learning rate of 1 ``[n]``."""
    like = {"dtype": adapter.mask.dtype, "device": adapter.mask.device}
    scalings = torch.tensor(adapter.scalings, **like)  # type: ignore[arg-type]
    widths = [max(spec.d_in, spec.d_out) for spec in adapter.layout.layers]
    rates = RATE * torch.tensor(widths, **like).sqrt()  # type: ignore[arg-type]
    ranks = torch.tensor(adapter.layout.ranks, device=adapter.mask.device)
    adapter.register_buffer("layer_scalings", scalings, persistent=False)
    adapter.register_buffer("row_scalings", scalings.repeat_interleave(ranks), persistent=False)
    adapter.register_buffer("layer_rates", rates, persistent=False)


class Taken:
    """What an optimizer's step left to the adapter: gradients of P and Q, and its options.

    Args:
        adapter: whose factors have gradients.
        optimizer: about to step.

    Raises:
        ValueError: the factors are in groups with different learning rates or weight decays.
    """

    def __init__(self, adapter: "HyperAdapter", optimizer: torch.optim.Optimizer) -> None:
        self.rate, self.decay = _options(adapter, optimizer)
        packed = adapter.packed()
        self.gradients = Packed(
            tuple(_taken(t) for t in packed.p), packed.lam, tuple(_taken(t) for t in packed.q)
        )

    def lam_gradient(self, adapter: "HyperAdapter") -> torch.Tensor:
        """dΛ = s·diag(K Qᵀ), ``[R]``, of the factors that the gradients belong to."""
        packed, scalings = adapter.packed(), adapter.row_scalings
        pairs = zip(self.gradients.q, packed.q, strict=True)
        products = torch.cat([(g * q).sum(1) for g, q in pairs])
        return products[adapter.positions_q] * (scalings / TANGENT)


def _taken(parameter: torch.Tensor) -> torch.Tensor:
    gradient, parameter.grad = parameter.grad, None
    return torch.zeros_like(parameter) if gradient is None else gradient


def _options(adapter: "HyperAdapter", optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Learning rate and weight decay of the groups that hold the factors."""
    own = {id(p) for p in adapter.parameters()}
    held = [g for g in optimizer.param_groups if any(id(p) in own for p in g["params"])]
    found = {(float(g["lr"]), float(g.get("weight_decay", 0.0))) for g in held}
    if len(found) > 1:
        raise ValueError(
            'update="spectral": P and Q are in parameter groups with different options (learning '
            f"rate, weight decay): {sorted(found)}; expected one for all of the adapter's"
        )
    return found.pop()


@torch.no_grad()
def advance(adapter: "HyperAdapter", taken: Taken) -> None:
    """One spectral step of every layer.

    Gradients of all layers together have norm 1 in the momenta, so that no step weighs more there
    for a loss that is scaled, or less for gradients that were clipped.
    """
    packed, momenta, gradients = adapter.packed(), adapter.momenta(), taken.gradients
    both = [*gradients.p, *gradients.q]
    norm = torch.nn.utils.get_total_norm(both)
    torch._foreach_div_(both, norm.clamp_min(torch.finfo(norm.dtype).tiny))
    spectral_step_(
        packed.p, packed.lam, packed.q, momenta.p, momenta.q, gradients.p, gradients.q,
        adapter.slots, eta=taken.rate * adapter.layer_rates, scaling=adapter.layer_scalings,
        beta=BETA, decay=1.0 - taken.rate * taken.decay, mask=adapter.mask,
        log_gain=adapter.get_buffer("log_gain"),
        gain_rate=GAIN_RATE * min(1.0, taken.rate / FULL_GAIN_RATE),
    )  # fmt: skip
