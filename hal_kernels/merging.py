"""`merge` and `unmerge`: the adapter folded into plain linear layers, and taken out again."""

from typing import Any, NamedTuple

import torch
from torch import nn

from .introspection import factors
from .nn.adapter import HyperAdapter
from .nn.linear import AdaptedLayer, is_foreign
from .patched import adapted_layers, enabled_adapter, expect_in_place, owner_of
from .patching import attach, detach_adapter, expect_unpatched
from .targets import base_weight


class _Merged(NamedTuple):
    adapter: HyperAdapter
    layers: dict[str, Any]
    base_weights: dict[str, torch.Tensor]  # on the CPU
    requires_grad: dict[str, bool]


def merge(model: nn.Module, *, keep_base: bool = True) -> nn.Module:
    """Add every layer's ΔW to its weight and make the layers plain again, in place.

    Args:
        model: a patched model.
        keep_base: keep the base weights (in host memory), so that `unmerge` restores them bit for
            bit. Without them there is no way back.

    Returns:
        The module that was patched: the same model, without the submodule ``hal``.

    Raises:
        TypeError, ValueError: `model` is no module, not patched, or has other layers than when it
            was patched; a layer is quantized, shares its weight with another module, or its merged
            weight would hold NaN or Inf. The model is then as it was.
    """
    adapter, owner = enabled_adapter(model), owner_of(model)
    layers = adapted_layers(owner)
    _expect_mergeable(owner, layers)
    deltas = {name: f.delta() for name, f in factors(owner).items()}
    with torch.no_grad():
        for name, layer in layers.items():
            if not merged_weight(layer, deltas[name]).isfinite().all():
                raise ValueError(f"merge: the merged weight of {name!r} holds NaN or Inf")
        base = {}
        for name, layer in layers.items():
            weight = base_weight(layer)
            if keep_base:
                base[name] = weight.detach().to("cpu", copy=True)
            weight.copy_(merged_weight(layer, deltas[name]))
    flags = {name: p.requires_grad for name, p in owner.named_parameters()}
    detach_adapter(owner)
    if keep_base:
        owner.__dict__["_hal_merged"] = _Merged(adapter, layers, base, flags)
    return owner


def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge`: base weights bit for bit as they were, and the adapter in its place.

    Raises:
        TypeError, ValueError: `model` is no module, holds no merged adapter, was merged with
            ``keep_base=False``, or has other layers since. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected torch.nn.Module")
    owner = next((m for m in model.modules() if "_hal_merged" in m.__dict__), None)
    if owner is None:
        raise ValueError(
            "model holds no merged adapter (it was never merged, or with keep_base=False)"
        )
    merged: _Merged = owner.__dict__.pop("_hal_merged")
    layers = merged.layers
    try:
        expect_in_place(owner, layers)
        expect_unpatched(owner)
    except ValueError:
        owner.__dict__["_hal_merged"] = merged
        raise
    device = next(iter(layers.values())).weight.device
    adapter = merged.adapter.to(device=device)
    attach(owner, adapter, layers, list(adapter.saved_modules))
    with torch.no_grad():
        for name, layer in layers.items():
            base_weight(layer).copy_(merged.base_weights[name])
    for name, parameter in owner.named_parameters():
        parameter.requires_grad_(merged.requires_grad.get(name, parameter.requires_grad))
    return owner


def merged_weight(layer: AdaptedLayer, delta: torch.Tensor) -> torch.Tensor:
    """The layer's weight as ``[d_out, d_in]``, with ΔW added, in its own dtype."""
    weight = base_weight(layer)
    return (weight.to(delta.dtype) + delta).to(weight.dtype)


def _expect_mergeable(model: nn.Module, layers: dict[str, AdaptedLayer]) -> None:
    owners: dict[int, dict[int, str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            # A tensor that holds others (torchao's) has no storage of its own.
            if parameter is not None and type(parameter.data) is torch.Tensor:
                owners.setdefault(parameter.untyped_storage().data_ptr(), {})[id(module)] = name
    for name, layer in layers.items():
        if is_foreign(layer):
            assert layer._hal is not None
            kind, weight = layer._hal.original_class.__name__, type(layer.weight).__name__
            raise ValueError(
                f"merge: {name!r} is a {kind}, whose weight ({weight}) can't take ΔW; use "
                "export_lora, or PEFT's merge_adapter (hal_peft) if bitsandbytes or torchao "
                "quantized it"
            )
        if "weight" not in layer._parameters:
            raise ValueError(
                f"merge: the weight of {name!r} is computed anew in each forward (weight_norm?), "
                "which would undo the merge"
            )
        holders = owners[base_weight(layer).untyped_storage().data_ptr()]
        others = sorted(other for module, other in holders.items() if module != id(layer))
        if others:
            raise ValueError(
                f"merge: the weight of {name!r} is shared with {others}, which would change"
            )
