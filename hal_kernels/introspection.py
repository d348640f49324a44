"""What an adapter holds: factors, ranks, penalty, size; and `step` for foreign optimizers."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from .nn.adapter import HyperAdapter
from .nn.linear import HALLinear
from .patched import find_adapter, intact_adapter


class Factors(NamedTuple):
    """One layer's factors: ΔW = scaling · Qᵀ diag(Λ⊙mask) Pᵀ, ``[d_out, d_in]``.

    Attributes:
        p: ``[d_in, r]``. lam: ``[r]``, before the mask. q: ``[r, d_out]``.
        mask: ``[r]``, 1 kept, 0 pruned.
        scaling: s = alpha / rank.
    """

    p: torch.Tensor
    lam: torch.Tensor
    q: torch.Tensor
    mask: torch.Tensor
    scaling: float

    def delta(self) -> torch.Tensor:
        """ΔW as ``[d_out, d_in]``, in the factors' dtype."""
        return (self.q.t() * (self.scaling * self.lam * self.mask)) @ self.p.t()


def factors(model: nn.Module) -> dict[str, Factors]:
    """The factors every layer works with now, by layer name, detached.

    With "direct" they are views of the parameters, so they can be set in place. With a hypernetwork
    they are what it generates from the present state: read-only in effect.

    Args:
        model: a patched model (or a wrapper around one), or a single `HALLinear` (name "").

    Raises:
        TypeError, ValueError: `model` is no module, not patched, or has other layers since.
    """
    if isinstance(model, HALLinear) and model._hal is None:
        own = (model.p.detach().t(), model.lam.detach(), model.q.detach())
        return {"": Factors(*own, model.mask, model.scaling)}
    return adapter_factors(intact_adapter(model))


def adapter_factors(adapter: HyperAdapter) -> dict[str, Factors]:
    """The factors of one adapter's layers, as `factors` gives them."""
    packed = adapter.current().factors
    layout = adapter.layout
    p, q = layout.p.split(packed.p), layout.q.split(packed.q)
    lam, mask = packed.lam.split(layout.ranks), adapter.effective_mask.split(layout.ranks)
    return {
        spec.name: Factors(p[i].t(), lam[i], q[i], mask[i], adapter.scalings[i])
        for i, spec in enumerate(layout.layers)
    }


def rank_pattern(model: nn.Module) -> dict[str, int]:
    """How many singular directions each layer keeps, by layer name. Waits for the device.

    Raises:
        TypeError, ValueError: `model` is no module, not patched, or has other layers since.
    """
    return adapter_rank_pattern(intact_adapter(model))


def adapter_rank_pattern(adapter: HyperAdapter) -> dict[str, int]:
    """How many singular directions each layer of one adapter keeps, as `rank_pattern` gives it."""
    masks = adapter.mask.cpu().split(adapter.layout.ranks)
    return {
        spec.name: int((mask > 0).sum())
        for spec, mask in zip(adapter.layout.layers, masks, strict=True)
    }


def summary(model: nn.Module) -> str:
    """A few lines to print before training: what trains, at what rank and rate, in what memory.

    Raises:
        TypeError, ValueError: `model` is no module, not patched, or has other layers since.
    """
    adapter = intact_adapter(model)
    layout, last = adapter.layout, adapter.last_allocation
    kept = f"{adapter.budget} directions, fixed"
    if last > 0:
        kept = f"{layout.initial_rows} directions at first, {adapter.budget} from step {last} on"
    trained = [p for p in model.parameters() if p.requires_grad]
    count, total = sum(p.numel() for p in trained), sum(p.numel() for p in model.parameters())
    tensors = dict(adapter.named_parameters()) | dict(adapter.named_buffers())
    # Spectral steps keep momenta of the factors themselves; Adam has two of everything else.
    own = {id(p) for p in adapter.parameters()} if adapter.config.spectral else set()
    momenta = [tensor for name, tensor in tensors.items() if name.startswith("momentum_")]
    state = _megabytes(momenta) + 2 * _megabytes(p for p in trained if id(p) not in own)
    held = _megabytes(tensors.values()) - _megabytes(momenta)
    return (
        f"adapted layers   {len(layout.layers)}\n"
        f"trained          {count:,} of {total:,} parameters ({100 * count / total:.2f} %)\n"
        f"rank budget      {kept}\n"
        f"learning rate    {starting_rate(model):g} to start with\n"
        f"memory           {held:.3g} MB of adapter, {state:.3g} MB of optimizer state (Adam)"
    )


def starting_rate(model: nn.Module) -> float:
    """The learning rate to try first for a patched model (docs/convergence.md)."""
    config = find_adapter(model).config
    if config.spectral:
        return 1e-3
    return 1e-2 if config.hypernet == "direct" else 1e-4


def _megabytes(tensors: Iterable[torch.Tensor]) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / 1e6


def penalty(model: nn.Module) -> torch.Tensor:
    """γ · orthogonality penalty [eq. 7], a scalar with gradients into the adapter.

    For losses computed outside the model's forward; one that the model returns has it already.

    Raises:
        TypeError, ValueError: `model` is no module, or not patched.
    """
    return find_adapter(model).penalty()


def step(model: nn.Module) -> None:
    """Tell the adapter that an optimizer step was taken; gradients must still be there.

    Only for engines whose optimizer is not a `torch.optim.Optimizer`: those are noticed by
    themselves, and after one of them this does nothing.

    Raises:
        TypeError, ValueError: `model` is no module, not patched, or of update="spectral".
    """
    adapter = find_adapter(model)
    if adapter.config.spectral:
        raise ValueError(
            'step: update="spectral" takes its learning rate from the torch.optim.Optimizer that '
            "holds the adapter's parameters, and moves them itself"
        )
    adapter.skip_if_nonfinite()
    adapter.after_optimizer_step()
